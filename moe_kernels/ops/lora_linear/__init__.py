"""A linear layer with low-rank updates on the rows of added modalities."""

from moe_kernels.ops.lora_linear.api import lora_linear

__all__ = ["lora_linear"]
