"""Transforms of functorch, forward mode, second derivatives and tracing: right, or refused."""

import warnings

import pytest
import torch
from support.registered_ops import Calls, make, results, same
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from moe_kernels import ops
from moe_kernels.ops import LoraWeights
from moe_kernels.testing import assert_close, working_backends

pytestmark = [
    pytest.mark.parametrize("backend", working_backends()),
    pytest.mark.parametrize("op", ["moe_mlp", "lora_linear"]),
]


def detached(function, x, adapters):
    """Return a sum of squares as a function of x, and x, both without gradients of their own."""
    for adapter in adapters:
        adapter.requires_grad_(False)
    return lambda x: function(x).square().sum(), x.detach()


def test_gradients_by_transforms_are_those_of_backward(op, backend):
    function, x, adapters = make(op, backend)
    (expected,) = torch.autograd.grad(function(x).square().sum(), x)
    loss, x = detached(function, x, adapters)
    assert torch.equal(grad(loss)(x), expected)
    assert torch.equal(vjp(loss, x)[1](torch.ones(()))[0], expected)
    assert_close(jacrev(loss)(x), expected)


def test_gradients_of_each_element_of_a_batch(op, backend):
    function, x, adapters = make(op, backend)
    batch = torch.stack([x.detach(), 2 * x.detach(), -x.detach()])
    loss, _ = detached(function, x, adapters)
    expected = torch.stack([grad(loss)(each) for each in batch])
    assert torch.equal(vmap(grad(loss))(batch), expected)
    assert torch.equal(grad(lambda batch: vmap(loss)(batch).sum())(batch), expected)


def small(op, backend):
    """Return a function of a low-rank pair and x (5, 8), and a pair; nothing trains."""
    ids = torch.tensor([0, 1, 1, -1, 1])
    if op == "lora_linear":
        weight, pair = torch.randn(6, 8), (torch.randn(1, 2, 8), torch.randn(1, 6, 2))

        def function(pair, x):
            lora = LoraWeights(*pair, torch.ones(1))
            return ops.lora_linear(x, weight, None, lora, modality_ids=ids, backend=backend)

        return function, pair
    topk_ids, topk_weights = torch.tensor([[0, 2]] * 5), torch.rand(5, 2)
    weights, pair = (torch.randn(3, 4, 8), torch.randn(3, 8, 2)), (
        torch.randn(1, 3, 2, 8), torch.randn(1, 3, 4, 2),
    )  # fmt: skip

    def function(pair, x):
        lora = LoraWeights(*pair, torch.ones(1))
        return ops.moe_mlp(
            x, topk_ids, topk_weights, *weights, gate_up_lora=lora, modality_ids=ids,
            backend=backend,
        )  # fmt: skip

    return function, pair


def test_gradients_of_adapters_by_transforms(op, backend):
    """vmap(grad) over adapters gives the gradients of single samples."""
    function, pair = small(op, backend)
    x = torch.randn(2, 5, 8)

    def loss(pair, x):
        return function(pair, x).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(pair, x)
    trained = [each.clone().requires_grad_() for each in pair]
    expected = [torch.autograd.grad(loss(trained, each), trained) for each in x]
    for of_batch, of_each in zip(found, zip(*expected, strict=True), strict=True):
        assert_close(of_batch, torch.stack(of_each))


@pytest.mark.parametrize("transform", [jacfwd, lambda f: lambda x: jvp(f, (x,), (x,))])
def test_forward_mode_transforms_are_refused(op, backend, transform):
    function, x, adapters = make(op, backend)
    loss, x = detached(function, x, adapters)
    with pytest.raises(NotImplementedError, match=f"ops.{op} has no forward-mode derivative"):
        transform(loss)(x)


def test_linearize_is_refused(op, backend):
    function, x, adapters = make(op, backend)
    loss, x = detached(function, x, adapters)
    with pytest.raises(NotImplementedError, match=f"ops.{op} has no forward-mode derivative"):
        linearize(loss, x)


def test_a_graph_of_make_fx_serves_other_values(op, backend):
    function, x, _ = make(op, backend)
    with torch.no_grad():
        assert torch.equal(make_fx(function)(x)(2 * x), function(2 * x))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("seen", [True, False])
def test_a_dual_tensor_is_refused(op, backend, gradients, seen):
    """A tangent is never dropped, also where nothing trains, on both ways to the op."""
    function, x, _ = make(op, backend)
    with forward_ad.dual_level(), torch.set_grad_enabled(gradients):
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=f"ops.{op} has no forward-mode derivative"):
            if seen:
                with Calls():
                    function(dual)
            else:
                function(dual)


def test_tensors_without_a_tangent_are_computed_within_forward_mode(op, backend):
    function, x, _ = make(op, backend)
    with forward_ad.dual_level():
        assert torch.equal(function(x), function(x.detach()))


def test_second_derivatives_are_refused(op, backend):
    function, x, adapters = make(op, backend)
    (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"ops.{op} has no second derivative"):
        first.sum().backward()
    loss, x = detached(function, x, adapters)
    with pytest.raises(NotImplementedError, match=f"ops.{op} has no second derivative"):
        grad(lambda x: grad(loss)(x).sum())(x)


def test_batched_gradients_are_refused(op, backend):
    function, x, _ = make(op, backend)
    out = function(x)
    with pytest.raises(NotImplementedError, match=f"{op} does not take batched gradients"):
        torch.autograd.grad(out, x, torch.stack([out, out]), is_grads_batched=True)


@pytest.mark.parametrize("batched", [True, False])
def test_a_frozen_weight_is_not_differentiated_by_a_transform(op, backend, batched):
    """Its gradient would be zeros."""
    x, lora = torch.randn(2, 8), LoraWeights(*map(torch.ones, [(1, 2, 8), (1, 6, 2), (1,)]))
    ids, weights, down = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), torch.ones(1, 8, 3)

    def function(weight):
        if op == "lora_linear":
            return ops.lora_linear(x, weight, None, lora, backend=backend).sum()
        return ops.moe_mlp(x, ids, weights, weight[None], down, backend=backend).sum()

    total = (lambda w: vmap(function)(w[None]).sum()) if batched else function
    with pytest.raises(ValueError, match="leave it out of what torch.func differentiates"):
        grad(total)(torch.randn(6, 8))


def test_a_traced_program_serves_other_values_and_trains(op, backend):
    function, pair = small(op, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; sizes become constants
        traced = torch.jit.trace(lambda x, *pair: function(pair, x), (torch.randn(5, 8), *pair))
    x, pair = torch.randn(5, 8).requires_grad_(), [(2 * t).requires_grad_() for t in pair]
    left = results(lambda x: traced(x, *pair), x, pair)
    assert same(left, results(lambda x: function(pair, x), x, pair))


def test_what_was_not_saved_is_not_differentiated(op, backend):
    """A program exported without gradients keeps nothing for the backward pass."""
    function, pair = small(op, backend)
    program = torch.export.export(Module(lambda x: function(pair, x)), (torch.randn(5, 8),))
    x = torch.randn(5, 8)
    assert torch.equal(program.module()(x), function(pair, x))
    with pytest.raises(RuntimeError, match=f"ops.{op} was compiled or exported where nothing"):
        program.module()(x.requires_grad_())


class Module(torch.nn.Module):
    """A function as a module, which torch.export asks for."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)
