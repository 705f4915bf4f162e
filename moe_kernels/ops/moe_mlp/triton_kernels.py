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
    w, extra_ptr, expert, num_base, size, HAS_EXTRA: tl.constexpr, TMA: tl.constexpr,
    PACKING: tl.constexpr,
):  # fmt: skip
    """Return a pointer to an expert's matrix, frozen or added.

    With TMA it is the stack's descriptor, and of a packed stack the pointer to the stack.
    """
    if TMA or PACKING != "none":
        return w
    else:
        ptr = w + tl.minimum(expert, num_base - 1) * size
        if HAS_EXTRA:
            if expert >= num_base:
                ptr = extra_ptr + (expert - num_base) * size
        return ptr


@triton.jit
def _fp8_values(stored):
    """Return the values of bytes of float8_e4m3fn in float32, whatever the device converts."""
    magnitude = (stored & 127).to(tl.int32)
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 127, float("nan"), value)
    return tl.where(stored > 127, -value, value)


@triton.jit
def _unpack(
    w, scales_ptr, codes_ptr, rows, columns, height, ld, mask, PACKING: tl.constexpr,
    SCALE_BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Return weights of a packed stack, at ``rows`` of it as one matrix of ``ld`` columns.

    ``height`` is the number of rows of an expert. Scales and codes are read by index; only "nf4"
    has codes.
    """
    index = rows.to(tl.int64) * ld + columns
    if PACKING == "nf4":
        pair = tl.load(w + index // 2, mask=mask, other=0).to(tl.int32)
        code = tl.where(index % 2 == 0, pair >> 4, pair & 15)
        value = tl.load(codes_ptr + code)
        scale = tl.load(scales_ptr + index // SCALE_BLOCK, mask=mask, other=0.0)
    else:
        value = _fp8_values(tl.load(w + index, mask=mask, other=0))
        block = rows // height * tl.cdiv(height, SCALE_BLOCK) + rows % height // SCALE_BLOCK
        scale = block * tl.cdiv(ld, SCALE_BLOCK) + columns // SCALE_BLOCK
        scale = tl.load(scales_ptr + scale, mask=mask, other=0.0)
    return (value * scale).to(dtype)


@triton.jit
def _load_packed(
    w, extra_ptr, scales_ptr, codes_ptr, row, k, n, size_k, size_n, num_base, height, ld,
    TRANSPOSED: tl.constexpr, HAS_EXTRA: tl.constexpr, PACKING: tl.constexpr,
    SCALE_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Load (BLOCK_K, BLOCK_N) at (k, n) of the matrix that begins at ``row`` of a packed stack.

    Added experts follow the stack's rows, and are not packed.
    """
    offs_k, offs_n = (k + tl.arange(0, BLOCK_K))[:, None], (n + tl.arange(0, BLOCK_N))[None, :]
    mask = (offs_k < size_k) & (offs_n < size_n)
    rows, columns = row + offs_k, offs_n
    if TRANSPOSED:
        rows, columns = row + offs_n, offs_k
    if HAS_EXTRA:
        if row >= num_base * height:
            index = (rows - num_base * height).to(tl.int64) * ld + columns
            part = tl.load(extra_ptr + index, mask=mask, other=0.0)
        else:
            part = _unpack(
                w, scales_ptr, codes_ptr, rows, columns, height, ld, mask, PACKING, SCALE_BLOCK,
                dtype,
            )  # fmt: skip
    else:
        part = _unpack(
            w, scales_ptr, codes_ptr, rows, columns, height, ld, mask, PACKING, SCALE_BLOCK, dtype
        )
    return part


@triton.jit
def _load_weights(
    w, extra_ptr, scales_ptr, codes_ptr, row, k, n, size_k, size_n, num_base, height, ld,
    TRANSPOSED: tl.constexpr, HAS_EXTRA: tl.constexpr, TMA: tl.constexpr, PACKING: tl.constexpr,
    SCALE_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Load (BLOCK_K, BLOCK_N) at (k, n) of an expert's matrix, stored (n, k) if TRANSPOSED.

    ``ld`` is the length of a stored row, of which columns from size_n on are not loaded.
    With TMA the copy engine loads it, at ``row`` of the stack as one matrix. Columns that it reads
    beyond the expert's n are never stored; beyond k it reads zeros, or the blocks fit exactly.
    Weights of a packed stack (PACKING is "nf4" or "fp8") are unpacked, at ``row`` too.
    """
    if PACKING != "none":
        return _load_packed(
            w, extra_ptr, scales_ptr, codes_ptr, row, k, n, size_k, size_n, num_base, height, ld,
            TRANSPOSED, HAS_EXTRA, PACKING, SCALE_BLOCK, BLOCK_K, BLOCK_N, dtype,
        )  # fmt: skip
    elif TMA:
        if TRANSPOSED:
            return tl.trans(w.load([row + n, k]))
        else:
            return w.load([row + k, n])
    else:
        offs_k, offs_n = k + tl.arange(0, BLOCK_K), n + tl.arange(0, BLOCK_N)
        if TRANSPOSED:
            return load_operand(w, offs_k, size_k, 1, offs_n, size_n, ld)
        else:
            return load_operand(w, offs_k, size_k, ld, offs_n, size_n, 1)


@triton.jit
def _product(
    left_ptr, left_rows, w, extra_ptr, scales_ptr, codes_ptr, row, n, size_k, size_n, num_base,
    mask_m, TRANSPOSED: tl.constexpr, HAS_EXTRA: tl.constexpr, TMA: tl.constexpr,
    PACKING: tl.constexpr, SCALE_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return left W in float32."""
    dtype: tl.constexpr = left_ptr.dtype.element_ty
    ld = size_k if TRANSPOSED else size_n
    height = size_n if TRANSPOSED else size_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, size_k, BLOCK_K):
        left = load_rows(left_ptr, left_rows, size_k, mask_m, k + tl.arange(0, BLOCK_K), size_k)
        part = _load_weights(
            w, extra_ptr, scales_ptr, codes_ptr, row, k, n, size_k, size_n, num_base, height, ld,
            TRANSPOSED, HAS_EXTRA, TMA, PACKING, SCALE_BLOCK, BLOCK_K, BLOCK_N, dtype,
        )  # fmt: skip
        acc = dot(left, part, acc)
    return acc


@triton.jit
def _two_products(
    x_ptr, token, w, extra_ptr, scales_ptr, codes_ptr, expert, n, hidden, inter, num_base, mask_m,
    TRANSPOSED: tl.constexpr, HAS_EXTRA: tl.constexpr, TMA: tl.constexpr, PACKING: tl.constexpr,
    SCALE_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return x W^T in float32, for rows n.. of gate and the same rows of up, which come after."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    ld = hidden if TRANSPOSED else 2 * inter
    height = 2 * inter if TRANSPOSED else hidden
    row = (expert * height).to(tl.int32)
    # A packed stack is stored (n, k), and is read at rows as TMA reads it.
    half = w if TMA or PACKING != "none" else w + inter * (hidden if TRANSPOSED else 1)
    up_row = row + inter if TRANSPOSED else row
    up_n = n + inter if TMA and not TRANSPOSED else n
    for k in range(0, hidden, BLOCK_K):
        x = load_rows(x_ptr, token, hidden, mask_m, k + tl.arange(0, BLOCK_K), hidden)
        wg = _load_weights(
            w, extra_ptr, scales_ptr, codes_ptr, row, k, n, hidden, inter, num_base, height, ld,
            TRANSPOSED, HAS_EXTRA, TMA, PACKING, SCALE_BLOCK, BLOCK_K, BLOCK_N, dtype,
        )  # fmt: skip
        wu = _load_weights(
            half, extra_ptr, scales_ptr, codes_ptr, up_row, k, up_n, hidden, inter, num_base,
            height, ld, TRANSPOSED, HAS_EXTRA, TMA, PACKING, SCALE_BLOCK, BLOCK_K, BLOCK_N, dtype,
        )  # fmt: skip
        gate = dot(x, wg, gate)
        up = dot(x, wu, up)
    return gate, up


@triton.jit
def _factor(x, alpha, ACT: tl.constexpr):
    """Return f(x) / x: every activation is its argument times a factor."""
    if ACT == "gelu":
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
    elif ACT == "relu_squared":
        return tl.where(x < 0, 0.0, x)
    elif ACT == "clamped_swiglu":
        return tl.sigmoid(alpha * x)
    else:
        return tl.sigmoid(x)


@triton.jit
def _times_slope(d, x, factor, alpha, ACT: tl.constexpr):
    """Return d times the derivative of x * factor."""
    if ACT == "gelu":
        return d * (factor + x * tl.exp(-0.5 * x * x) * 0.3989422804014327)
    elif ACT == "gelu_tanh":
        inner = 1.5957691216057308 * x * (1 + 3 * 0.044715 * x * x)
        return d * factor * (1 + inner * (1 - factor))
    elif ACT == "relu_squared":
        return d * 2 * factor
    elif ACT == "clamped_swiglu":
        return d * factor * (1 + alpha * x * (1 - factor))
    else:
        return d * factor * (1 + x * (1 - factor))


@triton.jit
def _bounded(gate, up, limit, shift, ACT: tl.constexpr):
    """Return the gate below its bound, and up within its bounds and shifted. NaN stays NaN."""
    if ACT == "clamped_swiglu":
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + shift
    return gate, up


@triton.jit
def _pairs(value, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr):
    """Split (BLOCK_M, 2 * COLUMNS) in its even and its odd columns."""
    return tl.split(tl.reshape(value, (BLOCK_M, COLUMNS, 2)))


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
def _add_bias(value, bias_ptr, with_bias, offs_n, size_n, HAS_BIAS: tl.constexpr):
    """Add a bias (size_n,) to each row of a tile ``with_bias``."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < tl.where(with_bias, size_n, 0), other=0.0)
        value += bias.to(tl.float32)[None, :]
    return value


@triton.jit
def _store_act(
    pre_ptr, act_ptr, bias_ptr, with_bias, first, local, n, inter, gate, up, mask_m, alpha, limit,
    shift, SAVE: tl.constexpr, ACT: tl.constexpr, ORDER: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the activation of the rounded pre-activation, and the latter if SAVE.

    ``gate`` holds both if they are interleaved, and what takes the gate's place if there is none.
    """
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    offs_n = n + tl.arange(0, COLUMNS)
    if ORDER == "interleaved":
        offs_pre = 2 * n + tl.arange(0, 2 * COLUMNS)
        both = _add_bias(gate, bias_ptr, with_bias, offs_pre, 2 * inter, HAS_BIAS).to(dtype)
        if SAVE:
            _store_rows(pre_ptr, first, local, offs_pre, 2 * inter, both, mask_m, 2 * inter)
        gate, up = _pairs(both.to(tl.float32), BLOCK_M, COLUMNS)
    elif ORDER == "paired":
        gate = _add_bias(gate, bias_ptr, with_bias, offs_n, inter, HAS_BIAS).to(dtype)
        up = _add_bias(up, bias_ptr + inter, with_bias, offs_n, inter, HAS_BIAS).to(dtype)
        if SAVE:
            _store_rows(pre_ptr, first, local, offs_n, 2 * inter, gate, mask_m, inter)
            _store_rows(pre_ptr + inter, first, local, offs_n, 2 * inter, up, mask_m, inter)
    else:
        gate = _add_bias(gate, bias_ptr, with_bias, offs_n, inter, HAS_BIAS).to(dtype)
        if SAVE:
            _store_rows(pre_ptr, first, local, offs_n, inter, gate, mask_m, inter)
    gate, up = _bounded(gate.to(tl.float32), up.to(tl.float32), limit, shift, ACT)
    act = gate * _factor(gate, alpha, ACT)
    if ORDER != "alone":
        act = act * up
    _store_rows(act_ptr, first, local, offs_n, inter, act, mask_m, inter)


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, HALF: tl.constexpr):
    """Split a tile of 2 * HALF columns in two."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))


@triton.jit
def _store_acts(
    pre_ptr, act_ptr, bias_ptr, with_bias, first, local, n, inter, gate, up, mask_m, alpha, limit,
    shift, SAVE: tl.constexpr, ACT: tl.constexpr, ORDER: tl.constexpr, HAS_BIAS: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Call :func:`_store_act` for PIECE columns at a time: all at once exceed the registers."""
    if COLUMNS <= PIECE:
        _store_act(
            pre_ptr, act_ptr, bias_ptr, with_bias, first, local, n, inter, gate, up, mask_m, alpha,
            limit, shift, SAVE, ACT, ORDER, HAS_BIAS, BLOCK_M, COLUMNS,
        )  # fmt: skip
    else:
        HALF: tl.constexpr = COLUMNS // 2
        SPAN: tl.constexpr = COLUMNS if ORDER == "interleaved" else HALF
        gate_left, gate_right = _halves(gate, BLOCK_M, SPAN)
        up_left, up_right = _halves(up, BLOCK_M, SPAN)
        _store_acts(
            pre_ptr, act_ptr, bias_ptr, with_bias, first, local, n, inter, gate_left, up_left,
            mask_m, alpha, limit, shift, SAVE, ACT, ORDER, HAS_BIAS, PIECE, BLOCK_M, HALF,
        )  # fmt: skip
        _store_acts(
            pre_ptr, act_ptr, bias_ptr, with_bias, first, local, n + HALF, inter, gate_right,
            up_right, mask_m, alpha, limit, shift, SAVE, ACT, ORDER, HAS_BIAS, PIECE, BLOCK_M, HALF,
        )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def gate_up_kernel(
    x_ptr,  # (T, hidden)
    w,  # (E, width, hidden) if TRANSPOSED, else (E, hidden, width); or with TMA a descriptor
    extra_ptr,  # (X, ...)
    scales_ptr,  # of a packed stack
    codes_ptr,  # (16,): the values of NF4
    bias_ptr,  # (E + X, width)
    perm_ptr,  # (T * TOP_K,)
    tiles_ptr,  # (3, num_tiles) of experts, the tail after the last
    segments_ptr,
    u_ptr,  # (T * TOP_K, RANK)
    b_ptr,  # (num_modalities, E, width, RANK)
    scaling_ptr,  # (num_modalities,)
    pre_ptr,  # (T * TOP_K, width) or nothing
    act_ptr,  # (T * TOP_K, inter)
    num_tiles,
    num_base,
    num_experts,
    num_modalities,
    hidden,
    inter,
    alpha,
    limit,
    shift,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    PACKING: tl.constexpr,  # of the frozen stack: "none", "nf4" or "fp8"
    SCALE_BLOCK: tl.constexpr,  # weights with one scale, in each direction for "fp8"
    TRANSPOSED: tl.constexpr,
    ACT: tl.constexpr,
    ORDER: tl.constexpr,  # "paired": gate, then up; "interleaved"; "alone": no gate
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Store the activation of x W^T + bias + s u B^T, and the latter if SAVE.

    Gate and up are two accumulators if they are paired, and one of all columns otherwise.
    """
    PAIRED: tl.constexpr = ORDER == "paired"
    SPAN: tl.constexpr = 2 * BLOCK_N if ORDER == "interleaved" else BLOCK_N
    PIECE: tl.constexpr = BLOCK_N // 2 if PAIRED else 32  # one wide accumulator needs smaller ones
    pid_m, pid_n = _tile_ids(num_tiles, tl.cdiv(inter, BLOCK_N), GROUP_M)
    expert, first, end = tile_of(tiles_ptr, pid_m, num_tiles)
    if first >= end:
        return
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    local, count = tl.arange(0, BLOCK_M), (end - first).to(tl.int32)
    mask_m = local < count
    n = pid_n * BLOCK_N
    width = inter if ORDER == "alone" else 2 * inter
    size_n = inter if PAIRED else width  # columns of an accumulator, of which this program's are
    span_n = pid_n * SPAN
    gate = tl.zeros((BLOCK_M, SPAN), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, SPAN), dtype=tl.float32)
    if expert < num_experts:
        token = tl.load(perm_ptr + first + local, mask=mask_m, other=0) // TOP_K
        w = _expert_matrix(w, extra_ptr, expert, num_base, width * hidden, HAS_EXTRA, TMA, PACKING)
        if PAIRED:
            gate, up = _two_products(
                x_ptr, token, w, extra_ptr, scales_ptr, codes_ptr, expert, n, hidden, inter,
                num_base, mask_m, TRANSPOSED, HAS_EXTRA, TMA, PACKING, SCALE_BLOCK, BLOCK_M,
                BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            row = (expert * (width if TRANSPOSED else hidden)).to(tl.int32)
            gate = _product(
                x_ptr, token, w, extra_ptr, scales_ptr, codes_ptr, row, span_n, hidden, width,
                num_base, mask_m, TRANSPOSED, HAS_EXTRA, TMA, PACKING, SCALE_BLOCK, BLOCK_M, SPAN,
                BLOCK_K,
            )  # fmt: skip
    bias_ptr += expert * width
    with_bias = expert < num_experts  # rows that were not dispatched have none, and stay zeros
    base = _base_rows(segments_ptr, expert, num_base, first, count, num_modalities, RANK)
    if base > 0:
        _store_acts(
            pre_ptr, act_ptr, bias_ptr, with_bias, first, local, n, inter, gate, up, local < base,
            alpha, limit, shift, SAVE, ACT, ORDER, HAS_BIAS, PIECE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if RANK > 0:
        if base < count:
            gate, up = _extend(
                gate, up, u_ptr, b_ptr, scaling_ptr, segments_ptr, expert, first, local,
                count, num_base, width * RANK, 1, RANK, span_n + tl.arange(0, SPAN), size_n,
                num_modalities, inter * RANK, RANK, BLOCK_R, dtype, PAIRED,
            )  # fmt: skip
            adapted = mask_m & (local >= base)
            _store_acts(
                pre_ptr, act_ptr, bias_ptr, with_bias, first, local, n, inter, gate, up, adapted,
                alpha, limit, shift, SAVE, ACT, ORDER, HAS_BIAS, PIECE, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def grouped_gemm_kernel(
    left_ptr,  # (T * TOP_K, size_k)
    w,  # (E, size_n, size_k) if TRANSPOSED, else (E, size_k, size_n); or a descriptor
    extra_ptr,  # (X, ...)
    scales_ptr,  # of a packed stack
    codes_ptr,  # (16,): the values of NF4
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
    PACKING: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
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
    w = _expert_matrix(w, extra_ptr, expert, num_base, size_k * size_n, HAS_EXTRA, TMA, PACKING)
    row = (expert * (size_n if TRANSPOSED else size_k)).to(tl.int32)
    acc = _product(
        left_ptr + first * size_k, local, w, extra_ptr, scales_ptr, codes_ptr, row, n, size_k,
        size_n, num_base, mask_m, TRANSPOSED, HAS_EXTRA, TMA, PACKING, SCALE_BLOCK, BLOCK_M,
        BLOCK_N, BLOCK_K,
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
def _load_pre(
    pre_ptr, first, local, n, inter, mask_m, ORDER: tl.constexpr, BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return gate and up before the activation in float32; without a gate, what there is twice."""
    if ORDER == "interleaved":
        offs_n = 2 * n + tl.arange(0, 2 * COLUMNS)
        mask = mask_m[:, None] & (offs_n < 2 * inter)[None, :]
        pre = pre_ptr + first * 2 * inter + local[:, None] * 2 * inter + offs_n[None, :]
        return _pairs(tl.load(pre, mask=mask, other=0.0).to(tl.float32), BLOCK_M, COLUMNS)
    else:
        offs_n = n + tl.arange(0, COLUMNS)
        mask = mask_m[:, None] & (offs_n < inter)[None, :]
        width = inter if ORDER == "alone" else 2 * inter
        pre = pre_ptr + first * width + local[:, None] * width + offs_n[None, :]
        gate = tl.load(pre, mask=mask, other=0.0).to(tl.float32)
        up = gate
        if ORDER == "paired":
            up = tl.load(pre + inter, mask=mask, other=0.0).to(tl.float32)
        return gate, up


@triton.jit
def _store_act_gradient(
    pre_ptr, dpre_ptr, act_ptr, first, local, n, inter, acc, weight, mask_m, mask_act, alpha,
    limit, shift, WRITE_ACT: tl.constexpr, ACT: tl.constexpr, ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store d(gate) and d(up) of weight * dA' (``acc``), and a of ``mask_act``; return <dA', a>."""
    dtype: tl.constexpr = dpre_ptr.dtype.element_ty
    offs_n = n + tl.arange(0, COLUMNS)
    mask = mask_m[:, None] & (offs_n < inter)[None, :]
    raw, raw_up = _load_pre(pre_ptr, first, local, n, inter, mask_m, ORDER, BLOCK_M, COLUMNS)
    gate, up = _bounded(raw, raw_up, limit, shift, ACT)
    factor = _factor(gate, alpha, ACT)
    value = gate * factor
    act = (value if ORDER == "alone" else value * up).to(dtype)
    if WRITE_ACT:
        _store_rows(act_ptr, first, local, offs_n, inter, act, mask_act, inter)
    dots = tl.sum(tl.where(mask, acc * act.to(tl.float32), 0.0), axis=1)
    d_act = acc * weight[:, None]
    d_up = d_act * value
    d_gate = _times_slope(
        d_act if ORDER == "alone" else d_act * up, gate, factor, alpha, ACT
    )  # fmt: skip
    if ACT == "clamped_swiglu":
        d_gate = tl.where(raw <= limit, d_gate, 0.0)
        d_up = tl.where((raw_up <= limit) & (raw_up >= -limit), d_up, 0.0)
    if ORDER == "interleaved":
        both = tl.reshape(tl.join(d_gate, d_up), (BLOCK_M, 2 * COLUMNS))
        offs_pre = 2 * n + tl.arange(0, 2 * COLUMNS)
        _store_rows(dpre_ptr, first, local, offs_pre, 2 * inter, both, mask_m, 2 * inter)
    elif ORDER == "paired":
        _store_rows(dpre_ptr + inter, first, local, offs_n, 2 * inter, d_up, mask_m, inter)
        _store_rows(dpre_ptr, first, local, offs_n, 2 * inter, d_gate, mask_m, inter)
    else:
        _store_rows(dpre_ptr, first, local, offs_n, inter, d_gate, mask_m, inter)
    return dots


@triton.jit
def _store_act_gradients(
    pre_ptr, dpre_ptr, act_ptr, first, local, n, inter, acc, weight, mask_m, mask_act, alpha,
    limit, shift, WRITE_ACT: tl.constexpr, ACT: tl.constexpr, ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Call :func:`_store_act_gradient` for each piece of a tile's columns.

    All columns at once would exceed the registers.
    """
    if BLOCK_N <= _PIECE:
        return _store_act_gradient(
            pre_ptr, dpre_ptr, act_ptr, first, local, n, inter, acc, weight, mask_m, mask_act,
            alpha, limit, shift, WRITE_ACT, ACT, ORDER, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = _halves(acc, BLOCK_M, HALF)
        dots = _store_act_gradients(
            pre_ptr, dpre_ptr, act_ptr, first, local, n, inter, left, weight, mask_m, mask_act,
            alpha, limit, shift, WRITE_ACT, ACT, ORDER, BLOCK_M, HALF,
        )  # fmt: skip
        return dots + _store_act_gradients(
            pre_ptr, dpre_ptr, act_ptr, first, local, n + HALF, inter, right, weight, mask_m,
            mask_act, alpha, limit, shift, WRITE_ACT, ACT, ORDER, BLOCK_M, HALF,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*_COUNTS, "num_rows"])
def act_backward_kernel(
    grad_ptr,  # (T, hidden)
    w,  # (E, inter, hidden) if TRANSPOSED, else (E, hidden, inter); or a descriptor
    extra_ptr,  # (X, ...)
    scales_ptr,  # of a packed stack
    codes_ptr,  # (16,): the values of NF4
    perm_ptr,
    tiles_ptr,
    segments_ptr,
    du_ptr,  # (T * TOP_K, RANK) float32
    a_ptr,  # (num_modalities, experts_of_a, RANK, inter)
    scaling_ptr,
    weights_ptr,  # (T, TOP_K)
    pre_ptr,  # (T * TOP_K, 2 * inter or inter)
    dpre_ptr,  # (T * TOP_K, 2 * inter or inter)
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
    alpha,
    limit,
    shift,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    TMA: tl.constexpr,
    PACKING: tl.constexpr,  # of the frozen stack: "none", "nf4" or "fp8"
    SCALE_BLOCK: tl.constexpr,  # weights with one scale, in each direction for "fp8"
    TRANSPOSED: tl.constexpr,
    ACT: tl.constexpr,
    ORDER: tl.constexpr,
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
    if first >= end:
        return
    dtype: tl.constexpr = dpre_ptr.dtype.element_ty
    local, count = tl.arange(0, BLOCK_M), (end - first).to(tl.int32)
    mask_m = local < count
    n = pid_n * BLOCK_N
    offs_n = n + tl.arange(0, BLOCK_N)
    slot = tl.load(perm_ptr + first + local, mask=mask_m, other=0)
    dots_ptr += pid_n * num_rows
    if expert >= num_experts:  # rows that were not dispatched
        tl.store(dots_ptr + slot, tl.zeros((BLOCK_M,), dtype=tl.float32), mask=mask_m)
        return
    w = _expert_matrix(w, extra_ptr, expert, num_base, hidden * inter, HAS_EXTRA, TMA, PACKING)
    row = (expert * (inter if TRANSPOSED else hidden)).to(tl.int32)
    acc = _product(
        grad_ptr, slot // TOP_K, w, extra_ptr, scales_ptr, codes_ptr, row, n, hidden, inter,
        num_base, mask_m, TRANSPOSED, HAS_EXTRA, TMA, PACKING, SCALE_BLOCK, BLOCK_M, BLOCK_N,
        BLOCK_K,
    )  # fmt: skip
    weight = tl.load(weights_ptr + slot, mask=mask_m, other=0.0).to(tl.float32)
    base = _base_rows(segments_ptr, expert, num_base, first, count, num_modalities, RANK)
    if base > 0:
        of_added = local < tl.where(expert < num_base, 0, base)
        dots = _store_act_gradients(
            pre_ptr, dpre_ptr, act_ptr, first, local, n, inter, acc, weight, local < base, of_added,
            alpha, limit, shift, WRITE_ADDED, ACT, ORDER, BLOCK_M, BLOCK_N,
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
                alpha, limit, shift, WRITE_ADAPTED, ACT, ORDER, BLOCK_M, BLOCK_N,
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
