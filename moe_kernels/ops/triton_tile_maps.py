"""Tile maps: the rows that each program of a Triton kernel takes, found on the device.

A tile is at most ``block`` rows of one group of sorted rows, and one launch makes several maps. A
group of c rows has ceil(c / block) tiles; all groups together have at most num_rows // block +
groups, and never more than num_rows. That bound follows from shapes alone, so the host allocates it
without knowing the counts. Tiles beyond the last real one have no rows, and their programs return
at once.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.ops.triton_launch import launch, next_power_of_2


class Groups(NamedTuple):
    """Groups of rows: runs of neighbouring segments of ``segment_offsets``.

    Group g begins with segment g % period * stride + g // period + offset, and has ``width``
    segments. The rows that were not dispatched lie behind the last segment.
    """

    num: int
    period: int
    stride: int
    offset: int
    width: int


def by_expert(num_experts: int, num_modalities: int) -> Groups:
    """Group the rows by expert; the last group are the rows that were not dispatched."""
    segments = num_modalities + 1
    return Groups(num_experts + 1, num_experts + 1, segments, 0, segments)


MAX_GROUPS = 2**20  # elements that a Triton program may hold: it scans the groups of a map


def by_adapter(num_base: int, num_modalities: int) -> Groups:
    """Group the rows by pair (added modality m, expert), number (m - 1) * num_base + expert.

    Raises:
        ValueError: there are more than 2^20 pairs.
    """
    num = num_base * num_modalities
    if num > MAX_GROUPS:
        raise ValueError(
            f"a tile map holds {MAX_GROUPS:,} pairs of an expert and an added modality, there are "
            f"{num:,} ({num_base:,} experts, {num_modalities:,} modalities): use fewer, or the "
            'backend "reference"'
        )
    return Groups(num, num_base, num_modalities + 1, 1, 1)


def by_added_expert(first: int, num_added: int, num_modalities: int) -> Groups:
    """Group the rows by added expert, from the id ``first`` on."""
    segments = num_modalities + 1
    return Groups(num_added, num_added, segments, first * segments, segments)


RequestedMaps = Sequence[tuple[Groups, int]]  # of each map: groups of rows, and rows of a tile


class TileMap(NamedTuple):
    """Tiles of groups of rows.

    Attributes:
        tiles: (3, n) int64, group, first row and end of each tile.
        groups: (3, groups) int64, first row and end of each group, and the first partial sum of its
            tiles, if it has several.
        num_rows: all sorted rows, in a group or not.
        block: rows of a tile.
    """

    tiles: Tensor
    groups: Tensor
    num_rows: int
    block: int

    @property
    def num_tiles(self) -> int:
        """Upper bound on the number of tiles."""
        return self.tiles.shape[1]

    @property
    def num_partials(self) -> int:
        """Upper bound on the number of partial sums, of groups of several tiles."""
        return 2 * (self.num_rows // self.block) if self.num_rows > self.block else 0


@triton.jit
def tile_of(tiles_ptr, tile, num_tiles):
    """Load group, first row and end of a tile."""
    group = tl.load(tiles_ptr + tile)
    return group, tl.load(tiles_ptr + num_tiles + tile), tl.load(tiles_ptr + 2 * num_tiles + tile)


@triton.jit
def _bounds(segments_ptr, group, num_segments, num_rows, period, stride, offset, width):
    """Load first row and end of a group, or of several."""
    segment = group % period * stride + group // period + offset
    first = tl.load(segments_ptr + segment)
    behind = segment + width > num_segments
    end = tl.load(segments_ptr + tl.where(behind, 0, segment + width))
    return first, tl.where(behind, num_rows, end)


@triton.jit
def _of_map(which, first, second, third, fourth):
    """Return a map's value."""
    return tl.where(
        which == 0, first, tl.where(which == 1, second, tl.where(which == 2, third, fourth))
    )


