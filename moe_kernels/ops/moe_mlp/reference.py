"""``moe_mlp`` forward and backward in plain torch, any float dtype: the definition.

The unit of work is a block of BLOCK_M sorted rows of one expert. The base GEMMs are zero-padded to
exactly BLOCK_M rows, because a GEMM whose row count is a routed count changes the bits of a row
when other rows are routed elsewhere. Low-rank terms touch only the rows of their modality. Blocks
run in a fixed order, and sums are accumulated in float32 (float64 for float64). The same without
blocks, one token at a time, is ``definition`` in tests/ops/test_moe_mlp.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.ops.dispatch.reference import dispatch
from moe_kernels.ops.dtypes import acc_dtype
from moe_kernels.ops.moe_mlp.activation import ExpertForm
from moe_kernels.ops.moe_mlp.weights import ExpertWeights, Saved

BLOCK_M = 32
_GELU_TANH = 2 * math.sqrt(2 / math.pi)  # (1 + tanh(x)) / 2 is sigmoid(2 x)


@dataclass(frozen=True)
class _Block:
    """Sorted rows [start, stop) of one expert, at most BLOCK_M of them."""

    expert: int
    start: int
    stop: int
    segments: tuple[tuple[int, int, int], ...]  # (modality index from 0, start, stop), m >= 1 only

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def forward(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    modality_ids: Tensor | None,
    weights: ExpertWeights,
    form: ExpertForm,
    save_for_backward: bool,
) -> tuple[Tensor, Saved]:
    """Return out (T, H), and what the backward pass needs."""
    perm, inv_perm, _, _, segment_offsets = dispatch(
        topk_ids, weights.num_experts, modality_ids, weights.num_modalities
    )
    rows, top_k = perm.numel(), topk_weights.shape[1]
    weights = weights.unpacked(hidden_states.dtype).in_compute_dtype(hidden_states.dtype)
    acc = acc_dtype(hidden_states.dtype)
    pre_act = hidden_states.new_empty(rows, weights.gate_up_proj.shape[1])
    pre_act[segment_offsets[-1] :] = 0
    u1, u2 = (hidden_states.new_zeros(rows, rank) for rank in weights.ranks)
    expert_out = hidden_states.new_empty(rows, hidden_states.shape[1], dtype=acc)
    for block in _blocks(segment_offsets, weights):
        x = hidden_states[perm[block.rows] // top_k]
        gate_up, down = _expert(weights, block.expert)
        pre = _fixed_mm(x, gate_up.T)
        _extend(pre, x, block, u1, weights.gate_up_A, weights.gate_up_B, weights.gate_up_scaling)
        if weights.gate_up_bias is not None:
            pre += weights.gate_up_bias[block.expert].to(acc)
        pre_act[block.rows] = pre
        a = _activate(pre_act[block.rows], form)
        y = _fixed_mm(a, down.T)
        _extend(y, a, block, u2, weights.down_A, weights.down_B, weights.down_scaling)
        expert_out[block.rows] = y
    out = _combine(expert_out, inv_perm, segment_offsets, topk_weights).to(hidden_states.dtype)
    if not save_for_backward:
        pre_act, u1, u2 = (t.new_empty(0, t.shape[1]) for t in (pre_act, u1, u2))
    return out, Saved(pre_act, u1, u2, perm, inv_perm, segment_offsets)


def backward(
    grad_out: Tensor,
    hidden_states: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    form: ExpertForm,
    saved: Saved,
    needs: list[bool],
    frozen_extra: int = 0,
) -> list[Tensor]:
    """Return the gradients that ``needs`` asks for, in its order; of parameters in float32.

    With dO the unweighted gradient of a row's output, w its routing weight and s the scaling::

        du2 = dO B2                      dA' = dO W_down + s2 du2 A2
        dw  = <dA', a>                   dpre = act'(pre) (w dA')
        du1 = dpre B1                    dx = dpre W_gate_up + s1 du1 A1
        dB2 = sum (w s2) dO^T u2         dA2 = sum (w s2 du2)^T a
        dB1 = sum dpre^T (s1 u1)         dA1 = sum (s1 du1)^T x
    """
    top_k = topk_weights.shape[1]
    weights = weights.unpacked(hidden_states.dtype).in_compute_dtype(hidden_states.dtype)
    pre_act, u1, u2, perm, inv_perm, segment_offsets = saved
    acc = acc_dtype(hidden_states.dtype)
    grads = _Gradients.zeros(hidden_states, topk_weights, perm, weights, needs)
    for block in _blocks(segment_offsets, weights):
        row_ids = perm[block.rows]
        x, d_out = hidden_states[row_ids // top_k], grad_out[row_ids // top_k]
        w = topk_weights.reshape(-1)[row_ids].to(acc)[:, None]
        gate_up, down = _expert(weights, block.expert)
        a = _activate(pre_act[block.rows], form)

        d_a = _fixed_mm(d_out, down)
        _extend_backward(
            d_a, d_out, w, a, block, u2, weights.down_A, weights.down_B, weights.down_scaling,
            grads.down_A, grads.down_B,
        )  # fmt: skip
        grads.topk_weights[row_ids] = (d_a * a.to(acc)).sum(-1)
        d_pre = _activate_backward(pre_act[block.rows], w * d_a, form)
        d_x = _fixed_mm(d_pre, gate_up)
        _extend_backward(
            d_x, d_pre, None, x, block, u1, weights.gate_up_A, weights.gate_up_B,
            weights.gate_up_scaling, grads.gate_up_A, grads.gate_up_B,
        )  # fmt: skip
        grads.rows[block.rows] = d_x
        if block.expert >= weights.gate_up_proj.shape[0] + frozen_extra:
            grads.add_extra(block, weights, x, d_out, d_pre, w * a.to(acc))
    return grads.needed(inv_perm, segment_offsets, hidden_states, topk_weights, needs)


@dataclass
class _Gradients:
    """Buffers that the backward fills; None where no gradient is needed."""

    rows: Tensor  # (T*K, H), gradient of each sorted row's input
    topk_weights: Tensor  # (T*K,), by row
    extra_gate_up: Tensor | None
    extra_down: Tensor | None
    gate_up_A: Tensor | None
    gate_up_B: Tensor | None
    down_A: Tensor | None
    down_B: Tensor | None

    @classmethod
    def zeros(cls, hidden_states, topk_weights, perm, weights, needs) -> "_Gradients":
        acc = acc_dtype(hidden_states.dtype)
        params = [
            tensor.new_zeros(tensor.shape, dtype=acc) if need else None
            for tensor, need in zip(weights.trainable(), needs[2:], strict=True)
        ]
        rows = hidden_states.new_empty(perm.numel(), hidden_states.shape[1], dtype=acc)
        return cls(rows, topk_weights.new_zeros(perm.numel(), dtype=acc), *params)

    def add_extra(self, block, weights, x, d_out, d_pre, weighted_a) -> None:
        """Add a block's share to the gradients of an added expert."""
        index = block.expert - weights.gate_up_proj.shape[0]
        acc = self.rows.dtype
        if self.extra_gate_up is not None:
            self.extra_gate_up[index] += d_pre.to(acc).T @ x.to(acc)
        if self.extra_down is not None:
            self.extra_down[index] += d_out.to(acc).T @ weighted_a

    def needed(self, inv_perm, segment_offsets, hidden_states, topk_weights, needs):
        """Return the list that the backward op returns."""
        ones = topk_weights.new_ones(topk_weights.shape, dtype=self.rows.dtype)
        results = [
            _combine(self.rows, inv_perm, segment_offsets, ones) if needs[0] else None,
            self.topk_weights.view(topk_weights.shape),
            self.extra_gate_up,
            self.extra_down,
            self.gate_up_A,
            self.gate_up_B,
            self.down_A,
            self.down_B,
        ]
        return [grad for grad, need in zip(results, needs, strict=True) if need]


def _blocks(segment_offsets: Tensor, weights: ExpertWeights) -> Iterator[_Block]:
    offsets = segment_offsets.tolist()
    groups = weights.num_modalities + 1
    num_base = weights.gate_up_proj.shape[0]
    for expert in range(weights.num_experts):
        bounds = offsets[expert * groups : (expert + 1) * groups + 1]
        for start in range(bounds[0], bounds[-1], BLOCK_M):
            stop = min(start + BLOCK_M, bounds[-1])
            segments = tuple(
                (m, max(start, bounds[m + 1]), min(stop, bounds[m + 2]))
                for m in range(groups - 1)
                if expert < num_base and max(start, bounds[m + 1]) < min(stop, bounds[m + 2])
            )
            yield _Block(expert, start, stop, segments)


def _expert(weights: ExpertWeights, expert: int) -> tuple[Tensor, Tensor]:
    num_base = weights.gate_up_proj.shape[0]
    if expert < num_base:
        return weights.gate_up_proj[expert], weights.down_proj[expert]
    return weights.extra_gate_up_proj[expert - num_base], weights.extra_down_proj[expert - num_base]


def _fixed_mm(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight`` in the accumulation dtype, as a GEMM of exactly BLOCK_M rows."""
    acc = acc_dtype(weight.dtype)
    padded = x.new_zeros(BLOCK_M, x.shape[1], dtype=acc)
    padded[: x.shape[0]] = x
    return (padded @ weight.to(acc))[: x.shape[0]]


def _lora_pair(lora_A: Tensor, lora_B: Tensor, modality: int, expert: int) -> tuple[Tensor, Tensor]:
    shared = lora_A.shape[1] == 1
    return lora_A[modality, 0 if shared else expert], lora_B[modality, expert]


def _extend(y, x, block, u_saved, lora_A, lora_B, scaling) -> None:
    """Add s (x A^T) B^T to the adapted rows of ``y`` (n, out); store u = x A^T."""
    if lora_A is None:
        return
    acc = y.dtype
    for modality, start, stop in block.segments:
        rows = slice(start - block.start, stop - block.start)
        a, b = _lora_pair(lora_A, lora_B, modality, block.expert)
        u_saved[start:stop] = x[rows].to(acc) @ a.to(acc).T
        u = _scaled(u_saved[start:stop], scaling[modality])
        y[rows] += u.to(acc) @ b.to(acc).T


def _extend_backward(
    d_x, d_y, w, x, block, u_saved, lora_A, lora_B, scaling, grad_A, grad_B
) -> None:
    """Add s (dy B) A to ``d_x``, and the block's share to the pair's gradients.

    ``w`` (n, 1) weighs the rows in the parameter gradients; None: ones.
    """
    if lora_A is None:
        return
    acc = d_x.dtype
    for modality, start, stop in block.segments:
        rows = slice(start - block.start, stop - block.start)
        a, b = _lora_pair(lora_A, lora_B, modality, block.expert)
        dy = d_y[rows].to(acc)
        du = (scaling[modality].to(acc) * (dy @ b.to(acc))).to(lora_A.dtype).to(acc)
        d_x[rows] += du @ a.to(acc)
        u = _scaled(u_saved[start:stop], scaling[modality]).to(acc)
        if w is not None:
            du, u = w[rows] * du, w[rows] * u
        if grad_A is not None:
            shared = lora_A.shape[1] == 1
            grad_A[modality, 0 if shared else block.expert] += du.T @ x[rows].to(acc)
        if grad_B is not None:
            grad_B[modality, block.expert] += dy.T @ u


def _scaled(u: Tensor, scaling: Tensor) -> Tensor:
    """Return s * u, multiplied in the accumulation dtype, then rounded as a GEMM operand."""
    acc = acc_dtype(u.dtype)
    return (u.to(acc) * scaling.to(acc)).to(u.dtype)


def _activate(pre_act: Tensor, form: ExpertForm) -> Tensor:
    """Return the activation (n, I) of ``pre_act`` (n, 2I or I), rounded to its dtype.

    It is computed on BLOCK_M rows: torch computes the last elements, fewer than fit in a vector,
    in other bits, and which they are would follow from n, a routed count.
    """
    rows = pre_act.shape[0]
    pre_act = torch.nn.functional.pad(pre_act, (0, 0, 0, BLOCK_M - rows))
    gate, up = _clamp(*_gate_and_up(pre_act.to(acc_dtype(pre_act.dtype)), form), form)
    silu = form.act == "silu"
    a = torch.nn.functional.silu(gate) if silu else gate * _factor(gate, form)
    return (a if up is None else a * up).to(pre_act.dtype)[:rows]


def _activate_backward(pre_act: Tensor, d_a: Tensor, form: ExpertForm) -> Tensor:
    """Return the gradient of the pre-activation for ``d_a`` (n, I), in its dtype."""
    raw = _gate_and_up(pre_act.to(d_a.dtype), form)
    gate, up = _clamp(*raw, form)
    factor = _factor(gate, form)
    d_gate = _times_slope(d_a if up is None else d_a * up, gate, factor, form)
    if up is None:
        return d_gate.to(pre_act.dtype)
    d_up = d_a * gate * factor
    if form.act == "clamped_swiglu":
        d_gate = torch.where(raw[0] <= form.limit, d_gate, 0)
        d_up = torch.where(raw[1].abs() <= form.limit, d_up, 0)
    d_pre = torch.stack([d_gate, d_up], -1 if form.interleaved else -2)
    return d_pre.flatten(-2).to(pre_act.dtype)


def _clamp(gate: Tensor, up: Tensor | None, form: ExpertForm) -> tuple[Tensor, Tensor | None]:
    """Return the gate below its bound, and up within its bounds and shifted."""
    if form.act != "clamped_swiglu":
        return gate, up
    return gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit) + form.shift


def _gate_and_up(pre_act: Tensor, form: ExpertForm) -> tuple[Tensor, Tensor | None]:
    """Return gate and up; without a gate, what takes its place and None."""
    if not form.gated:
        return pre_act, None
    return pre_act.unflatten(-1, (-1, 2)).unbind(-1) if form.interleaved else pre_act.chunk(2, -1)


def _factor(x: Tensor, form: ExpertForm) -> Tensor:
    """Return f(x) / x: every activation is its argument times a factor."""
    if form.act == "gelu":
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    if form.act == "gelu_tanh":
        return torch.sigmoid(_GELU_TANH * x * (1 + 0.044715 * x.square()))
    if form.act == "relu_squared":
        return x.relu()
    return torch.sigmoid(x if form.act == "silu" else form.alpha * x)


def _times_slope(d: Tensor, x: Tensor, factor: Tensor, form: ExpertForm) -> Tensor:
    """Return d times the derivative of x * factor."""
    if form.act == "gelu":
        return d * (factor + x * torch.exp(-0.5 * x.square()) * math.sqrt(0.5 / math.pi))
    if form.act == "gelu_tanh":
        inner = _GELU_TANH * x * (1 + 3 * 0.044715 * x.square())
        return d * factor * (1 + inner * (1 - factor))
    if form.act == "relu_squared":
        return d * 2 * factor
    return d * factor * (1 + form.alpha * x * (1 - factor))


def _combine(
    sorted_rows: Tensor, inv_perm: Tensor, segment_offsets: Tensor, topk_weights: Tensor
) -> Tensor:
    """Return (T, H): each token's rows times their weights, added in the order of its top-k.

    Rows at the tail (padding, dropped) were never written, so they are left out instead of being
    multiplied by 0.
    """
    num_tokens, top_k = topk_weights.shape
    out = sorted_rows.new_zeros(num_tokens, sorted_rows.shape[1])
    positions = inv_perm.view(num_tokens, top_k)
    routed = positions < segment_offsets[-1]
    for k in range(top_k):
        term = sorted_rows[positions[:, k]] * topk_weights[:, k, None].to(out.dtype)
        out += torch.where(routed[:, k, None], term, 0)
    return out
