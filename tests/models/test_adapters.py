"""Adapters on disk: the same bits come back, misfits are refused, no file is half-written."""

import json
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file
from support.model_zoo import (
    FAMILY,
    VOCAB,
    assert_same_snapshot,
    make_model,
    randomise,
    snapshot,
    token_ids,
    unchanged,
)
from support.saved_adapters import ADAPTER, CONFIG, WEIGHTS, read, rewrite

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model, tensor_files
from moe_kernels.models import adapter_files

KEY = CONFIG.removesuffix(".json")


def make_patched(family="mixtral", *, num_tokens=5, config=None, **kwargs):
    model = make_model(family, **kwargs)
    patched = patch_model(model, config or ModalityLoraConfig(r=4))
    if num_tokens:
        add_modality_tokens(model, "image", num_tokens)
    return patched


def logits(patched, modality=1, num_tokens=5):
    ids = token_ids(2, 12, vocab=VOCAB + num_tokens)
    with torch.no_grad():
        return patched.model(ids, modality_ids=torch.full_like(ids, modality)).logits


@pytest.fixture
def saved(tmp_path):
    patched = make_patched()
    randomise(patched)
    patched.save_adapter(tmp_path / "saved")
    return tmp_path / "saved"


# --- round trips


@FAMILY
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_same_bits_back(family, tied, tmp_path):
    patched = make_patched(family, tie_word_embeddings=tied)
    randomise(patched)
    expected, state = logits(patched), snapshot(patched.model)
    patched.save_adapter(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(ADAPTER)
    randomise(patched, seed=9)
    assert not torch.equal(logits(patched), expected)
    patched.load_adapter(tmp_path)
    assert_same_snapshot(snapshot(patched.model), state)

    # A fresh model gets the tokens too.
    fresh = make_patched(family, num_tokens=0, tie_word_embeddings=tied)
    fresh.load_adapter(tmp_path)
    assert torch.equal(logits(fresh), expected)
    assert_same_snapshot(snapshot(fresh.model), state)
    assert fresh.modality_token_ids("image") == range(VOCAB, VOCAB + 5)


def test_two_modalities_keep_the_order_of_their_tokens(tmp_path):
    config = ModalityLoraConfig(r=2, modalities=("image", "sound"))
    patched = make_patched(num_tokens=0, config=config)
    add_modality_tokens(patched.model, "sound", 2)
    add_modality_tokens(patched.model, "image", 3)
    randomise(patched)
    patched.save_adapter(str(tmp_path))
    fresh = make_patched(num_tokens=0, config=config)
    fresh.load_adapter(str(tmp_path))
    assert fresh.modality_token_ids("sound") == range(VOCAB, VOCAB + 2)
    assert torch.equal(logits(fresh), logits(patched))


def test_the_configuration_from_the_adapter(tmp_path):
    config = ModalityLoraConfig(
        r=4, lora_alpha=6, modalities=("sound",), rank_pattern={"q_proj": 2},
        alpha_pattern={"down_proj": 3.5}, shared_A=True, target_modules=("experts", "attention"),
    )  # fmt: skip
    make_patched(num_tokens=0, config=config).save_adapter(tmp_path)
    assert ModalityLoraConfig.from_adapter(tmp_path) == config
    chosen = ModalityLoraConfig.from_adapter(tmp_path, backend="reference")
    assert chosen.backend == "reference"
    fresh = make_patched(num_tokens=0, config=chosen)
    fresh.load_adapter(tmp_path)
    fresh.save_adapter(tmp_path)  # over the old one
    assert ModalityLoraConfig.from_adapter(tmp_path) == config


def test_what_the_files_say(saved):
    header, names = read(saved)
    assert header == json.loads((saved / CONFIG).read_text())
    assert header["layout"] == adapter_files.LAYOUT
    assert header["base_model"]["model_type"] == "mixtral"
    assert header["added_tokens"] == {"image": 5}
    assert "model.layers.0.modality_lora.gate_up_proj.lora_A" in names
    assert "model.embed_tokens.added_rows.image" in names


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=["bf16 to fp32", "fp32 to bf16"],
)
def test_the_base_in_another_dtype(dtypes, tmp_path):
    """A bfloat16 base and its float32 copy are the same model."""
    first, second = dtypes
    patched = make_patched(dtype=first)
    randomise(patched)
    patched.save_adapter(tmp_path)
    other = make_model("mixtral", dtype=first).to(second)
    other = patch_model(other, ModalityLoraConfig(r=4))
    other.load_adapter(tmp_path)
    pairs = zip(other.trainable_parameters(), patched.trainable_parameters(), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_a_model_moved_after_patching(tmp_path):
    patched = make_patched()
    randomise(patched)
    patched.model.bfloat16()
    patched.save_adapter(tmp_path)
    fresh = make_patched(dtype=torch.bfloat16)
    fresh.load_adapter(tmp_path)
    assert {p.dtype for p in fresh.trainable_parameters()} == {torch.float32}
    assert torch.equal(logits(fresh), logits(patched))


def test_adapters_switched_off_are_saved_all_the_same(tmp_path):
    patched = make_patched()
    randomise(patched)
    expected = logits(patched)
    with patched.adapters_disabled():
        patched.save_adapter(tmp_path)
    fresh = make_patched()
    fresh.load_adapter(tmp_path)
    assert torch.equal(logits(fresh), expected)


# --- refusals: the model is left as it was


def reshape(tensors):
    name = "model.layers.1.modality_lora.down_proj.lora_B"
    tensors[name] = tensors[name][:, :-1].contiguous()


def truncate(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(len(data) * keep)])


