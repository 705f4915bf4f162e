"""Saves that could be loaded again, or a refusal that names the parameter."""

import copy
import io
import itertools
import pickle
import threading
import warnings

import pytest
import torch
from safetensors.torch import load_file
from support.model_zoo import FAMILY, VOCAB, make_model, randomise, snapshot, token_ids
from support.patched_models import patched_model
from support.saved_adapters import (
    ADAPTER,
    CONFIG,
    EARLIER_ADAPTER,
    SAYS_WHOSE,
    STRANGERS,
    WEIGHTS,
    give_earlier_names,
    strange,
)
from support.text_tokenizer import make_tokenizer
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.imaging import PatchTokenizer, load_image_tokenizer
from moe_kernels.models import adapters
from moe_kernels.models.parameters import named_parameters, original_name
from moe_kernels.models.peft_format import load_peft_adapter, save_peft_adapter
from moe_kernels.moextend import ExpertExtender

LORA = "model.layers.1.modality_lora.down_proj.lora_B"
ROWS = "lm_head.added_rows.image"
BASE = "model.layers.0.mlp.experts.down_proj"


def everything(family="mixtral"):
    """Make a model with adapters, tokens, added experts and a projector, all of them random."""
    model = make_model(family)
    patched = patch_model(model, ModalityLoraConfig(r=2, modalities=("image", "module")))
    add_modality_tokens(model, "image", 3)
    extender = ExpertExtender(model)
    extender.extend([0], 2, init=0, modality="image", calibration="additive")
    extender.add_projector(5, modality="module")  # the name is also that of a wrapper of torch
    randomise(patched)
    return patched


def logits(patched):
    ids = token_ids(2, 9, vocab=VOCAB + 3)
    with torch.no_grad():
        return patched.model(ids, modality_ids=torch.ones_like(ids)).logits


def reloaded(folder, family="mixtral"):
    patched = patch_model(make_model(family), ModalityLoraConfig.from_adapter(folder))
    patched.load_adapter(folder)
    return patched


# --- values that are elsewhere, or are no numbers


def empty(model, name):
    model.get_parameter(name).data = torch.empty(0)  # as ZeRO-3 leaves them between uses


def to_meta(model, name):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, torch.nn.Parameter(torch.empty(2, device="meta")))


def to_a_subclass(model, name):
    class Shard(torch.Tensor):
        """Stands for DTensor, which needs a process group."""

        to_local = None

    parent, _, last = name.rpartition(".")
    parameter = torch.nn.Parameter(model.get_parameter(name).detach().as_subclass(Shard))
    model.get_submodule(parent)._parameters[last] = parameter


def save(patched, folder):
    patched.save_adapter(folder)


def save_pretrained(patched, folder):
    patched.model.save_pretrained(folder)


@pytest.mark.parametrize("write", [save, save_pretrained])
@pytest.mark.parametrize("name", [LORA, ROWS, BASE])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (empty, r"it has shape \(0,\), and had \([134]"),
        (to_meta, "it is on the device meta"),
        (to_a_subclass, "it is a Shard"),
    ],
    ids=["emptied", "offloaded", "sharded"],
)
def test_values_that_are_elsewhere(change, match, name, write, tmp_path):
    _, patched = patched_model(num_tokens=3)
    patched.save_adapter(tmp_path / "before")
    change(patched.model, name)
    with pytest.raises(ValueError, match=f"the values of {name} are not here: {match}"):
        write(patched, tmp_path / "after")
    assert not (tmp_path / "after").exists()
    with pytest.raises(ValueError, match=f"the values of {name} are not here"):
        patched.load_adapter(tmp_path / "before")


def test_all_parameters_emptied(tmp_path):
    _, patched = patched_model(num_tokens=3)
    for parameter in patched.trainable_parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"are not here: it has shape \(0,\)"):
        patched.save_adapter(tmp_path)


def test_pairs_for_peft_must_be_whole_too(tmp_path):
    _, patched = patched_model(config=ModalityLoraConfig(r=2))
    save_peft_adapter(patched, "image", tmp_path / "before")
    empty(patched.model, LORA)
    with pytest.raises(ValueError, match=f"the values of {LORA} are not here"):
        save_peft_adapter(patched, "image", tmp_path / "after")
    with pytest.raises(ValueError, match=f"the values of {LORA} are not here"):
        load_peft_adapter(patched, "image", tmp_path / "before")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [LORA, ROWS])
