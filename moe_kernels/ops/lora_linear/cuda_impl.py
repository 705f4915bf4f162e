"""The low-rank term of ``lora_linear`` by CUDA kernels; Triton's where those do not apply."""

from functools import partial

from moe_kernels.ops.cuda_launches import CUDA_SHARED
from moe_kernels.ops.lora_linear import triton_impl

num_tiles = triton_impl.num_tiles
dispatch = partial(triton_impl.dispatch, launches=CUDA_SHARED)
forward = partial(triton_impl.forward, launches=CUDA_SHARED)
backward = partial(triton_impl.backward, launches=CUDA_SHARED)
