"""The ops: dispatch, the fused expert MLP and the masked linear layer.

An op's folder has the public function in ``api``, the registered ops and their autograd formula in
``autograd``, the definition in plain torch in ``reference``, and one file for each other backend.
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