def test_values_that_are_no_numbers(value, name, tmp_path):
    _, patched = patched_model(num_tokens=3)
    with torch.no_grad():
        patched.model.get_parameter(name).view(-1)[7] = value
    with pytest.raises(ValueError, match=f"{name} has 1 values of .* that are not finite"):
        patched.save_adapter(tmp_path / "after")
    assert not (tmp_path / "after").exists()


def test_an_encoder_that_is_attached_later_is_no_part_of_the_adapter(tmp_path):
    patched, plain = everything(), everything()
    plain.save_adapter(tmp_path / "plain")
    patched.model.model.more = torch.nn.Linear(2, 2)
    patched.save_adapter(tmp_path / "adapter")
    saved = [(tmp_path / kind / WEIGHTS).read_bytes() for kind in ("plain", "adapter")]
    assert saved[0] == saved[1]
    patched.load_adapter(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="writes the base model"):
        patched.model.save_pretrained(tmp_path)
    assert "model.more.bias" in load_file(tmp_path / "model.safetensors")


def test_an_adapter_of_0_1_0_with_an_encoder_loads(tmp_path, monkeypatch):
    """Its fingerprint has the encoder."""
    _, patched = patched_model()
    patched.model.more = torch.nn.Linear(2, 2)
    of_all = adapters._fingerprint(named_parameters(patched.model), patched.model)
    with monkeypatch.context() as older:
        older.setattr(adapters, "_fingerprint", lambda *_: of_all)
        patched.save_adapter(tmp_path)
    patched.load_adapter(tmp_path)
    del patched.model.more
    with pytest.raises(ValueError, match="trained on other base weights"):
        patched.load_adapter(tmp_path)


@pytest.mark.parametrize("found", ["unknown", "missing"])
def test_an_added_parameter_too_many_or_too_few(found, tmp_path):
    _, patched = patched_model(config=ModalityLoraConfig(r=2))
    pairs = patched.model.model.layers[0].modality_lora
    if found == "missing":
        del pairs["down_proj"]
    else:
        pairs["other"] = pairs["down_proj"]
        del pairs["down_proj"]
        pairs["down_proj"] = copy.deepcopy(pairs["other"])
    match = f"not as it was patched: the parameter model.layers.0.modality_lora.*is {found}"
    with pytest.raises(ValueError, match=match):
        patched.save_adapter(tmp_path / "adapter")


def test_a_frozen_weight_of_another_class_is_no_obstacle(tmp_path):
    class Own(torch.Tensor):
        """A weight as other libraries make them."""

    model = make_model("mixtral")
    q_proj = model.model.layers[0].self_attn.q_proj
    q_proj.weight = torch.nn.Parameter(q_proj.weight.detach().as_subclass(Own), False)
    patched = patch_model(model, ModalityLoraConfig(r=2, target_modules=("experts",)))
    patched.save_adapter(tmp_path)
    patched.load_adapter(tmp_path)


def test_a_tied_model_whose_weights_were_assigned(tmp_path):
    """The weights are no longer tied then; the rows still are."""
    model, patched = patched_model(num_tokens=3, tie_word_embeddings=True)
    patched.save_adapter(tmp_path / "before")
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    patched.save_adapter(tmp_path / "after")
    saved = [(tmp_path / kind / WEIGHTS).read_bytes() for kind in ("before", "after")]
    assert saved[0] == saved[1]
    patched.load_adapter(tmp_path / "before")


def test_tokens_of_a_second_modality_in_a_tied_model_whose_weights_were_assigned():
    config = ModalityLoraConfig(r=2, modalities=("image", "audio"))
    model, _ = patched_model(config=config, num_tokens=3, tie_word_embeddings=True)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    add_modality_tokens(model, "audio", 2, init="normal")
    rows = [module.added_rows for module in (model.model.embed_tokens, model.lm_head)]
    assert rows[0] is rows[1] and list(rows[0]) == ["image", "audio"]


# --- names


