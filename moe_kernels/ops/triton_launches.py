"""Launches of the Triton kernels that several ops use."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops.dispatch.triton_impl import dispatch_with_maps
from moe_kernels.ops.triton_kernels import (
    add_low_rank_kernel,
    finish_wgrad_kernel,
    shrink_kernel,
    wgrad_kernel,
)
from moe_kernels.ops.triton_launch import launch, next_power_of_2
from moe_kernels.ops.triton_tile_maps import TileMap, tile_maps

FINISHED = 1024  # elements of a program of finish_wgrad_kernel
ADAPTER_ROWS = 32  # of a tile of one adapter: many programs, as each one waits for memory
ROWS_FILLED = 512  # about so many rows without an adapter for a program that writes zeros
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
    segments: Tensor | None = None


class Wgrad(NamedTuple):
    """A problem of a ``wgrad`` launch: sums of (factor * weight * left)^T right over rows.

    One launch takes one problem or two. These share ``perm``, ``rows``, ``top_k``, the number of
    factors and the dtype of ``right``; they may differ in all else, but only the first has a
    ``matrix``.

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


class Folded(NamedTuple):
    """Parts of du1, and slots of sums over each adapter's rows, that a launch of dA' has left.

    Attributes:
        du1: (n, T*K, r1) float32, parts of du1.
        slots: of dB1 (slots, 2I, r1), and of dA2 (slots, r2, I): those that are needed.
        perm: (T*K,).
        segments: offsets of the sorted rows' segments.
        num_base: experts of each modality.
        modalities: M.
    """

    du1: Tensor
    slots: list[Tensor]
    perm: Tensor
    segments: Tensor
    num_base: int
    modalities: int


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


@functools.cache  # every backward pass asks several times
def wgrad_blocks(
    height: int, width: int, dtype: torch.dtype, *, with_du: bool, capability: int
) -> tuple[int, int, int, int]:
    """Return rows and columns of a tile of a sum, rows that are summed in one step, and warps.

    With du the tiles are wide, since du is written in one part for each. Measured on an H100; on
    sm_80 wide tiles spill.
    """
    if dtype == torch.float32:
        *most, step, warps = 16, 64, 16, 4
    elif with_du:
        *most, step, warps = (16, 256, 64, 8) if capability >= 90 else (16, 128, 32, 4)
    else:
        *most, step, warps = 64, 128, 32, 4
    blocks = (max(16, next_power_of_2(size)) for size in (height, width))
    return *map(min, most, blocks), step, warps


def shrink_depth(dtype: torch.dtype) -> int:
    """Return the depth of a step of ``shrink_kernel``: few steps, each of which waits for memory.

    float32 has no matrix instructions, so the compiler unrolls over the depth.
    """
    return 16 if dtype == torch.float32 else 128


def shrink_warps(block_m: int) -> int:
    """Return the warps of a program of ``shrink_kernel``: four of them spill on 16 rows."""
    return 2 if block_m == 16 else 4


