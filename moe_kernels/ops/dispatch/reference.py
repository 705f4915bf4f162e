"""``dispatch`` in plain torch: one stable sort. No host sync."""

import torch
from torch import Tensor


def dispatch(
    topk_ids: Tensor, num_experts: int, modality_ids: Tensor | None, num_modalities: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of ``Dispatch``, in order, for (T, K) and (T,) ids."""
    num_tokens, top_k = topk_ids.shape
    groups = num_modalities + 1
    expert = topk_ids.reshape(-1)
    if modality_ids is None:
        modality = torch.zeros_like(expert)
    else:
        modality = modality_ids.repeat_interleave(top_k, output_size=num_tokens * top_k)
    routed = (expert >= 0) & (expert < num_experts) & (modality >= 0)
    routed &= modality <= num_modalities
    num_segments = num_experts * groups
    key = torch.where(routed, expert * groups + modality, num_segments)

    perm = torch.argsort(key, stable=True)
    inv_perm = torch.empty_like(perm)
    inv_perm[perm] = torch.arange(perm.numel(), device=perm.device)
    counts = key.new_zeros(num_segments + 1).scatter_add_(0, key, torch.ones_like(key))
    segment_offsets = key.new_zeros(num_segments + 1)
    segment_offsets[1:] = counts[:num_segments].cumsum(0)
    expert_offsets = segment_offsets[::groups].clone()
    return perm, inv_perm, expert_offsets.diff(), expert_offsets, segment_offsets
