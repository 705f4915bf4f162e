"""``lora_linear``: gradients, every backend against the float64 reference, text bits, bad input."""

import pytest
import torch
from support.covers import each_pair
from support.devices import NEEDS_CUDA

from moe_kernels import ops, testing
from moe_kernels.ops import LoraWeights
from moe_kernels.ops.lora_linear.rows import dispatch_shapes
from moe_kernels.testing import make_modality_ids

WORKING = testing.working_backends()


def make(num_tokens=11, inner=7, out=5, rank=3, modality="mixed", num_modalities=2, bias=True):
    generator = torch.Generator().manual_seed(num_tokens)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64) / size[-1] ** 0.5

    lora = LoraWeights(
        randn(num_modalities, rank, inner),
        randn(num_modalities, out, rank),
        torch.rand(num_modalities, generator=generator) + 0.5,
    )
    modality_ids = None
    if modality is not None:
        modality_ids = make_modality_ids(
            num_tokens, num_modalities, kind=modality, generator=generator
        )
    x = torch.randn(num_tokens, inner, generator=generator, dtype=torch.float64)
    return x, randn(out, inner), randn(out) if bias else None, lora, modality_ids


def run(args, dtype, lora_dtype, backend, grad_out):
    x, weight, bias, lora, modality_ids = args
    x, weight, a, b = (
        t.detach().to(d)
        for t, d in ((x, dtype), (weight, dtype), (lora[0], lora_dtype), (lora[1], lora_dtype))
    )
    bias = None if bias is None else bias.to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    lora = LoraWeights(*leaves[1:], lora.scaling)
    options = {"modality_ids": modality_ids, "backend": backend}
    out = ops.lora_linear(leaves[0], weight, bias, lora, **options)
    return [out, *torch.autograd.grad(out, leaves, grad_out.to(dtype))]


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("modality", ["mixed", "text", None])
def test_gradcheck(backend, modality):
    x, weight, bias, lora, modality_ids = make(num_tokens=6, inner=4, out=3, modality=modality)

    def function(x, a, b):
        pair, options = LoraWeights(a, b, lora.scaling), {"modality_ids": modality_ids}
        return ops.lora_linear(x, weight, bias, pair, **options, backend=backend)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (x, *lora[:2])])


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("modality", ["mixed", None])
def test_opcheck(backend, modality):
    x, weight, bias, lora, modality_ids = make(modality=modality)
    ids = torch.zeros(11, dtype=torch.int64) if modality_ids is None else modality_ids
    torch.library.opcheck(torch.ops.moe_kernels.linear_dispatch.default, (ids, 2, backend))
    dispatched = ops.linear_dispatch(ids, 2, backend=backend)
    args = (x.requires_grad_(), weight, bias, *dispatched, *lora, True, backend)
    torch.library.opcheck(torch.ops.moe_kernels.lora_linear.default, args)


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("modality", ["mixed", "text", None])
def test_opcheck_of_the_backward(backend, dtype, modality):
    """The backward op has no autograd formula, so only its schema and fake version are checked."""
    x, weight, bias, lora, modality_ids = make(modality=modality)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    lora = LoraWeights(*(t.float() for t in lora))
    ids = torch.zeros(11, dtype=torch.int64) if modality_ids is None else modality_ids
    dispatched = ops.linear_dispatch(ids, 2, backend=backend)
    _, u = torch.ops.moe_kernels.lora_linear(x, weight, bias, *dispatched, *lora, True, backend)
    saved = (u, dispatched.perm, dispatched.segment_offsets)
    grad_out = torch.randn(x.shape[0], weight.shape[0], dtype=dtype)
    for needs in ([True] * 3, [True, False, False], [False, True, True], [False, False, True]):
        torch.library.opcheck(
            torch.ops.moe_kernels.lora_linear_backward.default,
            (grad_out, x, weight, *lora, *saved, needs, backend),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("modality", ["mixed", "text", "image", None])
def test_saved_tensors_are_those_promised(backend, modality):
    x, weight, bias, lora, modality_ids = make(37, 41, 19, modality=modality)
    leaves = [t.requires_grad_() for t in (x, *lora[:2])]
    known = {t.data_ptr() for t in (*leaves, weight)}
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        ops.lora_linear(x, weight, bias, lora, modality_ids=modality_ids, backend=backend)
    others = [t for t in packed if t.data_ptr() not in known]
    floats = [tuple(t.shape) for t in others if t.is_floating_point()]
    assert sorted(floats) == [(2,), (37, 3)]  # the scaling and u
    ids = [tuple(t.shape) for t in others if not t.is_floating_point()]
    assert sorted(ids) == [(4,), (37,)]  # segment_offsets and perm
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(packed.append, lambda t: t):
        packed.clear()
        ops.lora_linear(x, weight, bias, lora, modality_ids=modality_ids, backend=backend)
    assert not packed


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("modality", ["text", "padding", None])
def test_unused_adapters_are_never_read_and_get_exact_zeros(backend, value, modality):
    x, weight, bias, lora, modality_ids = make(200, 128, 64, modality=modality)
    lora = LoraWeights(*(torch.full_like(t, value) for t in lora))
    args, grad_out = (x, weight, bias, lora, modality_ids), torch.ones(200, 64)
    out, grad_x, *grads = run(args, torch.float32, torch.float32, backend, grad_out)
    for tensor in (out, grad_x):
        assert tensor.isfinite().all()
        assert tensor.any()
    for grad in grads:
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("trained", ["adapters", "hidden_states"])
@pytest.mark.parametrize("modality", ["mixed", "image", "text", "padding", None])
def test_work_follows_the_mask(modality, trained, matmul_flops):
    """The operations are exactly those of the base GEMM and of the adapted rows' low-rank update.

    So the base path does no low-rank work, and no gradient of the frozen weight is computed.
    """
    num_tokens, inner, out_features, rank = 50, 24, 16, 5
    x, weight, bias, lora, modality_ids = make(
        num_tokens, inner, out_features, rank, modality=modality
    )
    for tensor in lora[:2] if trained == "adapters" else (x,):
        tensor.requires_grad_()

    def forward():
        return ops.lora_linear(
            x, weight, bias, lora, modality_ids=modality_ids, backend="reference"
        )

    base = 2 * num_tokens * inner * out_features
    adapted = 0 if modality_ids is None else int((modality_ids > 0).sum())
    out, flops = matmul_flops(forward)
    assert flops == base + 2 * adapted * rank * (inner + out_features)
    _, flops = matmul_flops(out.sum().backward)
    if trained == "adapters":  # u = x A^T is saved, so only du, dA and dB are computed
        assert flops == 2 * adapted * rank * (inner + 2 * out_features)
    else:
        assert flops == base + 2 * adapted * rank * (inner + out_features)
    assert (adapted > 0) == (modality in ("mixed", "image"))


@each_pair(
    size=[(0, 7, 5), (1, 7, 5), (37, 41, 19), (200, 128, 64)],
    modality=["mixed", "text", "image", "padding", None], bias=[True, False],
    dtype=testing.TOLERANCES, backend=WORKING,
)  # fmt: skip
def test_matches_the_definition(backend, dtype, bias, modality, size):
    num_tokens, inner, out = size
    args = make(num_tokens, inner, out, modality=modality, bias=bias)
    lora_dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    grad_out = torch.randn(num_tokens, out).to(dtype).double()
    x, weight, b, lora, modality_ids = [*(to_and_back(t, dtype) for t in args[:3]), *args[3:]]
    lora = LoraWeights(*(to_and_back(t, lora_dtype) for t in lora[:2]), lora.scaling)
    leaves = [t.clone().requires_grad_() for t in (x, *lora[:2])]
    expected = definition(leaves[0], weight, b, *leaves[1:], lora.scaling, modality_ids)
    expected = [expected, *torch.autograd.grad(expected, leaves, grad_out, allow_unused=True)]
    args = (x, weight, b, lora, modality_ids)
    for actual, reference in zip(
        run(args, dtype, lora_dtype, backend, grad_out), expected, strict=True
    ):
        reference = torch.zeros_like(actual) if reference is None else reference
        testing.assert_close(actual, reference, dtype=dtype)


def to_and_back(tensor, dtype):
    return None if tensor is None else tensor.to(dtype).double()


def definition(x, weight, bias, lora_a, lora_b, scaling, modality_ids):
    out = torch.nn.functional.linear(x, weight, bias)
    if modality_ids is None:
        return out
    for m in range(lora_a.shape[0]):
        mask = (modality_ids == m + 1).double()[:, None]
        out = out + mask * scaling[m] * (x @ lora_a[m].T @ lora_b[m].T)
    return out


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_text_rows_keep_their_bits(backend, dtype):
    x, weight, bias, lora, modality_ids = make(200, 512, 512)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    lora = LoraWeights(*(t.to(dtype) for t in lora[:2]), lora.scaling)
    text = modality_ids == 0
    expected = torch.nn.functional.linear(x, weight, bias)[text]
    for value in (1.0, 1e30, float("inf"), float("nan")):
        broken = lora._replace(lora_A=lora.lora_A * value, lora_B=lora.lora_B * value)
        out = ops.lora_linear(x, weight, bias, broken, modality_ids=modality_ids, backend=backend)
        assert torch.equal(out[text], expected)
    assert not torch.equal(out[modality_ids == 1], expected[:1].expand(1, -1))


@pytest.mark.parametrize("backend", WORKING)
def test_leading_dimensions_and_unwritten_memory(backend, filled_memory):
    x, weight, bias, lora, modality_ids = make(12)
    flat = ops.lora_linear(x, weight, bias, lora, modality_ids=modality_ids, backend=backend)
    x, modality_ids = x.view(3, 4, -1), modality_ids.view(3, 4).int()
    out = ops.lora_linear(x, weight, bias, lora, modality_ids=modality_ids, backend=backend)
    assert torch.equal(out, flat.view(3, 4, -1))
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_that_share_a_dispatch_keep_their_bits(backend, dtype):
    """Two layers of different widths on the same tokens share one dispatch."""
    for inner, out in ((40, 24), (24, 72)):
        x, weight, bias, lora, modality_ids = make(37, inner, out)
        x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
        lora = LoraWeights(*(t.float() for t in lora))
        dispatched = ops.linear_dispatch(modality_ids, 2, backend=backend)
        results = []
        for rows in ({"modality_ids": modality_ids}, {"dispatched": dispatched}):
            leaves = [t.detach().clone().requires_grad_() for t in (x, *lora[:2])]
            pair = LoraWeights(*leaves[1:], lora.scaling)
            out = ops.lora_linear(leaves[0], weight, bias, pair, **rows, backend=backend)
            results.append([out, *torch.autograd.grad(out.sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", WORKING)
def test_a_dispatch_that_does_not_fit_is_refused(backend):
    x, weight, bias, lora, modality_ids = make()
    dispatched = ops.linear_dispatch(modality_ids, 2, backend=backend)

    def call(match, error=ValueError, **given):
        with pytest.raises(error, match=match):
            ops.lora_linear(x, weight, bias, lora, **given, backend=backend)

    call("modality_ids or dispatched, not both", modality_ids=modality_ids, dispatched=dispatched)
    call("dispatched must be a LinearDispatch, got tuple", TypeError, dispatched=tuple(dispatched))
    call("dispatched.perm must have shape", dispatched=dispatched._replace(perm=modality_ids[1:]))
    other = ops.linear_dispatch(modality_ids, 3, backend=backend)
    call("dispatched.segment_offsets must have shape", dispatched=other)
    cut = dispatched._replace(tiles=dispatched.tiles.new_empty(3, 99))
    call("dispatched.tiles must have shape", dispatched=cut)
    # A dispatch for another kind of backend differs in its tiles.
    call(rf"make it by linear_dispatch\(modality_ids, 2, backend='{backend}'\)", dispatched=cut)
    meta = dispatched._replace(segment_offsets=dispatched.segment_offsets.to("meta"))
    call("dispatched.segment_offsets must be on cpu, got meta", dispatched=meta)
    for field, tensor in dispatched._asdict().items():
        name = f"dispatched.{field}"
        narrow, listed = tensor.int(), tensor.tolist()
        call(f"{name} must be int64", TypeError, dispatched=dispatched._replace(**{field: narrow}))
        call(
            f"{name} must be a tensor", TypeError, dispatched=dispatched._replace(**{field: listed})
        )
    strided = dispatched._replace(perm=dispatched.perm.repeat_interleave(2)[::2])
    call(r"dispatched.perm must be contiguous, has strides \(2,\)", dispatched=strided)


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("shift", [-100, 100])
def test_a_dispatch_with_values_out_of_range_is_refused(backend, shift):
    x, weight, bias, lora, modality_ids = make()
    dispatched = ops.linear_dispatch(modality_ids, 2, backend=backend)
    for field, tensor in dispatched._asdict().items():
        if field == "groups" or tensor.numel() == 0:  # forward does not read the groups' values
            continue
        wrong = dispatched._replace(**{field: tensor + shift})
        error = RuntimeError if backend == "cpu" else ValueError
        with pytest.raises(error, match=f"{field}.* must "):
            ops.lora_linear(x, weight, bias, lora, dispatched=wrong, backend=backend)


@pytest.mark.parametrize("backend", [*WORKING, None])
def test_bad_ids_are_refused_before_they_are_sorted(backend):
    ids = make()[-1]
    cases = [
        ((ids.tolist(), 2), TypeError, "modality_ids must be a tensor, got list"),
        ((ids.float(), 2), TypeError, "modality_ids must be int64"),
        ((ids.view(1, -1), 2), ValueError, "modality_ids must have 1 dimensions, got 2"),
        ((ids + 3, 2), ValueError, r"modality_ids must be in -1\.\.2"),
        ((ids, -1), ValueError, "num_modalities must be at least 0, got -1"),
        ((ids, [2]), TypeError, "num_modalities must be int, got list"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            ops.linear_dispatch(*arguments, backend=backend)
    with pytest.raises(ValueError, match="unknown backend 'xx'; the backends are"):
        ops.linear_dispatch(ids, 2, backend="xx")


@pytest.mark.parametrize("backend", WORKING)
def test_ids_of_any_integer_type_are_sorted_alike(backend):
    ids = make()[-1]
    expected = ops.linear_dispatch(ids, 2, backend=backend)
    for dtype in (torch.int32, torch.int8):
        dispatched = ops.linear_dispatch(ids.to(dtype), 2, backend=backend)
        for field, other in zip(dispatched, expected, strict=True):
            assert field.dtype == torch.int64 and torch.equal(field, other)
    assert len(ops.linear_dispatch(ids, 2)) == len(expected)  # the backend may be left out


def test_a_backend_without_tiles_needs_no_count_of_them():
    for backend in ("reference", "cpu"):
        assert dispatch_shapes(5, 2, backend) == ((5,), (4,), (3, 0), (3, 0))


def test_bad_input_is_refused():
    x, weight, bias, lora, modality_ids = make()
    ids = torch.arange(2)

    def call(x=x, weight=weight, bias=bias, lora=lora, modality_ids=modality_ids):
        ops.lora_linear(x, weight, bias, lora, modality_ids=modality_ids)

    cases = [
        ({"x": x[:, 1:]}, ValueError, "hidden_states must be"),
        ({"x": x.long()}, TypeError, "hidden_states must be float32"),
        ({"weight": weight[0]}, ValueError, "weight must have 2"),
        ({"weight": weight.clone().requires_grad_()}, ValueError, "weight requires grad"),
        ({"bias": bias[1:]}, ValueError, "bias must have shape"),
        ({"bias": bias.half()}, TypeError, "bias must be float64"),
        ({"lora": lora._replace(lora_A=lora.lora_A[0])}, ValueError, "lora_A must have 3"),
        ({"lora": lora._replace(lora_A=lora.lora_A[..., 1:])}, ValueError, "lora_A must be"),
        ({"lora": lora._replace(lora_B=lora.lora_B[:, 1:])}, ValueError, "lora_B must have"),
        ({"lora": lora._replace(scaling=lora.scaling[1:])}, ValueError, "scaling must have"),
        ({"lora": lora._replace(lora_B=lora.lora_B[0])}, ValueError, "lora_B must have 3"),
        ({"lora": lora._replace(lora_A=lora.lora_A.half())}, TypeError, "lora_A must be float64"),
        ({"lora": lora._replace(lora_B=lora.lora_B.float())}, TypeError, "lora_B must be float64"),
        ({"lora": lora._replace(scaling=ids)}, TypeError, "lora.scaling must be float32"),
        (
            {"lora": lora._replace(scaling=lora.scaling.clone().requires_grad_())}, ValueError,
            "lora.scaling requires grad, but scaling is a constant",
        ),
        ({"modality_ids": modality_ids.float()}, TypeError, "modality_ids must be int64"),
        ({"modality_ids": modality_ids[1:]}, ValueError, "modality_ids must have shape"),
        ({"modality_ids": modality_ids + 3}, ValueError, "modality_ids must be in"),
        ({"x": x.tolist()}, TypeError, "hidden_states must be a tensor, got list"),
        (
            {"weight": weight * weight.new_ones(1).requires_grad_()}, ValueError,
            "weight was computed from a tensor that requires grad, so detach it",
        ),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor, got float"),
        ({"modality_ids": [0]}, TypeError, "modality_ids must be a tensor, got list"),
        ({"lora": tuple(lora)}, TypeError, "lora must be a LoraWeights, got tuple"),
        ({"lora": None}, TypeError, "lora must be a LoraWeights, got NoneType"),
        ({"weight": weight.to("meta")}, ValueError, "^weight must be on cpu"),
        ({"bias": bias.to("meta")}, ValueError, "^bias must be on cpu"),
        ({"modality_ids": modality_ids.to("meta")}, ValueError, "^modality_ids must be on cpu"),
        *(
            ({"lora": lora._replace(**{field: value})}, error, f"^lora.{field} must be {message}")
            for field, tensor in lora._asdict().items()
            for value, error, message in (
                (tensor.to("meta"), ValueError, "on cpu"),
                (None, TypeError, "a tensor, got NoneType"),
            )
        ),
    ]  # fmt: skip
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            call(**changes)


@NEEDS_CUDA
@pytest.mark.parametrize("backend", testing.working_backends("cuda"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("modality", ["mixed", "text", None])
def test_on_cuda(backend, dtype, modality):
    x, weight, bias, lora, modality_ids = make(200, 128, 64, modality=modality)
    x, weight, bias = (to_and_back(t, dtype) for t in (x, weight, bias))
    lora = LoraWeights(*(to_and_back(t, torch.float32) for t in lora[:2]), lora.scaling)
    grad_out = torch.randn(200, 64).to(dtype)
    args = (x, weight, bias, lora, modality_ids)
    expected = run(args, torch.float64, torch.float64, "reference", grad_out)
    cuda = (*(t.cuda() for t in args[:3]), LoraWeights(*(t.cuda() for t in lora)))
    cuda = (*cuda, None if modality_ids is None else modality_ids.cuda())
    actual = run(cuda, dtype, torch.float32, backend, grad_out.cuda())
    for tensor, reference in zip(actual, expected, strict=True):
        assert tensor.is_cuda
        testing.assert_close(tensor.cpu(), reference, dtype=dtype)
