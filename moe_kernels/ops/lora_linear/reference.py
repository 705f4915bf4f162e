"""The low-rank term of ``lora_linear`` in plain torch, any float dtype: the definition.

The rows of each modality are computed in blocks, so that no (T, out) update is materialised.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_kernels.ops.dispatch import reference as dispatch_reference
from moe_kernels.ops.dtypes import acc_dtype
from moe_kernels.ops.lora_linear.rows import LinearDispatch
from moe_kernels.ops.lora_weights import LoraWeights

_BLOCK_M = 1024


def dispatch(modality_ids: Tensor, num_modalities: int) -> LinearDispatch:
    """Sort the rows of ``modality_ids`` (T,) by modality."""
    topk_ids = torch.zeros_like(modality_ids)[:, None]
    perm, _, _, _, segment_offsets = dispatch_reference.dispatch(
        topk_ids, 1, modality_ids, num_modalities
    )
    return LinearDispatch(perm, segment_offsets, perm.new_empty(3, 0), perm.new_empty(3, 0))


def forward(
    out: Tensor,
    hidden_states: Tensor,
    dispatched: LinearDispatch,
    lora: LoraWeights,
    save_for_backward: bool,
) -> Tensor:
    """Add s (x A^T) B^T to ``out`` (T, out) in place; return u = x A^T, (T, r) or (0, r)."""
    (lora_A, lora_B, scaling), perm = lora, dispatched.perm
    acc = acc_dtype(hidden_states.dtype)
    u_saved = hidden_states.new_zeros(perm.numel() if save_for_backward else 0, lora_A.shape[1])
    for modality, block in _blocks(dispatched.segment_offsets):
        rows, s = perm[block], scaling[modality].to(acc)
        u = (hidden_states[rows].to(acc) @ lora_A[modality].to(acc).T).to(out.dtype)
        if save_for_backward:
            u_saved[block] = u
        scaled = (u.to(acc) * s).to(out.dtype)
        out[rows] = (out[rows].to(acc) + scaled.to(acc) @ lora_B[modality].to(acc).T).to(out.dtype)
    return u_saved


def backward(
    grad_out: Tensor,
    hidden_states: Tensor,
    u: Tensor,
    perm: Tensor,
    segment_offsets: Tensor,
    lora: LoraWeights,
    grad_hidden: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Add s (dy B) A to ``grad_hidden`` in place; return those of dA and dB that are needed."""
    lora_A, lora_B, scaling = lora
    acc = acc_dtype(hidden_states.dtype)
    need_a, need_b = needs
    grad_A, grad_B = torch.zeros_like(lora_A, dtype=acc), torch.zeros_like(lora_B, dtype=acc)
    for modality, block in _blocks(segment_offsets):
        rows, s = perm[block], scaling[modality].to(acc)
        dy = grad_out[rows].to(acc)
        du = (s * (dy @ lora_B[modality].to(acc))).to(lora_A.dtype).to(acc)
        if grad_hidden is not None:
            term = du @ lora_A[modality].to(acc)
            grad_hidden[rows] = (grad_hidden[rows].to(acc) + term).to(grad_hidden.dtype)
        if need_a:
            grad_A[modality] += du.T @ hidden_states[rows].to(acc)
        if need_b:
            scaled = (u[block].to(acc) * s).to(u.dtype).to(acc)
            grad_B[modality] += dy.T @ scaled
    return [grad for grad, need in ((grad_A, need_a), (grad_B, need_b)) if need]


def _blocks(segment_offsets: Tensor) -> Iterator[tuple[int, slice]]:
    offsets = segment_offsets.tolist()
    for modality, (first, last) in enumerate(zip(offsets[1:], offsets[2:], strict=False)):
        for start in range(first, last, _BLOCK_M):
            yield modality, slice(start, min(start + _BLOCK_M, last))
