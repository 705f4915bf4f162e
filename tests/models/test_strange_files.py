"""Files of strangers: damaged, forged or greedy ones are refused, and the model stays as it was."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.model_zoo import make_model, randomise, unchanged
from support.patched_models import patched_model
from support.saved_adapters import CONFIG, PEFT, WEIGHTS, replaced, rewrite

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.models.config import ExtensionConfig
from moe_kernels.models.patterns import check_pattern, matches
from moe_kernels.models.peft_format import load_peft_adapter, save_peft_adapter
from moe_kernels.moextend import ExpertExtender

HUGE = 10**9
DEEP = "[" * 100_000 + "]" * 100_000


def everything():
    """Make a model with adapters, tokens, added experts and a projector, all of them random."""
    model = make_model("mixtral")
    config = ModalityLoraConfig(
        r=2, rank_pattern={"q_proj": 1}, modalities=("image", "task"), sequence_modalities=("task",)
    )
    patched = patch_model(model, config)
    add_modality_tokens(model, "image", 3)
    extender = ExpertExtender(model)
    extender.extend([0], 2, init=0, modality="image", calibration="additive")
    extender.add_projector(5, modality="image")
    randomise(patched)
    return patched


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    everything().save_adapter(folder)
    return folder


@pytest.fixture
def saved(original, tmp_path):
    for name in (WEIGHTS, CONFIG):
        (tmp_path / name).write_bytes((original / name).read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def fresh():
    """Share a model that no load may change."""
    config = everything().config
    return patch_model(make_model("mixtral"), config)


def values(patched):
    named = patched.named_trainable_parameters()
    return {name: parameter.detach().clone() for name, parameter in named}


# --- content


def test_files_without_a_checksum_load_as_before(saved):
    with safe_open(saved / WEIGHTS, "pt") as file:
        assert len(file.metadata()["sha256"]) == 64
    expected = load_file(saved / WEIGHTS)
    rewrite(saved)
    patched = patch_model(make_model("mixtral"), ModalityLoraConfig.from_adapter(saved))
    patched.load_adapter(saved)
    for name, parameter in values(patched).items():
        assert torch.equal(parameter, expected[name])


def test_a_changed_value_is_named_as_damage(saved):
    data = bytearray((saved / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (saved / WEIGHTS).write_bytes(data)
    patched = patch_model(make_model("mixtral"), ModalityLoraConfig.from_adapter(saved))
    before = values(patched)
    with pytest.raises(ValueError, match=r"content is not what was written \(sha256\)"):
        patched.load_adapter(saved)
    assert all(torch.equal(each, before[name]) for name, each in values(patched).items())


def cast(dtype, value=None):
    def change(tensors):
        name = next(name for name in sorted(tensors) if "lora_A" in name)
        tensors[name] = tensors[name].to(dtype)
        if value is not None:
            tensors[name].view(-1)[3] = value

    return change


FLOATS = "tensors must be one of F64, F32, F16, BF16"
CONTENTS = {
    "int8": (cast(torch.int8), f"lora_A is I8; {FLOATS}"),
    "bool": (cast(torch.bool), f"lora_A is BOOL; {FLOATS}"),
    "fp8": (cast(torch.float8_e4m3fn), f"lora_A is F8_E4M3; {FLOATS}"),
    "complex": (cast(torch.complex64), f"lora_A is C64; {FLOATS}"),
    "nan": (cast(torch.float32, float("nan")), "lora_A has 1 values of .* are not finite"),
    "inf": (cast(torch.float16, -float("inf")), "lora_A has 1 values of .* are not finite"),
    "float64 too large for float32": (cast(torch.float64, 1e300), "lora_A has 1 values"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_tensors_that_are_no_weights(case, saved, fresh):
    change, match = CONTENTS[case]
    rewrite(saved, change_tensors=change)
    with unchanged(fresh.model), pytest.raises(ValueError, match=match):
        fresh.load_adapter(saved)


@pytest.mark.parametrize("case", CONTENTS)
def test_tensors_of_peft_that_are_no_weights(case, tmp_path):
    change, match = CONTENTS[case]
    _, patched = patched_model(config=ModalityLoraConfig(r=2))
    save_peft_adapter(patched, "image", tmp_path)
    tensors = load_file(tmp_path / PEFT[0])
    change(tensors)
    save_file(tensors, tmp_path / PEFT[0], metadata={"format": "pt"})
    with (
        unchanged(patched.model),
        pytest.raises(ValueError, match="_A.weight" + match[6:]),
    ):
        load_peft_adapter(patched, "image", tmp_path)


# --- fields


FIELDS = {
    ("layout",): ("x", "the field layout must be an integer, got 'x'"),
    ("lora",): ([], "the field lora must be an object"),
    ("lora", "r"): ("8", "the field lora.r must be an integer, got '8'"),
    ("lora", "modalities"): ([1], r"the field lora.modalities\[0\] must be a string"),
    ("lora", "rank_pattern"): ({"q_proj": []}, r"lora.rank_pattern\['q_proj'\] must be an integer"),
    ("added_tokens", "image"): (True, r"added_tokens\['image'\] must be an integer, got True"),
    ("extensions", 0, "experts"): (7, r"the field extensions\[0\].experts must be an object"),
    ("projectors", "image", "num_layers"): (
        None,
        r"projectors\['image'\].num_layers must be an int",
    ),
    ("frozen",): (["x"], "the field frozen names x, which is not there"),
    ("routing",): ({"1": {"top_k": 2, "normalise": True}}, "the routing of layer 1, not extended"),
    ("base_model", "fingerprint"): (3, "the field base_model.fingerprint must be a string"),
    ("versions",): ({}, "the field versions.moe_kernels is missing"),
}


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_the_file_and_the_field_are_named(path, saved, fresh):
    value, match = FIELDS[path]
    rewrite(saved, lambda header: header.update(replaced(header, path, value)))
    with unchanged(fresh.model), pytest.raises(ValueError, match=match) as caught:
        fresh.load_adapter(saved)
    assert str(saved / WEIGHTS) in str(caught.value) or "routing" in match


@pytest.mark.parametrize("text", [DEEP, "[]", "3", "{", '{"layout": 1'])
def test_a_header_that_is_no_object(text, saved, fresh):
    save_file(
        {},
        saved / WEIGHTS,
        metadata={CONFIG.removesuffix(".json"): text.encode("utf-8", "replace").decode()},
    )
    match = f"the header of .*{WEIGHTS} is damaged"
    with unchanged(fresh.model), pytest.raises(ValueError, match=match):
        fresh.load_adapter(saved)
    with pytest.raises(ValueError, match=match):
        ModalityLoraConfig.from_adapter(saved)


@pytest.mark.parametrize("content", [DEEP.encode(), b"[]", b"\xff\xfe\xff", b"", b'{"r": 1'])
def test_peft_s_json_that_is_no_object(content, tmp_path):
    _, patched = patched_model(config=ModalityLoraConfig(r=2))
    save_peft_adapter(patched, "image", tmp_path)
    (tmp_path / PEFT[1]).write_bytes(content)
    with (
        unchanged(patched.model),
        pytest.raises(ValueError, match="adapter_config.json is damaged"),
    ):
        load_peft_adapter(patched, "image", tmp_path)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type"])
@pytest.mark.parametrize("value", ["x", [], [1], {"q_proj": "x"}, True, 0.5j])
def test_peft_s_fields_of_another_type(field, value, tmp_path):
    _, patched = patched_model(config=ModalityLoraConfig(r=2))
    save_peft_adapter(patched, "image", tmp_path)
    weights, settings = (tmp_path / name for name in PEFT)
    save_file(load_file(weights), weights)  # as PEFT does, without a header
    config = json.loads(settings.read_text())
    config[field] = str(value) if isinstance(value, complex) else value
    settings.write_text(json.dumps(config))
    with unchanged(patched.model), pytest.raises(ValueError, match=f"{field}|LoRA adapter of PEFT"):
        load_peft_adapter(patched, "image", tmp_path)


def test_json_beside_other_weights(tmp_path):
    """PEFT's JSON counts, so another save's is refused; ours does not, and a warning says so."""
    for alpha in (4, 8):
        _, patched = patched_model(config=ModalityLoraConfig(r=2, lora_alpha=alpha))
        save_peft_adapter(patched, "image", tmp_path / f"peft-{alpha}")
        patched.save_adapter(tmp_path / f"ours-{alpha}")
    for kind, name in (("peft", PEFT[1]), ("ours", CONFIG)):
        (tmp_path / f"{kind}-8" / name).write_bytes((tmp_path / f"{kind}-4" / name).read_bytes())
    with pytest.raises(ValueError, match="is not the configuration of adapter_model.safetensors"):
        load_peft_adapter(patched, "image", tmp_path / "peft-8")
    with pytest.warns(UserWarning, match=f"is not the configuration of {WEIGHTS}"):
        assert ModalityLoraConfig.from_adapter(tmp_path / "ours-8").lora_alpha == 8


@pytest.mark.parametrize("values", [[], {"experts": 3}, {"experts": {"x": 1}}, {}, {"r": "x"}])
def test_dictionaries_that_are_no_configurations(values):
    for kind in (ExtensionConfig, ModalityLoraConfig):
        if values == {} and kind is ModalityLoraConfig:
            continue  # all defaults
        with pytest.raises(ValueError, match="must be|is missing|does not know"):
            kind.from_dict(values)


# --- sizes and patterns that would take all memory, or for ever


SIZES = {
    "tokens": lambda h: h["added_tokens"].update(image=HUGE),
    "calibration": lambda h: h["extensions"][0].update(calibration_hidden=HUGE),
    "experts": lambda h: h["extensions"][0].update(experts={"0": HUGE}),
    "overflowing experts": lambda h: h["extensions"][0].update(experts={"0": 2**62}),
    "projector": lambda h: h["projectors"]["image"].update(hidden_features=HUGE),
    "overflowing projector": lambda h: h["projectors"]["image"].update(in_features=2**62),
    "layers of a projector": lambda h: h["projectors"]["image"].update(num_layers=HUGE),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_are_compared_before_anything_is_allocated(case, saved, fresh, monkeypatch):
    rewrite(saved, SIZES[case])

    def copy_(self, source):
        assert self.is_meta, f"{tuple(self.shape)} was allocated"
        return self

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    match = "has shape|impossible sizes|layers, but the file"
    with unchanged(fresh.model), pytest.raises(ValueError, match=match):
        fresh.load_adapter(saved)


@pytest.mark.parametrize(
    "change", [{"r": HUGE}, {"rank_pattern": {"q_proj": HUGE}}, {"r": 3}], ids=str
)
def test_a_rank_that_the_tensors_do_not_have(change, saved):
    """The model is patched by the header's configuration before the file is loaded."""
    rewrite(saved, lambda header: header["lora"].update(change))
    model, config = make_model("mixtral"), ModalityLoraConfig.from_adapter(saved)
    match = r"its configuration gives model.layers.0.* rank .*, and its tensors have .* \[1, 2\]"
    with unchanged(model), pytest.raises(ValueError, match=match):
        patch_model(model, config)


