"""Variants of ``moe_mlp`` inputs, and calls that return all gradients by name."""

import math

import torch

from moe_kernels import ops
from moe_kernels.ops import Activation, LoraWeights

SILU = ("silu", True, 1.0, math.inf, 0.0, False)  # how experts compute, as the ops take it
CLAMPED = Activation("clamped_swiglu", alpha=1.702, limit=0.7, shift=1.0)

# Options of make_moe_inputs and of moe_mlp, of every layout that an expert may have.
LAYOUTS = {
    "transposed": ({"transposed": True}, {}),
    "interleaved": ({}, {"interleaved": True}),
    "bias": ({"bias": True}, {}),
    "gelu": ({}, {"act": "gelu"}),
    "gelu_tanh": ({}, {"act": "gelu_tanh"}),
    "relu_squared": ({}, {"act": "relu_squared"}),
    "clamped": ({}, {"act": CLAMPED}),
    "silu_alone": ({"gated": False}, {"act": Activation("silu", gated=False)}),
    "gelu_alone": ({"gated": False, "bias": True}, {"act": Activation("gelu", gated=False)}),
    "gelu_tanh_alone": ({"gated": False}, {"act": Activation("gelu_tanh", gated=False)}),
    "nemotron_h": ({"gated": False}, {"act": Activation("relu_squared", gated=False)}),
    "gpt_oss": ({"transposed": True, "bias": True}, {"act": CLAMPED, "interleaved": True}),
    "all_else": (
        {"transposed": True, "gated": False, "bias": True, "shared_a": True},
        {"act": Activation("relu_squared", gated=False)},
    ),
}  # fmt: skip

# Mixed modalities with padding, an empty expert, the same expert twice, added experts.
VARIANTS = {
    "one_modality": {},
    "two_modalities": {"num_modalities": 2},
    "added_experts": {"num_extra": 2},
    "shared_a": {"shared_a": True, "num_modalities": 2},
    "own_ranks": {"ranks": (2, 5)},
    "gate_up_only": {"ranks": (3, 0)},
    "down_only": {"ranks": (0, 3)},
    "no_adapter": {"ranks": (0, 0)},
    "no_mask": {"modality": None},
    "all_text": {"modality": "text"},
    "all_image": {"modality": "image"},
    "all_padding": {"modality": "padding"},
    "zipf": {"routing": "zipf"},
    "one_expert": {"routing": "one_expert"},
    "repeated": {"routing": "repeated"},
    "half_empty": {"routing": "half_empty", "num_extra": 1},
}


def on_device(inputs, device):
    """Return inputs whose tensors are on a device; None stays None."""

    def move(value):
        if isinstance(value, LoraWeights):
            return LoraWeights(*map(move, value))
        return None if value is None else value.to(device)

    return type(inputs)(*map(move, inputs))


def strided(inputs):
    """Return equal inputs whose tensors are not contiguous."""

    def transposed(value):
        if isinstance(value, LoraWeights):
            return LoraWeights(*map(transposed, value))
        return None if value is None else value.transpose(0, -1).contiguous().transpose(0, -1)

    return type(inputs)(*map(transposed, inputs))


def call(inputs, backend, **options):
    return ops.moe_mlp(*inputs[:5], **inputs.keywords(), **options, backend=backend)


def run(inputs, backend, grad_out, **options):
    """Return the output and all gradients by name."""
    inputs.requires_grad_()
    out = call(inputs, backend, **options)
    tensors = inputs.differentiable()
    grads = torch.autograd.grad(out, list(tensors.values()), grad_out.to(out.dtype))
    return {"out": out, **dict(zip(tensors, grads, strict=True))}


def check_frozen_extra(inputs, backend):
    """Check that ``frozen_extra`` zeroes gradients of the first added experts and nothing else."""
    num_extra = inputs.extra_down_proj.shape[0]
    grad_out = torch.randn_like(inputs.hidden_states)
    full = run(inputs, backend, grad_out)
    names = ("extra_gate_up_proj", "extra_down_proj")
    assert all(full[name].flatten(1).any(1).all() for name in names)
    for frozen in range(1, num_extra):
        found = run(inputs, backend, grad_out, frozen_extra=frozen)
        for name, expected in full.items():
            if name in names:
                assert not found[name][:frozen].any(), name
                assert torch.equal(found[name][frozen:], expected[frozen:]), name
            else:
                assert torch.equal(found[name], expected), name
    out = call(inputs, backend, frozen_extra=num_extra)
    tensors = [inputs.hidden_states, inputs.extra_gate_up_proj, inputs.extra_down_proj]
    hidden, *extra = torch.autograd.grad(out, tensors, grad_out, allow_unused=True)
    assert torch.equal(hidden, full["hidden_states"]) and extra == [None, None]