FILES = {
    "another layout": (
        lambda f: rewrite(f, lambda h: h.update(layout=99)),
        r"layout 99 \(moe_kernels .*reads layout 1",
    ),
    "a tensor of another shape": (
        lambda f: rewrite(f, change_tensors=reshape),
        r"down_proj.lora_B has shape \(1, 3, 32, 4\), not \(1, 4, 32, 4\)",
    ),
    "a tensor is missing": (
        lambda f: rewrite(f, change_tensors=lambda t: t.popitem()),
        "lacks 1 tensors, such as ",
    ),
    "a tensor too many": (
        lambda f: rewrite(f, change_tensors=lambda t: t.update(other=torch.zeros(2))),
        "has 1 unknown tensors, such as other",
    ),
    "truncated": (lambda f: truncate(f, 0.7), "damaged or truncated"),
    "truncated in its header": (lambda f: truncate(f, 0.01), "damaged or truncated"),
    "empty": (lambda f: truncate(f, 0), "damaged or truncated"),
    "somebody else's": (
        lambda f: save_file({"x": torch.zeros(2)}, f / WEIGHTS, metadata={"format": "pt"}),
        "not written by moe_kernels",
    ),
    "other JSON in its header": (
        lambda f: save_file({"x": torch.zeros(2)}, f / WEIGHTS, metadata={KEY: "{}"}),
        "not written by moe_kernels",
    ),
}


@pytest.mark.parametrize("damage", FILES)
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_a_file_that_is_not_right(damage, num_tokens, saved):
    spoil, match = FILES[damage]
    spoil(saved)
    patched = make_patched(num_tokens=num_tokens)
    randomise(patched, seed=4)
    with unchanged(patched.model), pytest.raises(ValueError, match=match):
        patched.load_adapter(saved)


