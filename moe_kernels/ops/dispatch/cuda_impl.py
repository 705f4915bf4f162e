"""``dispatch`` on CUDA: a stable counting sort in two launches, which also write tile maps."""

from torch import Tensor

from moe_kernels import _native
from moe_kernels.ops.cuda_tile_maps import (
    flatten_requests,
    make_tile_maps,
    supports_maps,
    tile_maps,
)
from moe_kernels.ops.dispatch import triton_impl
from moe_kernels.ops.triton_tile_maps import RequestedMaps, TileMap


def _supports(num_experts: int, num_modalities: int) -> bool:
    """Return whether a block can count the segments."""
    return num_experts * (num_modalities + 1) < _native.max_dispatch_keys()


def dispatch(
    topk_ids: Tensor, num_experts: int, modality_ids: Tensor | None, num_modalities: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of ``Dispatch``, in order, for (T, K) and (T,) ids.

    Triton sorts where there are more segments than a block can count.
    """
    if not _supports(num_experts, num_modalities):
        return triton_impl.dispatch(topk_ids, num_experts, modality_ids, num_modalities)
    return _native.ops().dispatch(topk_ids, num_experts, modality_ids, num_modalities)


def dispatch_with_maps(
    topk_ids: Tensor,
    num_experts: int,
    modality_ids: Tensor | None,
    num_modalities: int,
    requested: RequestedMaps,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], list[TileMap]]:
    """Return the fields and the requested maps, from the two launches of dispatch if possible."""
    rows, sizes = topk_ids.numel(), (num_experts, modality_ids, num_modalities)
    if not _supports(num_experts, num_modalities) or not supports_maps(requested):
        fields = dispatch(topk_ids, *sizes)
        return fields, tile_maps(fields[-1], rows, requested)
    *fields, tensors = _native.ops().dispatch_with_maps(
        topk_ids, *sizes, *flatten_requests(requested)
    )
    return tuple(fields), make_tile_maps(tensors, rows, requested)
