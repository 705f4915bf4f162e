"""The registered ops are seen by what looks for them; plain tensors go around the dispatcher."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moe_kernels import backends, ops
from moe_kernels.ops import LoraWeights
from moe_kernels.testing import SHAPES, make_moe_inputs

WORKING = [name for name, why_not in backends.available().items() if why_not is None]
pytestmark = [
    pytest.mark.parametrize("backend", WORKING),
    pytest.mark.parametrize("op", ["moe_mlp", "lora_linear"]),
]


class Calls(TorchDispatchMode):
    """Keeps the names of this package's ops that pass the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("moe_kernels"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def make(op, backend):
    """A function of hidden states (T, H), and these, with adapters that train."""
    inputs = make_moe_inputs(SHAPES["tiny"], seed=3).to(torch.float32)
    x = inputs.hidden_states.requires_grad_()
    if op == "moe_mlp":
        rest, keywords = inputs.requires_grad_()[1:5], inputs.keywords()
        return lambda x: ops.moe_mlp(x, *rest, **keywords, backend=backend), x
    hidden = x.shape[1]
    lora = LoraWeights(
        torch.randn(2, 3, hidden, requires_grad=True),
        torch.randn(2, hidden, 3, requires_grad=True),
        torch.ones(2),
    )
    return partial(
        ops.lora_linear, weight=torch.randn(hidden, hidden), bias=None, lora=lora,
        modality_ids=inputs.modality_ids, backend=backend,
    ), x  # fmt: skip


def gradient(function, x):
    out = function(x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


def test_a_mode_sees_the_ops_and_the_bits_are_the_same(op, backend):
    function, x = make(op, backend)
    plain = gradient(function, x)
    with Calls() as calls:
        seen = gradient(function, x)
    assert [name for name in calls.names if name.startswith("moe_kernels::")] == [
        f"moe_kernels::{op}", f"moe_kernels::{op}_backward",
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


def test_selective_checkpointing_can_keep_the_output(op, backend):
    """The op named in the list is not computed again for the backward pass."""
    function, x = make(op, backend)
    expected = gradient(function, x)
    forward = getattr(torch.ops.moe_kernels, op).default
    counts = []
    for kept in ([forward], [torch.ops.aten.sin.default]):
        context = partial(create_selective_checkpoint_contexts, kept)
        out = checkpoint(function, x, use_reentrant=False, context_fn=context)
        with Calls() as calls:
            actual = torch.autograd.grad(out.square().sum(), x)[0]
        counts.append(calls.names.count(f"moe_kernels::{op}"))
        assert torch.equal(actual, expected[1])
    assert counts == [0, 1]


def test_fake_tensors_have_shapes_and_dtypes(op, backend):
    function, x = make(op, backend)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = function(mode.from_tensor(x))
    assert (out.shape, out.dtype) == (x.shape, x.dtype) and type(out) is not torch.Tensor


def test_a_second_derivative_is_refused(op, backend):
    function, x = make(op, backend)
    (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
