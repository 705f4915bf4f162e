"""The launches that several ops share, in the backend "cuda": the extension's ops where they take
what is asked, Triton's kernels for the rest. Which, follows from shapes, dtypes and the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels import _native
from moe_kernels.ops.triton_kernels import TRITON_SHARED, capability, du_parts_fit, shrink_to_du
from moe_kernels.ops.triton_tile_maps import Groups, TileMap

# Compute capabilities whose matrix instructions (wgmma, tcgen05) the extension's products do not
# use, and Triton's do: those are taken there. On an H100 they are the faster ones, by half
# (docs/kernels.md, note 5); 10.x has not been measured.
TRITON_FROM, TRITON_BELOW = 90, 120
RequestedMaps = Sequence[tuple[Groups, int]]  # maps: groups of rows, and rows of a tile


def uses_triton_gemm(device: torch.device) -> bool:
    """Whether the products of the experts and the low-rank passes are Triton's on this device."""
    return TRITON_FROM <= capability(device) < TRITON_BELOW


def supports_maps(requested: RequestedMaps) -> bool:
    """Whether one launch makes all these maps."""
    if len(requested) > _native.cuda_limit("MAX_MAPS"):
        return False
    most = _native.max_dispatch_keys()
    return all(groups.num <= most for groups, _ in requested)


def flatten_requests(requested: RequestedMaps) -> tuple[list[int], list[int]]:
    """What the native ops take: the maps' blocks, and five numbers of the groups of each."""
    return [block for _, block in requested], [
        number for groups, _ in requested for number in groups
    ]


def make_tile_maps(
    made: Sequence[Tensor], num_rows: int, requested: RequestedMaps
) -> list[TileMap]:
    """Of what the native ops return: tiles and groups of each map."""
    pairs = zip(made[::2], made[1::2], requested, strict=True)
    return [TileMap(tiles, groups, num_rows, block) for tiles, groups, (_, block) in pairs]


def tile_maps(segment_offsets: Tensor, num_rows: int, requested: RequestedMaps) -> list[TileMap]:
    """All maps in one launch; see :func:`moe_kernels.ops.triton_tile_maps.tile_maps`."""
    if not supports_maps(requested):
        return TRITON_SHARED.tile_maps(segment_offsets, num_rows, requested)
    made = _native.ops().tile_maps(segment_offsets, num_rows, *flatten_requests(requested))
    return make_tile_maps(made, num_rows, requested)


def shrink(
    left: Tensor,
    matrix: Tensor,
    perm: Tensor,
    tiles: TileMap,
    out: Tensor,
    *,
    rank_first: bool,
    top_k: int,
    by_token: bool,
    num_base: int,
    experts: int,
    block_k: int,
) -> Tensor:
    """See :func:`moe_kernels.ops.triton_kernels.shrink`; ``block_k`` is Triton's alone."""
    if uses_triton_gemm(left.device):
        return TRITON_SHARED.shrink(
            left, matrix, perm, tiles, out, rank_first=rank_first, top_k=top_k, by_token=by_token,
            num_base=num_base, experts=experts, block_k=block_k,
        )  # fmt: skip
    _native.ops().shrink(
        out, left, matrix, perm, tiles.tiles, tiles.groups.shape[1], num_base, experts, top_k,
        by_token, rank_first,
    )  # fmt: skip
    return out


def match_routing_weights(rows: Tensor, weights: Tensor) -> Tensor:
    """Routing weights as the kernels take them: in float32, or in the dtype of the rows."""
    return weights if weights.dtype == rows.dtype else weights.float()


def wgrad(
    left: Tensor,
    right: Tensor,
    perm: Tensor,
    rows: TileMap,
    factors: Tensor,
    *,
    transposed: bool,
    top_k: int,
    weights: Tensor | None = None,
    left_by_token: bool = False,
    right_by_token: bool = False,
    matrix: Tensor | None = None,
    tiles: TileMap | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`moe_kernels.ops.triton_kernels.wgrad`; ``tiles`` are for du in a pass of its own,
    which it is where the parts of one pass would be too large.
    """
    if uses_triton_gemm(right.device):
        return TRITON_SHARED.wgrad(
            left, right, perm, rows, factors, transposed=transposed, top_k=top_k, weights=weights,
            left_by_token=left_by_token, right_by_token=right_by_token, matrix=matrix, tiles=tiles,
        )  # fmt: skip
    du = None
    if matrix is not None and not du_parts_fit(
        perm.numel(), *matrix.shape[1:], _native.cuda_limit("COLUMNS_OF_PART")
    ):
        du = shrink_to_du(shrink, right, matrix, perm, tiles, top_k, right_by_token)
        matrix = None
    if weights is not None:
        weights = match_routing_weights(right, weights)
    out, with_sums = _native.ops().wgrad(
        left, right, perm, rows.tiles, rows.groups, factors, weights, matrix, rows.block, top_k,
        transposed, left_by_token, right_by_token,
    )  # fmt: skip
    return out, du if matrix is None else with_sums


def gives_du(rank: int, dy: Tensor) -> bool:
    """Whether du comes with dB; float32 has no matrix instructions to multiply by the way with."""
    if uses_triton_gemm(dy.device):
        return TRITON_SHARED.gives_du(rank, dy)
    return dy.dtype != torch.float32 and rank <= _native.cuda_limit("MAX_RANK_WITH_DU")


def add_low_rank(
    u: Tensor,
    matrix: Tensor,
    scaling: Tensor,
    perm: Tensor,
    tiles: TileMap,
    out: Tensor,
    *,
    rank_last: bool,
    block_n: int,
) -> None:
    """See :func:`moe_kernels.ops.triton_kernels.add_low_rank`, which does float32 and rows that are
    not a multiple of 16 bytes; ``block_n`` is Triton's alone.
    """
    if out.dtype == torch.float32 or out.shape[1] % 8:
        TRITON_SHARED.add_low_rank(
            u, matrix, scaling, perm, tiles, out, rank_last=rank_last, block_n=block_n
        )
    else:
        _native.ops().add_low_rank(out, u, matrix, scaling, perm, tiles.tiles, rank_last)


CUDA_SHARED = TRITON_SHARED._replace(
    tile_maps=tile_maps,
    shrink=shrink,
    wgrad=wgrad,
    add_low_rank=add_low_rank,
    gives_du=gives_du,
)
