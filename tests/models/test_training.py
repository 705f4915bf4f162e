"""Training forwards whose adapters get no gradient: one warning, where a loss shows nothing."""

import warnings

import pytest
import torch
from support.model_zoo import VOCAB, make_model, token_ids

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
