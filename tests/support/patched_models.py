"""Patched models compared with merged weights and with their compiled form."""

import copy

import torch
from support.model_zoo import make_model, randomise, token_ids

from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.models.handle import get_patched
from moe_kernels.moextend import ExpertExtender
from moe_kernels.testing import relative_rms


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
