"""Tile maps by the extension's CUDA kernels; ``triton_tile_maps`` says what they are."""

from collections.abc import Sequence

from torch import Tensor

from moe_kernels import _native
from moe_kernels.ops import triton_tile_maps
from moe_kernels.ops.triton_tile_maps import RequestedMaps, TileMap


def supports_maps(requested: RequestedMaps) -> bool:
    """Return whether one launch can make all these maps."""
    if len(requested) > _native.cuda_limit("MAX_MAPS"):
        return False
    most = _native.max_dispatch_keys()
    return all(groups.num <= most for groups, _ in requested)


def flatten_requests(requested: RequestedMaps) -> tuple[list[int], list[int]]:
    """Return the native ops' arguments: rows of a tile of each map, and five numbers a group."""
    blocks = [block for _, block in requested]
    return blocks, [number for groups, _ in requested for number in groups]


def make_tile_maps(
    tensors: Sequence[Tensor], num_rows: int, requested: RequestedMaps
) -> list[TileMap]:
    """Build the maps from what a native op returned: tiles and groups of each in turn."""
    pairs = zip(tensors[::2], tensors[1::2], requested, strict=True)
    return [TileMap(tiles, groups, num_rows, block) for tiles, groups, (_, block) in pairs]


def tile_maps(segment_offsets: Tensor, num_rows: int, requested: RequestedMaps) -> list[TileMap]:
    """Make all maps in one launch; see :func:`moe_kernels.ops.triton_tile_maps.tile_maps`."""
    if not supports_maps(requested):
        return triton_tile_maps.tile_maps(segment_offsets, num_rows, requested)
    tensors = _native.ops().tile_maps(segment_offsets, num_rows, *flatten_requests(requested))
    return make_tile_maps(tensors, num_rows, requested)
