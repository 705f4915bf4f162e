"""PEFT's low-rank pairs of stacked experts, read as :class:`moe_kernels.ops.LoraWeights`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels.ops import LoraWeights


def read_pairs(
    wrapper: nn.Module, groups: Sequence[Sequence[str]], dtype: torch.dtype
) -> LoraWeights:
    """Return PEFT's adapters of one parameter, each group of them as one modality.

    Args:
        wrapper: ``ParamWrapper`` of the parameter.
        groups: names of adapters; the updates of a group are summed.
        dtype: of the base weights.
    """
    pairs = [_sum_of_adapters(wrapper, group, dtype) for group in groups]
    rank = max(lora_A.shape[1] for lora_A, _, _ in pairs)
    device = pairs[0][0].device
    scaling = torch.stack([_as_tensor(scaling, device) for _, _, scaling in pairs])
    if len(pairs) == 1:  # without a copy
        return LoraWeights(pairs[0][0][None], pairs[0][1][None], scaling)
    return LoraWeights(
        torch.stack([F.pad(A, (0, 0, 0, rank - A.shape[1])) for A, _, _ in pairs]),
        torch.stack([F.pad(B, (0, rank - B.shape[2])) for _, B, _ in pairs]),
        scaling,
    )


def _sum_of_adapters(
    wrapper: nn.Module, names: Sequence[str], dtype: torch.dtype
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Return A (E, r, in), B (E, out, r) and scaling of adapters that are joined along the rank."""
    pairs = [_pair(wrapper, name, dtype) for name in names if name in wrapper.lora_A]
    if len(pairs) == 1 and dtype != torch.float64:
        return pairs[0]
    if not pairs:  # __base__, or another layer or parameter has these adapters
        weight, number = wrapper.get_param(), wrapper.num_experts
        return (
            weight.new_zeros(number, 1, wrapper.in_features),
            weight.new_zeros(number, wrapper.out_features, 1),
            0.0,
        )
    # The kernels take the scaling in float32, which would round that of a float64 model.
    return (
        torch.cat([A for A, _, _ in pairs], 1),
        torch.cat([B * scaling for _, B, scaling in pairs], 2),
        1.0,
    )


def _pair(
    wrapper: nn.Module, name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Return A (E, r, in), B (E, out, r) and scaling of one adapter.

    PEFT's A is (E r, in) with the expert slowest, its B (out, r E) with the expert fastest.
    """
    lora_A, lora_B = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    kept = (torch.float64,) if dtype == torch.float64 else (dtype, torch.float32)
    if lora_A.dtype not in kept or lora_B.dtype != lora_A.dtype:
        lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    number = wrapper.num_experts
    # Torch transposes a matrix by blocks, several times as fast as it permutes three dimensions.
    experts_first = lora_B.reshape(-1, number).t().contiguous()
    return (
        lora_A.reshape(number, -1, lora_A.shape[-1]),
        experts_first.view(number, lora_B.shape[0], -1),
        wrapper.scaling[name],
    )


def _as_tensor(scaling: float | Tensor, device: torch.device) -> Tensor:
    """Return a scaling, which hot-swapping makes a tensor, in float32; no copy from the host."""
    if isinstance(scaling, Tensor):
        return scaling.detach().reshape(()).to(device, torch.float32)
    return torch.full((), scaling, dtype=torch.float32, device=device)
