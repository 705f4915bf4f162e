"""Triton kernels and parts of them that several ops use.

Rows are in sorted order: p is a row's place, ``perm[p] // TOP_K`` its token. A tile is BLOCK_M rows
of one group, taken from a map (3, num_tiles) of group, first row and end; a tile without rows
returns at once, so the host need not know the counts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import backends

# Triton decides when a kernel is decorated, that is when this module is imported.
INTERPRETED = backends.triton_is_interpreted()
ROWS_OF_OUTER = 32  # summed between two visits to the accumulator


@triton.jit
def tile_of(tiles_ptr, tile, num_tiles):
    """Group, first row and end of a tile."""
    group = tl.load(tiles_ptr + tile)
    return group, tl.load(tiles_ptr + num_tiles + tile), tl.load(tiles_ptr + 2 * num_tiles + tile)


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


@triton.jit
def add_product(
    acc, left_ptr, left_rows, left_ld, w, stride_wk, stride_wn, size_k, offs_n, size_n, mask_m,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + left @ W, W (size_k, size_n) with any strides."""
    for k in range(0, size_k, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        left = load_rows(left_ptr, left_rows, left_ld, mask_m, offs_k, size_k)
        acc = dot(left, load_operand(w, offs_k, size_k, stride_wk, offs_n, size_n, stride_wn), acc)
    return acc


@triton.jit
def project_kernel(
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
    offs_r = tl.arange(0, BLOCK_R)
    index = pair // num_base * experts_of_m + tl.minimum(pair % num_base, experts_of_m - 1)
    acc = add_product(
        tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), left_ptr, left_rows, size_k,
        m_ptr + index * size_k * RANK, stride_mk, stride_mr, size_k, offs_r, RANK, mask_m, BLOCK_K,
    )  # fmt: skip
    mask = mask_m[:, None] & (offs_r < RANK)[None, :]
    out = out_ptr + rows[:, None] * RANK + offs_r[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def outer_kernel(
    left_ptr,  # (rows, height)
    right_ptr,  # (rows, width)
    perm_ptr,
    groups_ptr,  # (2, num_groups): first row and end
    factors_ptr,  # (num_groups,) float32
    weights_ptr,  # (T, TOP_K)
    out_ptr,  # (num_groups, height, width) or (num_groups, width, height), float32
    num_groups,
    height,
    width,
    stride_h,
    stride_w,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr,
    RIGHT_BY_TOKEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """out[g] = sum over the group's rows of (factor * weight * left)^T right, in row order."""
    group, pid_h, pid_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, end = tl.load(groups_ptr + group), tl.load(groups_ptr + num_groups + group)
    dtype: tl.constexpr = right_ptr.dtype.element_ty
    factor = tl.load(factors_ptr + group)
    offs_h = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
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
    mask = (offs_h < height)[:, None] & (offs_n < width)[None, :]
    out = out_ptr + group.to(tl.int64) * height * width
    tl.store(out + offs_h[:, None] * stride_h + offs_n[None, :] * stride_w, acc, mask=mask)


@triton.jit
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
    offs_r = tl.arange(0, BLOCK_R)
    token = tl.load(perm_ptr + rows, mask=mask_m, other=0)
    u = scaled_rows(u_ptr, tl.load(scaling_ptr + modality), rows, mask_m, offs_r, RANK, dtype)
    v = load_operand(
        v_ptr + modality * RANK * width, offs_r, RANK, stride_vr, offs_n, width, stride_vn
    )
    mask = mask_m[:, None] & (offs_n < width)[None, :]
    out = out_ptr + token[:, None] * width + offs_n[None, :]
    acc = dot(u, v, tl.load(out, mask=mask, other=0.0).to(tl.float32))
    tl.store(out, acc.to(dtype), mask=mask)


# --- launches


def check_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError for a dtype that these kernels do not compute in."""
    if dtype == torch.float64:
        raise TypeError("backend 'triton' computes in float32, bfloat16 or float16, not float64")
    if dtype == torch.bfloat16 and INTERPRETED:
        raise TypeError("Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16")


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, and 1."""
    return 1 << max(n - 1, 0).bit_length()


def tile_map(first: Tensor, end: Tensor, num_rows: int, block: int) -> Tensor:
    """(3, n) group, first row and end of every tile of ``block`` rows; n depends on shapes alone.

    A group of c rows has ceil(c / block) tiles, so there are at most num_rows / block + groups.
    Those beyond the last have no rows.
    """
    groups = first.numel()
    index = torch.arange(num_rows // block + groups, device=first.device)
    tiles = (end - first + block - 1) // block
    ends = tiles.cumsum(0)
    group = torch.searchsorted(ends, index, right=True).clamp(max=max(groups - 1, 0))
    if groups == 0:
        return torch.zeros(3, 0, dtype=torch.int64, device=first.device)
    start = first[group] + (index - (ends - tiles)[group]) * block
    stop = torch.minimum(start + block, end[group])
    return torch.stack([group, start, torch.where(index < ends[-1], stop, start)])


def project(
    left: Tensor,
    matrix: Tensor,
    perm: Tensor,
    tiles: Tensor,
    out: Tensor,
    *,
    strides: tuple[int, int],
    top_k: int,
    by_token: bool,
    num_base: int,
    experts: int,
    block_m: int,
    block_k: int,
) -> Tensor:
    """Fills the adapted rows of ``out`` with left @ matrix; ``strides`` along k and r."""
    num_tiles, rank = tiles.shape[1], out.shape[1]
    if num_tiles and out.shape[0]:
        project_kernel[(num_tiles,)](
            left, matrix, perm, tiles, out, num_tiles, num_base, experts, left.shape[1],
            *strides, TOP_K=top_k, BY_TOKEN=by_token, RANK=rank,
            BLOCK_R=max(16, next_power_of_2(rank)), BLOCK_M=block_m, BLOCK_K=block_k,
        )  # fmt: skip
    return out


def outer(
    left: Tensor,
    right: Tensor,
    perm: Tensor,
    bounds: Tensor,
    factors: Tensor,
    *,
    transposed: bool,
    top_k: int,
    weights: Tensor | None = None,
    left_by_token: bool = False,
    right_by_token: bool = False,
) -> Tensor:
    """(groups, height, width) sums of left^T right, or with the last two exchanged, in float32.

    Args:
        bounds: (2, groups), first row and end of each group.
        factors: (groups,), of each sum.
        weights: (T, K), of each row, or None.
    """
    groups, height, width = bounds.shape[1], left.shape[1], right.shape[1]
    shape = (groups, width, height) if transposed else (groups, height, width)
    out = torch.zeros(shape, dtype=torch.float32, device=left.device)
    block_h = min(64, max(16, next_power_of_2(height)))
    block_n = min(128, max(16, next_power_of_2(width)))
    if groups and perm.numel():
        outer_kernel[(groups, -(-height // block_h), -(-width // block_n))](
            left, right, perm, bounds, factors, factors if weights is None else weights, out,
            groups, height, width, *((1, height) if transposed else (width, 1)), TOP_K=top_k,
            WEIGHTED=weights is not None, LEFT_BY_TOKEN=left_by_token,
            RIGHT_BY_TOKEN=right_by_token, BLOCK_H=block_h, BLOCK_N=block_n,
            BLOCK_P=ROWS_OF_OUTER,
        )  # fmt: skip
    return out
