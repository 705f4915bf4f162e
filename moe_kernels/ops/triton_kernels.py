"""Triton kernels and parts of them that several ops use.

Rows are in sorted order: p is a row's place, ``perm[p] // TOP_K`` its token. ``tiles_ptr`` are the
tiles of a map (``triton_tile_maps``). Adapters come in their own dtype and are rounded to that of
the rows they meet. Counts are not specialised on: a new number of tokens compiles nothing.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops.triton_tile_maps import TileMap, tile_maps, tile_of

MAX_SUMMED = 32  # columns of the rank in a program of sum_parts_kernel: wider ones spill
MAX_BYTES_OF_PARTS = 2**28  # of du by columns of dy; beyond it du is a pass of its own
STEP_R = 16  # columns of the rank in one step of an extension: wider ones spill
MAX_RANK_WITH_DU = 16  # highest rank of which du comes with dB, in parts by columns of dy
# Triton decides when a kernel is decorated, that is when this module is imported.
INTERPRETED = backends.triton_is_interpreted()


@triton.jit
def dot(a, b, acc):
    """acc + a @ b; float32 in full precision."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_rows(ptr, rows, ld, mask_m, offs_k, size_k):
    """(BLOCK_M, BLOCK_K) of a row-major matrix."""
    mask = mask_m[:, None] & (offs_k < size_k)[None, :]
    return tl.load(ptr + rows[:, None] * ld + offs_k[None, :], mask=mask, other=0.0)


@triton.jit
def load_operand(ptr, offs_k, size_k, stride_k, offs_n, size_n, stride_n):
    """(BLOCK_K, BLOCK_N) of a matrix with any strides."""
    mask = (offs_k < size_k)[:, None] & (offs_n < size_n)[None, :]
    return tl.load(
        ptr + offs_k[:, None] * stride_k + offs_n[None, :] * stride_n, mask=mask, other=0.0
    )


@triton.jit
def scaled_rows(u_ptr, scale, rows, mask_m, offs_r, RANK: tl.constexpr, dtype: tl.constexpr):
    """scale * u (BLOCK_M, BLOCK_R), multiplied in float32 and rounded once."""
    u = load_rows(u_ptr, rows, RANK, mask_m, offs_r, RANK)
    return (u.to(tl.float32) * scale).to(dtype)


