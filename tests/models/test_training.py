"""Training forwards whose adapters get no gradient: one warning, where a loss shows nothing."""

import copy
import warnings

import peft
import pytest
import torch
from support.model_zoo import VOCAB, make_model, token_ids
from torch import nn

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model

IDS = token_ids(2, 6)


def idle(call):
    """Return the modalities that warnings of a call name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [
        name
        for w in caught
        for name in ("image", "sound")
        if f"no token of modality '{name}'" in str(w.message)
    ]


def make(**settings):
    model = make_model("mixtral").train()
    return model, patch_model(model, ModalityLoraConfig(r=2, **settings))


def test_neither_tokens_nor_ids():
    model, _ = make(modalities=("image", "sound"))
    assert idle(lambda: model.eval()(IDS)) == []
    with torch.no_grad():
        assert idle(lambda: model.train()(IDS)) == []
    assert idle(lambda: model(IDS, modality_ids=torch.ones_like(IDS))) == []
    add_modality_tokens(model, "sound", 3)
    with pytest.warns(UserWarning, match="modality 'image'.*does the collator drop the column"):
        model(IDS)
    assert idle(lambda: model(IDS)) == []  # once


def test_values_are_checked_by_a_compiled_forward_and_after_a_trace():
    model, patched = make()
    call = {"input_ids": IDS, "modality_ids": torch.ones_like(IDS), "use_cache": False}
    torch.export.export(model, (), call, strict=False)  # has no values to look at
    with torch.no_grad():
        next(patched.trainable_parameters()).fill_(torch.nan)
    for forward in (torch.compile(model, backend="eager"), model):
        with pytest.raises(RuntimeError, match="lora_A is not finite: to_empty"):
            forward(**call)


@pytest.mark.slow
def test_a_compiled_model_warns_too():
    model, _ = make()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert idle(lambda: compiled(IDS)) == ["image"]
    assert idle(lambda: compiled(IDS)) == []


@pytest.mark.parametrize("settings", [{"target_modules": ()}, {"num_tokens": 4}])
def test_nothing_that_idles(settings):
    num_tokens = settings.pop("num_tokens", 0)
    model, _ = make(**settings)
    if num_tokens:
        add_modality_tokens(model, "image", num_tokens)
    assert idle(lambda: model(IDS % VOCAB)) == []


def freeze(model):
    model.requires_grad_(False)


def freeze_for_kbit(model):
    """Freeze all, and let the embeddings require grad."""
    model.is_loaded_in_4bit = True
    peft.prepare_model_for_kbit_training(model)


@pytest.mark.parametrize(
    ("freeze_all", "forwards"),
    [
        (freeze, 1),
        pytest.param(freeze_for_kbit, 0, marks=pytest.mark.slow),
        pytest.param(freeze, 0, marks=pytest.mark.slow),
        pytest.param(freeze_for_kbit, 1, marks=pytest.mark.slow),
    ],
)
def test_all_was_frozen_after_patching(freeze_all, forwards):
    model, _ = make()
    call = {"input_ids": IDS, "modality_ids": torch.ones_like(IDS)}
    for _ in range(forwards):
        model(**call)
    freeze_all(model)
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "this training forward")
        with torch.no_grad():
            model(**call)
        model.eval()(**call)
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model.train()(inputs_embeds=embeds, modality_ids=call["modality_ids"])  # their maker learns
    for forward in (torch.compile(other, backend="eager"), model):
        with pytest.warns(UserWarning, match="teaches the model nothing: .*kbit_.*before patch_mo"):
            forward(**call)
    steer = nn.Parameter(torch.zeros(model.config.hidden_size))
    model.model.norm.register_forward_hook(lambda module, inputs, output: output + steer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "this training forward")
        model(**call, labels=IDS).loss.backward()  # once is enough
        assert steer.grad.norm() > 0
    model, _ = make()
    freeze_all(model)
    model.encoder = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "this training forward")
        model(**call)  # another part of the model learns


def test_some_was_frozen_after_patching():
    model, patched = make()
    first, *others = patched.trainable_parameters()
    for parameter in others:
        parameter.requires_grad_(False)
    model(IDS, labels=IDS, modality_ids=torch.ones_like(IDS)).loss.backward()
    assert first.grad is not None
