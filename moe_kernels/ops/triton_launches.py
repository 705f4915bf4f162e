"""Launches of the Triton kernels that several ops use."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops.dispatch.triton_impl import dispatch_with_maps
from moe_kernels.ops.triton_kernels import (
    add_low_rank_kernel,
    finish_wgrad_kernel,
    shrink_kernel,
    sum_parts_kernel,
    wgrad_kernel,
)
from moe_kernels.ops.triton_tile_maps import TileMap, tile_maps

MAX_SUMMED = 32  # columns of the rank in a program of sum_parts_kernel: wider ones spill
MAX_BYTES_OF_PARTS = 2**28  # of du by columns of dy; beyond it du is a pass of its own
STEP_R = 16  # columns of the rank in one step of an extension: wider ones spill
MAX_RANK_WITH_DU = 16  # highest rank at which du comes with dB, in parts by columns of dy
# Triton chooses between compiler and interpreter when a kernel is decorated, so at import.
INTERPRETED = backends.triton_is_interpreted()


class Shrink(NamedTuple):
    """Arguments of a ``shrink`` launch: out = left M on adapted rows, M of (modality, expert).

    Attributes:
        left: (T, k) if ``by_token``, else (T*K, k).
        matrix: (M, experts, r, k) if ``rank_first``, else (M, experts, k, r).
        perm: (T*K,).
        tiles: tiles of each pair (modality, expert).
        out: (T*K, r).
        rank_first: whether the rank is the matrices' first axis.
        by_token: whether rows of ``left`` are tokens.
        top_k: K.
        num_base: experts of each modality in ``tiles``.
        experts: matrices of each modality: ``num_base``, or 1 that all share.
        block_k: depth of a step of Triton's kernel.
        segments: offsets of the sorted rows' segments. With them rows without an adapter get zeros;
            otherwise they are not written.
    """

    left: Tensor
    matrix: Tensor
    perm: Tensor
    tiles: TileMap
    out: Tensor
    rank_first: bool
    by_token: bool
    top_k: int
    num_base: int
    experts: int
    block_k: int
    segments: Tensor | None = None


class Wgrad(NamedTuple):
    """A problem of a ``wgrad`` launch: sums of (factor * weight * left)^T right over rows.

    One launch takes one problem or two. These share ``perm`` and ``top_k`` and may differ in all
    else, but only the first has a ``matrix``.

    Attributes:
        left: (T, height) if ``left_by_token``, else (T*K, height).
        right: (T, width) if ``right_by_token``, else (T*K, width).
        perm: (T*K,).
        rows: long tiles of the groups that are summed over.
        factors: (n,) float32, each of as many neighbouring groups' sums.
        top_k: K.
        transposed: whether a sum is (width, height) instead of (height, width).
        weights: (T, K), of each row, or None: all are 1.
        left_by_token: whether rows of ``left`` are tokens.
        right_by_token: whether rows of ``right`` are tokens.
        matrix: (groups, width, height), or None. With it the launch also returns right @ matrix.
        tiles: short tiles of the same groups; with ``matrix``.
    """

    left: Tensor
    right: Tensor
    perm: Tensor
    rows: TileMap
    factors: Tensor
    top_k: int
    transposed: bool
    weights: Tensor | None = None
    left_by_token: bool = False
    right_by_token: bool = False
    matrix: Tensor | None = None
    tiles: TileMap | None = None


class LowRank(NamedTuple):
    """Arguments of an ``add_low_rank`` launch: out[token] += s u V, in place, on adapted rows.

    Attributes:
        u: (T, r), sorted rows.
        matrix: (M, n, r) if ``rank_last``, else (M, r, n).
        scaling: (M,) float32.
        perm: (T,).
        tiles: tiles of each modality.
        out: (T, n), by token.
        rank_last: whether the rank is the matrices' last axis.
        block_n: columns of a program of Triton's kernel.
    """

    u: Tensor
    matrix: Tensor
    scaling: Tensor
    perm: Tensor
    tiles: TileMap
    out: Tensor
    rank_last: bool
    block_n: int


def check_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError for a dtype that these kernels do not compute in."""
    if dtype == torch.float64:
        raise TypeError(
            "backends 'triton' and 'cuda' compute in float32, bfloat16 or float16, not float64"
        )
    if dtype == torch.bfloat16 and INTERPRETED:
        raise TypeError("Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16")


@functools.cache  # every call of an op asks several times
def capability(device: torch.device) -> int:
    """Return the compute capability, 90 for sm_90; the interpreter stands for a Hopper."""
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def has_tma(device: torch.device) -> bool:
    """Return whether the copy engine can load tiles of a tensor."""
    return capability(device) >= 90


def rank_block(dtype: torch.dtype) -> int:
    """Return the columns of the rank in a program of ``shrink_kernel``.

    float32 has no matrix instructions, and more columns spill.
    """
    return 16 if dtype == torch.float32 else 64


