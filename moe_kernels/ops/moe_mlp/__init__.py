"""The experts of a MoE layer, with low-rank updates on the rows of added modalities."""

from moe_kernels.ops.moe_mlp.activation import Activation
from moe_kernels.ops.moe_mlp.api import moe_mlp

__all__ = ["Activation", "moe_mlp"]