def wrap_by_checkpointing(model):
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])


def wrap_by_compile(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")


@pytest.mark.parametrize("wrap", [wrap_by_checkpointing, wrap_by_compile])
def test_wrappers_are_not_in_the_names(wrap, tmp_path):
    """An adapter of a wrapped model fits the plain one, and the other way round."""
    plain, wrapped = everything(), everything()
    for each in (plain, wrapped):
        each.model.get_parameter(LORA).requires_grad_(False)
    wrap(wrapped.model)
    plain.save_adapter(tmp_path / "plain")
    wrapped.save_adapter(tmp_path / "wrapped")
    for name in (WEIGHTS, CONFIG):
        saved = [(tmp_path / kind / name).read_bytes() for kind in ("plain", "wrapped")]
        assert saved[0] == saved[1]
    expected = [parameter.clone() for parameter in wrapped.model.parameters()]
    randomise(wrapped, seed=5)
    wrapped.load_adapter(tmp_path / "plain")
    assert all(map(torch.equal, wrapped.model.parameters(), expected))
    frozen = [original_name(n) for n, p in wrapped.model.named_parameters() if is_lora(n, p)]
    assert frozen == [LORA]


def is_lora(name, parameter):
    return "modality_lora" in name and not parameter.requires_grad


# --- the same bytes


def test_equal_adapters_are_equal_files(tmp_path):
    """safetensors orders the strings of a header at random, which no reader should see."""
    files = set()
    for number in range(6):
        everything().save_adapter(tmp_path / str(number))
        files.add((tmp_path / str(number) / WEIGHTS).read_bytes())
        files.add((tmp_path / str(number) / CONFIG).read_bytes())
    assert len(files) == 2


# --- one folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:save_pretrained of a patched model")
@pytest.mark.parametrize("has_peft", [True, False], ids=["PEFT", "no PEFT"])
def test_all_parts_in_one_folder(has_peft, tmp_path, monkeypatch):
    """No part replaces a file of another, so the order does not matter; each loader finds its own.

    With PEFT installed, transformers looks for an adapter of PEFT beside the model.
    """
    if not has_peft:
        for module in ("models.auto.auto_factory", "integrations.peft"):
            monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: False)
    patched, image_tokenizer = everything(), PatchTokenizer(torch.rand(8, 12), 2, (4, 6, 3))
    text_tokenizer = make_tokenizer(bos_token="<s>", pad_token="<pad>")
    savers = (patched.model.save_pretrained, text_tokenizer.save_pretrained, image_tokenizer.save,
              patched.save_adapter)  # fmt: skip
    found = []
    for number, order in enumerate(itertools.permutations(savers)):
        for save_part in order:
            save_part(tmp_path / str(number))
        found.append(contents(tmp_path / str(number)))
    assert all(each == found[0] for each in found)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "0")
    loaded = patch_model(model, ModalityLoraConfig.from_adapter(tmp_path / "0"))
    loaded.load_adapter(tmp_path / "0")
    assert torch.equal(logits(loaded), logits(patched))
    again = AutoTokenizer.from_pretrained(tmp_path / "0")
    assert (again.bos_token, again.pad_token) == ("<s>", "<pad>")
    assert torch.equal(load_image_tokenizer(tmp_path / "0").codebook, image_tokenizer.codebook)


@pytest.mark.filterwarnings("ignore:save_pretrained of a patched model")
def test_earlier_names_are_read_and_give_way(tmp_path):
    """They were PEFT's, and from_pretrained failed beside them."""
    patched = everything()
    patched.save_adapter(tmp_path)
    expected = contents(tmp_path)
    give_earlier_names(tmp_path, ADAPTER, EARLIER_ADAPTER)
    assert sorted(contents(tmp_path)) == sorted(EARLIER_ADAPTER)
    assert torch.equal(logits(reloaded(tmp_path)), logits(patched))
    patched.model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="peft_type"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    patched.save_adapter(tmp_path)
    assert {name: contents(tmp_path).get(name) for name in expected} == expected
    assert not contents(tmp_path).keys() & set(EARLIER_ADAPTER)
    AutoModelForCausalLM.from_pretrained(tmp_path)


# --- several savers, and strangers' links


