"""Triton kernels of ``moe_mlp``; ``triton_impl`` launches them, ``ops/triton_kernels`` has others.

A row's arithmetic depends neither on its place in a tile nor on the other rows: where a low-rank
term applies to some rows of a tile only, the others keep their accumulator, since 0 * Inf would
poison them.
"""

# ruff: noqa: SIM102 (Triton's `and` does not look at one side first)
import triton
import triton.language as tl

from moe_kernels.ops.triton_kernels import (
    add_product,
    dot,
    load_operand,
    load_rows,
    scaled_rows,
    tile_of,
)


@triton.jit
def _tile_ids(num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """(m, n) of this program: GROUP_M row tiles share their weights' tiles in the L2."""
    pid = tl.program_id(0)
    per_group = GROUP_M * num_tiles_n
    first = pid // per_group * GROUP_M
    size = tl.minimum(num_tiles_m - first, GROUP_M)
    return first + pid % per_group % size, pid % per_group // size


@triton.jit
def _expert_matrix(base_ptr, extra_ptr, expert, num_base, size, HAS_EXTRA: tl.constexpr):
    """Where an expert's matrix begins: in the frozen stack or among the added ones."""
    ptr = base_ptr + tl.minimum(expert, num_base - 1) * size
    if HAS_EXTRA:
        if expert >= num_base:
            ptr = extra_ptr + (expert - num_base) * size
    return ptr


@triton.jit
def _silu_mul(gate, up):
    return gate * tl.sigmoid(gate) * up


@triton.jit
def gate_up_kernel(
    x_ptr,  # (T, hidden)
    w_ptr,  # (E, 2 * inter, hidden)
    extra_ptr,  # (X, 2 * inter, hidden)
    perm_ptr,  # (T * TOP_K,)
    tiles_ptr,  # (3, num_tiles) of experts, the tail after the last
    segments_ptr,
    u_ptr,  # (T * TOP_K, RANK)
    b_ptr,  # (NUM_MODALITIES, E, 2 * inter, RANK)
    scaling_ptr,  # (NUM_MODALITIES,)
    pre_ptr,  # (T * TOP_K, 2 * inter) or nothing
    act_ptr,  # (T * TOP_K, inter)
    num_tiles,
    num_base,
    num_experts,
    hidden,
    inter,
    TOP_K: tl.constexpr,
    NUM_MODALITIES: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """act = silu(gate) * up, with gate and up = x W^T + s (x A^T) B^T; keeps the pre-activation."""
    pid_m, pid_n = _tile_ids(num_tiles, tl.cdiv(inter, BLOCK_N), GROUP_M)
    expert, first, end = tile_of(tiles_ptr, pid_m, num_tiles)
    if first >= end:
        return
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    local = tl.arange(0, BLOCK_M)  # 32 bits: offsets within a tile
    rows = first + local
    mask_m = rows < end
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if expert < num_experts:
        token = tl.load(perm_ptr + rows, mask=mask_m, other=0) // TOP_K
        size = 2 * inter * hidden
        w = _expert_matrix(w_ptr, extra_ptr, expert, num_base, size, HAS_EXTRA)
        for k in range(0, hidden, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = load_rows(x_ptr, token, hidden, mask_m, offs_k, hidden)
            wg = load_operand(w, offs_k, hidden, 1, offs_n, inter, hidden)
            wu = load_operand(w + inter * hidden, offs_k, hidden, 1, offs_n, inter, hidden)
            gate = dot(x, wg, gate)
            up = dot(x, wu, up)
        if RANK > 0:
            if expert < num_base:
                offs_r = tl.arange(0, BLOCK_R)
                for m in range(1, NUM_MODALITIES + 1):
                    segment = segments_ptr + expert * (NUM_MODALITIES + 1) + m
                    low, high = tl.load(segment), tl.load(segment + 1)
                    if (low < end) & (high > first) & (low < high):
                        adapted = mask_m & (rows >= low) & (rows < high)
                        scale = tl.load(scaling_ptr + m - 1)
                        u = scaled_rows(u_ptr, scale, rows, adapted, offs_r, RANK, dtype)
                        b = b_ptr + ((m - 1) * num_base + expert) * 2 * inter * RANK
                        bg = load_operand(b, offs_r, RANK, 1, offs_n, inter, RANK)
                        bu = load_operand(b + inter * RANK, offs_r, RANK, 1, offs_n, inter, RANK)
                        gate = tl.where(adapted[:, None], dot(u, bg, gate), gate)
                        up = tl.where(adapted[:, None], dot(u, bu, up), up)
    mask = mask_m[:, None] & (offs_n < inter)[None, :]
    gate_rounded, up_rounded = gate.to(dtype), up.to(dtype)
    if SAVE:
        pre = pre_ptr + first * 2 * inter + local[:, None] * 2 * inter + offs_n[None, :]
        tl.store(pre, gate_rounded, mask=mask)
        tl.store(pre + inter, up_rounded, mask=mask)
    act = _silu_mul(gate_rounded.to(tl.float32), up_rounded.to(tl.float32))
    act_tile = act_ptr + first * inter + local[:, None] * inter + offs_n[None, :]
    tl.store(act_tile, act.to(dtype), mask=mask)


@triton.jit
def _extend(
    acc, u_ptr, v_ptr, scaling_ptr, segments_ptr, expert, rows, first, end, mask_m,
    experts_of_v, stride_vr, stride_vn, offs_n, size_n,
    NUM_MODALITIES: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """acc + s u V on the rows of each modality, V (RANK, size_n) of (modality, expert)."""
    offs_r = tl.arange(0, BLOCK_R)
    for m in range(1, NUM_MODALITIES + 1):
        segment = segments_ptr + expert * (NUM_MODALITIES + 1) + m
        low, high = tl.load(segment), tl.load(segment + 1)
        if (low < end) & (high > first) & (low < high):
            adapted = mask_m & (rows >= low) & (rows < high)
            scale = tl.load(scaling_ptr + m - 1)
            u = scaled_rows(u_ptr, scale, rows, adapted, offs_r, RANK, dtype)
            index = (m - 1) * experts_of_v + tl.minimum(expert, experts_of_v - 1)
            v = load_operand(
                v_ptr + index * RANK * size_n, offs_r, RANK, stride_vr, offs_n, size_n, stride_vn
            )
            acc = tl.where(adapted[:, None], dot(u, v, acc), acc)
    return acc


@triton.jit
def rows_kernel(
    left_ptr,  # (T * TOP_K, size_k)
    w_ptr,  # (E, ...): (size_k, size_n) with strides stride_wk, stride_wn
    extra_ptr,  # (X, ...)
    tiles_ptr,  # (3, num_tiles) of experts
    segments_ptr,
    u_ptr,  # (T * TOP_K, RANK)
    v_ptr,  # (NUM_MODALITIES, experts_of_v, ...): (RANK, size_n), strides stride_vr, stride_vn
    scaling_ptr,
    out_ptr,  # (T * TOP_K, size_n)
    num_tiles,
    num_base,
    num_experts,
    size_k,
    size_n,
    stride_wk,
    stride_wn,
    experts_of_v,
    stride_vr,
    stride_vn,
    NUM_MODALITIES: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out = left W + s u V, row by row: the second product forward, d(hidden_states) backward."""
    pid_m, pid_n = _tile_ids(num_tiles, tl.cdiv(size_n, BLOCK_N), GROUP_M)
    expert, first, end = tile_of(tiles_ptr, pid_m, num_tiles)
    if (first >= end) | (expert >= num_experts):
        return
    dtype: tl.constexpr = left_ptr.dtype.element_ty
    local = tl.arange(0, BLOCK_M)  # 32 bits: offsets within a tile
    rows = first + local
    mask_m = rows < end
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    w = _expert_matrix(w_ptr, extra_ptr, expert, num_base, size_k * size_n, HAS_EXTRA)
    acc = add_product(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), left_ptr, rows, size_k, w, stride_wk,
        stride_wn, size_k, offs_n, size_n, mask_m, BLOCK_K,
    )  # fmt: skip
    if RANK > 0:
        if expert < num_base:
            acc = _extend(
                acc, u_ptr, v_ptr, scaling_ptr, segments_ptr, expert, rows, first, end, mask_m,
                experts_of_v, stride_vr, stride_vn, offs_n, size_n,
                NUM_MODALITIES, RANK, BLOCK_R, dtype,
            )  # fmt: skip
    mask = mask_m[:, None] & (offs_n < size_n)[None, :]
    out = out_ptr + first * size_n + local[:, None] * size_n + offs_n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def act_backward_kernel(
    grad_ptr,  # (T, hidden)
    w_ptr,  # (E, hidden, inter)
    extra_ptr,  # (X, hidden, inter)
    perm_ptr,
    tiles_ptr,
    segments_ptr,
    du_ptr,  # (T * TOP_K, RANK) float32
    a_ptr,  # (NUM_MODALITIES, experts_of_a, RANK, inter)
    scaling_ptr,
    weights_ptr,  # (T, TOP_K)
    pre_ptr,  # (T * TOP_K, 2 * inter)
    dpre_ptr,  # (T * TOP_K, 2 * inter)
    act_ptr,  # (T * TOP_K, inter) or nothing
    dots_ptr,  # (column tiles, T * TOP_K) float32
    num_tiles,
    num_base,
    num_experts,
    num_rows,
    hidden,
    inter,
    experts_of_a,
    TOP_K: tl.constexpr,
    NUM_MODALITIES: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    WRITE_ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """dA' = dO W + s du A; in its epilogue <dA', a>, d(gate) and d(up) of w dA', and a."""
    pid_m, pid_n = _tile_ids(num_tiles, tl.cdiv(inter, BLOCK_N), GROUP_M)
    expert, first, end = tile_of(tiles_ptr, pid_m, num_tiles)
    if (first >= end) | (expert >= num_experts):
        return
    dtype: tl.constexpr = dpre_ptr.dtype.element_ty
    local = tl.arange(0, BLOCK_M)  # 32 bits: offsets within a tile
    rows = first + local
    mask_m = rows < end
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(perm_ptr + rows, mask=mask_m, other=0)
    w = _expert_matrix(w_ptr, extra_ptr, expert, num_base, hidden * inter, HAS_EXTRA)
    acc = add_product(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), grad_ptr, slot // TOP_K, hidden, w, inter,
        1, hidden, offs_n, inter, mask_m, BLOCK_K,
    )  # fmt: skip
    if RANK > 0:
        if expert < num_base:
            acc = _extend(
                acc, du_ptr, a_ptr, scaling_ptr, segments_ptr, expert, rows, first, end, mask_m,
                experts_of_a, inter, 1, offs_n, inter, NUM_MODALITIES, RANK, BLOCK_R, dtype,
            )  # fmt: skip
    mask = mask_m[:, None] & (offs_n < inter)[None, :]
    offsets = first * 2 * inter + local[:, None] * 2 * inter + offs_n[None, :]
    pre = pre_ptr + offsets
    gate = tl.load(pre, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre + inter, mask=mask, other=0.0).to(tl.float32)
    act = _silu_mul(gate, up).to(dtype)
    if WRITE_ACT:
        act_tile = act_ptr + first * inter + local[:, None] * inter + offs_n[None, :]
        tl.store(act_tile, act, mask=mask)
    dots = tl.sum(tl.where(mask, acc * act.to(tl.float32), 0.0), axis=1)
    tl.store(dots_ptr + pid_n * num_rows + rows, dots, mask=mask_m)
    d_act = acc * tl.load(weights_ptr + slot, mask=mask_m, other=0.0).to(tl.float32)[:, None]
    sigmoid = tl.sigmoid(gate)
    d_gate = d_act * up * sigmoid * (1 + gate * (1 - sigmoid))
    dpre = dpre_ptr + offsets
    tl.store(dpre, d_gate.to(dtype), mask=mask)
    tl.store(dpre + inter, (d_act * gate * sigmoid).to(dtype), mask=mask)


@triton.jit
def combine_kernel(
    rows_ptr,  # (T * TOP_K, width)
    inv_perm_ptr,
    num_rows_ptr,  # (1,): rows from here on were not dispatched
    weights_ptr,  # (T, TOP_K)
    out_ptr,  # (T, width)
    width,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[t] = sum over k of w[t, k] * the row of slot (t, k), in the order of k."""
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < width
    num_rows = tl.load(num_rows_ptr)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in range(TOP_K):
        place = tl.load(inv_perm_ptr + token * TOP_K + k)
        there = offs_n < tl.where(place < num_rows, width, 0)
        row = tl.load(rows_ptr + place * width + offs_n, mask=there, other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + token * TOP_K + k).to(tl.float32)
            row = tl.where(there, row * weight, 0.0)
        acc += row
    tl.store(out_ptr + token * width + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask)
