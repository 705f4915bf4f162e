"""``moe_mlp`` in Triton: the launches that ``gpu`` is written against."""

from functools import partial

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.ops import triton_launches as shared
from moe_kernels.ops.moe_mlp import gpu
from moe_kernels.ops.moe_mlp import triton_kernels as kernels
from moe_kernels.ops.moe_mlp.activation import ExpertForm
from moe_kernels.ops.moe_mlp.gpu import Layer, LayerLaunches
from moe_kernels.ops.moe_mlp.packed import (
    FP8_BLOCK,
    is_packed,
    nf4_block,
    nf4_values,
    unpacked_shape,
)
from moe_kernels.ops.moe_mlp.tiles import Tiles
from moe_kernels.ops.moe_mlp.weights import ExpertWeights, Saved, is_transposed
from moe_kernels.ops.triton_launch import launch, next_power_of_2


def tile_rows(tiles: Tiles, rows: int, weights: ExpertWeights, form: ExpertForm) -> tuple[int, int]:
    """Return the rows of a tile of one expert, and of one adapter."""
    return tiles.m, min(tiles.m, shared.ADAPTER_ROWS)


def _rank(lora_A: Tensor | None) -> dict[str, int]:
    return {"RANK": 0 if lora_A is None else lora_A.shape[2], "BLOCK_R": shared.STEP_R}


def _stack(layer: Layer, name: str, block_n: int, *, transposed: bool) -> dict[str, object]:
    """Return the kernels' arguments for a frozen stack and the added experts' (or a stand-in).

    ``transposed``: whether a product is with W^T. In the kernels' sense it is whether W is stored
    (n, k), the other way around for a stack that is a transposed view.
    The stack goes in as a descriptor for the copy engine where the device has one and the stack
    allows it: it is not packed; there are no added experts, whose stack would be another
    descriptor; rows are a multiple of 16 bytes; and where k runs over rows, the next expert's rows
    never fill a block up.
    """
    base, extra, has_extra = layer.stacks(name)
    if is_packed(base):
        flags = {"HAS_EXTRA": has_extra, "TMA": False, "TRANSPOSED": transposed}
        return {"w": base.view(torch.uint8), "extra_ptr": extra, **flags, **_scales(layer, name)}
    stored = base
    if is_transposed(base):
        stored, transposed = base.transpose(1, 2), not transposed
    block = (block_n, layer.tiles.k) if transposed else (layer.tiles.k, block_n)
    tma = (
        shared.has_tma(base.device)
        and base.element_size() == 2  # float32 has no matrix instructions to feed, and spills
        and not has_extra
        and stored.is_contiguous()
        and stored.data_ptr() % 16 == 0
        and stored.shape[2] * stored.element_size() % 16 == 0
        and (transposed or stored.shape[1] % layer.tiles.k == 0)
    )
    stack = TensorDescriptor.from_tensor(stored.flatten(0, 1), list(block)) if tma else base
    flags = {"HAS_EXTRA": has_extra, "TMA": tma, "TRANSPOSED": transposed}
    return {"w": stack, "extra_ptr": extra, **flags, **_NOT_PACKED}


_NOT_PACKED = {"scales_ptr": None, "codes_ptr": None, "PACKING": "none", "SCALE_BLOCK": 1}


def _scales(layer: Layer, name: str) -> dict[str, object]:
    """Return the kernels' arguments that unpack a frozen stack."""
    stack = getattr(layer.weights, name)
    scales = getattr(layer.weights, name.replace("proj", "scales"))
    if stack.dtype == torch.uint8:
        form = {"PACKING": "nf4", "SCALE_BLOCK": nf4_block(stack, scales)}
    else:
        form = {"PACKING": "fp8", "SCALE_BLOCK": FP8_BLOCK}
    return {"scales_ptr": scales, "codes_ptr": nf4_values(stack.device), **form}


def _routed(layer: Layer) -> dict[str, object]:
    """Return the kernels' arguments for the tiles and segments of the sorted rows."""
    return {
        "tiles_ptr": layer.expert_tiles.tiles,
        "segments_ptr": layer.segments,
        "num_tiles": layer.expert_tiles.num_tiles,
        "num_base": layer.num_base,
        "num_experts": layer.weights.num_experts,
        "num_modalities": layer.weights.num_modalities,
    }


def _form(form: ExpertForm) -> dict[str, object]:
    """Return the kernels' arguments for the activation and the order of gate and up."""
    order = "alone" if not form.gated else "interleaved" if form.interleaved else "paired"
    values = {"alpha": form.alpha, "limit": form.limit, "shift": form.shift}
    return {"ACT": form.act, "ORDER": order, **values}


