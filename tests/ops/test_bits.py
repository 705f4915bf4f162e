"""Text rows keep their bits whatever the adapters and the other rows are (docs/design.md).

The hidden sizes are large enough to expose a wrong implementation. At 48 it would pass; fp32 needs
128 and bf16 needs 512.
"""

import pytest
import torch
from support.covers import each_pair
from support.moe_mlp import LAYOUTS
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import ops
from moe_kernels.ops import LoraWeights
from moe_kernels.ops.moe_mlp import api
from moe_kernels.testing import (
    Shape,
    make_modality_ids,
    make_moe_inputs,
    make_routing,
    working_backends,
)

WORKING = working_backends()
HALF_AND_WHOLE = [torch.float32, torch.bfloat16]
DTYPES = pytest.mark.parametrize("dtype", HALF_AND_WHOLE, ids=str)
BACKENDS = pytest.mark.parametrize("backend", WORKING)


def call(inputs, backend, **options):
    with torch.no_grad():
        return ops.moe_mlp(*inputs[:5], **inputs.keywords(), **options, backend=backend)


def scaled(lora, factor):
    return LoraWeights(lora.lora_A * factor, lora.lora_B * factor, lora.scaling)


@each_pair(
    backend=WORKING, dtype=HALF_AND_WHOLE, num_tokens=[64, 200],
    seed_and_threads=[(0, 1), (0, 2), (1, 1), (2, 1)],
)  # fmt: skip
def test_any_adapter(backend, dtype, num_tokens, seed_and_threads, thread_count):
    """Any adapter values leave text unchanged; threads are fixed since the reference needs that."""
    seed, threads = seed_and_threads
    thread_count(threads)
    shape = Shape(T=num_tokens, K=2, E=8, H=512, I=256, r=16)
    inputs = make_moe_inputs(shape, seed=seed, num_extra=1).to(dtype)
    text = inputs.modality_ids == 0
    expected = call(inputs, backend)[text]
    for factor in (-3.0, 1e18, float("inf"), float("nan")):
        changed = inputs._replace(
            gate_up_lora=scaled(inputs.gate_up_lora, factor),
            down_lora=scaled(inputs.down_lora, factor),
        )
        assert torch.equal(call(changed, backend)[text], expected)
    none = inputs._replace(gate_up_lora=None, down_lora=None)
    assert torch.equal(call(none, backend)[text], expected)


@each_pair(backend=WORKING, dtype=HALF_AND_WHOLE, num_tokens=[64, 200], seed=range(3))
def test_any_other_rows(backend, dtype, num_tokens, seed):
    """Values, modality and routing of the other rows change, and so do all row counts."""
    shape = Shape(T=num_tokens, K=2, E=8, H=512, I=256, r=16)
    inputs = make_moe_inputs(shape, seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed + 100)
    keep = torch.rand(num_tokens, generator=generator) < 0.3
    keep[0] = True
    inputs.modality_ids[keep] = 0
    expected = call(inputs, backend)[keep]
    for kind in ("zipf", "one_expert", "balanced"):
        ids, weights = make_routing(num_tokens, 2, 8, kind=kind, generator=generator)
        modality = make_modality_ids(num_tokens, kind="mixed", generator=generator)
        noise = torch.randn(num_tokens, 512, generator=generator).to(dtype) * 100
        changed = inputs._replace(
            hidden_states=torch.where(keep[:, None], inputs.hidden_states, noise),
            topk_ids=torch.where(keep[:, None], inputs.topk_ids, ids),
            topk_weights=torch.where(keep[:, None], inputs.topk_weights, weights.to(dtype)),
            modality_ids=torch.where(keep, inputs.modality_ids, modality),
        )
        assert torch.equal(call(changed, backend)[keep], expected)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("layout", ["gpt_oss", "all_else"])
