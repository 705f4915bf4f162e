"""The Triton kernels against the float64 reference; where there is no GPU, in the interpreter.

``test_triton.py`` runs these in processes of their own: Triton decides when it is first imported
whether kernels are interpreted.
"""

import pytest
import torch
from test_moe_mlp import VARIANTS, call, run

from moe_kernels.ops import LoraWeights, lora_linear
from moe_kernels.testing import SHAPES, Shape, assert_close, make_moe_inputs

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter's products of bfloat16 are wrong.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


def on_device(inputs):
    def move(value):
        if isinstance(value, LoraWeights):
            return LoraWeights(*map(move, value))
        return None if value is None else value.to(DEVICE)

    return type(inputs)(*map(move, inputs))


def check(dtype, shape, seed=0, **variant):
    low = make_moe_inputs(shape, seed=seed, **variant)
    low = low.to(dtype, lora_dtype=torch.float32)
    grad_out = torch.randn(low.hidden_states.shape, dtype=torch.float64).to(dtype).double()
    expected = run(low.to(torch.float64), "reference", grad_out)
    actual = run(on_device(low), "triton", grad_out.to(DEVICE))
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value.cpu(), expected[name], dtype=dtype, name=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_the_reference(variant):
    check(torch.float32, SHAPES["tiny"], seed=len(variant), **VARIANTS[variant])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["two_modalities", "added_experts", "shared_a", "own_ranks"])
def test_odd_sizes(dtype, variant):
    check(dtype, SHAPES["odd"], **VARIANTS[variant])


@pytest.mark.parametrize(
    "shape",
    [
        Shape(T=1, K=1, E=2, H=16, I=16, r=4),
        Shape(T=3, K=5, E=6, H=40, I=24, r=70),
        Shape(T=300, K=2, E=2, H=32, I=16, r=4),  # tiles with many rows
    ],
    ids=["one token", "rank above 64", "wide tiles"],
)
def test_shapes(shape):
    check(torch.float32, shape, num_modalities=2)


def test_no_tokens():
    inputs = on_device(make_moe_inputs(Shape(T=0, K=2, E=3, H=16, I=8, r=2)).to(torch.float32))
    results = run(inputs, "triton", torch.zeros(0, 16, device=DEVICE))
    assert results["out"].shape == (0, 16)
    assert all((grad == 0).all() for name, grad in results.items() if "lora" in name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_text_rows_do_not_see_adapters(value):
    """Nor do rows of one modality see another's."""
    inputs = make_moe_inputs(SHAPES["tiny"], num_modalities=2).to(torch.float32)
    inputs = on_device(inputs)
    grad_out = torch.randn_like(inputs.hidden_states)
    before = run(inputs, "triton", grad_out)
    for modality in (1, 2):
        changed = inputs._replace(
            **{
                name: getattr(inputs, name)._replace(
                    lora_A=_filled(getattr(inputs, name).lora_A, modality, value),
                    lora_B=_filled(getattr(inputs, name).lora_B, modality, value),
                )
                for name in ("gate_up_lora", "down_lora")
            }
        )
        after = run(changed, "triton", grad_out)
        others = inputs.modality_ids != modality
        assert others.any() and not others.all()
        for name in ("out", "hidden_states", "topk_weights"):
            assert torch.equal(after[name][others], before[name][others])
            assert not torch.equal(after[name], before[name])


def _filled(tensor, modality, value):
    tensor = tensor.detach().clone()
    tensor[modality - 1] = value
    return tensor


def test_the_same_bits_twice():
    inputs = on_device(make_moe_inputs(SHAPES["odd"]).to(torch.float32))
    grad_out = torch.randn_like(inputs.hidden_states)
    first, second = (run(inputs, "triton", grad_out) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("trained", ["hidden_states", "topk_weights", "down_lora", "gate_up_lora"])
def test_only_the_gradients_asked_for(trained):
    inputs = on_device(make_moe_inputs(SHAPES["tiny"]).to(torch.float32))
    grad_out = torch.randn_like(inputs.hidden_states)
    everything = run(inputs, "triton", grad_out)
    tensors = {
        name: tensor.detach().requires_grad_(name.startswith(trained))
        for name, tensor in inputs.differentiable().items()
    }
    loras = {
        name: LoraWeights(
            tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], getattr(inputs, name).scaling
        )
        for name in ("gate_up_lora", "down_lora")
    }
    alone = inputs._replace(
        hidden_states=tensors["hidden_states"], topk_weights=tensors["topk_weights"], **loras
    )
    call(alone, "triton").backward(grad_out)
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == name.startswith(trained)
        assert tensor.grad is None or torch.equal(tensor.grad, everything[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("modalities", [1, 2])
def test_lora_linear(dtype, modalities):
    generator = torch.Generator().manual_seed(modalities)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weight, bias, grad_out = normal(37, 50), normal(29, 50), normal(29), normal(37, 29)
    lora = normal(modalities, 5, 50), normal(modalities, 29, 5)
    scaling = torch.tensor([2.0, 0.5][:modalities])
    ids = torch.randint(-1, modalities + 1, (37,), generator=generator)

    def results(dtype, backend, device):
        def leaf(tensor):
            return tensor.to(device, dtype).requires_grad_()

        leaves = leaf(x), *map(leaf, lora)
        out = lora_linear(
            leaves[0], weight.to(device, dtype), bias.to(device, dtype),
            LoraWeights(*leaves[1:], scaling.to(device)), modality_ids=ids.to(device),
            backend=backend,
        )  # fmt: skip
        return out, *torch.autograd.grad(out, leaves, grad_out.to(device, dtype))

    expected = results(torch.float64, "reference", "cpu")
    for actual, wanted in zip(results(dtype, "triton", DEVICE), expected, strict=True):
        assert_close(actual.cpu(), wanted, dtype=dtype)


def test_refuses_what_it_does_not_compute():
    inputs = on_device(make_moe_inputs(SHAPES["tiny"]).to(torch.float64))
    with pytest.raises(TypeError, match="'triton' computes in float32, bfloat16 or float16"):
        call(inputs, "triton")


@pytest.mark.skipif(ON_GPU, reason="of the interpreter: run on a machine without a GPU")
def test_the_interpreter_refuses_bfloat16():
    inputs = make_moe_inputs(SHAPES["tiny"]).to(torch.bfloat16)
    with pytest.raises(TypeError, match="interpreter multiplies bfloat16 wrongly"):
        call(inputs, "triton")
