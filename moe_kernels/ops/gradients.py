"""What the ops' autograd formulas share."""

from collections.abc import Sequence

from torch import Tensor


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
