"""``moe_mlp``: the reference's gradients, backends against it, hard cases, bad input."""

import itertools
from dataclasses import replace as replace_shape
from functools import partial

import pytest
import torch
from support.covers import each_pair
from support.devices import NEEDS_CUDA
from support.moe_mlp import (
    LAYOUTS,
    SILU,
    VARIANTS,
    call,
    check_frozen_extra,
    on_device,
    run,
    strided,
)
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import _native, backends, ops, testing
from moe_kernels.ops import Activation, LoraWeights
from moe_kernels.ops.moe_mlp import activation as activation_module
from moe_kernels.ops.moe_mlp import reference
from moe_kernels.ops.moe_mlp.weights import ExpertWeights
from moe_kernels.testing import SHAPES, MoeInputs, Shape, make_moe_inputs

WORKING = testing.working_backends()


def activation(pre, act, interleaved):
    """Return the activation of one row, in torch's own functions."""
    act = Activation(act) if isinstance(act, str) else act
    function = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": partial(functional.gelu, approximate="tanh"),
        "relu_squared": lambda x: functional.relu(x).square(),
        "clamped_swiglu": lambda x: x * torch.sigmoid(act.alpha * x),
    }[act.name]
    if not act.gated:
        return function(pre)
    gate, up = (pre[::2], pre[1::2]) if interleaved else pre.chunk(2)
    if act.name == "clamped_swiglu":
        gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit) + act.shift
    return function(gate) * up


