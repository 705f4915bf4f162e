"""Patched models with random adapters, and checks of what they compute, generate and save."""

import copy

import torch
from safetensors.torch import load_file
from support.model_zoo import VOCAB, make_model, randomise, token_ids

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.models.handle import get_patched
from moe_kernels.moextend import ExpertExtender
from moe_kernels.testing import relative_rms


def patched_model(family="mixtral", config=None, *, num_tokens=0, scale=0.3, **settings):
    """Return a model with image tokens and random adapters, and its handle."""
    model = make_model(family, **settings)
    patched = patch_model(model, config)
    if num_tokens:
        first = model.config.vocab_size
        added = add_modality_tokens(model, "image", num_tokens)
        assert added == range(first, first + num_tokens)
    randomise(patched, scale=scale)
    return model, patched


def assert_saved(patched, folder):
    """Check that transformers saves the trainable parameters under their own names.

    On saving, transformers splits and renames parameters that look like weights of experts.
    """
    patched.model.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    for name, parameter in patched.named_trainable_parameters():
        assert torch.equal(saved[name], parameter), name


@torch.no_grad()
def greedy(model, ids, steps, modality_of=lambda ids: None):
    """Return ids and the tokens that follow, each of them by one forward without a cache."""
    for _ in range(steps):
        logits = model(ids, modality_ids=modality_of(ids)).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def check_generation(model, num_tokens):
    """Check that generate() gives the tokens of full forwards, with and without a cache."""
    ids = token_ids(2, 6, vocab=VOCAB + num_tokens)
    settings = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": []}
    settings["attention_mask"] = torch.ones_like(ids)
    expected = greedy(model, ids, 6)
    assert (expected[:, 6:] >= VOCAB).any()
    assert torch.equal(model.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), expected)


def merge(model, patched):
    """Return a plain model that has every low-rank update in its weights."""
    merged = copy.deepcopy(model)
    for projection in get_patched(merged).projections:
        lora = projection.lora
        delta = lora.scaling[0] * (lora.lora_B[0] @ lora.lora_A[0])
        projection.weight.data += delta.detach().to(projection.weight.dtype)
    get_patched(merged).unpatch()
    return merged


def check_compiles(family, backend, *, extended=False):
    """Check that a model compiles into one graph with the same logits and close gradients."""
    model = make_model(family)
    targets = ("experts", "attention", "router")
    config = ModalityLoraConfig(r=4, lora_alpha=8, backend=backend, target_modules=targets)
    patched = patch_model(model, config)
    if extended:
        for calibration in ("additive", "multiplicative"):
            extender = ExpertExtender(model)
            extender.extend([0], 2, init=0, calibration=calibration, freeze_earlier=False)
    randomise(patched)
    parameters = list(patched.trainable_parameters())
    inputs = {"input_ids": token_ids(2, 12), "modality_ids": (token_ids(2, 12, seed=1) % 3) - 1}
    inputs["modality_ids"].clamp_(0)

    def forward():
        return model(**inputs, use_cache=False).logits

    def results(forward):
        logits = forward()
        return logits, *torch.autograd.grad(logits.square().sum(), parameters)

    expected = results(forward)
    torch._dynamo.reset()
    actual = results(torch.compile(forward, fullgraph=True, backend="aot_eager"))
    assert torch.equal(actual[0], expected[0])
    for found, expected_each in zip(actual, expected, strict=True):
        assert relative_rms(found, expected_each) < 1e-5
