"""Tiles of the Triton kernels of ``moe_mlp``, chosen by shapes, dtype and device alone.

The choice never depends on the routing, so a row's bits do not depend on the rest of the batch. For
shapes that ``moe-kernels tune`` has measured, the tiles that it stored replace the tables
here.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from moe_kernels import env
from moe_kernels.ops.moe_mlp.tiles import Tiles, forced
from moe_kernels.ops.moe_mlp.weights import ExpertWeights
from moe_kernels.ops.triton_launches import capability

Table = Sequence[tuple[int, Tiles]]

# Keyed by the least compute capability, then by the least average number of rows of an expert. Few
# rows need many small programs. Half precision on sm_90: measured on an H100
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


# Of stacks that are packed: what is loaded lives in registers until it is unpacked. Chosen by what
# the compiler made of them, not yet by a GPU: on sm_100 few rows spill at a step of 64.
_PACKED_HALF: dict[int, Table] = {
    80: ((64, Tiles(64, 64, 32, 64, 8, 4, 2)), (0, Tiles(16, 64, 32, 64, 8, 4, 2))),
    100: ((64, Tiles(64, 64, 32, 64, 8, 4, 2)), (0, Tiles(16, 64, 32, 32, 8, 4, 2))),
}
_PACKED_FLOAT32: dict[int, Table] = {
    80: ((64, Tiles(32, 32, 16, 16, 8, 4, 2)), (0, Tiles(16, 32, 16, 16, 8, 2, 2))),
}


def built_in(dtype: torch.dtype, capability: int, *, packed: bool = False) -> Table:
    """Return the table for a dtype, a compute capability (90 for sm_90), and how W is stored."""
    of_float32, of_half = (_PACKED_FLOAT32, _PACKED_HALF) if packed else (_FLOAT32, _HALF)
    tables = of_float32 if dtype == torch.float32 else of_half
    return tables[max((least for least in tables if least <= capability), default=min(tables))]


def choose_tiles(rows: int, weights: ExpertWeights, dtype: torch.dtype) -> Tiles:
    """Return the tiles for ``rows`` pairs of a token and one of its experts, computed in dtype."""
    if (tiles := forced()) is not None:
        return tiles
    stack = weights.gate_up_proj
    if weights.is_packed:
        table = built_in(dtype, capability(stack.device), packed=True)
    else:
        table = _table(stack.device, dtype, stack.shape)
    # Added experts do not count: adding some changes no bit of the rows that do not choose them.
    average = rows // stack.shape[0]
    return next((tiles for least, tiles in table if average >= least), table[-1][1])


@functools.cache  # every call of an op asks
def _table(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> Table:
    """Return the tuned table for a frozen stack, or the built-in one."""
    return _stored().get(_key(device, dtype, shape)) or built_in(dtype, capability(device))


def key_of(gate_up_proj: torch.Tensor) -> str:
    """Return the key of a frozen stack (E, 2I, H) in the file of tuned tiles."""
    return _key(gate_up_proj.device, gate_up_proj.dtype, gate_up_proj.shape)


def _key(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    experts, double_inter, hidden = shape
    dtype_name = str(dtype).removeprefix("torch.")
    return f"{name}, {dtype_name}, E={experts} H={hidden} I={double_inter // 2}"


@functools.cache
def _stored() -> dict[str, Table]:
    return read(env.tiles_path())


def read(path: Path) -> dict[str, Table]:
    """Read tuned tables, by :func:`key_of`: pairs of a least average of rows, and tiles.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        tables = json.loads(path.read_bytes())
        return {key: [_entry(*each) for each in table] for key, table in tables.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a file of tuned tiles ({error}): delete it") from error


def _entry(least: int, fields: dict[str, int]) -> tuple[int, Tiles]:
    tiles = Tiles(**fields)
    powers = (tiles.m, tiles.n, tiles.n_gated, tiles.k, tiles.warps)
    whole = all(type(value) is int and value >= 0 for value in (least, *tiles))
    if not whole or not all(n and n & (n - 1) == 0 for n in powers) or not tiles.group:
        raise ValueError(f"{fields} are no tiles")
    return least, tiles


def forget_stored() -> None:
    """Forget the tuned tables: the next choice of tiles reads the file again."""
    _stored.cache_clear()
    _table.cache_clear()