def definition(inputs, act="silu", interleaved=False):
    """Return what ``moe_mlp`` means, one token and one of its experts at a time."""
    x, ids, weights, gate_up, down, modality, gate_up_lora, down_lora, *others = inputs
    extra, biases = others[:2], others[2:]
    stacks = [gate_up, down]
    if extra[0] is not None:
        stacks = [torch.cat(pair) for pair in zip(stacks, extra, strict=True)]

    def project(row, stack, lora, expert, m):
        out = stacks[stack][expert] @ row
        if biases[stack] is not None:
            out = out + biases[stack][expert]
        if lora is None or m < 1 or expert >= gate_up.shape[0]:  # added experts have no adapters
            return out
        lora_A = lora.lora_A[m - 1].expand(gate_up.shape[0], -1, -1)[expert]
        return out + lora.scaling[m - 1] * lora.lora_B[m - 1, expert] @ (lora_A @ row)

    out = torch.zeros_like(x)
    for t, k in itertools.product(*map(range, ids.shape)):
        m = 0 if modality is None else int(modality[t])
        if m < 0:  # padding
            continue
        act_row = activation(project(x[t], 0, gate_up_lora, ids[t, k], m), act, interleaved)
        out[t] += weights[t, k] * project(act_row, 1, down_lora, ids[t, k], m)
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_is_the_definition(variant):
    inputs = make_moe_inputs(SHAPES["tiny"], seed=5, **VARIANTS[variant])
    testing.assert_close(call(inputs, "reference"), definition(inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_is_the_definition_in_every_layout(layout):
    """Its gradients are those that torch finds for the definition, at the clamps too."""
    made, options = LAYOUTS[layout]
    shape = replace_shape(SHAPES["tiny"], T=25)
    inputs = make_moe_inputs(shape, seed=2, num_extra=1, num_modalities=2, **made)
    grad_out = torch.randn(inputs.hidden_states.shape, dtype=torch.float64)
    found = run(inputs, "reference", grad_out, **options)
    out = definition(inputs, **options)
    leaves = inputs.differentiable()
    expected = torch.autograd.grad(out, list(leaves.values()), grad_out)
    testing.assert_close(found["out"], out)
    for name, gradient in zip(leaves, expected, strict=True):
        testing.assert_close(found[name], gradient, name=name)


# These are checked with the full numerical Jacobian, the others with a random projection of it.
FULL_JACOBIAN = ("added_experts", "two_modalities", "shared_a", "own_ranks")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", WORKING)
def test_gradcheck(backend, variant):
    inputs = make_moe_inputs(Shape(T=6, K=2, E=3, H=4, I=3, r=2), seed=3, **VARIANTS[variant])
    if variant in FULL_JACOBIAN:
        assert (inputs.modality_ids == -1).any() and (inputs.modality_ids == 0).any()
    inputs = inputs.requires_grad_()
    names = list(inputs.differentiable())

    def function(*tensors):
        return call(replace(inputs, dict(zip(names, tensors, strict=True))), backend)

    assert torch.autograd.gradcheck(
        function,
        tuple(inputs.differentiable().values()),
        fast_mode=variant not in FULL_JACOBIAN,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", WORKING)
def test_gradcheck_in_every_layout(backend, layout):
    made, options = LAYOUTS[layout]
    shape = Shape(T=6, K=2, E=3, H=4, I=3, r=2)
    inputs = make_moe_inputs(shape, seed=3, num_extra=1, **made).requires_grad_()
    names = list(inputs.differentiable())

    def function(*tensors):
        return call(replace(inputs, dict(zip(names, tensors, strict=True))), backend, **options)

    tensors = tuple(inputs.differentiable().values())
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def replace(inputs, tensors):
    """Return ``inputs`` with differentiable tensors replaced by name."""
    plain = {name: tensor for name, tensor in tensors.items() if "." not in name}
    for name in ("gate_up_lora", "down_lora"):
        if f"{name}.lora_A" in tensors:
            lora = getattr(inputs, name)
            plain[name] = LoraWeights(
                tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], lora.scaling
            )
    return inputs._replace(**plain)


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("layout", ["gpt_oss", "all_else"])
def test_opcheck_in_other_layouts(backend, layout):
    made, options = LAYOUTS[layout]
    inputs = make_moe_inputs(SHAPES["tiny"], num_extra=1, **made).to(torch.float32)
    inputs.requires_grad_()
    extras, loras = inputs[8:10], [*inputs.gate_up_lora, *inputs.down_lora, inputs.gate_up_bias]
    form = activation_module.expert_form(options["act"], options.get("interleaved", False))
    arguments = (*inputs[:6], *extras, *loras, None, None, 0, *form, True, backend)
    torch.library.opcheck(torch.ops.moe_kernels.moe_mlp.default, arguments)


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("layout", ["gpt_oss", "all_else"])
def test_opcheck_of_the_backward_in_other_layouts(backend, layout):
    """Gradients of added experts are contiguous where the base is stored transposed, too."""
    made, options = LAYOUTS[layout]
    inputs = make_moe_inputs(SHAPES["tiny"], num_extra=1, **made).to(torch.float32)
    extras, loras = inputs[8:10], [*inputs.gate_up_lora, *inputs.down_lora, inputs.gate_up_bias]
    form = activation_module.expert_form(options["act"], options.get("interleaved", False))
    forward = torch.ops.moe_kernels.moe_mlp
    _, *saved = forward(*inputs[:6], *extras, *loras, None, None, 0, *form, True, backend)
    fixed = (inputs.hidden_states, *inputs[2:5], *extras, *loras, None, None, *saved)
    torch.library.opcheck(
        torch.ops.moe_kernels.moe_mlp_backward.default,
        (torch.randn_like(inputs.hidden_states), *fixed, [True] * 8, 0, *form, backend),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", WORKING)
def test_transforms_and_compilation_in_another_layout(backend):
    """The bias of the down projection is added in front of the op's own ways."""
    made, options = LAYOUTS["gpt_oss"]
    inputs = make_moe_inputs(SHAPES["tiny"], **made).to(torch.float32)

    def loss(x):
        return call(inputs._replace(hidden_states=x), backend, **options).square().sum()

    x = inputs.hidden_states.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    assert torch.equal(torch.func.grad(loss)(x.detach()), expected)
    batch = torch.stack([x.detach(), 2 * x.detach()])
    each = torch.stack([torch.func.grad(loss)(one) for one in batch])
    assert torch.equal(torch.vmap(torch.func.grad(loss))(batch), each)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(x)
    testing.assert_close(torch.autograd.grad(found, x)[0], expected)


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("variant", ["added_experts", "gate_up_only", "no_mask"])
def test_opcheck(backend, variant):
    inputs = make_moe_inputs(SHAPES["tiny"], **VARIANTS[variant]).to(torch.float32)
    inputs.requires_grad_()
    loras = [*(inputs.gate_up_lora or (None,) * 3), *(inputs.down_lora or (None,) * 3)]
    args = (*inputs[:6], inputs.extra_gate_up_proj, inputs.extra_down_proj, *loras)
    frozen = int(variant == "added_experts")
    arguments = (*args, inputs.gate_up_bias, None, None, frozen, *SILU, True, backend)
    torch.library.opcheck(torch.ops.moe_kernels.moe_mlp.default, arguments)


@each_pair(
    backend=WORKING, dtype=testing.TOLERANCES, variant=VARIANTS,
    shape=["tiny", "small"],  # kernels read unpacked and packed weights
)  # fmt: skip
def test_where_nothing_trains_the_bits_are_the_same(backend, dtype, variant, shape):
    """If nothing trains, the native backend is a single op that also sorts the rows."""
    inputs = make_moe_inputs(SHAPES[shape], seed=5, **VARIANTS[variant])
    inputs = inputs.to(dtype, lora_dtype=None if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        alone = call(inputs, backend)
    out = call(inputs.requires_grad_(), backend)
    assert torch.equal(out, alone)


@pytest.mark.skipif("cpu" not in WORKING, reason=f"{backends.available()['cpu']}")
@pytest.mark.parametrize("variant", ["added_experts", "gate_up_only", "no_mask"])
def test_opcheck_of_the_native_op_where_nothing_trains(variant):
    inputs = make_moe_inputs(SHAPES["tiny"], **VARIANTS[variant]).to(torch.float32)
    loras = [*(inputs.gate_up_lora or (None,) * 3), *(inputs.down_lora or (None,) * 3)]
    extras = (inputs.extra_gate_up_proj, inputs.extra_down_proj)
    op = _native.ops().moe_mlp_inference.default
    rest = (*extras, *loras, None, None, None, *SILU)
    torch.library.opcheck(op, (*inputs[:6], *rest), test_utils=("test_schema",))
    out = op(inputs.hidden_states.half(), *inputs[1:6], *rest)
    assert out.dtype == inputs.gate_up_proj.dtype


@each_pair(
    backend=WORKING, dtype=[torch.float32, torch.bfloat16],
    variant=["added_experts", "gate_up_only", "down_only", "all_padding"],
)  # fmt: skip
def test_opcheck_of_the_backward(backend, dtype, variant):
    """The backward op has no autograd formula, so only its schema and fake version are checked."""
    inputs = make_moe_inputs(SHAPES["tiny"], **VARIANTS[variant])
    inputs = inputs.to(dtype, lora_dtype=torch.float32)
    loras = [*(inputs.gate_up_lora or (None,) * 3), *(inputs.down_lora or (None,) * 3)]
    extras = (inputs.extra_gate_up_proj, inputs.extra_down_proj)
    loras += [inputs.gate_up_bias, None, None]
    _, *saved = torch.ops.moe_kernels.moe_mlp(*inputs[:6], *extras, *loras, 0, *SILU, True, backend)
    fixed = (inputs.hidden_states, *inputs[2:5], *extras, *loras, *saved)
    grad_out = torch.randn(inputs.hidden_states.shape, dtype=dtype)
    trainable = (*fixed[:2], *extras, *loras[:2], *loras[3:5])
    everything = [tensor is not None for tensor in trainable]
    for needs in (everything, [False, False, *everything[2:]], [True] + [False] * 7):
        torch.library.opcheck(
            torch.ops.moe_kernels.moe_mlp_backward.default,
            (grad_out, *fixed, needs, int(variant == "added_experts"), *SILU, backend),
            test_utils=("test_schema", "test_faketensor"),
        )


@each_pair(
    backend=WORKING, dtype=testing.TOLERANCES, variant=VARIANTS, shape=["tiny", "odd", "small"]
)
def test_backend_matches_the_float64_reference(backend, dtype, variant, shape):
    seed = len(variant) + len(shape)
    low = make_moe_inputs(SHAPES[shape], seed=seed, **VARIANTS[variant]).to(dtype)
    grad_out = torch.randn(low.hidden_states.shape, dtype=torch.float64).to(dtype).double()
    expected = run(low.to(torch.float64), "reference", grad_out)
    for name, actual in run(low, backend, grad_out).items():
        testing.assert_close(actual, expected[name], dtype=dtype, name=name)


def is_clamped(layout):
    """Return whether a pre-activation that is rounded across a bound changes its gradient."""
    return layout in ("clamped", "gpt_oss")


@each_pair(
    backend=[name for name in WORKING if name != "reference"], dtype=testing.TOLERANCES,
    layout=LAYOUTS, shape=["tiny", "odd", "small"],
)  # fmt: skip
def test_every_layout_matches_the_float64_reference(backend, dtype, layout, shape, filled_memory):
    """Padding, two modalities and added experts included; and where nothing trains, the bits."""
    made, options = LAYOUTS[layout]
    low = make_moe_inputs(SHAPES[shape], seed=4, num_modalities=2, num_extra=1, **made).to(dtype)
    grad_out = torch.randn(low.hidden_states.shape, dtype=torch.float64).to(dtype).double()
    expected = run(low.to(torch.float64), "reference", grad_out, **options)
    found = run(low, backend, grad_out, **options)
    for name, actual in found.items():
        if name in ("out", "topk_weights") or dtype.itemsize > 2 or not is_clamped(layout):
            testing.assert_close(actual, expected[name], dtype=dtype, name=name)
    padding = low.modality_ids == -1
    assert padding.any()
    for name in ("out", "hidden_states", "topk_weights"):
        assert not found[name][padding].any(), name
    with torch.no_grad():
        assert torch.equal(call(low, backend, **options), found["out"])


@pytest.mark.parametrize("backend", WORKING)
def test_gradients_of_large_and_of_missing_values(backend):
    """Activations are right far from zero, at the bounds, and where the input is NaN."""
    values = [0.0, 0.7, -0.7, 5.0, -5.0, 40.0, -40.0, 200.0, -200.0, float("nan")]
    x = torch.tensor(values)[:, None].requires_grad_()
    ids, weights = torch.zeros(len(values), 1).long(), torch.ones(len(values), 1)
    for act in ("silu", "gelu", "gelu_tanh", "relu_squared"):
        form = Activation(act, gated=False)
        out = ops.moe_mlp(
            x, ids, weights, torch.ones(1, 1, 1), torch.ones(1, 1, 1), act=form, backend=backend
        )
        wide = x.detach().double().requires_grad_()
        expected = torch.stack([activation(row, form, False) for row in wide])
        for found, wanted in (
            (out, expected),
            (torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(expected.sum(), wide)[0]),
        ):
            torch.testing.assert_close(
                found, wanted.float(), rtol=1e-5, atol=1e-6, equal_nan=True, msg=act
            )


@pytest.mark.parametrize("backend", WORKING)
def test_gradients_at_the_clamps_are_those_of_torch(backend):
    values = torch.tensor([-0.8, -0.7, 0.0, 0.7, 0.8])
    pairs = torch.cartesian_prod(values, values).requires_grad_()  # gate, up
    ids, weights = torch.zeros(len(pairs), 1).long(), torch.ones(len(pairs), 1)
    eye, act = torch.eye(2)[None], Activation("clamped_swiglu", limit=0.7, alpha=1.7, shift=1.0)
    down = torch.ones(1, 2, 1)
    found = ops.moe_mlp(pairs, ids, weights, eye, down, act=act, backend=backend)
    expected = torch.stack([activation(row, act, False) for row in pairs]).expand_as(found)
    testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(out.sum(), pairs)[0] for out in (found, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("layout", ["gpt_oss", "all_else"])
def test_unused_adapters_are_never_read_in_other_layouts(backend, layout):
    made, options = LAYOUTS[layout]
    inputs = make_moe_inputs(SHAPES["odd"], modality="text", **made).to(torch.float32)
    for tensor in (*inputs.gate_up_lora[:2], *inputs.down_lora[:2]):
        tensor.fill_(float("nan"))
    grad_out = torch.ones_like(inputs.hidden_states)
    for name, tensor in run(inputs, backend, grad_out, **options).items():
        assert tensor.isfinite().all(), name
        assert ("lora" in name) == (not tensor.any()), name


@pytest.mark.parametrize("backend", WORKING)
def test_a_transposed_stack_is_never_copied(backend):
    """Nothing of the size of an expert's matrix is allocated, forward or backward."""
    shape = Shape(T=2, K=1, E=64, H=96, I=96, r=2)
    inputs = make_moe_inputs(shape, transposed=True, modality="text").to(torch.float32)
    stacks = inputs.gate_up_proj, inputs.down_proj
    assert not any(stack.is_contiguous() for stack in stacks)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            known = {stack.untyped_storage().data_ptr() for stack in stacks}
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    own = tensor.untyped_storage().data_ptr() not in known
                    sizes.append(tensor.numel() if own else 0)
            return out

    weights = ExpertWeights(*stacks, *[None] * 9)
    form = activation_module.SILU
    implementation = backends.implementation("moe_mlp", backend)
    ids, modality = inputs.topk_ids, inputs.modality_ids
    with Sizes():
        out, saved = implementation.forward(
            inputs.hidden_states, ids, inputs.topk_weights.float(), modality, weights, form, True
        )
        needs = [True, True, *[False] * 6]
        implementation.backward(
            out, inputs.hidden_states, inputs.topk_weights.float(), weights, form, saved, needs
        )
    assert 0 < max(sizes) < min(stack.numel() for stack in stacks) // 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", WORKING)
def test_more_tokens_than_one_work_item_sums(backend, dtype, thread_count):
    """The CPU splits 1,100 tokens into several ranges, and every modality's segment with them."""
    thread_count(2)
    shape = Shape(T=1100, K=2, E=3, H=40, I=24, r=4)
    low = make_moe_inputs(shape, num_modalities=2, num_extra=1).to(dtype)
    grad_out = torch.randn(low.hidden_states.shape).to(dtype).double()
    expected = run(low.to(torch.float64), "reference", grad_out)
    for name, actual in run(low, backend, grad_out).items():
        testing.assert_close(actual, expected[name], dtype=dtype, name=name)


@pytest.mark.parametrize("backend", WORKING)
def test_fp32_adapters_are_rounded_as_a_cast_rounds_them(backend):
    """Kernels read fp32 adapters directly; the forward has the bits that cast adapters give."""
    mixed = make_moe_inputs(SHAPES["small"]).to(torch.bfloat16, lora_dtype=torch.float32)
    cast = mixed.to(torch.bfloat16)
    assert torch.equal(call(mixed, backend), call(cast, backend))


@pytest.mark.parametrize("backend", WORKING)
def test_fp32_adapters_on_a_bf16_base(backend):
    full = make_moe_inputs(SHAPES["small"], num_extra=1)
    mixed = full.to(torch.bfloat16, lora_dtype=torch.float32)
    grad_out = torch.randn(full.hidden_states.shape).bfloat16()
    results = run(mixed, backend, grad_out)
    expected = run(mixed.to(torch.float64), "reference", grad_out.double())
    for name, actual in results.items():
        assert actual.dtype == (torch.float32 if "lora" in name else torch.bfloat16), name
        testing.assert_close(actual, expected[name], dtype=torch.bfloat16, name=name)


@pytest.mark.parametrize("backend", WORKING)
def test_autocast_changes_nothing(backend):
    inputs = make_moe_inputs(SHAPES["small"]).to(torch.float32).requires_grad_()
    plain = call(inputs, backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = call(inputs, backend)
        cast.sum().backward()
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)
    expected = run(inputs.to(torch.float32), backend, torch.ones_like(plain))
    assert torch.equal(inputs.hidden_states.grad, expected["hidden_states"])


@pytest.mark.parametrize("backend", WORKING)
def test_hidden_states_of_another_dtype_come_back_as_they_went_in(backend):
    inputs = make_moe_inputs(SHAPES["tiny"]).to(torch.float32)
    out = call(inputs._replace(hidden_states=inputs.hidden_states.bfloat16()), backend)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("num_tokens", [0, 1, 2])
def test_few_tokens(backend, num_tokens):
    shape = Shape(T=num_tokens, K=2, E=4, H=16, I=8, r=3)
    low = make_moe_inputs(shape, modality="image", num_extra=1).to(torch.float32)
    grad_out = torch.ones(num_tokens, 16)
    expected = run(low.to(torch.float64), "reference", grad_out.double())
    for name, actual in run(low, backend, grad_out).items():
        testing.assert_close(actual, expected[name], name=name)


@pytest.mark.parametrize("backend", WORKING)
def test_non_contiguous_inputs(backend):
    inputs = make_moe_inputs(SHAPES["odd"]).to(torch.float32)
    expected = call(inputs, backend)
    odd = strided(inputs)
    assert not odd.gate_up_proj.is_contiguous()
    assert torch.equal(call(odd, backend), expected)


@pytest.mark.parametrize("backend", WORKING)
def test_padding_is_written_as_zeros_and_never_read(backend):
    inputs = make_moe_inputs(SHAPES["small"]).to(torch.float32)
    padding = inputs.modality_ids == -1
    assert padding.any()
    inputs.hidden_states[padding] = float("nan")
    inputs.topk_weights[padding] = float("nan")
    results = run(inputs, backend, torch.ones_like(inputs.hidden_states))
    assert (results["out"][padding] == 0).all()
    assert (results["hidden_states"][padding] == 0).all()
    assert (results["topk_weights"][padding] == 0).all()
    for name, tensor in results.items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("modality", ["text", None])
def test_unused_adapters_are_never_read_and_get_exact_zeros(backend, value, modality):
    inputs = make_moe_inputs(SHAPES["small"], modality=modality, num_extra=1).to(torch.float32)
    for tensor in (*inputs.gate_up_lora, *inputs.down_lora):
        tensor.fill_(value)
    results = run(inputs, backend, torch.ones_like(inputs.hidden_states))
    for name, tensor in results.items():
        assert tensor.isfinite().all(), name
        assert ("lora" in name) == (not tensor.any()), name


@pytest.mark.parametrize("trained", ["adapters", "hidden_states"])
@pytest.mark.parametrize("modality", ["mixed", "image", "text", "padding", None])
def test_work_follows_the_mask(modality, trained, matmul_flops):
    """The operations are exactly those of the base GEMMs and of the adapted rows' low-rank updates.

    So the base path does no low-rank work, and no gradient of a frozen weight is computed; either
    would raise the count.
    """
    shape = Shape(T=50, K=2, E=4, H=24, I=16, r=5)
    inputs = make_moe_inputs(shape, modality=modality, num_modalities=2).to(torch.float32)
    trainable = inputs.differentiable()
    for name, tensor in trainable.items():
        tensor.requires_grad_(("lora" in name) == (trained == "adapters"))
    out, forward = matmul_flops(lambda: call(inputs, "reference"))
    _, backward = matmul_flops(lambda: out.sum().backward())

    ids = torch.zeros(shape.T).long() if modality is None else inputs.modality_ids
    rows = torch.bincount(inputs.topk_ids[ids >= 0].flatten(), minlength=shape.E)
    padded = int((-(-rows // reference.BLOCK_M) * reference.BLOCK_M).sum())
    adapted = int((ids > 0).sum()) * shape.K
    base = 2 * padded * 3 * shape.H * shape.I
    pair = 2 * adapted * shape.r * (2 * shape.H + 3 * shape.I)  # A and B of both projections
    assert forward == base + pair
    assert backward == base + (2 * pair if trained == "adapters" else pair)
    assert (pair > 0) == (modality in ("mixed", "image"))


@pytest.mark.parametrize("backend", WORKING)
def test_only_asked_gradients_exist(backend):
    names = list(make_moe_inputs(SHAPES["tiny"], num_extra=1).differentiable())
    full = make_moe_inputs(SHAPES["tiny"], num_extra=1).to(torch.float32)
    expected = run(full, backend, torch.ones_like(full.hidden_states))
    for requested in names:
        inputs = make_moe_inputs(SHAPES["tiny"], num_extra=1).to(torch.float32)
        inputs.differentiable()[requested].requires_grad_()
        call(inputs, backend).sum().backward()
        for name, tensor in inputs.differentiable().items():
            if name == requested:
                testing.assert_close(tensor.grad, expected[name], name=name)
            else:
                assert tensor.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", WORKING)
def test_the_first_added_experts_may_be_frozen(backend, dtype, filled_memory):
    inputs = make_moe_inputs(SHAPES["odd"], num_modalities=2, num_extra=3)
    check_frozen_extra(inputs.to(dtype, lora_dtype=torch.float32), backend)


@pytest.mark.parametrize("backend", WORKING)
def test_frozen_added_experts_where_nothing_else_trains(backend, filled_memory):
    full = make_moe_inputs(SHAPES["odd"], num_extra=2).to(torch.float32)
    full = run(full, backend, torch.ones_like(full.hidden_states))
    for name in ("extra_gate_up_proj", "extra_down_proj"):
        inputs = make_moe_inputs(SHAPES["odd"], num_extra=2).to(torch.float32)
        weight = inputs.differentiable()[name].requires_grad_()
        call(inputs, backend, frozen_extra=1).sum().backward()
        assert not weight.grad[0].any()
        testing.assert_close(weight.grad[1], full[name][1], name=name)


def test_no_work_for_frozen_added_experts(matmul_flops):
    shape = Shape(T=50, K=2, E=4, H=24, I=16, r=5)

    inputs = make_moe_inputs(shape, num_extra=3).to(torch.float32).requires_grad_()

    def backward(frozen):
        loss = call(inputs, "reference", frozen_extra=frozen).sum()
        return matmul_flops(loss.backward)[1]

    rows = inputs.topk_ids[inputs.modality_ids >= 0].flatten()
    for frozen in (1, 2):
        spared = int(((rows >= shape.E) & (rows < shape.E + frozen)).sum())
        assert spared > 0
        assert backward(0) - backward(frozen) == 2 * spared * 3 * shape.H * shape.I


@pytest.mark.parametrize("frozen", [-1, 3, 1.0, True])
def test_frozen_extra_out_of_range(frozen):
    inputs = make_moe_inputs(SHAPES["tiny"], num_extra=2).to(torch.float32)
    with pytest.raises(ValueError, match=r"frozen_extra must be an integer in 0\.\.2"):
        call(inputs, None, frozen_extra=frozen)
    with pytest.raises(ValueError, match=r"frozen_extra must be an integer in 0\.\.0, got 1"):
        call(make_moe_inputs(SHAPES["tiny"]).to(torch.float32), None, frozen_extra=1)


@pytest.mark.parametrize("frozen", [-1, 3])
def test_the_ops_refuse_frozen_extra_out_of_range(frozen):
    inputs = make_moe_inputs(SHAPES["tiny"], num_extra=2, ranks=(0, 0)).to(torch.float32)
    extra = (None, inputs.extra_gate_up_proj, inputs.extra_down_proj, *[None] * 9)
    match = r"frozen_extra must be an integer in 0\.\.2, got"
    with pytest.raises(ValueError, match=match):
        torch.ops.moe_kernels.moe_mlp(*inputs[:5], *extra, frozen, *SILU, True, "reference")
    _, *saved = torch.ops.moe_kernels.moe_mlp(*inputs[:5], *extra, 0, *SILU, True, "reference")
    hidden_states, _, topk_weights, *stacks = inputs[:5]
    with pytest.raises(ValueError, match=match):
        torch.ops.moe_kernels.moe_mlp_backward(
            torch.ones_like(hidden_states), hidden_states, topk_weights, *stacks, *extra[1:],
            *saved, [True] * 4 + [False] * 4, frozen, *SILU, "reference",
        )  # fmt: skip


@pytest.mark.parametrize("backend", WORKING)
def test_retain_graph_and_repeated_runs_give_the_same_bits(backend):
    inputs = make_moe_inputs(SHAPES["small"], num_extra=1).to(torch.float32).requires_grad_()
    tensors = list(inputs.differentiable().values())
    out = call(inputs, backend)
    first = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(out.sum(), tensors)
    third = torch.autograd.grad(call(inputs, backend).sum(), tensors)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("backend", WORKING)
def test_saved_tensors_are_those_promised(backend):
    inputs = make_moe_inputs(SHAPES["small"]).to(torch.float32).requires_grad_()
    rows = SHAPES["small"].T * SHAPES["small"].K
    known = {id(t) for t in (*inputs.differentiable().values(), *inputs[:5])}
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        call(inputs, backend)
    large = [tuple(t.shape) for t in packed if id(t) not in known and t.is_floating_point()]
    shape = SHAPES["small"]
    scalings = [(1,), (1,)]
    assert sorted(large) == sorted(
        [(rows, 2 * shape.I), (rows, shape.r), (rows, shape.r), *scalings]
    )


@pytest.mark.parametrize("backend", WORKING)
def test_unwritten_memory_shows(backend, filled_memory):
    inputs = make_moe_inputs(SHAPES["odd"], num_extra=1, num_modalities=2).to(torch.float32)
    results = run(inputs, backend, torch.ones_like(inputs.hidden_states))
    for name, tensor in results.items():
        assert tensor.isfinite().all(), name


def bad(**changes):
    inputs = make_moe_inputs(SHAPES["tiny"], num_extra=1, bias=True).to(torch.float32)
    return inputs._replace(
        **{name: change(getattr(inputs, name)) for name, change in changes.items()}
    )


def with_field(field, change):
    return lambda lora: lora._replace(**{field: change(getattr(lora, field))})


def on_meta(tensor):
    return tensor.to("meta")


BAD = {
    "hidden rank": ({"hidden_states": lambda t: t[None]}, ValueError, "hidden_states must have 2"),
    "hidden size": ({"hidden_states": lambda t: t[:, 1:]}, ValueError, "gate_up_proj must be"),
    "hidden int": ({"hidden_states": lambda t: t.long()}, TypeError, "hidden_states must be float"),
    "ids float": ({"topk_ids": lambda t: t.float()}, TypeError, "topk_ids must be int64"),
    "ids int32": ({"topk_ids": lambda t: t.int()}, TypeError, "topk_ids must be int64"),
    "ids rank": ({"topk_ids": lambda t: t[0]}, ValueError, "topk_ids must have 2"),
    "ids rows": ({"topk_ids": lambda t: t[1:]}, ValueError, "topk_ids must have shape"),
    "ids high": ({"topk_ids": lambda t: t + 3}, ValueError, r"topk_ids must be in 0\.\.4"),
    "ids low": ({"topk_ids": lambda t: t - 1}, ValueError, r"topk_ids must be in 0\.\.4"),
    "weights shape": ({"topk_weights": lambda t: t[:, :1]}, ValueError, "topk_weights must have"),
    "weights int": ({"topk_weights": lambda t: t.long()}, TypeError, "topk_weights must be"),
    "gate_up rank": ({"gate_up_proj": lambda t: t[0]}, ValueError, "gate_up_proj must have 3"),
    "gate_up int": (
        {"gate_up_proj": lambda t: t.long()}, TypeError, "gate_up_proj must be float32",
    ),
    "gate_up odd": ({"gate_up_proj": lambda t: t[:, 1:]}, ValueError, "gate_up_proj must be"),
    "gate_up grad": (
        {"gate_up_proj": lambda t: t.requires_grad_()}, ValueError, "gate_up_proj requires grad",
    ),
    "down shape": ({"down_proj": lambda t: t[1:]}, ValueError, "down_proj must have shape"),
    "down dtype": ({"down_proj": lambda t: t.half()}, TypeError, "down_proj must be float32"),
    "mask float": ({"modality_ids": lambda t: t.float()}, TypeError, "modality_ids must be int64"),
    "mask shape": ({"modality_ids": lambda t: t[1:]}, ValueError, "modality_ids must have shape"),
    "mask high": ({"modality_ids": lambda t: t * 2}, ValueError, "modality_ids must be in"),
    "A and B dtypes differ": (
        {"gate_up_proj": lambda t: t.bfloat16(), "down_proj": lambda t: t.bfloat16(),
         "gate_up_bias": lambda _: None, "down_bias": lambda _: None,
         "gate_up_lora": with_field("lora_B", lambda t: t.bfloat16())},
        TypeError, "lora_A is torch.float32 but lora_B torch.bfloat16",
    ),
    "modalities differ": (
        {"down_lora": lambda _: make_moe_inputs(
            SHAPES["tiny"], num_modalities=2).to(torch.float32).down_lora},
        ValueError, "same number of modalities",
    ),
    "one extra": ({"extra_down_proj": lambda _: None}, ValueError, "given together"),
    "extra shape": (
        {"extra_gate_up_proj": lambda t: t[:, 1:]}, ValueError, "extra_gate_up_proj must have",
    ),
    "extra gate_up rank": (
        {"extra_gate_up_proj": lambda t: t[0]}, ValueError, "extra_gate_up_proj must have 3",
    ),
    "extra down rank": (
        {"extra_down_proj": lambda t: t[0]}, ValueError, "extra_down_proj must have shape",
    ),
    "extra dtype": ({"extra_down_proj": lambda t: t.half()}, TypeError, "extra_down_proj must be"),
}  # fmt: skip

BAD |= {
    name: ({lora: with_field(field, change)}, error, message)
    for name, lora, field, change, error, message in (
        ("A rank", "gate_up_lora", "lora_A", lambda t: t[0], ValueError, "lora_A must have 4"),
        ("A in", "down_lora", "lora_A", lambda t: t[..., 1:], ValueError, r"down_lora.lora_A"),
        ("A experts", "down_lora", "lora_A", lambda t: t[:, :2], ValueError, r"down_lora.lora_A"),
        ("A dtype", "down_lora", "lora_A", lambda t: t.half(), TypeError, "must be float32"),
        ("A none", "down_lora", "lora_A", lambda _: None, TypeError,
         "down_lora.lora_A must be a tensor, got NoneType"),
        ("B rank", "gate_up_lora", "lora_B", lambda t: t[0], ValueError, "lora_B must have 4"),
        ("B dtype", "gate_up_lora", "lora_B", lambda t: t.half(), TypeError,
         "gate_up_lora.lora_B must be float32"),
        ("B shape", "down_lora", "lora_B", lambda t: t[:, 1:], ValueError, r"down_lora.lora_B"),
        ("scaling shape", "down_lora", "scaling", lambda t: t[None], ValueError,
         "scaling must have"),
        ("scaling int", "down_lora", "scaling", lambda t: t.long(), TypeError,
         "down_lora.scaling must be float32"),
        ("scaling grad", "down_lora", "scaling", lambda t: t.requires_grad_(), ValueError,
         "down_lora.scaling requires grad, but scaling is a constant"),
        ("scaling number", "down_lora", "scaling", lambda _: 2.0, TypeError,
         "down_lora.scaling must be a tensor, got float"),
    )
}  # fmt: skip
BAD |= {
    f"{name} {kind}": ({name: change}, error, message)
    for name in ("gate_up_bias", "down_bias")
    for kind, change, error, message in (
        ("shape", lambda t: t[1:], ValueError, f"{name} must have shape"),
        ("dtype", lambda t: t.half(), TypeError, f"{name} must be float32"),
        (
            "grad",
            lambda t: t.requires_grad_(),
            ValueError,
            f"{name} requires grad, but the experts",
        ),
    )
}
TENSORS = (
    *MoeInputs._fields[:6], "extra_gate_up_proj", "extra_down_proj", "gate_up_bias", "down_bias",
)  # fmt: skip
BAD |= {
    f"{name} list": ({name: lambda t: t.tolist()}, TypeError, f"^{name} must be a tensor, got list")
    for name in TENSORS
}
BAD |= {
    f"{name} device": ({name: on_meta}, ValueError, f"^{name} must be on cpu, got meta")
    for name in TENSORS[1:]
}
for lora in ("gate_up_lora", "down_lora"):
    BAD[f"{lora} tuple"] = {lora: tuple}, TypeError, f"{lora} must be a LoraWeights, got tuple"
    for field in LoraWeights._fields:
        change = {lora: with_field(field, on_meta)}
        BAD[f"{lora}.{field} device"] = change, ValueError, f"^{lora}.{field} must be on cpu"


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(bad(**changes), None)


def test_bad_names_are_refused():
    inputs = bad()
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        call(inputs, "gpu")
    with pytest.raises(RuntimeError, match="backend 'triton' (is not available: .+|needs tensors)"):
        call(inputs, "triton")


BAD_FORMS = {
    "name": ({"act": "relu"}, ValueError, "act must be one of 'silu', .*, got 'relu'"),
    "type": ({"act": torch.relu}, TypeError, "act must be a str or an Activation, got builtin"),
    "gated": ({"act": Activation("silu", gated=1)}, TypeError, "gated must be True or False"),
    "alpha": ({"act": Activation("silu", alpha=2.0)}, ValueError, "values of act 'clamped_swiglu'"),
    "limit": (
        {"act": Activation("clamped_swiglu", limit=0.0)}, ValueError, "a limit above 0.*limit=0.0",
    ),
    "shift": (
        {"act": Activation("clamped_swiglu", shift=float("nan"))}, ValueError, "finite.*shift=nan",
    ),
    "number": ({"act": Activation("clamped_swiglu", limit="7")}, TypeError, "limit of act must be"),
    "no gate": (
        {"act": Activation("clamped_swiglu", gated=False)}, ValueError, "has a gate always",
    ),
    "order": (
        {"act": Activation("gelu", gated=False), "interleaved": True}, ValueError,
        "interleaved needs gate and up",
    ),
    "order type": ({"interleaved": 1}, TypeError, "interleaved must be True or False, got 1"),
    "rows": (
        {"act": Activation("gelu", gated=False)}, ValueError,
        r"down_proj must have shape \(4, 8, 12\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FORMS)
def test_bad_forms_are_refused(case):
    options, error, message = BAD_FORMS[case]
    with pytest.raises(error, match=message):
        call(bad(), None, **options)


@NEEDS_CUDA
@pytest.mark.parametrize("backend", testing.working_backends("cuda"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["two_modalities", "added_experts", "no_mask"])
def test_on_cuda(backend, dtype, variant):
    low = make_moe_inputs(SHAPES["small"], **VARIANTS[variant]).to(dtype)
    grad_out = torch.randn(low.hidden_states.shape).to(dtype)
    expected = run(low.to(torch.float64), "reference", grad_out)
    for name, actual in run(on_device(low, "cuda"), backend, grad_out.cuda()).items():
        assert actual.is_cuda, name
        testing.assert_close(actual.cpu(), expected[name], dtype=dtype, name=name)


@pytest.mark.parametrize("backend", testing.working_backends())
def test_a_call_that_does_not_train_builds_no_empty_tensors_to_save(backend, monkeypatch):
    inputs = make_moe_inputs(SHAPES["tiny"], seed=3).to(torch.float32)
    expected = call(inputs, backend)
    monkeypatch.setattr(ops.moe_mlp.__globals__["autograd"], "nothing_saved", None)
    assert torch.equal(call(inputs, backend), expected)