def test_two_savers_in_one_folder(tmp_path):
    """No save fails, as of all ranks of a run, and what is there is a whole adapter of one."""
    savers = [patched_model(num_tokens=3, scale=scale)[1] for scale in (0.1, 0.3)]
    failures = []

    def work(patched):
        try:
            for _ in range(15):
                patched.save_adapter(tmp_path)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(patched,)) for patched in savers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ADAPTER)
    found = logits(reloaded(tmp_path))
    assert any(torch.equal(found, logits(patched)) for patched in savers)


def test_no_file_is_written_through_a_link(tmp_path):
    """The cache of the hub has links to files of ours in the place of files."""
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "out"
    patched_model(scale=0.1)[1].save_adapter(first)
    patched_model(scale=0.3)[1].save_adapter(second)
    before = [(first / name).read_bytes() for name in ADAPTER]
    out.mkdir()
    for name in ADAPTER:
        (out / f".{name}.tmp").symlink_to(first / name)
        (out / name).symlink_to(first / name)
    patched_model(scale=0.3)[1].save_adapter(out)
    assert [(first / name).read_bytes() for name in ADAPTER] == before
    assert [(out / name).read_bytes() for name in ADAPTER] == [
        (second / name).read_bytes() for name in ADAPTER
    ]


@pytest.mark.parametrize("content", STRANGERS, ids=lambda content: str(content)[:12])
@pytest.mark.parametrize("name", ADAPTER)
def test_a_file_of_something_else_is_not_replaced(name, content, tmp_path):
    with strange(tmp_path, name, content), pytest.raises(FileExistsError, match=SAYS_WHOSE):
        patched_model()[1].save_adapter(tmp_path)


# --- pickles and checkpoints of transformers


@pytest.mark.parametrize(
    "part",
    [
        lambda patched: patched.model,
        lambda patched: patched,
        lambda patched: patched.model.model.layers[0],
        lambda patched: patched.model.model.layers[0].self_attn.q_proj,
        lambda patched: patched.model.get_input_embeddings(),
        lambda patched: patched.model.get_output_embeddings(),
    ],
    ids=["model", "handle", "layer", "projection", "embedding", "head"],
)
@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_a_pickle_is_refused_as_nothing_could_read_it(write, part):
    patched = everything()
    with pytest.raises(TypeError, match="a patched model cannot be pickled.*save_adapter"):
        write(part(patched), io.BytesIO())
    twin = copy.deepcopy(patched.model)
    assert snapshot(twin)["attributes"] == snapshot(patched.model)["attributes"]
    torch.save(patched.model.state_dict(), io.BytesIO())
    pickle.dumps(patched.unpatch())


def test_the_state_dict_goes_to_a_twin():
    one, two = everything(), everything()
    randomise(two, seed=5)
    expected = logits(one)
    assert not torch.equal(logits(two), expected)
    buffer = io.BytesIO()
    torch.save(one.model.state_dict(), buffer)
    buffer.seek(0)
    two.model.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(logits(two), expected)
    two.model.load_state_dict(one.model.state_dict(), assign=True)
    assert torch.equal(logits(two), expected)


@FAMILY
def test_transformers_checkpoint_is_the_base_model(family, tmp_path):
    """A warning says what from_pretrained leaves out; the settings are those of the base."""
    patched = everything(family)
    patched.model.generation_config.suppress_tokens.insert(0, 7)
    before = snapshot(patched.model)
    with pytest.warns(UserWarning, match="writes the base model, with all that was added"):
        patched.model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough, as a Trainer saves many times
        patched.model.save_pretrained(tmp_path)
    after = snapshot(patched.model)
    assert {k: after[k] for k in ("config", "generation_config", "attributes", "hooks")} == {
        k: before[k] for k in ("config", "generation_config", "attributes", "hooks")
    }
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = make_model(family)
    assert plain.config.vocab_size == VOCAB
    assert plain.generation_config.suppress_tokens == [7]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name
    patched.save_adapter(tmp_path / "adapter")
    fresh = patch_model(plain, ModalityLoraConfig.from_adapter(tmp_path / "adapter"))
    fresh.load_adapter(tmp_path / "adapter")
