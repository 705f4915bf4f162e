"""What the ops' autograd formulas share, and the short way to them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, nn.Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether an op on these tensors may be computed without the dispatcher.

    False where something has to see the registered op: tracing and compilation, a dispatch mode
    (selective checkpointing, counters of operations), a tensor's subclass.
    Else the way through ``torch.library`` has no use, and costs a few tenths of a millisecond a
    layer, forward and backward: as much as a small layer's GEMM.
    """
    return (
        not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and all(tensor is None or type(tensor) in _PLAIN for tensor in tensors)
    )


def plain_function(
    compute: Callable, setup_context: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    """The same op for plain tensors, by the formulas that are registered for the op."""

    class PlainFunction(torch.autograd.Function):
        # A setup_context of its own would make PyTorch look at the signature at every call.
        @staticmethod
        def forward(ctx, *arguments):
            output = compute(*arguments)
            setup_context(ctx, arguments, output)
            return output

    PlainFunction.backward = staticmethod(backward)
    return PlainFunction


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