MODELS = {
    "another family": (
        lambda: make_patched("olmoe"),
        r"for a 'mixtral' model \(unnamed\), this is a 'olmoe' \(unnamed\)",
    ),
    "other weights": (lambda: make_patched(seed=1), "other base weights"),
    "another rank": (
        lambda: make_patched(config=ModalityLoraConfig(r=8)),
        r"r: 4 != 8; patch with ModalityLoraConfig.from_adapter",
    ),
    "another scaling": (
        lambda: make_patched(config=ModalityLoraConfig(r=4, lora_alpha=1)),
        "lora_alpha: 32 != 1",
    ),
    "other modalities": (
        lambda: make_patched(config=ModalityLoraConfig(r=4, modalities=("image", "sound"))),
        "modalities: .*image.* != .*sound",
    ),
    "other targets": (
        lambda: make_patched(config=ModalityLoraConfig(r=4, target_modules=("experts",))),
        "target_modules",
    ),
    "another number of tokens": (
        lambda: make_patched(num_tokens=6),
        "has added tokens {'image': 5}, the model {'image': 6}",
    ),
    "another size": (lambda: make_patched(hidden_size=48), "other base weights"),
    "a tied head": (lambda: make_patched(tie_word_embeddings=True), "other base weights"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_does_not_fit(case, saved):
    make, match = MODELS[case]
    patched = make()
    with unchanged(patched.model), pytest.raises(ValueError, match=match):
        patched.load_adapter(saved)


def test_one_changed_layer_is_another_base(saved):
    model = make_model("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(1.1)
    patched = patch_model(model, ModalityLoraConfig(r=4))
    with pytest.raises(ValueError, match="other base weights"):
        patched.load_adapter(saved)


def test_the_base_is_named(tmp_path):
    """By id and revision, which the configuration has of a model from the hub."""
    patched, other = make_patched(), make_patched(seed=1)
    patched.model.config._name_or_path = "a/base"
    patched.model.config._commit_hash = "0123abc"
    patched.save_adapter(tmp_path)
    assert read(tmp_path)[0]["base_model"]["revision"] == "0123abc"
    match = r"other base weights \(a/base at revision 0123abc\) than this model's \(unnamed\)"
    with pytest.raises(ValueError, match=match):
        other.load_adapter(tmp_path)
    rewrite(tmp_path, lambda header: header["base_model"].pop("revision"))  # as in older files
    with pytest.raises(ValueError, match=r"other base weights \(a/base\) than"):
        other.load_adapter(tmp_path)


def test_no_adapter_there(tmp_path):
    patched = make_patched()
    missing = tmp_path / "missing"
    said = {tmp_path: f"{WEIGHTS} is missing", missing: f"there is no folder {missing}"}
    for folder, problem in said.items():
        with pytest.raises(FileNotFoundError, match=problem):
            patched.load_adapter(folder)
        with pytest.raises(FileNotFoundError, match=problem):
            ModalityLoraConfig.from_adapter(folder)


# --- writing


def contents(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def fails(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "where",
    [(tensor_files, "save_file"), (tensor_files.Path, "write_text"), (os, "replace")],
    ids=["save_file", "write_text", "replace"],
)
def test_a_disk_that_fills(where, saved, monkeypatch):
    before = contents(saved)
    patched = make_patched()
    randomise(patched, seed=7)
    monkeypatch.setattr(*where, fails)
    with unchanged(patched.model), pytest.raises(OSError, match="No space left"):
        patched.save_adapter(saved)
    monkeypatch.undo()
    assert contents(saved) == before


def test_a_disk_that_really_fills(saved):
    """The kernel refuses to write past a size: only the old files remain."""
    before = contents(saved)
    patched = make_patched()
    randomise(patched, seed=7)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(Exception, match="(?i)too large|file size|I/?O ?error"):
            patched.save_adapter(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(saved) == before


def test_a_crash_between_the_two_files(saved, monkeypatch):
    """The weights are new and the JSON is old; loading reads the header of the weights."""
    config = ModalityLoraConfig(r=2, lora_alpha=5)
    patched = make_patched(config=config, num_tokens=3)
    randomise(patched, seed=7)
    replace, calls = os.replace, []

    def crash(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        patched.save_adapter(saved)
    monkeypatch.undo()
    assert json.loads((saved / CONFIG).read_text())["lora"]["r"] == 4
    assert sorted(os.listdir(saved)) == sorted(ADAPTER)
    with pytest.warns(UserWarning, match=f"{CONFIG} is not the configuration of"):
        assert ModalityLoraConfig.from_adapter(saved) == config
    with pytest.warns(UserWarning, match="whose own header counts: it was edited, or is that of"):
        fresh = make_patched(config=ModalityLoraConfig.from_adapter(saved), num_tokens=0)
        fresh.load_adapter(saved)
    assert torch.equal(logits(fresh, num_tokens=3), logits(patched, num_tokens=3))