def shrink(args: Shrink) -> Tensor:
    """Write left M to the adapted rows of ``args.out``, zeros to others if asked; return it."""
    (num_rows, rank), size_k, tiles = args.out.shape, args.left.shape[1], args.tiles
    block_r = min(rank_block(args.left.dtype), max(16, next_power_of_2(rank)))
    fill = args.segments is not None
    programs = tiles.num_tiles
    if fill:  # so many for the base rows of each expert, and for the rows behind the last adapter's
        programs += (args.num_base + 1) * -(-num_rows // (ROWS_FILLED * (args.num_base + 1)))
    launch(
        shrink_kernel,
        (programs if num_rows else 0, -(-rank // block_r)),
        left_ptr=args.left,
        m_ptr=args.matrix,
        perm_ptr=args.perm,
        tiles_ptr=tiles.tiles,
        segments_ptr=args.segments if fill else args.perm,
        out_ptr=args.out,
        num_tiles=tiles.num_tiles,
        num_base=args.num_base,
        experts_of_m=args.experts,
        num_modalities=tiles.groups.shape[1] // args.num_base,
        num_rows=num_rows,
        size_k=size_k,
        stride_mk=1 if args.rank_first else rank,
        stride_mr=size_k if args.rank_first else 1,
        TOP_K=args.top_k,
        BY_TOKEN=args.by_token,
        FILL=fill,
        RANK=rank,
        BLOCK_R=block_r,
        BLOCK_M=tiles.block,
        BLOCK_K=shrink_depth(args.left.dtype),
        num_warps=shrink_warps(tiles.block),
    )
    return args.out


class Parts(NamedTuple):
    """Memory of a problem's results, and of what the launch after ``wgrad_kernel`` adds."""

    out: Tensor  # (groups, height, width) or (groups, width, height)
    partial: Tensor  # of the same shape but for the groups
    du_parts: Tensor | None  # (column blocks, T*K, height)
    du: Tensor | None  # (T*K, height)


def wgrad(
    problems: Sequence[Wgrad],
    dots: Tensor | None = None,
    dots_dtype: torch.dtype = torch.float32,
    folded: None = None,
) -> tuple[list[tuple[Tensor, Tensor | None]], Tensor | None]:
    """Return each problem's sums and its du, and the sum over n of ``dots`` (n, T, K).

    Two launches: one for all sums by tiles, and one that adds them.

    Args:
        problems: none, one or two; only the first may have a matrix.
        dots: (n, T, K) float32, parts that are added in order; or None.
        dots_dtype: what their sum, in float32, is rounded to.
        folded: None; other backends add the slots of :class:`Folded` too, and return their sums
            (M*E, ...) behind the problems'.

    Returns:
        for each problem its groups' sums in float32, (groups, height, width), or (groups, width,
        height) if ``transposed``, and du = right @ matrix (T*K, height) in float32, of which rows
        of no group are not written, or None without a matrix; and (T, K), or None without dots.

    Example:
        >>> [(grad_B, du), (grad_A, _)], grad_weights = wgrad([of_B, of_A], dots, torch.bfloat16)
    """
    parts = []
    if problems:
        heights, widths = ([getattr(a, n).shape[1] for a in problems] for n in ("left", "right"))
        right, with_du = problems[0].right, problems[0].matrix is not None
        *blocks, warps = wgrad_blocks(
            max(heights),
            max(widths),
            right.dtype,
            with_du=with_du,
            capability=capability(right.device),
        )
        parts = [_parts_of(args, blocks[1]) for args in problems]
        _launch_wgrad(problems, parts, blocks, warps)
    sum_of_dots = None if dots is None else dots.new_empty(dots.shape[1:], dtype=dots_dtype)
    _finish_wgrad(problems, parts, dots, sum_of_dots)
    return [(each.out, each.du) for each in parts], sum_of_dots


def _parts_of(args: Wgrad, columns: int) -> Parts:
    """Allocate a problem's results; ``columns`` are those of a part of du."""
    height, width = args.left.shape[1], args.right.shape[1]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=args.left.device)

    shape = (width, height) if args.transposed else (height, width)
    out, partial = empty(args.rows.groups.shape[1], *shape), empty(args.rows.num_partials, *shape)
    if args.matrix is None:
        return Parts(out, partial, None, None)
    rows = args.perm.numel()
    return Parts(out, partial, empty(-(-width // columns), rows, height), empty(rows, height))


def _launch_wgrad(
    problems: Sequence[Wgrad], parts: Sequence[Parts], blocks: Sequence[int], warps: int
) -> None:
    """Sum each tile of the problems' rows; write du's parts by columns if there is a matrix."""
    first, rows = problems[0], problems[0].rows
    num_groups = rows.groups.shape[1]
    programs = sum(
        -(-args.left.shape[1] // blocks[0]) * -(-args.right.shape[1] // blocks[1])
        for args in problems
    )
    launch(
        wgrad_kernel,
        (rows.num_tiles * programs,),
        **_problem("", first, parts[0]),
        **_problem("2", problems[-1], parts[-1]),
        matrix_ptr=first.right if first.matrix is None else first.matrix,
        du_parts_ptr=parts[0].out if first.matrix is None else parts[0].du_parts,
        perm_ptr=first.perm,
        tiles_ptr=rows.tiles,
        groups_ptr=rows.groups,
        num_tiles=rows.num_tiles,
        num_groups=num_groups,
        groups_of_factor=num_groups // first.factors.numel(),
        num_rows=rows.num_rows,
        chunk=rows.block,
        TOP_K=first.top_k,
        WITH_DU=first.matrix is not None,
        TWO=len(problems) == 2,
        BLOCK_H=blocks[0],
        BLOCK_N=blocks[1],
        BLOCK_P=blocks[2],
        num_warps=warps,
    )


def _problem(number: str, args: Wgrad, parts: Parts) -> dict[str, object]:
    """Return the arguments of ``wgrad_kernel`` for its problem of this number."""
    height, width = args.left.shape[1], args.right.shape[1]
    return {
        f"left{number}_ptr": args.left,
        f"right{number}_ptr": args.right,
        f"factors{number}_ptr": args.factors,
        f"weights{number}_ptr": args.factors if args.weights is None else args.weights,
        f"out{number}_ptr": parts.out,
        f"partial{number}_ptr": parts.partial,
        f"height{number}": height,
        f"width{number}": width,
        f"stride_h{number}": 1 if args.transposed else width,
        f"stride_w{number}": height if args.transposed else 1,
        f"WEIGHTED{number}": args.weights is not None,
        f"LEFT_BY_TOKEN{number}": args.left_by_token,
        f"RIGHT_BY_TOKEN{number}": args.right_by_token,
    }


def _finish_wgrad(
    problems: Sequence[Wgrad],
    parts: Sequence[Parts],
    dots: Tensor | None,
    sum_of_dots: Tensor | None,
) -> None:
    """Add the partial sums of groups of several tiles, the parts of du and the dots.

    Groups without rows get zeros.
    """
    block = FINISHED
    sizes = [each.out[0].numel() if len(each.out) else 0 for each in parts]
    num_groups = problems[0].rows.groups.shape[1] if problems else 0
    du = parts[0].du if parts else None
    tiles = None if du is None else problems[0].tiles
    nothing = dots if dots is not None else parts[0].out
    programs = sum(num_groups * -(-size // block) for size in sizes)
    if du is not None:
        programs += tiles.num_tiles * -(-tiles.block * du.shape[1] // block)
    if dots is not None:
        programs += -(-sum_of_dots.numel() // block)
    launch(
        finish_wgrad_kernel,
        (programs,),
        groups_ptr=problems[0].rows.groups if problems else nothing,
        partial_ptr=parts[0].partial if parts else nothing,
        partial2_ptr=parts[-1].partial if parts else nothing,
        out_ptr=parts[0].out if parts else nothing,
        out2_ptr=parts[-1].out if parts else nothing,
        tiles_ptr=nothing if du is None else tiles.tiles,
        du_parts_ptr=nothing if du is None else parts[0].du_parts,
        du_ptr=nothing if du is None else du,
        dots_ptr=nothing if dots is None else dots,
        dots_out_ptr=nothing if dots is None else sum_of_dots,
        num_groups=num_groups,
        chunk=problems[0].rows.block if problems else 1,
        size=sizes[0] if sizes else 0,
        size2=sizes[1] if len(sizes) == 2 else 0,
        num_tiles=0 if du is None else tiles.num_tiles,
        num_rows=0 if du is None else du.shape[0],
        num_parts=0 if du is None else len(parts[0].du_parts),
        height=0 if du is None else du.shape[1],
        num_dots=0 if dots is None else len(dots),
        size_of_dots=0 if dots is None else sum_of_dots.numel(),
        BLOCK_M=16 if du is None else tiles.block,
        BLOCK=block,
    )


def add_low_rank(args: LowRank) -> None:
    """Add s u V to the adapted rows of ``args.out`` in place."""
    rank, width = args.u.shape[1], args.out.shape[1]
    launch(
        add_low_rank_kernel,
        (args.tiles.num_tiles if args.perm.numel() else 0, -(-width // args.block_n)),
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


def chunk_rows(num_rows: int, size: int, device: torch.device) -> int:
    """Return the rows of a tile for a sum over rows with ``size`` elements: about 32 tiles in all.

    Then one long group does not delay the launch, and a few groups still give many programs. There
    are fewer tiles where the partial sums, up to two for each, would take more than 256 MiB.
    """
    tiles = min(32, max(1, 2**25 // size))
    return max(512, next_power_of_2(num_rows // tiles))


class SharedLaunches(NamedTuple):
    """A backend's launches that several ops share.

    Attributes:
        dispatch_with_maps: see :mod:`moe_kernels.ops.dispatch.triton_impl`.
        tile_maps: see :func:`moe_kernels.ops.triton_tile_maps.tile_maps`.
        shrink, wgrad, add_low_rank: see the functions of this module.
        gives_du: whether ``wgrad`` should return du too, for a rank, dy and the number of rows.
        chunk_rows: rows of a tile of a sum of ``wgrad``, for all rows, a sum's elements, a device.
    """

    dispatch_with_maps: Callable[..., tuple[tuple[Tensor, ...], list[TileMap]]]
    tile_maps: Callable[..., list[TileMap]]
    shrink: Callable[[Shrink], Tensor]
    wgrad: Callable[..., tuple[list[tuple[Tensor, Tensor | None]], Tensor | None]]
    add_low_rank: Callable[[LowRank], None]
    gives_du: Callable[[int, Tensor, int], bool]
    chunk_rows: Callable[[int, int, torch.device], int]


TRITON_SHARED = SharedLaunches(
    dispatch_with_maps=dispatch_with_maps,
    tile_maps=tile_maps,
    shrink=shrink,
    wgrad=wgrad,
    add_low_rank=add_low_rank,
    gives_du=gives_du,
    chunk_rows=chunk_rows,
)
