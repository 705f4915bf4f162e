"""The experts of a MoE layer, with low-rank updates on the rows of added modalities."""

from moe_kernels.ops.moe_mlp.activation import Activation
from moe_kernels.ops.moe_mlp.api import moe_mlp
from moe_kernels.ops.moe_mlp.packed import (
    Fp8Weights,
    Nf4Weights,
    PackedWeights,
    quantise_fp8,
    quantise_nf4,
)

__all__ = [
    "Activation",
    "Fp8Weights",
    "Nf4Weights",
    "PackedWeights",
    "moe_mlp",
    "quantise_fp8",
    "quantise_nf4",
]
