"""Tile maps: the rows that each program of a Triton kernel takes, found on the device.

A tile is at most ``block`` rows of one group of sorted rows, and one launch makes a map. A group of
c rows has ceil(c / block) tiles; all groups together have at most num_rows // block + groups. That
bound follows from shapes alone, so the host allocates it without knowing the counts. Tiles beyond
the last real one have no rows, and their programs return at once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


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


def by_adapter(num_base: int, num_modalities: int) -> Groups:
    """Group the rows by pair (added modality m, expert), number (m - 1) * num_base + expert."""
    return Groups(num_base * num_modalities, num_base, num_modalities + 1, 1, 1)


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


# One compilation serves all shapes: the kernel gains nothing from constant arguments.
@triton.jit(
    do_not_specialize=[
        "num_segments", "num_rows", "num_groups", "num_tiles", "block", "period", "stride",
        "offset", "width",
    ]
)  # fmt: skip
def tile_map_kernel(
    segments_ptr,  # (num_segments + 1,)
    tiles_ptr,  # (3, num_tiles)
    groups_ptr,  # (3, num_groups)
    num_segments,
    num_rows,
    num_groups,
    num_tiles,
    block,
    period,
    stride,
    offset,
    width,
    BLOCK_G: tl.constexpr,  # at least num_groups
    BLOCK_T: tl.constexpr,
):
    """Write one group's tiles, after those of earlier groups, and a share of the empty tiles."""
    this = tl.program_id(0)
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


def most_tiles(num_rows: int, num_groups: int, block: int) -> int:
    """Return how many tiles the groups can have, whatever the routing."""
    return num_rows // block + num_groups if num_groups else 0


def tile_map(segment_offsets: Tensor, groups: Groups, num_rows: int, block: int) -> TileMap:
    """Make the map of tiles of ``block`` rows for groups of ``num_rows`` sorted rows."""
    num_tiles = most_tiles(num_rows, groups.num, block)
    written = TileMap(
        segment_offsets.new_empty(3, num_tiles), segment_offsets.new_empty(3, groups.num),
        num_rows, block,
    )  # fmt: skip
    if groups.num:
        tile_map_kernel[(groups.num,)](
            segments_ptr=segment_offsets,
            tiles_ptr=written.tiles,
            groups_ptr=written.groups,
            num_segments=segment_offsets.numel() - 1,
            num_rows=num_rows,
            num_groups=groups.num,
            num_tiles=num_tiles,
            block=block,
            period=groups.period,
            stride=groups.stride,
            offset=groups.offset,
            width=groups.width,
            BLOCK_G=triton.next_power_of_2(groups.num),
            BLOCK_T=128,
        )
    return written


def tile_maps(segment_offsets: Tensor, num_rows: int, requested: RequestedMaps) -> list[TileMap]:
    """:func:`tile_map` for each pair of groups and rows of a tile."""
    return [tile_map(segment_offsets, groups, num_rows, block) for groups, block in requested]


def chunk_rows(num_rows: int, size: int) -> int:
    """Return the rows of a tile for a sum over rows with ``size`` elements: about 32 tiles in all.

    Then one long group does not delay the launch, and a few groups still give many programs. There
    are fewer tiles where the partial sums, up to two for each, would take more than 256 MiB.
    """
    tiles = min(32, max(1, 2**25 // size))
    return max(512, triton.next_power_of_2(num_rows // tiles))
