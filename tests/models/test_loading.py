"""``moe_kernels.load``: a base and its adapter in one call."""

import pytest
import torch
from support.model_zoo import (
    VOCAB,
    assert_same_snapshot,
    make_model,
    randomise,
    snapshot,
    token_ids,
)
from support.saved_adapters import WEIGHTS
from support.text_tokenizer import make_sized_tokenizer
from transformers import AutoModelForCausalLM, MixtralForCausalLM

import moe_kernels
from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.models import loading


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save a base and an adapter of three tokens; return both folders and the logits of a batch."""
    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    make_model("mixtral").save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    patched = patch_model(model, ModalityLoraConfig(r=2))
    add_modality_tokens(model, "image", 3)
    randomise(patched)
    patched.save_adapter(adapter)
    return base, adapter, logits(model)


def logits(model):
    with torch.no_grad():
        return model(token_ids(2, 9, vocab=VOCAB + 3)).logits


def test_a_folder_gives_what_was_saved(folders):
    base, adapter, expected = folders
    for given in (base, str(base)):
        patched = moe_kernels.load(given, adapter)
        assert not patched.model.training
        assert torch.equal(logits(patched.model), expected)


def test_a_model_is_patched_in_place(folders):
    base, adapter, expected = folders
    model = MixtralForCausalLM.from_pretrained(base)
    patched = moe_kernels.load(model, adapter)
    assert patched.model is model and torch.equal(logits(model), expected)


def test_options_reach_from_pretrained_and_the_backend_the_patch(folders):
    base, adapter, _ = folders
    patched = moe_kernels.load(base, adapter, backend="reference", dtype=torch.float32)
    assert patched.config.backend == "reference"
    patched = moe_kernels.load(base, adapter, dtype=torch.bfloat16)
    assert patched.model.dtype == torch.bfloat16 and patched.config.backend is None


def test_a_tokenizer_learns_the_names_of_added_tokens(folders):
    base, adapter, _ = folders
    tokenizer = make_sized_tokenizer(VOCAB)
    moe_kernels.load(base, adapter, tokenizer)
    assert tokenizer.convert_ids_to_tokens([VOCAB, VOCAB + 2]) == ["<image_0>", "<image_2>"]


def test_the_name_of_a_tokenizer_is_no_tokenizer(folders):
    base, adapter, _ = folders
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer of transformers; got str"):
        moe_kernels.load(base, adapter, "gpt2")


def test_an_adapter_that_is_not_there_is_said_before_a_base_is_loaded(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setattr(loading, "AutoModelForCausalLM", None)
    with pytest.raises(FileNotFoundError):
        moe_kernels.load(folders[0], tmp_path)


def test_a_model_that_does_not_fit_is_left_as_it_was(folders):
    model = make_model("mixtral", seed=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="trained on other base weights"):
        moe_kernels.load(model, folders[1])
    assert_same_snapshot(snapshot(model), before)
    patch_model(model)  # not patched


def test_options_beside_a_model_are_refused_before_it_is_touched(folders):
    model = make_model("mixtral")
    before = snapshot(model)
    with pytest.raises(TypeError, match="dtype: for from_pretrained, but base is a model"):
        moe_kernels.load(model, folders[1], dtype="bfloat16")
    assert_same_snapshot(snapshot(model), before)


@pytest.mark.parametrize(
    ("base", "options", "expected"),
    [
        ("name/of-hub", {}, {"revision": "c0ffee"}),
        ("name/of-hub", {"revision": "main"}, {"revision": "main"}),
        ("name/of-another", {}, {}),
    ],
)
def test_a_base_of_the_hub_is_that_which_was_trained_on(
    base, options, expected, tmp_path, monkeypatch
):
    """The hub may have another commit by now, whose weights the adapter does not fit."""
    model = make_model("mixtral")
    model.config.name_or_path, model.config._commit_hash = "name/of-hub", "c0ffee"
    patch_model(model, ModalityLoraConfig(r=2)).save_adapter(tmp_path)
    assert (tmp_path / WEIGHTS).exists()
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options))
        return make_model("mixtral")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    moe_kernels.load(base, tmp_path, **options)
    assert asked == [(base, expected)]


@pytest.mark.parametrize("base", ["no/such/folder", "my-modl"])
def test_a_base_that_is_not_there_is_named_as_a_folder(base, folders, monkeypatch):
    def from_pretrained(name, **options):
        raise OSError("the hub cannot be asked")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(OSError, match=f"^no model: there is no folder {base} in "):
        moe_kernels.load(base, folders[1])