def _grid(layer: Layer, width: int, block_n: int) -> tuple[int]:
    return (layer.expert_tiles.num_tiles * -(-width // block_n),)


def _blocks(tiles: Tiles, block_n: int) -> dict[str, int]:
    return {
        "BLOCK_M": tiles.m,
        "BLOCK_N": block_n,
        "BLOCK_K": tiles.k,
        "GROUP_M": tiles.group,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def gate_up(layer: Layer, x: Tensor, u1: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return pre_act (T*K, 2I or I), or no rows unless ``save``, act (T*K, I), and u2 = act A^T."""
    hidden, inter = layer.sizes
    lora_A, lora_B, scaling = layer.lora("gate_up")
    block_n = layer.tiles.n_gated if layer.form.gated else layer.tiles.n
    columns = 2 * block_n if layer.form.interleaved else block_n  # of an accumulator
    stack = _stack(layer, "gate_up_proj", columns, transposed=True)
    bias = layer.weights.gate_up_bias
    pre_act = x.new_empty(layer.num_rows if save else 0, layer.form.factor * inter)
    act = x.new_empty(layer.num_rows, inter)
    launch(
        kernels.gate_up_kernel,
        _grid(layer, inter, block_n),
        x_ptr=x,
        bias_ptr=layer.topk_weights if bias is None else bias,
        perm_ptr=layer.perm,
        u_ptr=u1,
        b_ptr=stack["extra_ptr"] if lora_B is None else lora_B,
        scaling_ptr=layer.topk_weights if scaling is None else scaling,
        pre_ptr=pre_act,
        act_ptr=act,
        hidden=hidden,
        inter=inter,
        TOP_K=layer.top_k,
        HAS_BIAS=bias is not None,
        SAVE=save,
        **stack,
        **_form(layer.form),
        **_routed(layer),
        **_rank(lora_A),
        **_blocks(layer.tiles, block_n),
    )
    return pre_act, act, gpu.shrink_to_u(layer, act, "down", save)


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
    """Return (T*K, N) rows: left W^T + s u B^T if ``transposed``, else left W + s u A; and u."""
    lora_A, lora_B, scaling = layer.lora(name)
    weights = _stack(layer, stack, layer.tiles.n, transposed=transposed)
    shape = unpacked_shape(getattr(layer.weights, stack))
    size_n, size_k = shape[1:] if transposed else shape[:0:-1]
    matrix = lora_B if transposed else lora_A
    rank = _rank(lora_A if u is not None else None)
    out = left.new_empty(layer.num_rows, size_n)
    launch(
        kernels.grouped_gemm_kernel,
        _grid(layer, size_n, layer.tiles.n),
        left_ptr=left,
        u_ptr=left if u is None else u,
        v_ptr=weights["extra_ptr"] if matrix is None else matrix,
        scaling_ptr=layer.topk_weights if scaling is None else scaling,
        out_ptr=out,
        size_k=size_k,
        size_n=size_n,
        experts_of_v=1 if matrix is None else matrix.shape[1],
        stride_vr=1 if transposed else size_n,
        stride_vn=rank["RANK"] if transposed else 1,
        **weights,
        **_routed(layer),
        **rank,
        **_blocks(layer.tiles, layer.tiles.n),
    )
    return out, u


def act_backward(
    layer: Layer,
    grad_out: Tensor,
    saved: Saved,
    du2: Tensor | None,
    wanted: gpu.Wanted,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Return d_pre (T*K, 2I or I), act (T*K, I) of the requested rows, and parts of <dA', a>.

    The parts (n, T, K), whose sum over n is <dA', a>, are in float32, and 0 for rows that were not
    dispatched. Nothing is folded.
    """
    hidden, inter = layer.sizes
    pre_act = saved.pre_act
    lora_A, _, scaling = layer.lora("down")
    block_n = layer.tiles.n_gated
    stack = _stack(layer, "down_proj", block_n, transposed=False)
    d_pre = torch.empty_like(pre_act)
    act = pre_act.new_empty(layer.num_rows if wanted.A2 or wanted.act_of_added else 0, inter)
    shape = (-(-inter // block_n), *layer.topk_weights.shape)
    dots = torch.empty(shape, dtype=torch.float32, device=pre_act.device)
    cap = {"maxnreg": layer.tiles.act_registers} if layer.tiles.act_registers else {}
    launch(
        kernels.act_backward_kernel,
        _grid(layer, inter, block_n),
        grad_ptr=grad_out,
        perm_ptr=layer.perm,
        du_ptr=grad_out if du2 is None else du2,
        a_ptr=stack["extra_ptr"] if lora_A is None else lora_A,
        scaling_ptr=layer.topk_weights if scaling is None else scaling,
        weights_ptr=layer.topk_weights,
        pre_ptr=pre_act,
        dpre_ptr=d_pre,
        act_ptr=act,
        dots_ptr=dots,
        num_rows=layer.num_rows,
        hidden=hidden,
        inter=inter,
        experts_of_a=1 if lora_A is None else lora_A.shape[1],
        TOP_K=layer.top_k,
        WRITE_ADAPTED=wanted.A2,
        WRITE_ADDED=wanted.act_of_added,
        **stack,
        **_form(layer.form),
        **_routed(layer),
        **_rank(lora_A),
        **_blocks(layer.tiles, block_n),
        **cap,
    )
    return d_pre, act, dots, None


def combine(layer: Layer, rows: Tensor, *, weighted: bool) -> Tensor:
    """Return (T, N) sums over each token's rows; zeros for a token without rows."""
    tokens, width = layer.topk_weights.shape[0], rows.shape[1]
    out = rows.new_empty(tokens, width)
    block = min(1024, next_power_of_2(width))
    launch(
        kernels.combine_kernel,
        (tokens, -(-width // block)),
        rows_ptr=rows,
        inv_perm_ptr=layer.inv_perm,
        num_rows_ptr=layer.segments[-1:],
        weights_ptr=layer.topk_weights,
        out_ptr=out,
        width=width,
        TOP_K=layer.top_k,
        WEIGHTED=weighted,
        BLOCK_N=block,
    )
    return out


TRITON_LAYER = LayerLaunches(
    shared=shared.TRITON_SHARED,
    tile_rows=tile_rows,
    gate_up=gate_up,
    grouped_gemm=grouped_gemm,
    act_backward=act_backward,
    combine=combine,
)
forward = partial(gpu.forward, TRITON_LAYER)
backward = partial(gpu.backward, TRITON_LAYER)
