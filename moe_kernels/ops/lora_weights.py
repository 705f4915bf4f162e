"""Low-rank weights, one pair for each added modality, and their checks."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.ops import checks


class LoraWeights(NamedTuple):
    """One projection's low-rank update for M added modalities: W + scaling * lora_B @ lora_A.

    For experts ``lora_A`` is (M, E, r, in), or (M, 1, r, in) when all experts share it, and
    ``lora_B`` is (M, E, out, r). For a linear layer they are (M, r, in) and (M, out, r).
    ``scaling`` is (M,), usually ``lora_alpha / r``, used in float32; it takes no gradient.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor

    def for_kernels(self) -> "LoraWeights":
        """Return contiguous tensors, the scaling in float32."""
        return LoraWeights(
            self.lora_A.contiguous(), self.lora_B.contiguous(), self.scaling.float().contiguous()
        )


def check_expert_lora(name: str, lora: LoraWeights, weight: Tensor) -> None:
    """Raise unless ``lora`` fits the stacked ``weight`` (E, out, in)."""
    num_experts, out_features, in_features = weight.shape
    _check_common(name, lora, weight, ndim=4)
    num_modalities, num_a, rank, lora_in = lora.lora_A.shape
    if num_a not in (1, num_experts) or lora_in != in_features:
        raise ValueError(
            f"{name}.lora_A must be (M, {num_experts} or 1, r, {in_features}), "
            f"got {tuple(lora.lora_A.shape)}"
        )
    checks.shape(f"{name}.lora_B", lora.lora_B, (num_modalities, num_experts, out_features, rank))


def check_linear_lora(name: str, lora: LoraWeights, weight: Tensor) -> None:
    """Raise unless ``lora`` fits the ``weight`` (out, in) of a linear layer."""
    out_features, in_features = weight.shape
    _check_common(name, lora, weight, ndim=3)
    num_modalities, rank, lora_in = lora.lora_A.shape
    if weight.numel() == 0:
        raise ValueError(f"{name} needs a weight with elements, got {tuple(weight.shape)}")
    if lora_in != in_features:
        raise ValueError(
            f"{name}.lora_A must be (M, r, {in_features}), got {tuple(lora.lora_A.shape)}"
        )
    checks.shape(f"{name}.lora_B", lora.lora_B, (num_modalities, out_features, rank))


def _check_common(name: str, lora: LoraWeights, weight: Tensor, ndim: int) -> None:
    if not isinstance(lora, LoraWeights):
        raise TypeError(f"{name} must be a LoraWeights, got {type(lora).__name__}")
    checks.tensors(**{f"{name}.{field}": value for field, value in lora._asdict().items()})
    is_wide = weight.dtype in (torch.float32, torch.float64)
    allowed = (weight.dtype,) if is_wide else (weight.dtype, torch.float32)
    for field, tensor in (("lora_A", lora.lora_A), ("lora_B", lora.lora_B)):
        checks.ndim(f"{name}.{field}", tensor, ndim)
        checks.device(f"{name}.{field}", tensor, weight.device)
        checks.dtype(f"{name}.{field}", tensor, allowed)
    if lora.lora_A.dtype != lora.lora_B.dtype:
        raise TypeError(
            f"{name}.lora_A is {lora.lora_A.dtype} but lora_B {lora.lora_B.dtype}: use one dtype"
        )
    if lora.lora_A.shape[-2] == 0 or lora.lora_A.shape[0] == 0:
        raise ValueError(f"{name} needs a rank and a number of modalities of at least 1")
    checks.shape(f"{name}.scaling", lora.scaling, (lora.lora_A.shape[0],))
    checks.device(f"{name}.scaling", lora.scaling, weight.device)
    checks.floating(f"{name}.scaling", lora.scaling)
    checks.frozen(f"{name}.scaling", lora.scaling, "scaling is a constant")