def test_an_adapter_s_configuration_serves_another_model(saved):
    config = ModalityLoraConfig.from_adapter(saved)
    patch_model(make_model("olmoe", num_hidden_layers=3, hidden_size=64), config)


ENDLESS = [
    "([a-z._0-9]*)*!", "(a+)+", "(.|.)" * 20, ".?" * 30 + "!", ".*" * 8 + "!", "(?=.*)x", r"(a)\1",
    "(" * 400 + ")" * 400, "x" * 501, "((a|b)+|c)*", "[a-z]{1,90}" * 6,
    "((.|.)(.|.)|.)" * 10, "(((.*)|.*)|.*).*", "(?!x)q_proj", r"[\\]]*",
]  # fmt: skip


@pytest.mark.parametrize("key", ENDLESS, ids=lambda key: key[:20])
def test_a_pattern_that_might_take_for_ever(key, saved):
    rewrite(saved, lambda header: header["lora"].update(rank_pattern={key: 2}))
    reasons = "matching it might take for ever.*give the names|500 are the most|not a regular"
    with pytest.raises(ValueError, match=f"rank_pattern: .*({reasons})"):
        ModalityLoraConfig.from_adapter(saved)


@pytest.mark.parametrize(
    "pattern", [{f"layer{i}.*.*x": 1 for i in range(300)}, dict.fromkeys(map(str, range(5000)), 1)]
)
def test_many_keys_together_might_take_for_ever(pattern):
    with pytest.raises(ValueError, match="rank_pattern has (too many|5000) keys"):
        check_pattern("rank_pattern", pattern)


@pytest.mark.parametrize(
    "key",
    [
        r"model\.layers\.(?:1[0-9]|2[0-3])\..*", r".*\.(q|v)_proj", "layers.[0-3].self_attn.q_proj",
        "^model.layers.11.k_proj$", r"\d+", r"(0|1|2|3)\.mlp\.\w*", "q_proj|k_proj", "mlp?",
        r"layers\.[\d]+\.q_proj", "((q|k)_proj|v_proj)", r"[\w.]+", "(?:((a|b)c|d)e|f)?",
    ],
)  # fmt: skip
def test_patterns_that_people_write(key):
    check_pattern("rank_pattern", {key: 4})
    matches(key, "model.layers.11.self_attn.k_proj")


def test_the_slowest_patterns_end():
    name = "model.layers.10.block_sparse_moe.experts.gate_up_proj"
    for key in (".*.*.*z", "[a-z._0-9]*[a-z._0-9]*[a-z._0-9]*0", "(.|.|.|.)" * 9 + "z"):
        check_pattern("rank_pattern", {key: 1})
        assert not matches(key, name)
