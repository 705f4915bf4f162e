"""Triton kernels, and parts of them, that several ops use; ``triton_launches`` launches them.

Rows are in sorted order: p is a row's place, ``perm[p] // TOP_K`` its token. ``tiles_ptr`` are the
tiles of a map (``triton_tile_maps``). Adapters are read in their own dtype and rounded to that of
the rows they multiply. Counts are not specialised on: a new number of tokens compiles nothing.
"""

# ruff: noqa: SIM102 (Triton's `and` does not look at one side first)
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


@triton.jit
def _fill(
    segments_ptr, out_ptr, program, num_programs, num_base, num_modalities, num_rows, offs_r,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store zeros in a share of the rows without an adapter.

    They are the base rows of each expert, and the rows of added experts and those that were not
    dispatched, which come last. Each of these ranges has as many programs as the others.
    """
    segment = segments_ptr + program % (num_base + 1) * (num_modalities + 1)
    low = tl.load(segment)
    high = num_rows.to(tl.int64)
    if program % (num_base + 1) < num_base:
        high = tl.load(segment + 1)
    local = program // (num_base + 1) * BLOCK_M + tl.arange(0, BLOCK_M)
    zeros = tl.zeros((BLOCK_M, BLOCK_R), dtype=out_ptr.dtype.element_ty)
    for start in range(low, high, num_programs // (num_base + 1) * BLOCK_M):
        rows = start + local
        mask = (rows < high)[:, None] & (offs_r < RANK)[None, :]
        tl.store(out_ptr + rows[:, None] * RANK + offs_r[None, :], zeros, mask=mask)


@triton.jit(
    do_not_specialize=["num_tiles", "num_base", "experts_of_m", "num_modalities", "num_rows"]
)
def shrink_kernel(
    left_ptr,  # (T, size_k) if BY_TOKEN, else (T * TOP_K, size_k)
    m_ptr,  # (num_modalities, experts_of_m, ...): (size_k, RANK), strides stride_mk, stride_mr
    perm_ptr,
    tiles_ptr,  # (3, num_tiles) of pairs (modality, expert)
    segments_ptr,  # (at least num_base * (num_modalities + 1) + 1,)
    out_ptr,  # (T * TOP_K, RANK)
    num_tiles,
    num_base,
    experts_of_m,
    num_modalities,
    num_rows,
    size_k,
    stride_mk,
    stride_mr,
    TOP_K: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    FILL: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store out = left M on adapted rows.

    With FILL the programs behind those of the tiles store zeros on all other rows.
    """
    program = tl.program_id(0)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if FILL:
        if program >= num_tiles:
            _fill(
                segments_ptr, out_ptr, program - num_tiles, tl.num_programs(0) - num_tiles,
                num_base, num_modalities, num_rows, offs_r, RANK, BLOCK_R, BLOCK_M,
            )  # fmt: skip
            return
    pair, first, end = tile_of(tiles_ptr, program, num_tiles)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    mask_m = rows < end
    left_rows = rows
    if BY_TOKEN:
        left_rows = tl.load(perm_ptr + rows, mask=mask_m, other=0) // TOP_K
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


@triton.jit
def _sum_tile(
    left_ptr, right_ptr, perm_ptr, groups_ptr, factors_ptr, weights_ptr, matrix_ptr, out_ptr,
    partial_ptr, du_parts_ptr, block, group, first, end, num_groups, groups_of_factor, num_rows,
    chunk, height, width, stride_h, stride_w, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr, RIGHT_BY_TOKEN: tl.constexpr, WITH_DU: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Store a block of one tile's sum, and with WITH_DU the block's part of du.

    What a step reads by its rows' tokens is looked up a step before.
    """
    pid_n = block // tl.cdiv(height, BLOCK_H)
    dtype: tl.constexpr = right_ptr.dtype.element_ty
    factor = tl.load(factors_ptr + group // groups_of_factor)
    offs_h = block % tl.cdiv(height, BLOCK_H) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    size = height * width
    if WITH_DU:
        matrix = load_operand(matrix_ptr + group * size, offs_n, width, height, offs_h, height, 1)
        matrix = matrix.to(dtype)
        du_part = du_parts_ptr + (pid_n.to(tl.int64) * num_rows + first) * height
    acc = tl.zeros((BLOCK_H, BLOCK_N), dtype=tl.float32)
    rows = first + tl.arange(0, BLOCK_P)
    slot = tl.load(perm_ptr + rows, mask=rows < end, other=0)
    if WEIGHTED:
        weight = tl.load(weights_ptr + slot, mask=rows < end, other=0.0)
    for _ in range(first, end, BLOCK_P):
        mask_p = rows < end
        next_rows = rows + BLOCK_P
        next_slot = tl.load(perm_ptr + next_rows, mask=next_rows < end, other=0)
        token = slot // TOP_K
        left = load_rows(
            left_ptr, token if LEFT_BY_TOKEN else rows, height, mask_p, offs_h, height
        ).to(tl.float32)
        right = load_rows(
            right_ptr, token if RIGHT_BY_TOKEN else rows, width, mask_p, offs_n, width
        )
        left *= factor
        if WEIGHTED:
            left *= weight.to(tl.float32)[:, None]
            weight = tl.load(weights_ptr + next_slot, mask=next_rows < end, other=0.0)
        acc = dot(tl.trans(left.to(dtype)), right, acc)
        if WITH_DU:
            du = dot(right, matrix, tl.zeros((BLOCK_P, BLOCK_H), dtype=tl.float32))
            here = (rows - first)[:, None] * height + offs_h[None, :]
            tl.store(du_part + here, du, mask=mask_p[:, None] & (offs_h < height)[None, :])
        rows, slot = next_rows, next_slot
    low, high = tl.load(groups_ptr + group), tl.load(groups_ptr + num_groups + group)
    out = out_ptr + group * size
    if high - low > chunk:
        partial = tl.load(groups_ptr + 2 * num_groups + group) + (first - low) // chunk
        out = partial_ptr + partial * size
    mask = (offs_h < height)[:, None] & (offs_n < width)[None, :]
    tl.store(out + offs_h[:, None] * stride_h + offs_n[None, :] * stride_w, acc, mask=mask)


@triton.jit(do_not_specialize=["num_tiles", "num_groups", "groups_of_factor", "num_rows", "chunk"])
def wgrad_kernel(
    # Two problems over the same rows.
    left_ptr,  # (rows, height)
    left2_ptr,
    right_ptr,  # (rows, width)
    right2_ptr,
    factors_ptr,  # (num_groups / groups_of_factor,) float32
    factors2_ptr,
    weights_ptr,  # (T, TOP_K)
    weights2_ptr,
    out_ptr,  # (num_groups, height, width) or (num_groups, width, height), float32
    out2_ptr,
    partial_ptr,  # (partial sums, ...) of the same, float32
    partial2_ptr,
    matrix_ptr,  # (num_groups, width, height), for du
    du_parts_ptr,  # (column blocks, num_rows, height), float32
    perm_ptr,
    tiles_ptr,  # (3, num_tiles)
    groups_ptr,  # (3, num_groups): first row, end, first partial sum
    num_tiles,
    num_groups,
    groups_of_factor,
    num_rows,
    chunk,
    height,
    height2,
    width,
    width2,
    stride_h,
    stride_h2,
    stride_w,
    stride_w2,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WEIGHTED2: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr,
    LEFT_BY_TOKEN2: tl.constexpr,
    RIGHT_BY_TOKEN: tl.constexpr,
    RIGHT_BY_TOKEN2: tl.constexpr,
    WITH_DU: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Store out[g] = sum over the group's rows of (factor * weight * left)^T right, in row order.

    If the group has several tiles, each tile's sum is a partial sum. With WITH_DU the kernel also
    stores right matrix[g], row by row, for this program's columns: ``right`` is read once for both.
    With TWO the programs behind the first problem's do the same for the second one.
    """
    block = tl.program_id(0) // num_tiles
    group, first, end = tile_of(tiles_ptr, tl.program_id(0) % num_tiles, num_tiles)
    if first >= end:
        return
    if TWO:
        blocks = tl.cdiv(height, BLOCK_H) * tl.cdiv(width, BLOCK_N)
        if block >= blocks:
            _sum_tile(
                left2_ptr, right2_ptr, perm_ptr, groups_ptr, factors2_ptr, weights2_ptr, matrix_ptr,
                out2_ptr, partial2_ptr, du_parts_ptr, block - blocks, group, first, end, num_groups,
                groups_of_factor, num_rows, chunk, height2, width2, stride_h2, stride_w2, TOP_K,
                WEIGHTED2, LEFT_BY_TOKEN2, RIGHT_BY_TOKEN2, False, BLOCK_H, BLOCK_N, BLOCK_P,
            )  # fmt: skip
            return
    _sum_tile(
        left_ptr, right_ptr, perm_ptr, groups_ptr, factors_ptr, weights_ptr, matrix_ptr, out_ptr,
        partial_ptr, du_parts_ptr, block, group, first, end, num_groups, groups_of_factor, num_rows,
        chunk, height, width, stride_h, stride_w, TOP_K, WEIGHTED, LEFT_BY_TOKEN, RIGHT_BY_TOKEN,
        WITH_DU, BLOCK_H, BLOCK_N, BLOCK_P,
    )  # fmt: skip


@triton.jit
def _add_parts(parts_ptr, out_ptr, num_parts, stride, offs, mask, BLOCK: tl.constexpr):
    """Store the sum of the parts, ``stride`` elements apart, in order."""
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(num_parts):
        acc += tl.load(parts_ptr + offs, mask=mask, other=0.0)
        parts_ptr += stride  # a part at a time: all of them can pass 2^31
    tl.store(out_ptr + offs, acc, mask=mask)


@triton.jit
def _finish_group(
    groups_ptr, partial_ptr, out_ptr, program, num_groups, chunk, size, BLOCK: tl.constexpr
):
    """Sum up a group of several tiles, in the order of the tiles; without tiles it gets zeros.

    The sum of a single tile is there already.
    """
    group = (program % num_groups).to(tl.int64)
    rows = tl.load(groups_ptr + num_groups + group) - tl.load(groups_ptr + group)
    tiles = tl.cdiv(rows, chunk).to(tl.int32)
    first = tl.load(groups_ptr + 2 * num_groups + group) * size
    offs = program // num_groups * BLOCK + tl.arange(0, BLOCK)
    mask = offs < tl.where(tiles == 1, 0, size)
    _add_parts(
        partial_ptr + first, out_ptr + group * size, tl.where(tiles == 1, 0, tiles), size, offs,
        mask, BLOCK,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "num_groups", "chunk", "num_tiles", "num_rows", "num_parts", "num_dots", "size_of_dots",
    ]
)  # fmt: skip
def finish_wgrad_kernel(
    groups_ptr,  # (3, num_groups): first row, end, first partial sum
    partial_ptr,  # (partial sums, size)
    partial2_ptr,  # (partial sums, size2)
    out_ptr,  # (num_groups, size)
    out2_ptr,  # (num_groups, size2)
    tiles_ptr,  # (3, num_tiles), the rows of du
    du_parts_ptr,  # (num_parts, num_rows, height)
    du_ptr,  # (num_rows, height)
    dots_ptr,  # (num_dots, size_of_dots)
    dots_out_ptr,  # (size_of_dots,)
    num_groups,
    chunk,
    size,
    size2,
    num_tiles,
    num_rows,
    num_parts,
    height,
    num_dots,
    size_of_dots,
    BLOCK_M: tl.constexpr,  # rows of a tile of du
    BLOCK: tl.constexpr,
):
    """Add all that ``wgrad_kernel`` and act_backward left in parts, each in order.

    The first programs are those of the first problem's groups; those of the second one's, of du on
    the rows of its tiles, and of the dots follow.
    """
    program = tl.program_id(0)
    programs = num_groups * tl.cdiv(size, BLOCK)
    if program < programs:
        _finish_group(
            groups_ptr, partial_ptr, out_ptr, program, num_groups, chunk, size, BLOCK
        )  # fmt: skip
        return
    program -= programs
    programs = num_groups * tl.cdiv(size2, BLOCK)
    if program < programs:
        _finish_group(
            groups_ptr, partial2_ptr, out2_ptr, program, num_groups, chunk, size2, BLOCK
        )  # fmt: skip
        return
    program -= programs
    programs = num_tiles * tl.cdiv(BLOCK_M * height, BLOCK)
    if program < programs:
        _, first, end = tile_of(tiles_ptr, program % num_tiles, num_tiles)
        offs = first * height + program // num_tiles * BLOCK + tl.arange(0, BLOCK)
        stride = num_rows.to(tl.int64) * height
        _add_parts(du_parts_ptr, du_ptr, num_parts, stride, offs, offs < end * height, BLOCK)
        return
    offs = (program - programs) * BLOCK + tl.arange(0, BLOCK)
    _add_parts(
        dots_ptr, dots_out_ptr, num_dots, size_of_dots, offs, offs < size_of_dots, BLOCK
    )  # fmt: skip


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
