"""What the ops' autograd formulas share, and the short way to them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether an op on these tensors may be computed without the dispatcher.

    False where something has to see the registered op: tracing and compilation, a dispatch mode of
    this thread (selective checkpointing, counters of operations), a functorch transform, forward
    mode differentiation, a tensor's subclass, a meta tensor. Else the way through ``torch.library``
    has no use, and costs a few tenths of a millisecond a layer, forward and backward: as much as a
    small layer's GEMM.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and all(t is None or (type(t) in _PLAIN and not t.is_meta) for t in tensors)
    )


def plain_function(
    name: str, compute: Callable, setup_context: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    """The op ``name`` for plain tensors, by the formulas that are registered for it."""

    # A setup_context of its own would make PyTorch look at the signature at every call.
    def forward(ctx, *arguments):
        output = compute(*arguments)
        setup_context(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def place(
    needed: Sequence[Tensor], positions: Sequence[int], needs: Sequence[bool], num_args: int
) -> tuple[Tensor | None, ...]:
    """The gradients of an op's ``num_args`` arguments, None where there is none.

    ``needed`` are those of the arguments at ``positions`` whose entry in ``needs`` is true.
    """
    grads: list[Tensor | None] = [None] * num_args
    rest = iter(needed)
    for position, need in zip(positions, needs, strict=True):
        if need:
            grads[position] = next(rest)
    return tuple(grads)
