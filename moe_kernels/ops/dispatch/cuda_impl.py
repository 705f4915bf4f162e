"""``dispatch`` on CUDA: a stable counting sort in two launches."""

from torch import Tensor

from moe_kernels import _native
from moe_kernels.ops.dispatch import triton_impl


def dispatch(
    topk_ids: Tensor, num_experts: int, modality_ids: Tensor | None, num_modalities: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ``Dispatch``, in order, of ``topk_ids`` (T, K) and ``modality_ids`` (T,).

    More segments than a block can count go to Triton's.
    """
    if num_experts * (num_modalities + 1) >= _native.max_dispatch_keys():
        return triton_impl.dispatch(topk_ids, num_experts, modality_ids, num_modalities)
    return _native.ops().dispatch(topk_ids, num_experts, modality_ids, num_modalities)
