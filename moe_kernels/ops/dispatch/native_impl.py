"""``dispatch`` on the native extension: a stable counting sort in C++."""

from torch import Tensor

from moe_kernels import _native


def dispatch(
    topk_ids: Tensor, num_experts: int, modality_ids: Tensor | None, num_modalities: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of ``Dispatch``, in order, for (T, K) and (T,) ids."""
    return _native.ops().dispatch(topk_ids, num_experts, modality_ids, num_modalities)
