"""The registered op ``moe_kernels::dispatch``. Ids carry no gradient, so it has no formula."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels import backends, env
from moe_kernels.ops import checks
from moe_kernels.ops.dtypes import on_device

WITH_MAPS = ("triton", "cuda")  # backends whose kernels take rows in tiles of a map


def run(
    topk_ids: Tensor,
    num_experts: int,
    modality_ids: Tensor | None,
    num_modalities: int,
    backend: str,
    requested: Sequence = (),
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], list]:
    """The fields of ``Dispatch``, in order, after a check of the values where that is free.

    And the tile maps that are ``requested``, of a backend in :data:`WITH_MAPS`: see
    :func:`moe_kernels.ops.dispatch.triton_impl.dispatch_with_maps`.
    """
    if topk_ids.device.type == "cpu" or env.check_values():
        _check_values(topk_ids, num_experts, modality_ids, num_modalities)
    arguments = (
        topk_ids.contiguous(),
        num_experts,
        None if modality_ids is None else modality_ids.contiguous(),
        num_modalities,
    )
    implementation = backends.implementation("dispatch", backend)
    with on_device(topk_ids.device):
        if requested:
            return implementation.dispatch_with_maps(*arguments, requested)
        return implementation.dispatch(*arguments), []


def _check_values(
    topk_ids: Tensor, num_experts: int, modality_ids: Tensor | None, num_modalities: int
) -> None:
    if topk_ids.numel():
        low, high = (int(v) for v in torch.aminmax(topk_ids))
        if low < 0 or high >= num_experts:
            raise ValueError(f"topk_ids must be in 0..{num_experts - 1}, got {low}..{high}")
    if modality_ids is not None:
        checks.modality_range(modality_ids, num_modalities)


@torch.library.custom_op("moe_kernels::dispatch", mutates_args=())
def dispatch_op(
    topk_ids: Tensor,
    num_experts: int,
    modality_ids: Tensor | None,
    num_modalities: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`moe_kernels.ops.dispatch`."""
    return run(topk_ids, num_experts, modality_ids, num_modalities, backend)[0]


@dispatch_op.register_fake
def _(topk_ids, num_experts, modality_ids, num_modalities, backend):
    rows = topk_ids.numel()
    return (
        topk_ids.new_empty(rows),
        topk_ids.new_empty(rows),
        topk_ids.new_empty(num_experts),
        topk_ids.new_empty(num_experts + 1),
        topk_ids.new_empty(num_experts * (num_modalities + 1) + 1),
    )
