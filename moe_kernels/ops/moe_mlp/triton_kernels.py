"""Triton kernels of ``moe_mlp``; ``triton_impl`` launches them, ``ops/triton_kernels`` has others.

Rows of a tile are counted from its first one in 32 bits; the first row, and offsets in stacks,
take 64. A row's arithmetic depends neither on its place in a tile nor on the other rows. An
expert's rows of the base modality come first. A tile stores them before it adds the low-rank terms
of the other rows to the same accumulator, since 0 * Inf would poison them.
"""

# ruff: noqa: SIM102 (Triton's `and` does not look at one side first)
import triton
import triton.language as tl

from moe_kernels.ops.triton_kernels import (
    dot,
    load_operand,
    load_rows,
    scaled_rows,
)
from moe_kernels.ops.triton_tile_maps import tile_of

_COUNTS = ("num_tiles", "num_base", "num_experts")  # a new one compiles nothing
# Columns of dA' that its epilogue handles at once: whole sectors of 32 bytes, and few registers.
_PIECE = tl.constexpr(16)


@triton.jit
def _tile_ids(num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """Return (m, n) of this program: GROUP_M row tiles share their weights' tiles in the L2."""
    pid = tl.program_id(0)
    per_group = GROUP_M * num_tiles_n
    first = pid // per_group * GROUP_M
    size = tl.minimum(num_tiles_m - first, GROUP_M)
    return first + pid % per_group % size, pid % per_group // size


@triton.jit
def _expert_matrix(
    w, extra_ptr, expert, num_base, size, HAS_EXTRA: tl.constexpr, TMA: tl.constexpr
):
    """Return a pointer to an expert's matrix, frozen or added; with TMA the stack's descriptor."""
    if TMA:
        return w
    else:
        ptr = w + tl.minimum(expert, num_base - 1) * size
        if HAS_EXTRA:
            if expert >= num_base:
                ptr = extra_ptr + (expert - num_base) * size
        return ptr


@triton.jit
def _load_weights(
    w, row, k, n, size_k, size_n, TRANSPOSED: tl.constexpr, TMA: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Load (BLOCK_K, BLOCK_N) at (k, n) of an expert's matrix, (size_n, size_k) if TRANSPOSED.

    With TMA the copy engine loads it, at ``row`` of the stack as one matrix. Columns that it reads
    beyond the expert's n are never stored; beyond k it reads zeros, or the blocks fit exactly.
    """
    if TMA:
        if TRANSPOSED:
            return tl.trans(w.load([row + n, k]))
        else:
            return w.load([row + k, n])
    else:
        offs_k, offs_n = k + tl.arange(0, BLOCK_K), n + tl.arange(0, BLOCK_N)
        if TRANSPOSED:
            return load_operand(w, offs_k, size_k, 1, offs_n, size_n, size_k)
        else:
            return load_operand(w, offs_k, size_k, size_n, offs_n, size_n, 1)


@triton.jit
def _product(
    left_ptr, left_rows, w, row, n, size_k, size_n, mask_m, TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return left W in float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, size_k, BLOCK_K):
        left = load_rows(left_ptr, left_rows, size_k, mask_m, k + tl.arange(0, BLOCK_K), size_k)
        part = _load_weights(w, row, k, n, size_k, size_n, TRANSPOSED, TMA, BLOCK_K, BLOCK_N)
        acc = dot(left, part, acc)
    return acc


@triton.jit
def _silu_mul(gate, up):
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _base_rows(segments_ptr, expert, num_base, first, count, num_modalities, RANK: tl.constexpr):
    """Count the rows of a tile that come before the first adapted one, of ``count``."""
    if RANK > 0:
        if expert < num_base:
            end = tl.load(segments_ptr + expert * (num_modalities + 1) + 1)
            count = tl.minimum(tl.maximum(end - first, 0), count).to(tl.int32)
    return count


@triton.jit
def _extend(
    acc, second, u_ptr, v_ptr, scaling_ptr, segments_ptr, expert, first, local, count,
    experts_of_v, size_v, stride_vr, stride_vn, offs_n, size_n, num_modalities, to_second,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, dtype: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Return acc + s u V on the rows of each modality, V (RANK, size_n) of (modality, expert).

    If GATED, also return ``second`` with the V that lies ``to_second`` elements further on added to
    it. Rows of the base modality must have been stored before: rows of another modality get 0 * V,
    which is zero only while V is finite.
    """
    for m in range(1, num_modalities + 1):
        segment = segments_ptr + expert * (num_modalities + 1) + m
        low = tl.maximum(tl.load(segment) - first, 0)
        high = tl.minimum(tl.load(segment + 1) - first, count)
        if low < high:
            adapted = (local >= low.to(tl.int32)) & (local < high.to(tl.int32))
            scale = tl.load(scaling_ptr + m - 1)
            v = v_ptr + ((m - 1) * experts_of_v + tl.minimum(expert, experts_of_v - 1)) * size_v
            for r in tl.range(0, RANK, BLOCK_R, num_stages=1):
                offs_r = r + tl.arange(0, BLOCK_R)
                u = scaled_rows(u_ptr + first * RANK, scale, local, adapted, offs_r, RANK, dtype)
                part = load_operand(v, offs_r, RANK, stride_vr, offs_n, size_n, stride_vn)
                acc = dot(u, part.to(dtype), acc)
                if GATED:
                    part = load_operand(
                        v + to_second, offs_r, RANK, stride_vr, offs_n, size_n, stride_vn
                    )
                    second = dot(u, part.to(dtype), second)
    return acc, second


@triton.jit
def _store_rows(ptr, tile, local, offs_n, width, value, mask_m, size_n):
    """Store a tile of a row-major matrix of ``width`` columns; offsets within it take 32 bits."""
    mask = mask_m[:, None] & (offs_n < size_n)[None, :]
    to = ptr + tile * width + local[:, None] * width + offs_n[None, :]
    tl.store(to, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_act(pre_ptr, act_ptr, first, local, offs_n, inter, gate, up, mask_m, SAVE: tl.constexpr):
    """Store act = silu(gate) * up of the rounded pre-activation, and the latter if SAVE."""
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    gate, up = gate.to(dtype), up.to(dtype)
    if SAVE:
        _store_rows(pre_ptr, first, local, offs_n, 2 * inter, gate, mask_m, inter)
        _store_rows(pre_ptr + inter, first, local, offs_n, 2 * inter, up, mask_m, inter)
    act = _silu_mul(gate.to(tl.float32), up.to(tl.float32))
    _store_rows(act_ptr, first, local, offs_n, inter, act, mask_m, inter)


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, HALF: tl.constexpr):
    """Split a tile of 2 * HALF columns in two."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))


@triton.jit
def _store_acts(
    pre_ptr, act_ptr, first, local, n, inter, gate, up, mask_m, SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Call :func:`_store_act` for each half of the columns: both at once exceed the registers."""
    HALF: tl.constexpr = BLOCK_N // 2
    gate_left, gate_right = _halves(gate, BLOCK_M, HALF)
    up_left, up_right = _halves(up, BLOCK_M, HALF)
    offs_n = n + tl.arange(0, HALF)
    _store_act(pre_ptr, act_ptr, first, local, offs_n, inter, gate_left, up_left, mask_m, SAVE)
    _store_act(
        pre_ptr, act_ptr, first, local, offs_n + HALF, inter, gate_right, up_right, mask_m, SAVE
    )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def gate_up_kernel(
    x_ptr,  # (T, hidden)
    w,  # (E, 2 * inter, hidden), or with TMA a descriptor of (E * 2 * inter, hidden)
    extra_ptr,  # (X, 2 * inter, hidden)
    perm_ptr,  # (T * TOP_K,)
    tiles_ptr,  # (3, num_tiles) of experts, the tail after the last
    segments_ptr,
    u_ptr,  # (T * TOP_K, RANK)
    b_ptr,  # (num_modalities, E, 2 * inter, RANK)
    scaling_ptr,  # (num_modalities,)
    pre_ptr,  # (T * TOP_K, 2 * inter) or nothing
    act_ptr,  # (T * TOP_K, inter)
    num_tiles,
    num_base,
    num_experts,
    num_modalities,
    hidden,
    inter,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    TMA: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Store act = silu(gate) * up, with gate and up = x W^T + s u B^T; keep them if SAVE."""
    pid_m, pid_n = _tile_ids(num_tiles, tl.cdiv(inter, BLOCK_N), GROUP_M)
    expert, first, end = tile_of(tiles_ptr, pid_m, num_tiles)
    if first >= end:
        return
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    local, count = tl.arange(0, BLOCK_M), (end - first).to(tl.int32)
    mask_m = local < count
    n = pid_n * BLOCK_N
    offs_n = n + tl.arange(0, BLOCK_N)
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if expert < num_experts:
        token = tl.load(perm_ptr + first + local, mask=mask_m, other=0) // TOP_K
        w = _expert_matrix(w, extra_ptr, expert, num_base, 2 * inter * hidden, HAS_EXTRA, TMA)
        row = (expert * 2 * inter).to(tl.int32)
        half = w if TMA else w + inter * hidden
        for k in range(0, hidden, BLOCK_K):
            x = load_rows(x_ptr, token, hidden, mask_m, k + tl.arange(0, BLOCK_K), hidden)
            wg = _load_weights(w, row, k, n, hidden, inter, True, TMA, BLOCK_K, BLOCK_N)
            wu = _load_weights(half, row + inter, k, n, hidden, inter, True, TMA, BLOCK_K, BLOCK_N)
            gate = dot(x, wg, gate)
            up = dot(x, wu, up)
    base = _base_rows(segments_ptr, expert, num_base, first, count, num_modalities, RANK)
    if base > 0:
        _store_acts(
            pre_ptr, act_ptr, first, local, n, inter, gate, up, local < base, SAVE, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
    if RANK > 0:
        if base < count:
            gate, up = _extend(
                gate, up, u_ptr, b_ptr, scaling_ptr, segments_ptr, expert, first, local,
                count, num_base, 2 * inter * RANK, 1, RANK, offs_n, inter, num_modalities,
                inter * RANK, RANK, BLOCK_R, dtype, True,
            )  # fmt: skip
            adapted = mask_m & (local >= base)
            _store_acts(
                pre_ptr, act_ptr, first, local, n, inter, gate, up, adapted, SAVE, BLOCK_M, BLOCK_N
            )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def grouped_gemm_kernel(
    left_ptr,  # (T * TOP_K, size_k)
    w,  # (E, size_n, size_k) if TRANSPOSED, else (E, size_k, size_n); or a descriptor
    extra_ptr,  # (X, ...)
    tiles_ptr,  # (3, num_tiles) of experts
    segments_ptr,
    u_ptr,  # (T * TOP_K, RANK)
    v_ptr,  # (num_modalities, experts_of_v, ...): (RANK, size_n), strides stride_vr, stride_vn
    scaling_ptr,
    out_ptr,  # (T * TOP_K, size_n)
    num_tiles,
    num_base,
    num_experts,
    num_modalities,
    size_k,
    size_n,
    experts_of_v,
    stride_vr,
    stride_vn,
    TRANSPOSED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Store out = left W + s u V, row by row: "down" in forward, d(hidden_states) in backward."""
    pid_m, pid_n = _tile_ids(num_tiles, tl.cdiv(size_n, BLOCK_N), GROUP_M)
    expert, first, end = tile_of(tiles_ptr, pid_m, num_tiles)
    if (first >= end) | (expert >= num_experts):
        return
    dtype: tl.constexpr = left_ptr.dtype.element_ty
    local, count = tl.arange(0, BLOCK_M), (end - first).to(tl.int32)
    mask_m = local < count
    n = pid_n * BLOCK_N
    offs_n = n + tl.arange(0, BLOCK_N)
    w = _expert_matrix(w, extra_ptr, expert, num_base, size_k * size_n, HAS_EXTRA, TMA)
    row = (expert * (size_n if TRANSPOSED else size_k)).to(tl.int32)
    acc = _product(
        left_ptr + first * size_k, local, w, row, n, size_k, size_n, mask_m, TRANSPOSED, TMA,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    base = _base_rows(segments_ptr, expert, num_base, first, count, num_modalities, RANK)
    if base > 0:
        _store_rows(out_ptr, first, local, offs_n, size_n, acc, local < base, size_n)
    if RANK > 0:
        if base < count:
            acc, _ = _extend(
                acc, acc, u_ptr, v_ptr, scaling_ptr, segments_ptr, expert, first, local,
                count, experts_of_v, RANK * size_n, stride_vr, stride_vn, offs_n, size_n,
                num_modalities, 0, RANK, BLOCK_R, dtype, False,
            )  # fmt: skip
            adapted = mask_m & (local >= base)
            _store_rows(out_ptr, first, local, offs_n, size_n, acc, adapted, size_n)


@triton.jit
def _store_act_gradient(
    pre_ptr, dpre_ptr, act_ptr, first, local, offs_n, inter, acc, weight, mask_m, mask_act,
    WRITE_ACT: tl.constexpr,
):  # fmt: skip
    """Store d(gate) and d(up) of weight * dA' (``acc``), and a of ``mask_act``; return <dA', a>."""
    dtype: tl.constexpr = dpre_ptr.dtype.element_ty
    mask = mask_m[:, None] & (offs_n < inter)[None, :]
    pre = pre_ptr + first * 2 * inter + local[:, None] * 2 * inter + offs_n[None, :]
    gate = tl.load(pre, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre + inter, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    act = (silu * up).to(dtype)
    if WRITE_ACT:
        _store_rows(act_ptr, first, local, offs_n, inter, act, mask_act, inter)
    dots = tl.sum(tl.where(mask, acc * act.to(tl.float32), 0.0), axis=1)
    d_act = acc * weight[:, None]
    _store_rows(dpre_ptr + inter, first, local, offs_n, 2 * inter, d_act * silu, mask_m, inter)
    d_gate = d_act * up * sigmoid * (1 + gate * (1 - sigmoid))
    _store_rows(dpre_ptr, first, local, offs_n, 2 * inter, d_gate, mask_m, inter)
    return dots


@triton.jit
def _store_act_gradients(
    pre_ptr, dpre_ptr, act_ptr, first, local, n, inter, acc, weight, mask_m, mask_act,
    WRITE_ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Call :func:`_store_act_gradient` for each piece of a tile's columns.

    All columns at once would exceed the registers.
    """
    if BLOCK_N <= _PIECE:
        return _store_act_gradient(
            pre_ptr, dpre_ptr, act_ptr, first, local, n + tl.arange(0, BLOCK_N), inter, acc, weight,
            mask_m, mask_act, WRITE_ACT,
        )  # fmt: skip
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = _halves(acc, BLOCK_M, HALF)
        dots = _store_act_gradients(
            pre_ptr, dpre_ptr, act_ptr, first, local, n, inter, left, weight, mask_m, mask_act,
            WRITE_ACT, BLOCK_M, HALF,
        )  # fmt: skip
        return dots + _store_act_gradients(
            pre_ptr, dpre_ptr, act_ptr, first, local, n + HALF, inter, right, weight, mask_m,
            mask_act, WRITE_ACT, BLOCK_M, HALF,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*_COUNTS, "num_rows"])
def act_backward_kernel(
    grad_ptr,  # (T, hidden)
    w,  # (E, hidden, inter), or a descriptor
    extra_ptr,  # (X, hidden, inter)
    perm_ptr,
    tiles_ptr,
    segments_ptr,
    du_ptr,  # (T * TOP_K, RANK) float32
    a_ptr,  # (num_modalities, experts_of_a, RANK, inter)
    scaling_ptr,
    weights_ptr,  # (T, TOP_K)
    pre_ptr,  # (T * TOP_K, 2 * inter)
    dpre_ptr,  # (T * TOP_K, 2 * inter)
    act_ptr,  # (T * TOP_K, inter) or nothing; only rows that are asked for are written
    dots_ptr,  # (column tiles, T, TOP_K) float32
    num_tiles,
    num_base,
    num_experts,
    num_modalities,
    num_rows,
    hidden,
    inter,
    experts_of_a,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    TMA: tl.constexpr,
    WRITE_ADAPTED: tl.constexpr,  # a of rows with an adapter
    WRITE_ADDED: tl.constexpr,  # a of rows of added experts
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute dA' = dO W + s du A; store <dA', a>, d(gate) and d(up) of w dA', and a."""
    pid_m, pid_n = _tile_ids(num_tiles, tl.cdiv(inter, BLOCK_N), GROUP_M)
    expert, first, end = tile_of(tiles_ptr, pid_m, num_tiles)
    if (first >= end) | (expert >= num_experts):
        return
    dtype: tl.constexpr = dpre_ptr.dtype.element_ty
    local, count = tl.arange(0, BLOCK_M), (end - first).to(tl.int32)
    mask_m = local < count
    n = pid_n * BLOCK_N
    offs_n = n + tl.arange(0, BLOCK_N)
    slot = tl.load(perm_ptr + first + local, mask=mask_m, other=0)
    w = _expert_matrix(w, extra_ptr, expert, num_base, hidden * inter, HAS_EXTRA, TMA)
    acc = _product(
        grad_ptr, slot // TOP_K, w, (expert * hidden).to(tl.int32), n, hidden, inter, mask_m,
        False, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    weight = tl.load(weights_ptr + slot, mask=mask_m, other=0.0).to(tl.float32)
    dots_ptr += pid_n * num_rows
    base = _base_rows(segments_ptr, expert, num_base, first, count, num_modalities, RANK)
    if base > 0:
        of_added = local < tl.where(expert < num_base, 0, base)
        dots = _store_act_gradients(
            pre_ptr, dpre_ptr, act_ptr, first, local, n, inter, acc, weight, local < base, of_added,
            WRITE_ADDED, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        tl.store(dots_ptr + slot, dots, mask=local < base)
    if RANK > 0:
        if base < count:
            acc, _ = _extend(
                acc, acc, du_ptr, a_ptr, scaling_ptr, segments_ptr, expert, first, local,
                count, experts_of_a, RANK * inter, inter, 1, offs_n, inter, num_modalities, 0,
                RANK, BLOCK_R, dtype, False,
            )  # fmt: skip
            adapted = mask_m & (local >= base)
            dots = _store_act_gradients(
                pre_ptr, dpre_ptr, act_ptr, first, local, n, inter, acc, weight, adapted, adapted,
                WRITE_ADAPTED, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            tl.store(dots_ptr + slot, dots, mask=adapted)


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
    """Store out[t] = sum over k of w[t, k] * the row of slot (t, k), in the order of k."""
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < width
    num_rows = tl.load(num_rows_ptr)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in range(TOP_K):
        place = tl.load(inv_perm_ptr + token * TOP_K + k)
        present = offs_n < tl.where(place < num_rows, width, 0)
        row = tl.load(rows_ptr + place * width + offs_n, mask=present, other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + token * TOP_K + k).to(tl.float32)
            row = tl.where(present, row * weight, 0.0)
        acc += row
    tl.store(out_ptr + token * width + offs_n, acc.to(out_ptr.dtype.element_ty), mask=mask)
