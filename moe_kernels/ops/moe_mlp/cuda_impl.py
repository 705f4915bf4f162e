"""``moe_mlp`` by the extension's CUDA kernels where they support it, by Triton's otherwise."""

import torch
from torch import Tensor

from moe_kernels import _native, env
from moe_kernels.ops import checks
from moe_kernels.ops.cuda_launches import (
    CUDA_SHARED,
    has_engine,
    match_routing_weights,
    uses_triton_passes,
)
from moe_kernels.ops.moe_mlp import gpu, native_impl
from moe_kernels.ops.moe_mlp.activation import SILU, ExpertForm
from moe_kernels.ops.moe_mlp.gpu import Layer, Wanted
from moe_kernels.ops.moe_mlp.tiles import Tiles
from moe_kernels.ops.moe_mlp.triton_impl import TRITON_LAYER
from moe_kernels.ops.moe_mlp.weights import ExpertWeights, Saved, nothing_saved
from moe_kernels.ops.triton_launches import Folded


def supports(weights: ExpertWeights, form: ExpertForm) -> bool:
    """Return whether the extension multiplies with the experts' weights.

    It does for 16-bit weights in whole vectors of 16 bytes, on devices where its kernels are the
    faster ones.
    """
    hidden, inter = weights.sizes
    return (
        has_engine(weights.gate_up_proj.device)
        and _has_usual_layout(weights, form)
        and hidden % 8 == inter % 8 == 0
        and 4 * hidden * inter < 2**31
    )


def in_one_call(weights: ExpertWeights, form: ExpertForm) -> bool:
    """Return whether one native op makes every launch of a forward, and one of a backward.

    They give the bits of the course in ``gpu``, and cost the host less.
    """
    segments = weights.num_experts * (weights.num_modalities + 1)
    return supports(weights, form) and segments < _native.max_dispatch_keys()


def decodes(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    modality_ids: Tensor | None,
    weights: ExpertWeights,
    form: ExpertForm,
) -> bool:
    """Return whether two kernels compute the layer without dispatch: for a few tokens.

    They read the weights once, which takes most of the time, so they run on every device. They have
    not yet run on a GPU and give other last bits than the course of training, so the environment
    must ask for them (``MOE_KERNELS_DECODE``). They take tensors as they are: a copy would be a
    launch for every token.
    """
    if not env.decode():
        return False
    sizes = (*topk_ids.shape, *weights.sizes, max(weights.ranks))
    return (
        _native.decode_takes(*sizes)
        and _has_usual_layout(weights, form)
        and _has_usual_dtypes(hidden_states, topk_weights, weights)
        and all(
            t is None or t.is_contiguous()
            for t in (hidden_states, topk_ids, topk_weights, modality_ids, *weights[2:10])
        )
        and all(
            t is None or _is_aligned(t) for t in (hidden_states, *weights[2:4], weights.gate_up_A)
        )
    )


def _has_usual_dtypes(hidden_states: Tensor, topk_weights: Tensor, weights: ExpertWeights) -> bool:
    """Return whether the two kernels of decoding read these dtypes, beside experts of 16 bits."""
    dtype, extra = weights.gate_up_proj.dtype, weights.extra_gate_up_proj
    scalings = (weights.gate_up_scaling, weights.down_scaling)
    return (
        hidden_states.dtype == dtype
        and topk_weights.dtype in (dtype, torch.float32)
        and all(scaling is None or scaling.dtype == torch.float32 for scaling in scalings)
        and (extra is None or extra.dtype == weights.extra_down_proj.dtype)
    )


