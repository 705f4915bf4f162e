"""Registered ops are seen by modes, tracing and subclasses; plain tensors skip the dispatcher."""

import threading
from functools import partial

import pytest
import torch
from support.registered_ops import Calls, make, results, same
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moe_kernels import ops
from moe_kernels.testing import working_backends

pytestmark = [
    pytest.mark.parametrize("backend", working_backends()),
    pytest.mark.parametrize("op", ["moe_mlp", "lora_linear"]),
]


BEFORE = {"moe_mlp": [], "lora_linear": ["linear_dispatch"]}  # ops that come before the op


class Subclass(torch.Tensor):
    """A tensor subclass without any behaviour of its own."""


def test_plain_tensors_go_around(op, backend):
    function, x, _ = make(op, backend)
    name = {"moe_mlp": "MoeMlpBackward", "lora_linear": "LoraLinearBackward"}[op]
    node = function(x).grad_fn
    while name != type(node).__name__:  # a view or a cast may follow the op
        node = node.next_functions[0][0]


def test_a_mode_sees_the_ops_and_the_bits_are_the_same(op, backend):
    function, x, adapters = make(op, backend)
    plain = results(function, x, adapters)
    with torch.no_grad():
        assert torch.equal(function(x), plain[0])
    with Calls() as calls:
        assert same(results(function, x, adapters), plain)
    assert calls.names == [*BEFORE[op], op, f"{op}_backward"]
    with Calls() as calls, torch.no_grad():
        assert torch.equal(function(x), plain[0])
    assert calls.names == [*BEFORE[op], op]


def test_a_mode_of_another_thread_does_not_matter(op, backend):
    """A mode of another thread ends while this thread's mode is active."""
    function, x, _ = make(op, backend)
    entered, left = threading.Event(), threading.Event()

    def other():
        with Calls():
            entered.set()
            left.wait()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    with Calls() as calls:
        left.set()
        thread.join()
        function(x)
    assert calls.names == [*BEFORE[op], op]


def test_selective_checkpointing_can_keep_the_output(op, backend):
    """An op in the list of outputs to keep is not recomputed for the backward pass."""
    function, x, adapters = make(op, backend)
    expected = results(function, x, adapters)
    forward = getattr(torch.ops.moe_kernels, op).default
    for kept, computed_again in ([forward], 0), ([torch.ops.aten.sin.default], 1):
        context = partial(create_selective_checkpoint_contexts, kept)
        out = checkpoint(function, x, use_reentrant=False, context_fn=context)
        with Calls() as calls:
            grads = torch.autograd.grad(out.square().sum(), [x, *adapters])
        assert calls.names.count(op) == computed_again
        assert same((out, *grads), expected)


@pytest.mark.parametrize("inside", [True, False])
def test_fake_tensors_have_shapes_and_dtypes(op, backend, inside):
    function, x, _ = make(op, backend)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(x)
    if inside:
        with mode:
            out = function(fake)
    else:
        out = function(fake)
    assert isinstance(out, FakeTensor) and (out.shape, out.dtype) == (x.shape, x.dtype)


def test_subclasses_go_through_the_dispatcher(op, backend, monkeypatch):
    function, x, _ = make(op, backend)
    module = getattr(ops, op).__globals__["autograd"]
    expected = function(x)
    monkeypatch.setattr(module, "_plain", None)
    assert torch.equal(function(x.detach().as_subclass(Subclass).requires_grad_()), expected)


def test_vmap_over_what_does_not_train(op, backend):
    """vmap works on inputs that do not train, as a loop over the batch."""
    function, x, _ = make(op, backend)
    batch = torch.stack([x.detach(), 2 * x.detach()])
    with torch.no_grad():
        expected = torch.stack([function(part) for part in batch])
        assert torch.equal(torch.vmap(function)(batch), expected)


def test_it_compiles_into_one_graph_with_the_op_in_it(op, backend):
    function, x, adapters = make(op, backend)
    expected = results(function, x, adapters)
    targets = []

    def recording(graph_module, example_inputs):
        targets.extend(str(node.target) for node in graph_module.graph.nodes)
        return graph_module

    torch._dynamo.reset()
    assert torch.equal(torch.compile(function, fullgraph=True, backend=recording)(x), expected[0])
    assert f"moe_kernels.{op}" in targets
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert same(results(compiled, x, adapters), expected)
