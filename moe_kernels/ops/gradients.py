"""Parts that the ops' autograd formulas share, and the way around the dispatcher."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)
Fields = TypeVar("Fields", bound=tuple)


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether an op on these tensors may be computed without the dispatcher.

    It is False where something must see the registered op: tracing and compilation, a dispatch
    mode of this thread (selective checkpointing, counters of operations), a functorch transform,
    forward mode differentiation, a tensor's subclass, a meta tensor. Elsewhere ``torch.library``
    would add a few tenths of a millisecond a layer, forward and backward, as much as a small
    layer's GEMM.
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
    """Build the op ``name`` for plain tensors, from the formulas that are registered for it."""

    # With a setup_context of its own PyTorch would inspect the signature at every call.
    def forward(ctx, *arguments):
        output = compute(*arguments)
        setup_context(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


class OpArguments:
    """Names of a registered op's arguments, and positions of those that may take a gradient.

    Args:
        function: the op's function; its signature gives the names.
        differentiable: names of the arguments that may take a gradient, in the order of the
            backward op's ``needs``.
    """

    def __init__(self, function: Callable, differentiable: Sequence[str]):
        self.names = tuple(inspect.signature(function).parameters)
        self.positions = tuple(map(self.names.index, differentiable))

    def by_name(self, arguments: Sequence) -> dict[str, Any]:
        """Map each argument's name to its value."""
        return dict(zip(self.names, arguments, strict=True))

    def needs(self, needs_input_grad: Sequence[bool]) -> list[bool]:
        """Select the entries of ``ctx.needs_input_grad`` that the backward op takes."""
        return [needs_input_grad[position] for position in self.positions]

    def gradients(
        self, needed: Iterable[Tensor] = (), needs: Sequence[bool] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return one gradient for each argument, None where there is none.

        Args:
            needed: the gradients whose entry in ``needs`` is true, in its order.
            needs: as returned by :meth:`needs`; None: no gradient at all.
        """
        grads: list[Tensor | None] = [None] * len(self.names)
        rest = iter(needed)
        for position, need in zip(self.positions, needs or (), strict=needs is not None):
            if need:
                grads[position] = next(rest)
        return tuple(grads)


def select(kind: type[Fields], named: Mapping[str, Any]) -> Fields:
    """Build a NamedTuple from the entries of ``named`` that have the names of its fields."""
    return kind(**{name: named[name] for name in kind._fields})