def wgrad_blocks(
    height: int, width: int, dtype: torch.dtype, *, with_du: bool, capability: int
) -> tuple[int, int, int, int]:
    """Return rows and columns of a tile of a sum, rows that are summed in one step, and warps.

    With du the tiles are wide, since du is written in one part for each. Measured on an H100; on
    sm_80 wide tiles spill.
    """
    if dtype == torch.float32:
        *most, step, warps = 16, 64, 16, 4
    else:
        wide = with_du and capability >= 90
        *most, step, warps = (64, 256, 64, 8) if wide else (64, 128, 32, 4)
    blocks = (max(16, triton.next_power_of_2(size)) for size in (height, width))
    return *map(min, most, blocks), step, warps


def shrink_warps(block_m: int) -> int:
    """Return the warps of a program of ``shrink_kernel``: four of them spill on 16 rows."""
    return 2 if block_m == 16 else 4


def shrink(args: Shrink) -> Tensor:
    """Write left M to the adapted rows of ``args.out``, zeros to others if asked; return it."""
    if args.segments is not None:
        args.out.zero_()
    (num_rows, rank), size_k, tiles = args.out.shape, args.left.shape[1], args.tiles
    block_r = min(rank_block(args.left.dtype), max(16, triton.next_power_of_2(rank)))
    if tiles.num_tiles and num_rows:
        shrink_kernel[(tiles.num_tiles, -(-rank // block_r))](
            left_ptr=args.left,
            m_ptr=args.matrix,
            perm_ptr=args.perm,
            tiles_ptr=tiles.tiles,
            out_ptr=args.out,
            num_tiles=tiles.num_tiles,
            num_base=args.num_base,
            experts_of_m=args.experts,
            size_k=size_k,
            stride_mk=1 if args.rank_first else rank,
            stride_mr=size_k if args.rank_first else 1,
            TOP_K=args.top_k,
            BY_TOKEN=args.by_token,
            RANK=rank,
            BLOCK_R=block_r,
            BLOCK_M=tiles.block,
            BLOCK_K=args.block_k,
            num_warps=shrink_warps(tiles.block),
        )
    return args.out


def wgrad(
    problems: Sequence[Wgrad], dots: Tensor | None = None
) -> tuple[list[tuple[Tensor, Tensor | None]], Tensor | None]:
    """Return each problem's sums and its du, and the sum over n of ``dots`` (n, T, K).

    Args:
        problems: none, one or two; only the first may have a matrix.
        dots: (n, T, K) float32, parts that are added in order; or None.

    Returns:
        for each problem its groups' sums in float32, (groups, height, width), or (groups, width,
        height) if ``transposed``, and du = right @ matrix (T*K, height) in float32, of which rows
        of no group are not written, or None without a matrix; and (T, K), or None without dots.

    Example:
        >>> [(grad_B, du), (grad_A, _)], grad_weights = wgrad([of_B, of_A], dots)
    """
    return [_wgrad(args) for args in problems], None if dots is None else dots.sum(0)


def _wgrad(args: Wgrad) -> tuple[Tensor, Tensor | None]:
    num_groups, height, width = (
        args.rows.groups.shape[1],
        args.left.shape[1],
        args.right.shape[1],
    )
    block_h, block_n, block_p, warps = wgrad_blocks(
        height,
        width,
        args.right.dtype,
        with_du=args.matrix is not None,
        capability=capability(args.right.device),
    )
    grid = (args.rows.num_tiles, -(-height // block_h), -(-width // block_n))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=args.left.device)

    shape = (width, height) if args.transposed else (height, width)
    out, partial = empty(num_groups, *shape), empty(args.rows.num_partials, *shape)
    parts = None if args.matrix is None else empty(grid[2], args.perm.numel(), height)
    if num_groups and args.rows.num_rows:
        _launch_wgrad(args, grid, out, partial, parts, (block_h, block_n, block_p), warps)
    if num_groups:
        _finish_wgrad(args, partial, out)
    return out, None if parts is None else _sum_parts(parts, args.tiles)


def _launch_wgrad(
    args: Wgrad,
    grid: tuple[int, int, int],
    out: Tensor,
    partial: Tensor,
    parts: Tensor | None,
    blocks: tuple[int, int, int],
    warps: int,
) -> None:
    """Sum each tile of ``args.rows``; write du's parts by columns if there is a matrix."""
    height, width = args.left.shape[1], args.right.shape[1]
    num_groups = args.rows.groups.shape[1]
    wgrad_kernel[grid](
        left_ptr=args.left,
        right_ptr=args.right,
        perm_ptr=args.perm,
        tiles_ptr=args.rows.tiles,
        groups_ptr=args.rows.groups,
        factors_ptr=args.factors,
        weights_ptr=args.factors if args.weights is None else args.weights,
        matrix_ptr=args.right if args.matrix is None else args.matrix,
        out_ptr=out,
        partial_ptr=partial,
        du_parts_ptr=out if parts is None else parts,
        num_tiles=args.rows.num_tiles,
        num_groups=num_groups,
        groups_of_factor=num_groups // args.factors.numel(),
        num_rows=args.rows.num_rows,
        chunk=args.rows.block,
        height=height,
        width=width,
        stride_h=1 if args.transposed else width,
        stride_w=height if args.transposed else 1,
        TOP_K=args.top_k,
        WEIGHTED=args.weights is not None,
        LEFT_BY_TOKEN=args.left_by_token,
        RIGHT_BY_TOKEN=args.right_by_token,
        WITH_DU=args.matrix is not None,
        BLOCK_H=blocks[0],
        BLOCK_N=blocks[1],
        BLOCK_P=blocks[2],
        num_warps=warps,
    )


def _finish_wgrad(args: Wgrad, partial: Tensor, out: Tensor) -> None:
    """Add the partial sums of groups of several tiles; write zeros for groups without rows."""
    num_groups, size = out.shape[0], out.shape[1] * out.shape[2]
    # The second axis of a grid ends at 65,535.
    finish_wgrad_kernel[(-(-size // 1024), num_groups)](
        groups_ptr=args.rows.groups,
        partial_ptr=partial,
        out_ptr=out,
        num_groups=num_groups,
        chunk=args.rows.block,
        size=size,
        BLOCK_N=1024,
    )


def _sum_parts(parts: Tensor, tiles: TileMap) -> Tensor:
    """Return the sum over n of (n, rows, r) on the rows of the tiles; others are not written."""
    num_parts, rows, rank = parts.shape
    out = parts.new_empty(rows, rank)
    block_r = min(MAX_SUMMED, max(16, triton.next_power_of_2(rank)))
    if tiles.num_tiles and rows:
        sum_parts_kernel[(tiles.num_tiles, -(-rank // block_r))](
            parts_ptr=parts,
            out_ptr=out,
            tiles_ptr=tiles.tiles,
            num_tiles=tiles.num_tiles,
            num_parts=num_parts,
            num_rows=rows,
            RANK=rank,
            BLOCK_R=block_r,
            BLOCK_M=tiles.block,
        )
    return out


def add_low_rank(args: LowRank) -> None:
    """Add s u V to the adapted rows of ``args.out`` in place."""
    rank, width = args.u.shape[1], args.out.shape[1]
    if args.tiles.num_tiles and args.perm.numel():
        add_low_rank_kernel[(args.tiles.num_tiles, -(-width // args.block_n))](
            u_ptr=args.u,
            v_ptr=args.matrix,
            scaling_ptr=args.scaling,
            perm_ptr=args.perm,
            tiles_ptr=args.tiles.tiles,
            out_ptr=args.out,
            num_tiles=args.tiles.num_tiles,
            width=width,
            stride_vr=1 if args.rank_last else width,
            stride_vn=rank if args.rank_last else 1,
            RANK=rank,
            BLOCK_R=STEP_R,
            BLOCK_M=args.tiles.block,
            BLOCK_N=args.block_n,
        )


def gives_du(rank: int, dy: Tensor, num_rows: int) -> bool:
    """Return whether ``wgrad`` should give du (num_rows, rank) beside dB.

    It should where the parts of du cost less than another reading of dy, and are not too large.
    """
    _, columns, _, _ = wgrad_blocks(
        rank, dy.shape[1], dy.dtype, with_du=True, capability=capability(dy.device)
    )
    return rank <= MAX_RANK_WITH_DU and parts_fit(rank, dy.shape[1], num_rows, columns)


def parts_fit(rank: int, width: int, num_rows: int, columns: int) -> bool:
    """Return whether float32 parts of du, one for each ``columns`` of dy, are not too large."""
    return 4 * -(-width // columns) * num_rows * rank <= MAX_BYTES_OF_PARTS


class SharedLaunches(NamedTuple):
    """A backend's launches that several ops share.

    Attributes:
        dispatch_with_maps: see :mod:`moe_kernels.ops.dispatch.triton_impl`.
        tile_maps: see :func:`moe_kernels.ops.triton_tile_maps.tile_maps`.
        shrink, wgrad, add_low_rank: see the functions of this module.
        gives_du: whether ``wgrad`` should return du too, for a rank, dy and the number of rows.
    """

    dispatch_with_maps: Callable[..., tuple[tuple[Tensor, ...], list[TileMap]]]
    tile_maps: Callable[..., list[TileMap]]
    shrink: Callable[[Shrink], Tensor]
    wgrad: Callable[..., tuple[list[tuple[Tensor, Tensor | None]], Tensor | None]]
    add_low_rank: Callable[[LowRank], None]
    gives_du: Callable[[int, Tensor, int], bool]


TRITON_SHARED = SharedLaunches(
    dispatch_with_maps=dispatch_with_maps,
    tile_maps=tile_maps,
    shrink=shrink,
    wgrad=wgrad,
    add_low_rank=add_low_rank,
    gives_du=gives_du,
)
