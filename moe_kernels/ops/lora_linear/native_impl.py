"""The low-rank term of ``lora_linear`` on the native extension."""

import torch
from torch import Tensor

from moe_kernels import _native
from moe_kernels.ops.lora_linear.rows import LinearDispatch
from moe_kernels.ops.lora_weights import LoraWeights


def dispatch(modality_ids: Tensor, num_modalities: int) -> LinearDispatch:
    """Sort the rows of ``modality_ids`` (T,) by modality."""
    topk_ids = torch.zeros_like(modality_ids)[:, None]
    perm, _, _, _, segment_offsets = _native.ops().dispatch(
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
    return _native.ops().lora_linear_forward(
        out,
        hidden_states,
        dispatched.perm,
        dispatched.segment_offsets,
        *lora.for_kernels(),
        save_for_backward,
    )


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
    return _native.ops().lora_linear_backward(
        grad_out, hidden_states, u, perm, segment_offsets, *lora.for_kernels(), grad_hidden, needs
    )