def _has_usual_layout(weights: ExpertWeights, form: ExpertForm) -> bool:
    """Return whether experts are in the layout, and of a dtype, that the extension computes.

    That is SwiGLU of rows [gate; up], without a bias, and stacks of 16 bits that are stored
    neither transposed nor packed.
    """
    return (
        form == SILU
        and not weights.is_packed
        and weights.gate_up_bias is None
        and weights.gate_up_proj.dtype in (torch.bfloat16, torch.float16)
        and weights.gate_up_proj.is_contiguous()
        and weights.down_proj.is_contiguous()
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
    if uses_triton_passes(weights.gate_up_proj.device):
        return expert_rows, adapter_rows
    if supports(weights, form):
        # Added experts are left out, as in Triton's choice of tiles.
        expert_rows = _native.grouped_gemm_block(rows, weights.gate_up_proj.shape[0])
    return expert_rows, _native.cuda_limit("ADAPTER_BLOCK")


def _gemm_arguments(
    layer: Layer, left: Tensor, stack: str, name: str, u: Tensor | None, matrix: str
) -> tuple[Tensor | int | None, ...]:
    """Return the first arguments of the native GEMMs; ``matrix`` is "A" or "B", the factor of u."""
    base, extra, has_extra = layer.stacks(stack)
    low_rank = (None, None, None)
    if u is not None and u.shape[-1]:
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


def gate_up(layer: Layer, x: Tensor, u1: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `triton_impl.gate_up`; u2 comes in parts where that is cheaper."""
    if not supports(layer.weights, layer.form):
        return TRITON_LAYER.gate_up(layer, x, u1, save)
    arguments = _gemm_arguments(layer, x, "gate_up_proj", "gate_up", u1, "B")
    sizes = layer.num_rows, layer.num_base, layer.sizes[1]
    in_parts = _native.gives_u2(*sizes, *layer.weights.ranks)
    lora_A = _aligned(layer.weights.down_A) if in_parts else None
    pre_act, act, parts = _native.ops().gate_up(*arguments, save, lora_A)
    return pre_act, act, parts if in_parts else gpu.shrink_to_u(layer, act, "down", save)


def grouped_gemm(
    layer: Layer,
    left: Tensor,
    stack: str,
    name: str,
    u: Tensor | None,
    *,
    transposed: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `triton_impl.grouped_gemm`; it returns the sum of parts, without rows unless saved."""
    if not supports(layer.weights, layer.form):
        return TRITON_LAYER.grouped_gemm(
            layer, left, stack, name, u, transposed=transposed, save=save
        )
    matrix = "B" if transposed else "A"
    arguments = _gemm_arguments(layer, left, stack, name, u, matrix)
    in_parts = u is not None and u.dim() == 3
    out, summed = _native.ops().grouped_gemm(*arguments, transposed, save and in_parts)
    return out, summed if in_parts else u


def act_backward(
    layer: Layer,
    grad_out: Tensor,
    saved: Saved,
    du2: Tensor | None,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Folded | None]:
    """See `triton_impl.act_backward`; it folds where that is cheaper."""
    weights = layer.weights
    if not supports(weights, layer.form):
        return TRITON_LAYER.act_backward(layer, grad_out, saved, du2, wanted)
    arguments = _gemm_arguments(layer, grad_out, "down_proj", "down", du2, "A")
    sizes = layer.num_base, weights.num_modalities, layer.sizes[1], *weights.ranks
    folds = any(wanted[:3]) and _native.folds_gradients(layer.num_rows, *sizes)
    _, lora_B, scaling = layer.lora("gate_up")
    d_pre, act, dots, (du1, d_B1, d_A2) = _native.ops().act_backward(
        *arguments,
        match_routing_weights(grad_out, layer.topk_weights),
        saved.pre_act,
        wanted.A2 and not folds,
        wanted.act_of_added,
        *((saved.u1, lora_B, scaling) if folds else (None, None, None)),
        wanted[:3],
    )
    if not folds:
        return d_pre, act, dots, None
    slots = [sums for sums, is_wanted in ((d_B1, wanted.B1), (d_A2, wanted.A2)) if is_wanted]
    folded = Folded(du1, slots, layer.perm, layer.segments, *sizes[:2])
    return d_pre, act, dots, folded


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


def forward(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    modality_ids: Tensor | None,
    weights: ExpertWeights,
    form: ExpertForm,
    save_for_backward: bool,
) -> tuple[Tensor, Saved]:
    """Return out (T, H), and what the backward pass needs."""
    routed = hidden_states, topk_ids, topk_weights
    if not save_for_backward and decodes(*routed, modality_ids, weights, form):
        out = native_impl.inference(*routed, *weights[:2], modality_ids, *weights[2:], form=form)
        return out, nothing_saved(hidden_states, topk_ids, weights)
    rest = modality_ids, weights, form, save_for_backward
    if in_one_call(weights, form):
        return native_impl.forward_of(*routed, *rest)
    return gpu.forward(CUDA_LAYER, *routed, *rest)


def backward(
    grad_out: Tensor,
    hidden_states: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    form: ExpertForm,
    saved: Saved,
    needs: list[bool],
    frozen_extra: int = 0,
) -> list[Tensor]:
    """Return the gradients that ``needs`` asks for, in its order; of parameters in float32."""
    arguments = grad_out, hidden_states, topk_weights, weights, form, saved, needs, frozen_extra
    if in_one_call(weights, form):
        return native_impl.backward_of(*arguments)
    return gpu.backward(CUDA_LAYER, *arguments)


def inference(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    modality_ids: Tensor | None,
    *others: Tensor | None,
    form: ExpertForm,
) -> Tensor | None:
    """out (T, H) by two kernels in one call, or None where `decodes` is false.

    ``others`` are the rest of ExpertWeights' fields. A call of Python's course takes longer than a
    layer for one token.
    """
    weights = ExpertWeights(gate_up_proj, down_proj, *others)
    routed = hidden_states, topk_ids, topk_weights
    if not decodes(*routed, modality_ids, weights, form):
        return None
    checks.id_ranges(topk_ids, weights.num_experts, modality_ids, weights.num_modalities, "cuda")
    return native_impl.inference(*routed, gate_up_proj, down_proj, modality_ids, *others, form=form)
