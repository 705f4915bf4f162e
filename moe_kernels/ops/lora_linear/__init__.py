"""A linear layer with low-rank updates on the rows of added modalities."""

from moe_kernels.ops.lora_linear.api import linear_dispatch, lora_linear
from moe_kernels.ops.lora_linear.rows import LinearDispatch

__all__ = ["LinearDispatch", "linear_dispatch", "lora_linear"]
