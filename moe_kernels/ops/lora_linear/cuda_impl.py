"""The low-rank term of ``lora_linear`` by CUDA kernels, and Triton's for the rest."""

from functools import partial

from moe_kernels.ops.cuda_kernels import CUDA_SHARED
from moe_kernels.ops.lora_linear import triton_impl

forward_maps = triton_impl.forward_maps
forward = partial(triton_impl.forward, launches=CUDA_SHARED)
backward = partial(triton_impl.backward, launches=CUDA_SHARED)