@triton.jit(do_not_specialize=["num_tiles", "num_base", "experts_of_m"])
def shrink_kernel(
    left_ptr,  # (T, size_k) if BY_TOKEN, else (T * TOP_K, size_k)
    m_ptr,  # (NUM_MODALITIES, experts_of_m, ...): (size_k, RANK), strides stride_mk, stride_mr
    perm_ptr,
    tiles_ptr,  # (3, num_tiles) of pairs (modality, expert)
    out_ptr,  # (T * TOP_K, RANK)
    num_tiles,
    num_base,
    experts_of_m,
    size_k,
    stride_mk,
    stride_mr,
    TOP_K: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = left M on adapted rows alone."""
    pair, first, end = tile_of(tiles_ptr, tl.program_id(0), num_tiles)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    mask_m = rows < end
    left_rows = rows
    if BY_TOKEN:
        left_rows = tl.load(perm_ptr + rows, mask=mask_m, other=0) // TOP_K
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    index = pair // num_base * experts_of_m + tl.minimum(pair % num_base, experts_of_m - 1)
    matrix = m_ptr + index * size_k * RANK
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, size_k, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        left = load_rows(left_ptr, left_rows, size_k, mask_m, offs_k, size_k)
        part = load_operand(matrix, offs_k, size_k, stride_mk, offs_r, RANK, stride_mr)
        acc = dot(left, part.to(left.dtype), acc)
    mask = mask_m[:, None] & (offs_r < RANK)[None, :]
    out = out_ptr + rows[:, None] * RANK + offs_r[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tiles", "num_groups", "groups_of_factor", "num_rows", "chunk"])
def wgrad_kernel(
    left_ptr,  # (rows, height)
    right_ptr,  # (rows, width)
    perm_ptr,
    tiles_ptr,  # (3, num_tiles)
    groups_ptr,  # (3, num_groups): first row, end, first partial sum
    factors_ptr,  # (num_groups / groups_of_factor,) float32
    weights_ptr,  # (T, TOP_K)
    matrix_ptr,  # (num_groups, width, height), for du
    out_ptr,  # (num_groups, height, width) or (num_groups, width, height), float32
    partial_ptr,  # (partial sums, ...) of the same, float32
    du_parts_ptr,  # (column blocks, num_rows, height), float32
    num_tiles,
    num_groups,
    groups_of_factor,
    num_rows,
    chunk,
    height,
    width,
    stride_h,
    stride_w,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr,
    RIGHT_BY_TOKEN: tl.constexpr,
    WITH_DU: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """out[g] = sum over the group's rows of (factor * weight * left)^T right, in row order.

    The sum over a tile's rows, if the group has several. With WITH_DU also right matrix[g], row by
    row, of this program's columns: one reading of ``right`` serves both.
    """
    tile, pid_h, pid_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group, first, end = tile_of(tiles_ptr, tile, num_tiles)
    if first >= end:
        return
    dtype: tl.constexpr = right_ptr.dtype.element_ty
    factor = tl.load(factors_ptr + group // groups_of_factor)
    offs_h = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    size = height * width
    if WITH_DU:
        matrix = load_operand(matrix_ptr + group * size, offs_n, width, height, offs_h, height, 1)
        matrix = matrix.to(dtype)
        du_part = du_parts_ptr + (pid_n.to(tl.int64) * num_rows + first) * height
    acc = tl.zeros((BLOCK_H, BLOCK_N), dtype=tl.float32)
    for start in range(first, end, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask_p = rows < end
        slot = tl.load(perm_ptr + rows, mask=mask_p, other=0)
        token = slot // TOP_K
        left = load_rows(
            left_ptr, token if LEFT_BY_TOKEN else rows, height, mask_p, offs_h, height
        ).to(tl.float32)
        left *= factor
        if WEIGHTED:
            left *= tl.load(weights_ptr + slot, mask=mask_p, other=0.0).to(tl.float32)[:, None]
        right = load_rows(
            right_ptr, token if RIGHT_BY_TOKEN else rows, width, mask_p, offs_n, width
        )
        acc = dot(tl.trans(left.to(dtype)), right, acc)
        if WITH_DU:
            du = dot(right, matrix, tl.zeros((BLOCK_P, BLOCK_H), dtype=tl.float32))
            here = (rows - first)[:, None] * height + offs_h[None, :]
            tl.store(du_part + here, du, mask=mask_p[:, None] & (offs_h < height)[None, :])
    low, high = tl.load(groups_ptr + group), tl.load(groups_ptr + num_groups + group)
    out = out_ptr + group * size
    if high - low > chunk:
        partial = tl.load(groups_ptr + 2 * num_groups + group) + (first - low) // chunk
        out = partial_ptr + partial * size
    mask = (offs_h < height)[:, None] & (offs_n < width)[None, :]
    tl.store(out + offs_h[:, None] * stride_h + offs_n[None, :] * stride_w, acc, mask=mask)


@triton.jit(do_not_specialize=["num_groups", "chunk"])
def finish_wgrad_kernel(
    groups_ptr,  # (3, num_groups): first row, end, first partial sum
    partial_ptr,  # (partial sums, size)
    out_ptr,  # (num_groups, size)
    num_groups,
    chunk,
    size,
    BLOCK_N: tl.constexpr,
):
    """The sums of groups of several tiles, in the order of the tiles; zeros for those of none."""
    group = tl.program_id(1).to(tl.int64)
    rows = tl.load(groups_ptr + num_groups + group) - tl.load(groups_ptr + group)
    if (rows > 0) & (rows <= chunk):
        return
    offs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < size
    partial = tl.load(groups_ptr + 2 * num_groups + group)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for tile in range(tl.cdiv(rows, chunk)):
        acc += tl.load(partial_ptr + (partial + tile) * size + offs, mask=mask, other=0.0)
    tl.store(out_ptr + group * size + offs, acc, mask=mask)


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def sum_parts_kernel(
    parts_ptr,  # (num_parts, num_rows, RANK)
    out_ptr,  # (num_rows, RANK)
    tiles_ptr,
    num_tiles,
    num_parts,
    num_rows,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out = the sum of the parts, in order, on the rows of the tiles alone."""
    _, first, end = tile_of(tiles_ptr, tl.program_id(0), num_tiles)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for _ in range(num_parts):
        acc += load_rows(parts_ptr, rows, RANK, rows < end, offs_r, RANK)
        parts_ptr += num_rows * RANK  # a part at a time: all of them can pass 2^31
    mask = (rows < end)[:, None] & (offs_r < RANK)[None, :]
    tl.store(out_ptr + rows[:, None] * RANK + offs_r[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["num_tiles"])
def add_low_rank_kernel(
    u_ptr,  # (T, RANK), sorted rows
    v_ptr,  # (NUM_MODALITIES, ...): (RANK, width), strides stride_vr, stride_vn
    scaling_ptr,  # (NUM_MODALITIES,)
    perm_ptr,  # (T,)
    tiles_ptr,  # (3, num_tiles) of modalities
    out_ptr,  # (T, width)
    num_tiles,
    width,
    stride_vr,
    stride_vn,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[token] += s u V, in place, on adapted rows alone."""
    modality, first, end = tile_of(tiles_ptr, tl.program_id(0), num_tiles)
    if first >= end:
        return
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = first + tl.arange(0, BLOCK_M)
    mask_m = rows < end
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(perm_ptr + rows, mask=mask_m, other=0)
    scale = tl.load(scaling_ptr + modality)
    mask = mask_m[:, None] & (offs_n < width)[None, :]
    out = out_ptr + token[:, None] * width + offs_n[None, :]
    acc = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    for r in tl.range(0, RANK, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        u = scaled_rows(u_ptr, scale, rows, mask_m, offs_r, RANK, dtype)
        v = load_operand(
            v_ptr + modality * RANK * width, offs_r, RANK, stride_vr, offs_n, width, stride_vn
        )
        acc = dot(u, v.to(dtype), acc)
    tl.store(out, acc.to(dtype), mask=mask)


# --- launches


def check_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError for a dtype that these kernels do not compute in."""
    if dtype == torch.float64:
        raise TypeError(
            "backends 'triton' and 'cuda' compute in float32, bfloat16 or float16, not float64"
        )
    if dtype == torch.bfloat16 and INTERPRETED:
        raise TypeError("Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16")


@functools.cache  # asked several times at every call of an op
def capability(device: torch.device) -> int:
    """Compute capability, 90 for sm_90; the interpreter plays a Hopper."""
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def has_tma(device: torch.device) -> bool:
    """Whether the copy engine can load tiles of a tensor."""
    return capability(device) >= 90


def rank_block(dtype: torch.dtype) -> int:
    """Columns of the rank in a program of :func:`shrink_kernel`; float32 has no matrix
    instructions, and more spill.
    """
    return 16 if dtype == torch.float32 else 64


def wgrad_blocks(
    height: int, width: int, dtype: torch.dtype, *, with_du: bool, capability: int
) -> tuple[int, int, int, int]:
    """Rows and columns of a tile of a sum, rows that are summed in one step, and warps.

    With du the columns are wide: it is written in parts of so many. Measured on an H100;
    on sm_80 wide ones spill.
    """
    if dtype == torch.float32:
        *most, step, warps = 16, 64, 16, 4
    else:
        wide = with_du and capability >= 90
        *most, step, warps = (64, 256, 64, 8) if wide else (64, 128, 32, 4)
    blocks = (max(16, triton.next_power_of_2(size)) for size in (height, width))
    return *map(min, most, blocks), step, warps


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
    """Fills the adapted rows of ``out`` with left @ matrix, (..., k, r), or (..., r, k) if
    ``rank_first``, of which there are ``experts`` for each modality.
    """
    num_tiles, rank, block_m = tiles.num_tiles, out.shape[1], tiles.block
    block_r = min(rank_block(left.dtype), max(16, triton.next_power_of_2(rank)))
    if num_tiles and out.shape[0]:
        shrink_kernel[(num_tiles, -(-rank // block_r))](
            left, matrix, perm, tiles.tiles, out, num_tiles, num_base, experts, left.shape[1],
            *((1, left.shape[1]) if rank_first else (rank, 1)), TOP_K=top_k, BY_TOKEN=by_token,
            RANK=rank, BLOCK_R=block_r,
            BLOCK_M=block_m, BLOCK_K=block_k, num_warps=shrink_warps(block_m),
        )  # fmt: skip
    return out


def shrink_warps(block_m: int) -> int:
    """Of a program of :func:`shrink_kernel`: four of them spill on 16 rows."""
    return 2 if block_m == 16 else 4


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
    """(groups, height, width) sums of left^T right, or with the last two exchanged, in float32.

    Args:
        factors: (n,) float32, each of as many neighbouring groups' sums.
        weights: (T, K), of each row, or None.
        matrix: (groups, width, height), or None.
        tiles: of the same groups, short ones; with ``matrix``. Where its parts by columns would be
            too large, the product with it is a pass of its own.

    Returns:
        The sums, and with ``matrix`` right @ matrix (rows, height) in float32, of which rows of no
        group are not written.
    """
    num_groups, height, width = rows.groups.shape[1], left.shape[1], right.shape[1]
    blocks = functools.partial(
        wgrad_blocks, height, width, right.dtype, capability=capability(right.device)
    )
    du = None
    if matrix is not None and not du_parts_fit(
        perm.numel(), width, height, blocks(with_du=True)[1]
    ):
        du = shrink_to_du(shrink, right, matrix, perm, tiles, top_k, right_by_token)
        matrix = None
    block_h, block_n, block_p, warps = blocks(with_du=matrix is not None)
    grid = (rows.num_tiles, -(-height // block_h), -(-width // block_n))
    shape = (width, height) if transposed else (height, width)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=left.device)

    out = empty(num_groups, *shape)
    partial = empty(rows.num_partials, *shape)
    parts = None if matrix is None else empty(grid[2], perm.numel(), height)
    if num_groups == 0:
        return out, du if parts is None else _sum_parts(parts, tiles)
    if rows.num_rows:
        wgrad_kernel[grid](
            left, right, perm, rows.tiles, rows.groups, factors,
            factors if weights is None else weights, right if matrix is None else matrix, out,
            partial, out if parts is None else parts, grid[0], num_groups,
            num_groups // factors.numel(), rows.num_rows, rows.block, height, width,
            *((1, height) if transposed else (width, 1)), TOP_K=top_k,
            WEIGHTED=weights is not None, LEFT_BY_TOKEN=left_by_token,
            RIGHT_BY_TOKEN=right_by_token, WITH_DU=matrix is not None, BLOCK_H=block_h,
            BLOCK_N=block_n, BLOCK_P=block_p, num_warps=warps,
        )  # fmt: skip
    # The second axis of a grid ends at 65,535.
    finish_wgrad_kernel[(-(-height * width // 1024), num_groups)](
        rows.groups, partial, out, num_groups, rows.block, height * width,
        BLOCK_N=1024,
    )  # fmt: skip
    return out, du if parts is None else _sum_parts(parts, tiles)


def du_parts_fit(rows: int, width: int, rank: int, columns: int) -> bool:
    """Whether du may come with dB: float32, for all rows, one part for every so many columns of dy
    (rows, width).
    """
    return 4 * -(-width // columns) * rows * rank <= MAX_BYTES_OF_PARTS


def shrink_to_du(
    shrink: Callable[..., Tensor], dy: Tensor, matrix: Tensor, perm: Tensor, tiles: TileMap,
    top_k: int, by_token: bool,
) -> Tensor:  # fmt: skip
    """dy @ matrix (rows, r) in float32, of (groups, width, r), by a backend's ``shrink``."""
    du = torch.empty(perm.numel(), matrix.shape[2], dtype=torch.float32, device=dy.device)
    groups = max(1, matrix.shape[0])
    return shrink(
        dy, matrix, perm, tiles, du, rank_first=False, top_k=top_k, by_token=by_token,
        num_base=groups, experts=groups, block_k=16 if dy.dtype == torch.float32 else 64,
    )  # fmt: skip


def _sum_parts(parts: Tensor, tiles: TileMap) -> Tensor:
    """(rows, r) sums of (n, rows, r) on the rows of the tiles; others are not written."""
    num_parts, rows, rank = parts.shape
    out = parts.new_empty(rows, rank)
    block_r = min(MAX_SUMMED, max(16, triton.next_power_of_2(rank)))
    if tiles.num_tiles and rows:
        sum_parts_kernel[(tiles.num_tiles, -(-rank // block_r))](
            parts, out, tiles.tiles, tiles.num_tiles, num_parts, rows, RANK=rank, BLOCK_R=block_r,
            BLOCK_M=tiles.block,
        )  # fmt: skip
    return out


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
    """out[token] += s u @ matrix, (modalities, r, n), or (modalities, n, r) if ``rank_last``, in
    place, on adapted rows alone; ``scaling`` (modalities,) float32.
    """
    rank, width = u.shape[1], out.shape[1]
    if tiles.num_tiles and perm.numel():
        add_low_rank_kernel[(tiles.num_tiles, -(-width // block_n))](
            u, matrix, scaling, perm, tiles.tiles, out, tiles.num_tiles, width,
            *((1, rank) if rank_last else (width, 1)), RANK=rank, BLOCK_R=STEP_R,
            BLOCK_M=tiles.block, BLOCK_N=block_n,
        )  # fmt: skip


class SharedLaunches(NamedTuple):
    """The launches that the ops share: how a backend makes each.

    Attributes:
        tile_maps: see :func:`moe_kernels.ops.triton_tile_maps.tile_maps`.
        shrink, wgrad, add_low_rank: see the functions of this module.
        gives_du: whether ``wgrad`` is to give du too, for a rank and dy.
    """

    tile_maps: Callable[..., list[TileMap]]
    shrink: Callable[..., Tensor]
    wgrad: Callable[..., tuple[Tensor, Tensor | None]]
    add_low_rank: Callable[..., None]
    gives_du: Callable[[int, Tensor], bool]


def gives_du(rank: int, dy: Tensor) -> bool:
    """Whether the parts of du cost less than another reading of dy."""
    return rank <= MAX_RANK_WITH_DU


TRITON_SHARED = SharedLaunches(tile_maps, shrink, wgrad, add_low_rank, gives_du)
