"""Public function ``dispatch`` and the dataclass it returns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops import checks
from moe_kernels.ops.dispatch import autograd  # noqa: F401  (registers the op)


@dataclass(frozen=True)
class Dispatch:
    """Routed rows sorted by expert, then modality. All tensors are int64.

    A row is a pair of token t and slot k, numbered t * K + k. Rows keep their order inside each
    group. Rows of padding (modality -1) lie at the tail, from ``expert_offsets[E]`` on, and belong
    to no expert.

    Attributes:
        perm: (T*K,), ``perm[p]`` is the row at sorted position p.
        inv_perm: (T*K,), the sorted position of each row.
        tokens_per_expert: (E,), rows of each expert.
        expert_offsets: (E+1,), first sorted position of each expert, then the end of the last.
        segment_offsets: (E*(M+1)+1,), likewise for each pair (expert, modality).
    """

    perm: Tensor
    inv_perm: Tensor
    tokens_per_expert: Tensor
    expert_offsets: Tensor
    segment_offsets: Tensor


def dispatch(
    topk_ids: Tensor,
    num_experts: int,
    *,
    modality_ids: Tensor | None = None,
    num_modalities: int = 0,
    backend: str | None = None,
) -> Dispatch:
    """Sort routed rows by expert, then modality, with padding at the tail.

    Args:
        topk_ids: (T, K) int64, the experts of each token. An expert may occur twice.
        num_experts: E. On the CPU an id outside 0..E-1 raises; on CUDA such a row is dropped (it
            lies at the tail), unless ``MOE_KERNELS_CHECK=1`` asks for the check.
        modality_ids: (T,) int, 0 the base modality, 1..M added ones, -1 padding. None: all 0.
        num_modalities: M, the number of added modalities.
        backend: see :func:`moe_kernels.backends.select`.

    Raises:
        TypeError: ids that are not a tensor, or have another dtype.
        ValueError: a wrong rank, shape or device, or an id out of range.
    """
    checks.tensors(topk_ids=topk_ids)
    checks.optional_tensors(modality_ids=modality_ids)
    checks.ndim("topk_ids", topk_ids, 2)
    checks.dtype("topk_ids", topk_ids, (torch.int64,))
    if num_experts < 1 or topk_ids.shape[1] < 1 or num_modalities < 0:
        raise ValueError(
            f"dispatch needs num_experts >= 1, top-k >= 1 and num_modalities >= 0, got "
            f"{num_experts}, {topk_ids.shape[1]} and {num_modalities}"
        )
    if modality_ids is not None:
        check_modality_ids(modality_ids, topk_ids.shape[0], topk_ids.device)
        modality_ids = modality_ids.long()
    backend = backends.select(backend, topk_ids.device)
    return Dispatch(
        *torch.ops.moe_kernels.dispatch(
            topk_ids, num_experts, modality_ids, num_modalities, backend
        )
    )


def check_modality_ids(modality_ids: Tensor, num_tokens: int, device: torch.device) -> None:
    """Raise unless ``modality_ids`` is (T,) of an integer type on ``device``."""
    checks.integer("modality_ids", modality_ids)
    checks.shape("modality_ids", modality_ids, (num_tokens,))
    checks.device("modality_ids", modality_ids, device)
