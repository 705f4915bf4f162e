"""Which tiles the Triton kernels of ``moe_mlp`` use: a function of shapes, dtype and device alone.

Never of the routing, so that a row's bits do not follow what else is in the batch. The tables here
are replaced, for the shapes that ``python -m moe_kernels.tune`` was run on, by what it stored.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from moe_kernels import env
from moe_kernels.ops.moe_mlp.weights import ExpertWeights
from moe_kernels.ops.triton_launches import capability


class Tiles(NamedTuple):
    """The shape of a tile, and how it is run.

    Attributes:
        m: rows.
        n: columns of a plain product.
        n_gated: columns of gate, and as many of up, where both are held at once.
        k: depth of a step.
        group: row tiles that take the same weights one after the other.
        warps: of a program.
        stages: of the pipeline of loads.
        act_registers: of a thread in dA', at most, so that two of its programs share a
            multiprocessor: one stores while the other multiplies. 0: as many as it takes.
    """

    m: int
    n: int
    n_gated: int
    k: int
    group: int
    warps: int
    stages: int
    act_registers: int = 0


Table = Sequence[tuple[int, Tiles]]

# By compute capability, from that one on, then by the average number of rows of an expert, from
# that number on. Few rows want many small programs. Half precision on sm_90: measured on an H100
# in bfloat16 (docs/kernels.md, note 5). The others: chosen by what the compiler made of them (`make
# check-gpu-code`: no spill), not yet by a GPU. On sm_80 a step of 64 takes the last register; on
# sm_100 wider tiles spill a few. float32 has no matrix instructions: small tiles, small steps.
_HALF: dict[int, Table] = {
    80: ((64, Tiles(128, 128, 64, 32, 8, 8, 3)), (0, Tiles(16, 64, 64, 64, 8, 4, 4))),
    90: ((64, Tiles(128, 256, 128, 64, 8, 8, 3, 128)), (0, Tiles(16, 64, 32, 128, 8, 4, 4))),
    100: ((64, Tiles(128, 64, 32, 64, 8, 8, 3)), (0, Tiles(16, 32, 32, 64, 8, 2, 4))),
}
_FLOAT32: dict[int, Table] = {
    80: ((64, Tiles(64, 32, 32, 16, 8, 4, 3)), (0, Tiles(16, 64, 32, 16, 8, 2, 2))),
    90: ((64, Tiles(64, 32, 32, 16, 8, 4, 3)), (0, Tiles(16, 64, 32, 16, 8, 4, 2))),
    100: ((64, Tiles(32, 32, 16, 16, 8, 4, 3)), (0, Tiles(16, 32, 32, 16, 8, 2, 2))),
}


def built_in(dtype: torch.dtype, capability: int) -> Table:
    """The table for a dtype and a compute capability (90 for sm_90)."""
    tables = _FLOAT32 if dtype == torch.float32 else _HALF
    return tables[max((least for least in tables if least <= capability), default=min(tables))]


_forced: Tiles | None = None


def choose_tiles(rows: int, weights: ExpertWeights) -> Tiles:
    """The tiles for ``rows`` pairs of a token and one of its experts."""
    if _forced is not None:
        return _forced
    stack = weights.gate_up_proj
    table = _table(stack.device, stack.dtype, stack.shape)
    # Added experts are left out: adding some changes no bit of the rows that do not choose them.
    average = rows // stack.shape[0]
    return next((tiles for least, tiles in table if average >= least), table[-1][1])


@functools.cache  # asked several times at every call of an op
def _table(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> Table:
    """The tuned table for a frozen stack, or the built-in one."""
    return _stored().get(_key(device, dtype, shape)) or built_in(dtype, capability(device))


def key_of(gate_up_proj: torch.Tensor) -> str:
    """Device, dtype and shape of a frozen stack (E, 2I, H), as the file of tuned tiles has them."""
    return _key(gate_up_proj.device, gate_up_proj.dtype, gate_up_proj.shape)


def _key(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    experts, double_inter, hidden = shape
    dtype_name = str(dtype).removeprefix("torch.")
    return f"{name}, {dtype_name}, E={experts} H={hidden} I={double_inter // 2}"


@functools.cache
def _stored() -> dict[str, Table]:
    """The tuned tables, by :func:`key_of`: pairs of a least average number of rows and tiles."""
    path = env.tiles_path()
    if not path.is_file():
        return {}
    try:
        tables = json.loads(path.read_text())
        return {key: [(least, Tiles(**tiles)) for least, tiles in t] for key, t in tables.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a file of tuned tiles ({error}): delete it") from error


def forget_stored() -> None:
    """Read the file again when tiles are next chosen."""
    _stored.cache_clear()
    _table.cache_clear()


@contextmanager
def force(tiles: Tiles | None) -> Iterator[None]:
    """These tiles and no others, to time or to test them; None: those that would be chosen."""
    global _forced
    _forced = tiles
    try:
        yield
    finally:
        _forced = None
