"""Triton kernels, and parts of them, that several ops use; ``triton_launches`` launches them.

Rows are in sorted order: p is a row's place, ``perm[p] // TOP_K`` its token. ``tiles_ptr`` are the
tiles of a map (``triton_tile_maps``). Adapters are read in their own dtype and rounded to that of
the rows they multiply. Counts are not specialised on: a new number of tokens compiles nothing.
"""

import triton
import triton.language as tl

from moe_kernels.ops.triton_tile_maps import tile_of


@triton.jit
def dot(a, b, acc):
    """Return acc + a @ b; float32 in full precision."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_rows(ptr, rows, ld, mask_m, offs_k, size_k):
    """Load (BLOCK_M, BLOCK_K) of a row-major matrix."""
    mask = mask_m[:, None] & (offs_k < size_k)[None, :]
    return tl.load(ptr + rows[:, None] * ld + offs_k[None, :], mask=mask, other=0.0)


@triton.jit
def load_operand(ptr, offs_k, size_k, stride_k, offs_n, size_n, stride_n):
    """Load (BLOCK_K, BLOCK_N) of a matrix with any strides."""
    mask = (offs_k < size_k)[:, None] & (offs_n < size_n)[None, :]
    return tl.load(
        ptr + offs_k[:, None] * stride_k + offs_n[None, :] * stride_n, mask=mask, other=0.0
    )


@triton.jit
def scaled_rows(u_ptr, scale, rows, mask_m, offs_r, RANK: tl.constexpr, dtype: tl.constexpr):
    """Return scale * u (BLOCK_M, BLOCK_R), multiplied in float32 and rounded once."""
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
    """Store out = left M on adapted rows alone."""
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
    """Store out[g] = sum over the group's rows of (factor * weight * left)^T right, in row order.

    If the group has several tiles, each tile's sum is a partial sum. With WITH_DU the kernel also
    stores right matrix[g], row by row, for this program's columns: ``right`` is read once for both.
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
    """Sum up groups of several tiles, in the order of the tiles; groups without tiles get zeros."""
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
    """Store the sum of the parts, in order, on the rows of the tiles alone."""
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
    """Add s u V to out[token] in place, on adapted rows alone."""
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
