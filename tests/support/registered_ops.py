"""Small calls of the registered ops, with their outputs and gradients."""

from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import ops
from moe_kernels.ops import LoraWeights
from moe_kernels.testing import SHAPES, make_moe_inputs


class Calls(TorchDispatchMode):
    """Records the names of the registered ops that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moe_kernels":
            self.names.append(func._schema.name.removeprefix("moe_kernels::"))
        return func(*args, **(kwargs or {}))


def make(op, backend):
    """Return a function of hidden states, the hidden states (T, H), and the adapters it trains."""
    generator = torch.Generator().manual_seed(1)
    inputs = make_moe_inputs(SHAPES["tiny"], seed=3).to(torch.float32)
    x = inputs.hidden_states.requires_grad_()
    if op == "moe_mlp":
        rest, keywords = inputs.requires_grad_()[1:5], inputs.keywords()
        adapters = [*inputs.gate_up_lora[:2], *inputs.down_lora[:2]]
        return lambda x: ops.moe_mlp(x, *rest, **keywords, backend=backend), x, adapters
    hidden = x.shape[1]
    weight, a, b = (
        torch.randn(size, generator=generator)
        for size in ((hidden, hidden), (2, 3, hidden), (2, hidden, 3))
    )
    lora = LoraWeights(a.requires_grad_(), b.requires_grad_(), torch.ones(2))
    function = partial(
        ops.lora_linear, weight=weight, bias=None, lora=lora, modality_ids=inputs.modality_ids,
        backend=backend,
    )  # fmt: skip
    return function, x, [a, b]


def results(function, x, adapters):
    """Return the output and the gradients of the input and the adapters."""
    out = function(x)
    return out.detach(), *torch.autograd.grad(out.square().sum(), [x, *adapters])


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
