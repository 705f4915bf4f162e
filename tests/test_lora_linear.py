"""``lora_linear``: gradients, every backend against the float64 reference, text bits, bad input."""

import pytest
import torch

from moe_kernels import backends, ops, testing
from moe_kernels.ops import LoraWeights
from moe_kernels.testing import make_modality_ids

WORKING = [name for name, why_not in backends.available().items() if why_not is None]


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
    out = ops.lora_linear(
        leaves[0],
        weight,
        bias,
        LoraWeights(*leaves[1:], lora.scaling),
        modality_ids=modality_ids,
        backend=backend,
    )
    return [out, *torch.autograd.grad(out, leaves, grad_out.to(dtype))]


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("modality", ["mixed", "text", None])
def test_gradcheck(backend, modality):
    x, weight, bias, lora, modality_ids = make(num_tokens=6, inner=4, out=3, modality=modality)

    def function(x, a, b):
        return ops.lora_linear(
            x,
            weight,
            bias,
            LoraWeights(a, b, lora.scaling),
            modality_ids=modality_ids,
            backend=backend,
        )

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (x, *lora[:2])])


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("modality", ["mixed", None])
def test_opcheck(backend, modality):
    x, weight, bias, lora, modality_ids = make(modality=modality)
    args = (x.requires_grad_(), weight, bias, modality_ids, *lora, True, backend)
    torch.library.opcheck(torch.ops.moe_kernels.lora_linear.default, args)


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("modality", ["mixed", "text", "image", "padding", None])
@pytest.mark.parametrize("size", [(0, 7, 5), (1, 7, 5), (37, 41, 19), (200, 128, 64)])
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
    for actual, wanted in zip(
        run(args, dtype, lora_dtype, backend, grad_out), expected, strict=True
    ):
        wanted = torch.zeros_like(actual) if wanted is None else wanted
        testing.assert_close(actual, wanted, dtype=dtype)


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
    out = ops.lora_linear(
        x.view(3, 4, -1),
        weight,
        bias,
        lora,
        modality_ids=modality_ids.view(3, 4).int(),
        backend=backend,
    )
    assert torch.equal(out, flat.view(3, 4, -1))
    assert out.isfinite().all()


def test_bad_input_is_refused():
    x, weight, bias, lora, modality_ids = make()

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
        ({"modality_ids": modality_ids.float()}, TypeError, "modality_ids must be int64"),
        ({"modality_ids": modality_ids[1:]}, ValueError, "modality_ids must have shape"),
        ({"modality_ids": modality_ids + 3}, ValueError, "modality_ids must be in"),
        ({"weight": weight.to("meta")}, ValueError, "weight must be on cpu"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            call(**changes)