def test_other_layouts(backend, dtype, layout):
    """Neither adapters, other rows nor added experts change text, biases included."""
    made, options = LAYOUTS[layout]
    inputs = make_moe_inputs(Shape(T=64, K=2, E=8, H=512, I=256, r=16), **made).to(dtype)
    text = inputs.modality_ids == 0
    expected = call(inputs, backend, **options)[text]
    generator = torch.Generator().manual_seed(1)
    ids, weights = make_routing(64, 2, 8, kind="zipf", generator=generator)
    changed = inputs._replace(
        hidden_states=torch.where(text[:, None], inputs.hidden_states, float("nan")),
        topk_ids=torch.where(text[:, None], inputs.topk_ids, ids),
        topk_weights=torch.where(text[:, None], inputs.topk_weights, weights.to(dtype)),
        modality_ids=torch.where(text, 0, 1),
        gate_up_lora=scaled(inputs.gate_up_lora, float("nan")),
        down_lora=scaled(inputs.down_lora, float("inf")),
    )
    assert torch.equal(call(changed, backend, **options)[text], expected)
    extra = make_moe_inputs(Shape(T=1, K=1, E=3, H=512, I=256), seed=1, **made).to(dtype)
    added = changed._replace(
        extra_gate_up_proj=extra.gate_up_proj,
        extra_down_proj=extra.down_proj,
        gate_up_bias=torch.cat([inputs.gate_up_bias, extra.gate_up_bias]),
        down_bias=torch.cat([inputs.down_bias, extra.down_bias]),
    )
    assert torch.equal(call(added, backend, **options)[text], expected)


@BACKENDS
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_bias_that_is_not_finite(backend, value):
    """Only rows that choose its expert notice, whether it is the base's or an added one."""
    made, options = LAYOUTS["gpt_oss"]
    inputs = make_moe_inputs(Shape(T=64, K=2, E=8, H=64, I=32), num_extra=2, **made)
    inputs = inputs.to(torch.float32)
    expected, bias = call(inputs, backend, **options), inputs.down_bias.clone()
    bias[[3, 9], 1] = value
    found = call(inputs._replace(down_bias=bias), backend, **options)
    chosen = ((inputs.topk_ids == 3) | (inputs.topk_ids == 9)).any(1) & (inputs.modality_ids >= 0)
    assert chosen.any() and not chosen.all()
    assert torch.equal(found[~chosen], expected[~chosen]) and found[chosen].isnan().all()


def test_the_memory_of_biases():
    """A tensor of tokens by top-k by experts would be much larger than all else."""
    tokens, top_k, experts = 64, 8, 32
    made = {"bias": True, "gated": False}
    inputs = make_moe_inputs(Shape(T=tokens, K=top_k, E=experts, H=16, I=16), **made)
    sizes = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out))
            return out

    biases = inputs.down_bias, inputs.down_bias[:0]
    with Spy():
        api._add_down_bias(inputs.hidden_states, *inputs[1:3], inputs.modality_ids, biases)
    assert max(sizes) <= tokens * (experts + 1)


@BACKENDS
@DTYPES
def test_the_other_rows_values_may_be_nan(backend, dtype):
    inputs = make_moe_inputs(Shape(T=64, K=2, E=4, H=512, I=256)).to(dtype)
    text = inputs.modality_ids == 0
    expected = call(inputs, backend)[text]
    inputs.hidden_states[~text] = float("nan")
    assert torch.equal(call(inputs, backend)[text], expected)


@each_pair(backend=WORKING, dtype=HALF_AND_WHOLE, num_tokens=[1, 62, 66, 72, 76, 200])
def test_added_experts_that_no_row_chooses(backend, dtype, num_tokens):
    """Unchosen experts change no bits, even if a choice of kernels by E would differ for E + X."""
    shape = Shape(T=num_tokens, K=2, E=8, H=512, I=256)
    without = make_moe_inputs(shape).to(dtype)
    expected = call(without, backend)
    for number, value in ((1, 1.0), (3, float("nan"))):
        added = [
            torch.randn(number, *stack.shape[1:]) * value
            for stack in (without.gate_up_proj, without.down_proj)
        ]
        inputs = without._replace(extra_gate_up_proj=added[0], extra_down_proj=added[1])
        assert torch.equal(call(inputs, backend), expected)


@pytest.mark.parametrize("backend", [name for name in WORKING if name != "reference"])
@DTYPES
def test_thread_count(backend, dtype, thread_count):
    """The number of threads changes no bits, except for the reference, whose GEMMs are torch's."""
    inputs = make_moe_inputs(Shape(T=200, K=2, E=8, H=512, I=256), num_extra=1).to(dtype)
    results = []
    for threads in (1, 2):
        thread_count(threads)
        inputs.requires_grad_()
        out = ops.moe_mlp(*inputs[:5], **inputs.keywords(), backend=backend)
        tensors = list(inputs.differentiable().values())
        results.append([out, *torch.autograd.grad(out.sum(), tensors)])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
