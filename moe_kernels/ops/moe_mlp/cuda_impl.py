"""``moe_mlp`` by the extension's CUDA kernels where they support it, by Triton's otherwise."""

from functools import partial

import torch
from torch import Tensor

from moe_kernels import _native
from moe_kernels.ops.cuda_launches import CUDA_SHARED, match_routing_weights, uses_triton_gemm
from moe_kernels.ops.moe_mlp import gpu
from moe_kernels.ops.moe_mlp.activation import SILU, ExpertForm
from moe_kernels.ops.moe_mlp.gpu import Layer
from moe_kernels.ops.moe_mlp.triton_impl import TRITON_LAYER
from moe_kernels.ops.moe_mlp.triton_tiles import Tiles
from moe_kernels.ops.moe_mlp.weights import ExpertWeights

_ADAPTER_BLOCK = 64  # rows that a block of `shrink` takes at once


def supports(weights: ExpertWeights, form: ExpertForm) -> bool:
    """Return whether the extension multiplies with the experts' weights.

    It does for 16-bit weights in whole vectors of 16 bytes, on devices where its kernels are the
    faster ones. Of layouts it has the usual one alone: SwiGLU of rows [gate; up], without a bias,
    and stacks that are stored neither transposed nor packed.
    """
    hidden, inter = weights.sizes
    return (
        form == SILU
        and not weights.is_packed
        and weights.gate_up_bias is None
        and weights.gate_up_proj.is_contiguous()
        and weights.down_proj.is_contiguous()
        and not uses_triton_gemm(weights.gate_up_proj.device)
        and weights.gate_up_proj.dtype in (torch.bfloat16, torch.float16)
        and hidden % 8 == inter % 8 == 0
        and 4 * hidden * inter < 2**31
        and _is_aligned(weights.gate_up_proj)
        and _is_aligned(weights.down_proj)
    )


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if _is_aligned(tensor) else tensor.clone()


def tile_rows(tiles: Tiles, rows: int, weights: ExpertWeights, form: ExpertForm) -> tuple[int, int]:
    """Return the rows of a tile of one expert, as the GEMMs take them, and of one adapter."""
    expert_rows, adapter_rows = TRITON_LAYER.tile_rows(tiles, rows, weights, form)
    if uses_triton_gemm(weights.gate_up_proj.device):
        return expert_rows, adapter_rows
    if supports(weights, form):
        # Added experts are left out, as in Triton's choice of tiles.
        expert_rows = _native.grouped_gemm_block(rows, weights.gate_up_proj.shape[0])
    return expert_rows, _ADAPTER_BLOCK


def _gemm_arguments(
    layer: Layer, left: Tensor, stack: str, name: str, u: Tensor | None, matrix: str
) -> tuple[Tensor | int | None, ...]:
    """Return the first arguments of the native GEMMs; ``matrix`` is "A" or "B", the factor of u."""
    base, extra, has_extra = layer.stacks(stack)
    low_rank = (None, None, None)
    if u is not None and u.shape[1]:
        low_rank = u, getattr(layer.weights, f"{name}_{matrix}"), layer.lora(name)[2]
    return (
        _aligned(left),
        base,
        _aligned(extra) if has_extra else None,
        layer.perm,
        layer.expert_tiles.tiles,
        layer.segments,
        *low_rank,
        layer.expert_tiles.block,
    )


def gate_up(layer: Layer, x: Tensor, u1: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """See `triton_impl.gate_up`."""
    if not supports(layer.weights, layer.form):
        return TRITON_LAYER.gate_up(layer, x, u1, save)
    arguments = _gemm_arguments(layer, x, "gate_up_proj", "gate_up", u1, "B")
    return _native.ops().gate_up(*arguments, save)


def grouped_gemm(
    layer: Layer, left: Tensor, stack: str, name: str, u: Tensor | None, *, transposed: bool
) -> Tensor:
    """See `triton_impl.grouped_gemm`."""
    if not supports(layer.weights, layer.form):
        return TRITON_LAYER.grouped_gemm(layer, left, stack, name, u, transposed=transposed)
    matrix = "B" if transposed else "A"
    arguments = _gemm_arguments(layer, left, stack, name, u, matrix)
    return _native.ops().grouped_gemm(*arguments, transposed)


def act_backward(
    layer: Layer,
    grad_out: Tensor,
    pre_act: Tensor,
    du2: Tensor | None,
    *,
    act_of_adapted: bool,
    act_of_added: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `triton_impl.act_backward`."""
    if not supports(layer.weights, layer.form):
        return TRITON_LAYER.act_backward(
            layer, grad_out, pre_act, du2, act_of_adapted=act_of_adapted, act_of_added=act_of_added
        )
    arguments = _gemm_arguments(layer, grad_out, "down_proj", "down", du2, "A")
    return _native.ops().act_backward(
        *arguments,
        match_routing_weights(grad_out, layer.topk_weights),
        pre_act,
        act_of_adapted,
        act_of_added,
    )


def combine(layer: Layer, rows: Tensor, *, weighted: bool) -> Tensor:
    """See `triton_impl.combine`, which is used for rows that are not a multiple of 16 bytes."""
    if rows.shape[1] * rows.element_size() % 16:
        return TRITON_LAYER.combine(layer, rows, weighted=weighted)
    weights = match_routing_weights(rows, layer.topk_weights) if weighted else None
    return _native.ops().combine(
        rows, layer.inv_perm, layer.segments[-1:], weights, layer.topk_weights.shape[0]
    )


CUDA_LAYER = TRITON_LAYER._replace(
    shared=CUDA_SHARED,
    tile_rows=tile_rows,
    gate_up=gate_up,
    grouped_gemm=grouped_gemm,
    act_backward=act_backward,
    combine=combine,
)
forward = partial(gpu.forward, CUDA_LAYER)
backward = partial(gpu.backward, CUDA_LAYER)
