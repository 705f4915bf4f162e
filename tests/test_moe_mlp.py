"""``moe_mlp``: gradients of the reference, every backend against it, hard cases, bad input."""

import pytest
import torch

from moe_kernels import backends, ops, testing
from moe_kernels.ops import LoraWeights
from moe_kernels.testing import SHAPES, Shape, make_moe_inputs

WORKING = [name for name, why_not in backends.available().items() if why_not is None]

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


def call(inputs, backend):
    return ops.moe_mlp(*inputs[:5], **inputs.keywords(), backend=backend)


def run(inputs, backend, grad_out):
    """Output and gradients by name."""
    inputs.requires_grad_()
    out = call(inputs, backend)
    tensors = inputs.differentiable()
    grads = torch.autograd.grad(out, list(tensors.values()), grad_out.to(out.dtype))
    return {"out": out, **dict(zip(tensors, grads, strict=True))}


# The full numerical Jacobian for these, a random projection of it for the others.
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


def replace(inputs, tensors):
    """``inputs`` with differentiable tensors replaced by name."""
    plain = {name: tensor for name, tensor in tensors.items() if "." not in name}
    for name in ("gate_up_lora", "down_lora"):
        if f"{name}.lora_A" in tensors:
            lora = getattr(inputs, name)
            plain[name] = LoraWeights(
                tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], lora.scaling
            )
    return inputs._replace(**plain)


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("variant", ["added_experts", "gate_up_only", "no_mask"])
def test_opcheck(backend, variant):
    inputs = make_moe_inputs(SHAPES["tiny"], **VARIANTS[variant]).to(torch.float32)
    inputs.requires_grad_()
    loras = [*(inputs.gate_up_lora or (None,) * 3), *(inputs.down_lora or (None,) * 3)]
    args = (*inputs[:6], inputs.extra_gate_up_proj, inputs.extra_down_proj, *loras)
    torch.library.opcheck(torch.ops.moe_kernels.moe_mlp.default, (*args, True, backend))


@pytest.mark.parametrize("shape", ["tiny", "odd", "small"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
@pytest.mark.parametrize("backend", WORKING)
def test_backend_matches_the_float64_reference(backend, dtype, variant, shape):
    seed = len(variant) + len(shape)
    low = make_moe_inputs(SHAPES[shape], seed=seed, **VARIANTS[variant]).to(dtype)
    grad_out = torch.randn(low.hidden_states.shape, dtype=torch.float64).to(dtype).double()
    expected = run(low.to(torch.float64), "reference", grad_out)
    for name, actual in run(low, backend, grad_out).items():
        testing.assert_close(actual, expected[name], dtype=dtype, name=name)


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

    def strided(tensor):
        return None if tensor is None else tensor.transpose(0, -1).contiguous().transpose(0, -1)

    fields = {}
    for name, value in inputs._asdict().items():
        fields[name] = (
            LoraWeights(*map(strided, value)) if isinstance(value, LoraWeights) else strided(value)
        )
    odd = inputs._replace(**fields)
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
def test_unused_adapters_get_exact_zeros(backend):
    inputs = make_moe_inputs(SHAPES["small"], modality="text").to(torch.float32)
    results = run(inputs, backend, torch.ones_like(inputs.hidden_states))
    for name, grad in results.items():
        assert ("lora" in name) == (not grad.any()), name


@pytest.mark.parametrize("backend", WORKING)
def test_only_asked_gradients_exist(backend):
    names = list(make_moe_inputs(SHAPES["tiny"], num_extra=1).differentiable())
    full = make_moe_inputs(SHAPES["tiny"], num_extra=1).to(torch.float32)
    expected = run(full, backend, torch.ones_like(full.hidden_states))
    for wanted in names:
        inputs = make_moe_inputs(SHAPES["tiny"], num_extra=1).to(torch.float32)
        inputs.differentiable()[wanted].requires_grad_()
        call(inputs, backend).sum().backward()
        for name, tensor in inputs.differentiable().items():
            if name == wanted:
                testing.assert_close(tensor.grad, expected[name], name=name)
            else:
                assert tensor.grad is None


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
    inputs = make_moe_inputs(SHAPES["tiny"], num_extra=1).to(torch.float32)
    return inputs._replace(
        **{name: change(getattr(inputs, name)) for name, change in changes.items()}
    )


def with_field(field, change):
    return lambda lora: lora._replace(**{field: change(getattr(lora, field))})


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
    "gate_up odd": ({"gate_up_proj": lambda t: t[:, 1:]}, ValueError, "gate_up_proj must be"),
    "gate_up grad": (
        {"gate_up_proj": lambda t: t.requires_grad_()}, ValueError, "gate_up_proj requires grad",
    ),
    "down shape": ({"down_proj": lambda t: t[1:]}, ValueError, "down_proj must have shape"),
    "down dtype": ({"down_proj": lambda t: t.half()}, TypeError, "down_proj must be float32"),
    "mask float": ({"modality_ids": lambda t: t.float()}, TypeError, "modality_ids must be int64"),
    "mask shape": ({"modality_ids": lambda t: t[1:]}, ValueError, "modality_ids must have shape"),
    "mask high": ({"modality_ids": lambda t: t * 2}, ValueError, "modality_ids must be in"),
    "A rank": (
        {"gate_up_lora": with_field("lora_A", lambda t: t[0])}, ValueError, "lora_A must have 4",
    ),
    "A in": (
        {"down_lora": with_field("lora_A", lambda t: t[..., 1:])}, ValueError, r"down_lora.lora_A",
    ),
    "A experts": (
        {"down_lora": with_field("lora_A", lambda t: t[:, :2])}, ValueError, r"down_lora.lora_A",
    ),
    "A dtype": (
        {"down_lora": with_field("lora_A", lambda t: t.half())}, TypeError, "must be float32",
    ),
    "B shape": (
        {"down_lora": with_field("lora_B", lambda t: t[:, 1:])}, ValueError, r"down_lora.lora_B",
    ),
    "scaling shape": (
        {"down_lora": with_field("scaling", lambda t: t[None])}, ValueError, "scaling must have",
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
    "extra dtype": ({"extra_down_proj": lambda t: t.half()}, TypeError, "extra_down_proj must be"),
    "device": ({"topk_weights": lambda t: t.to("meta")}, ValueError, "topk_weights must be on cpu"),
    "lora device": (
        {"gate_up_lora": with_field("lora_B", lambda t: t.to("meta"))}, ValueError, "on cpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(bad(**changes), None)


def test_bad_names_are_refused():
    inputs = bad()
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        call(inputs, "gpu")
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: .+"):
        call(inputs, "triton")
    with pytest.raises(ValueError, match="act must be 'silu'"):
        ops.moe_mlp(*inputs[:5], act="relu")