@triton.jit
def _most_tiles(num_rows, num_groups, block):
    """Return how many tiles a map has, as :func:`most_tiles` does."""
    return tl.where(num_groups > 0, tl.minimum(num_rows, num_rows // block + num_groups), 0)


# One compilation serves all shapes: the kernel gains nothing from constant arguments.
@triton.jit(
    do_not_specialize=[
        "num_segments", "num_rows",
        "num0", "period0", "stride0", "offset0", "width0", "block0",
        "num1", "period1", "stride1", "offset1", "width1", "block1",
        "num2", "period2", "stride2", "offset2", "width2", "block2",
        "num3", "period3", "stride3", "offset3", "width3", "block3",
    ]
)  # fmt: skip
def tile_maps_kernel(
    segments_ptr,  # (num_segments + 1,)
    tiles_ptr,  # (3, tiles) of each map in turn
    groups_ptr,  # (3, groups) of each map in turn
    num_segments,
    num_rows,
    num0, period0, stride0, offset0, width0, block0,
    num1, period1, stride1, offset1, width1, block1,
    num2, period2, stride2, offset2, width2, block2,
    num3, period3, stride3, offset3, width3, block3,
    BLOCK_G: tl.constexpr,  # at least the groups of every map
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write a group's tiles, after those of earlier groups, and a share of its map's empty tiles.

    The programs are the groups of the first map, then those of the next ones.
    """
    this = tl.program_id(0)
    two, three = num0 + num1, num0 + num1 + num2
    which = (this >= num0).to(tl.int32) + (this >= two).to(tl.int32) + (this >= three).to(tl.int32)
    this -= _of_map(which, 0, num0, two, three)
    groups_ptr += 3 * _of_map(which, 0, num0, two, three)
    tiles0 = _most_tiles(num_rows, num0, block0)
    tiles1 = _most_tiles(num_rows, num1, block1)
    tiles2 = _most_tiles(num_rows, num2, block2)
    tiles_ptr += 3 * _of_map(which, 0, tiles0, tiles0 + tiles1, tiles0 + tiles1 + tiles2)
    num_groups = _of_map(which, num0, num1, num2, num3)
    period = _of_map(which, period0, period1, period2, period3)
    stride = _of_map(which, stride0, stride1, stride2, stride3)
    offset = _of_map(which, offset0, offset1, offset2, offset3)
    width = _of_map(which, width0, width1, width2, width3)
    block = _of_map(which, block0, block1, block2, block3)
    num_tiles = _most_tiles(num_rows, num_groups, block)
    block = block.to(tl.int64)  # times a number of tiles
    groups = tl.arange(0, BLOCK_G)
    present = groups < num_groups
    low, high = _bounds(
        segments_ptr, tl.where(present, groups, 0), num_segments, num_rows, period, stride, offset,
        width,
    )  # fmt: skip
    tiles = tl.where(present, (high - low + block - 1) // block, 0)
    several = tl.where(tiles > 1, tiles, 0)
    to = tiles_ptr + tl.sum(tl.where(groups < this, tiles, 0))
    low, high = _bounds(
        segments_ptr, this, num_segments, num_rows, period, stride, offset, width
    )  # fmt: skip
    tl.store(groups_ptr + this, low)
    tl.store(groups_ptr + num_groups + this, high)
    tl.store(groups_ptr + 2 * num_groups + this, tl.sum(tl.where(groups < this, several, 0)))
    offs = tl.arange(0, BLOCK_T)
    for start in range(low, high, BLOCK_T * block):
        first = start + offs * block
        mask = first < high
        tl.store(to + offs, this, mask=mask)
        tl.store(to + num_tiles + offs, first, mask=mask)
        tl.store(to + 2 * num_tiles + offs, tl.minimum(first + block, high), mask=mask)
        to += BLOCK_T
    for tile in range(tl.sum(tiles) + this * BLOCK_T, num_tiles, num_groups * BLOCK_T):
        for row in range(3):
            tl.store(tiles_ptr + row * num_tiles + tile + offs, 0, mask=tile + offs < num_tiles)


MAX_MAPS = 4  # of one launch
_NO_GROUPS = Groups(0, 1, 0, 0, 0)


def most_tiles(num_rows: int, num_groups: int, block: int) -> int:
    """Return how many tiles the groups can have, whatever the routing."""
    return min(num_rows, num_rows // block + num_groups) if num_groups else 0


def tile_maps(segment_offsets: Tensor, num_rows: int, requested: RequestedMaps) -> list[TileMap]:
    """Make a map of tiles of so many rows for each groups of ``num_rows`` sorted rows.

    Up to four maps are one launch.
    """
    if len(requested) > MAX_MAPS:
        first, others = requested[:MAX_MAPS], requested[MAX_MAPS:]
        return [
            *tile_maps(segment_offsets, num_rows, first),
            *tile_maps(segment_offsets, num_rows, others),
        ]
    tile_columns, group_columns, numbers = _maps_of(num_rows, tuple(requested))
    tiles, of_tiles = _in_one_tensor(segment_offsets, tile_columns)
    # Apart from the tiles: both may be outputs of an op, which must not share memory.
    groups_of, of_groups = _in_one_tensor(segment_offsets, group_columns)
    launch(
        tile_maps_kernel,
        (sum(group_columns),),
        segments_ptr=segment_offsets,
        tiles_ptr=tiles,
        groups_ptr=groups_of,
        num_segments=segment_offsets.numel() - 1,
        num_rows=num_rows,
        **numbers,
    )
    return [
        TileMap(tiles, groups, num_rows, block)
        for tiles, groups, (_, block) in zip(of_tiles, of_groups, requested, strict=True)
    ]


@functools.lru_cache(1024)  # every layer of a model asks the same
def _maps_of(
    num_rows: int, requested: tuple[tuple[Groups, int], ...]
) -> tuple[list[int], list[int], dict[str, int]]:
    """Return the columns of each map's tiles and groups, and the kernel's numbers of all maps."""
    padded = [*requested, *[(_NO_GROUPS, 1)] * (MAX_MAPS - len(requested))]
    numbers = {
        f"{name}{index}": number
        for index, (groups, block) in enumerate(padded)
        for name, number in (*groups._asdict().items(), ("block", block))
    }
    group_columns = [groups.num for groups, _ in requested]
    numbers |= {"BLOCK_G": next_power_of_2(max(group_columns)), "BLOCK_T": 128}
    tile_columns = [most_tiles(num_rows, groups.num, block) for groups, block in requested]
    return tile_columns, group_columns, numbers


def _in_one_tensor(like: Tensor, columns: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Return new memory like ``like``, and its parts, each (3, columns)."""
    memory = like.new_empty(3 * sum(columns))
    return memory, [part.view(3, -1) for part in memory.split([3 * n for n in columns])]
