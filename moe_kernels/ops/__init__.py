"""The ops: dispatch, the fused expert MLP and the masked linear layer.

They take tensors, and need no model. docs/design.md says what must always hold of them.
"""

from moe_kernels.ops.dispatch import Dispatch, dispatch
from moe_kernels.ops.lora_linear import LinearDispatch, linear_dispatch, lora_linear
from moe_kernels.ops.lora_weights import LoraWeights
from moe_kernels.ops.moe_mlp import (
    Activation,
    Fp8Weights,
    Nf4Weights,
    PackedWeights,
    moe_mlp,
    quantise_fp8,
    quantise_nf4,
)

__all__ = [
    "Activation",
    "Dispatch",
    "Fp8Weights",
    "LinearDispatch",
    "LoraWeights",
    "Nf4Weights",
    "PackedWeights",
    "dispatch",
    "linear_dispatch",
    "lora_linear",
    "moe_mlp",
    "quantise_fp8",
    "quantise_nf4",
]
