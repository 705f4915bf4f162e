"""The registered op ``moe_kernels::dispatch``. Ids carry no gradient, so it has no formula."""

import torch
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops import checks
from moe_kernels.ops.dtypes import on_device
from moe_kernels.ops.gradients import by_element


@torch.library.custom_op("moe_kernels::dispatch", mutates_args=())
def dispatch_op(
    topk_ids: Tensor,
    num_experts: int,
    modality_ids: Tensor | None,
    num_modalities: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`moe_kernels.ops.dispatch`."""
    checks.id_ranges(topk_ids, num_experts, modality_ids, num_modalities, backend)
    with on_device(topk_ids.device):
        return backends.implementation("dispatch", backend).dispatch(
            topk_ids.contiguous(),
            num_experts,
            None if modality_ids is None else modality_ids.contiguous(),
            num_modalities,
        )


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


dispatch_op.register_vmap(by_element(dispatch_op))
