"""Models that get their values after patching: made on the device meta, or emptied."""

import copy
from unittest import mock

import pytest
import torch
from support.model_zoo import FAMILIES, VOCAB, token_ids
from support.patched_models import patched_model

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model

NUM_TOKENS = 6
TARGETS = ("experts", "attention", "router")


def reference():
    """Return a patched model, and ids of text and image tokens."""
    config = ModalityLoraConfig(r=4, target_modules=TARGETS)
    model, _ = patched_model("mixtral", config, num_tokens=NUM_TOKENS)
    ids = token_ids(2, 12, vocab=VOCAB + NUM_TOKENS)
    ids[:, 3:6] = VOCAB + torch.arange(3)
    return model, ids


def restore_rotary(model, expected):
    """Restore transformers' buffers that no state dict holds, as everybody must."""
    for name, buffer in expected.model.rotary_emb.named_buffers():
        model.model.rotary_emb.register_buffer(name, buffer.clone(), persistent=False)


@torch.no_grad()
def assert_same_logits(model, expected, ids):
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_an_emptied_model_adapts_once_its_state_is_loaded():
    expected, ids = reference()
    model = copy.deepcopy(expected).to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()  # memory that was not written may hold anything; zeros are plausible
    model.load_state_dict(expected.state_dict())
    restore_rotary(model, expected)
    assert_same_logits(model, expected, ids)


@pytest.mark.parametrize("added", [False, True])
def test_an_emptied_model_says_so_or_starts_anew(added):
    """Fresh memory is often zero: pairs of zeros would never get a gradient."""
    expected, ids = reference()
    base = expected.state_dict()
    with torch.device("meta"):
        model, patched = patched_model("mixtral", ModalityLoraConfig(r=4, target_modules=TARGETS))
        if added:
            add_modality_tokens(model, "image", NUM_TOKENS)
    with mock.patch("torch.empty_like", torch.zeros_like):
        model.to_empty(device="cpu")
    model.load_state_dict(
        {k: v for k, v in base.items() if "added_rows" not in k and "lora" not in k}, strict=False
    )
    restore_rotary(model, expected)
    model.train()
    call = {"input_ids": ids % VOCAB, "modality_ids": torch.ones_like(ids), "labels": ids % VOCAB}
    if added:
        with pytest.raises(RuntimeError, match="added_rows.image is not finite: to_empty leaves"):
            model(**call)
        return
    model(**call).loss.backward()
    for name, parameter in patched.named_trainable_parameters():
        assert parameter.grad.any() == name.endswith("lora_B"), name


def test_pairs_that_were_emptied_with_a_module_around_the_model():
    model, _ = reference()
    with mock.patch("torch.empty_like", torch.zeros_like):
        model.model.to_empty(device="cpu")
    ids = torch.zeros(1, 4).long()
    with pytest.raises(
        RuntimeError, match="modality_lora.gate_up_proj is zero, lora_A too: to_empty"
    ):
        model.train()(ids)


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_patched_on_the_device_meta_adapts_once_it_has_values(assign):
    expected, ids = reference()
    model_class, _, _ = FAMILIES["mixtral"]
    config = copy.deepcopy(expected.config)
    config.vocab_size, config._experts_implementation = VOCAB, "eager"
    with torch.device("meta"):
        model = model_class(config).eval()
    patch_model(model, ModalityLoraConfig(r=4, target_modules=TARGETS))
    add_modality_tokens(model, "image", NUM_TOKENS)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(expected.state_dict(), assign=assign)
    restore_rotary(model, expected)
    assert_same_logits(model, expected, ids)
