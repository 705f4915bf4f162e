"""Tiles of Triton's kernels for ``moe_mlp``, and those that a caller forces on its own calls.

Apart from ``triton_tiles``, since the autograd formula needs them and must not import Triton.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Tiles(NamedTuple):
    """Shape and launch settings of a tile.

    Attributes:
        m: rows.
        n: columns of a GEMM without gate.
        n_gated: columns of gate, and as many of up, where both are held at once.
        k: depth of a step of the sum.
        group: row tiles that use the same weights one after the other.
        warps: warps of a program.
        stages: stages of the pipeline of loads.
        act_registers: most registers of a thread in the dA' kernel, so that two of its programs
            share a multiprocessor: one stores while the other multiplies. 0: no limit.
    """

    m: int
    n: int
    n_gated: int
    k: int
    group: int
    warps: int
    stages: int
    act_registers: int = 0


_FORCED: ContextVar[Tiles | None] = ContextVar("forced_tiles", default=None)
forced = _FORCED.get


@contextmanager
def force(tiles: Tiles | None) -> Iterator[None]:
    """Use these tiles in every launch, to time or test them; None: the usual choice.

    They hold for calls of this thread, and for the backward passes of those calls, in whatever
    thread and whenever these run. ``torch.compile`` decides earlier: a compiled call has the tiles
    that hold when it runs, and its backward pass those that hold when that runs.

    Example:
        >>> with force(Tiles(16, 64, 32, 64, 8, 4, 2)):
        ...     out = moe_mlp(..., backend="triton")
        >>> out.sum().backward()  # with the same tiles
    """
    token = _FORCED.set(tiles)
    try:
        yield
    finally:
        _FORCED.reset(token)
