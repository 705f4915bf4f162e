"""The experts of a MoE layer, with low-rank updates on the rows of added modalities."""

from moe_kernels.ops.moe_mlp.api import moe_mlp

__all__ = ["moe_mlp"]
