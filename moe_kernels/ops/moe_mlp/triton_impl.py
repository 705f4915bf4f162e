"""``moe_mlp`` in Triton: the launches that ``gpu`` is made of."""

from functools import partial

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.ops import triton_kernels as shared
from moe_kernels.ops.moe_mlp import gpu
from moe_kernels.ops.moe_mlp import triton_kernels as kernels
from moe_kernels.ops.moe_mlp.gpu import Layer, LayerLaunches
from moe_kernels.ops.moe_mlp.triton_tiles import Tiles, choose_tiles
from moe_kernels.ops.moe_mlp.weights import ExpertWeights


def _rank(lora_A: Tensor | None) -> dict[str, int]:
    return {"RANK": 0 if lora_A is None else lora_A.shape[2], "BLOCK_R": shared.STEP_R}


def _operand(
    layer: Layer, name: str, block_n: int, *, transposed: bool
) -> tuple[Tensor | TensorDescriptor, Tensor, dict[str, bool]]:
    """A frozen stack, the added experts' (or a stand-in), and the kernels' flags for them.

    The stack goes in as a descriptor for the copy engine where there is one and it can: there are
    no added experts, whose stack would be another descriptor; rows are a multiple of 16 bytes; and
    where k runs over rows, the next expert's rows never fill a block up.
    """
    base, extra, has_extra = layer.stacks(name)
    block = (block_n, layer.tiles.k) if transposed else (layer.tiles.k, block_n)
    tma = (
        shared.has_tma(base.device)
        and base.element_size() == 2  # float32 has no matrix instructions to feed, and spills
        and not has_extra
        and base.is_contiguous()
        and base.data_ptr() % 16 == 0
        and base.shape[2] * base.element_size() % 16 == 0
        and (transposed or base.shape[1] % layer.tiles.k == 0)
    )
    stack = TensorDescriptor.from_tensor(base.flatten(0, 1), list(block)) if tma else base
    return stack, extra, {"HAS_EXTRA": has_extra, "TMA": tma}


def _grid(layer: Layer, width: int, block_n: int) -> tuple[int]:
    return (layer.expert_tiles.num_tiles * -(-width // block_n),)


def _blocks(tiles: Tiles, block_n: int) -> dict[str, int]:
    return {
        "BLOCK_M": tiles.m, "BLOCK_N": block_n, "BLOCK_K": tiles.k, "GROUP_M": tiles.group,
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip


def blocks(rows: int, weights: ExpertWeights) -> tuple[int, int]:
    """Rows of a tile of one expert, and of one adapter: the same."""
    tiles = choose_tiles(rows, weights)
    return tiles.m, tiles.m


def gate_up(layer: Layer, x: Tensor, u1: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """pre_act (T*K, 2I), or no rows unless ``save``, and act (T*K, I)."""
    hidden, inter = layer.sizes
    lora_A, lora_B, scaling = layer.lora("gate_up")
    base, extra, flags = _operand(layer, "gate_up_proj", layer.tiles.n_gated, transposed=True)
    pre_act = x.new_empty(layer.num_rows if save else 0, 2 * inter)
    act = x.new_empty(layer.num_rows, inter)
    if layer.num_rows == 0:
        return pre_act, act
    kernels.gate_up_kernel[_grid(layer, inter, layer.tiles.n_gated)](
        x, base, extra, layer.perm, layer.expert_tiles.tiles, layer.segments, u1,
        extra if lora_B is None else lora_B, layer.topk_weights if scaling is None else scaling,
        pre_act, act, layer.expert_tiles.num_tiles, layer.num_base, layer.weights.num_experts,
        layer.weights.num_modalities, hidden, inter, TOP_K=layer.top_k, SAVE=save, **flags,
        **_rank(lora_A), **_blocks(layer.tiles, layer.tiles.n_gated),
    )  # fmt: skip
    return pre_act, act


def grouped_gemm(
    layer: Layer, left: Tensor, stack: str, name: str, u: Tensor | None, *, transposed: bool
) -> Tensor:
    """(T*K, N) rows: left W^T + s u B^T if ``transposed``, else left W + s u A."""
    lora_A, lora_B, scaling = layer.lora(name)
    base, extra, flags = _operand(layer, stack, layer.tiles.n, transposed=transposed)
    size_n, size_k = extra.shape[1:] if transposed else extra.shape[:0:-1]
    matrix = lora_B if transposed else lora_A
    blocks = _rank(lora_A if u is not None else None)
    strides_v = (1, blocks["RANK"]) if transposed else (size_n, 1)
    out = left.new_empty(layer.num_rows, size_n)
    if layer.num_rows:
        kernels.grouped_gemm_kernel[_grid(layer, size_n, layer.tiles.n)](
            left, base, extra, layer.expert_tiles.tiles, layer.segments, left if u is None else u,
            extra if matrix is None else matrix,
            layer.topk_weights if scaling is None else scaling, out,
            layer.expert_tiles.num_tiles, layer.num_base, layer.weights.num_experts,
            layer.weights.num_modalities, size_k,
            size_n, 1 if matrix is None else matrix.shape[1], *strides_v, TRANSPOSED=transposed,
            **flags, **blocks,
            **_blocks(layer.tiles, layer.tiles.n),
        )  # fmt: skip
    return out


def act_backward(
    layer: Layer,
    grad_out: Tensor,
    pre_act: Tensor,
    du2: Tensor | None,
    *,
    act_of_adapted: bool,
    act_of_added: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_pre (T*K, 2I), act (T*K, I) of the rows that are asked for, and <dA', a> (T, K) in float32,
    0 of rows that were not dispatched.
    """
    hidden, inter = layer.sizes
    lora_A, _, scaling = layer.lora("down")
    base, extra, flags = _operand(layer, "down_proj", layer.tiles.n_gated, transposed=False)
    rows = layer.num_rows
    d_pre = torch.empty_like(pre_act)
    act = pre_act.new_empty(rows if act_of_adapted or act_of_added else 0, inter)
    parts = -(-inter // layer.tiles.n_gated)
    shape = (parts, *layer.topk_weights.shape)
    dots = torch.zeros(shape, dtype=torch.float32, device=pre_act.device)
    cap = {"maxnreg": layer.tiles.act_registers} if layer.tiles.act_registers else {}
    if rows:
        kernels.act_backward_kernel[_grid(layer, inter, layer.tiles.n_gated)](
            grad_out, base, extra, layer.perm, layer.expert_tiles.tiles, layer.segments,
            grad_out if du2 is None else du2, extra if lora_A is None else lora_A,
            layer.topk_weights if scaling is None else scaling, layer.topk_weights, pre_act, d_pre,
            act, dots, layer.expert_tiles.num_tiles, layer.num_base, layer.weights.num_experts,
            layer.weights.num_modalities, rows,
            hidden, inter, 1 if lora_A is None else lora_A.shape[1], TOP_K=layer.top_k,
            WRITE_ADAPTED=act_of_adapted, WRITE_ADDED=act_of_added, **flags,
            **_rank(lora_A), **_blocks(layer.tiles, layer.tiles.n_gated), **cap,
        )  # fmt: skip
    return d_pre, act, dots.sum(0)


def combine(layer: Layer, rows: Tensor, *, weighted: bool) -> Tensor:
    """(T, N) sums over each token's rows; zeros for a token without rows."""
    tokens, width = layer.topk_weights.shape[0], rows.shape[1]
    out = rows.new_empty(tokens, width)
    block = min(1024, triton.next_power_of_2(width))
    if tokens and width:
        kernels.combine_kernel[(tokens, -(-width // block))](
            rows, layer.inv_perm, layer.segments[-1:], layer.topk_weights, out, width,
            TOP_K=layer.top_k, WEIGHTED=weighted, BLOCK_N=block,
        )  # fmt: skip
    return out


TRITON_LAYER = LayerLaunches(
    shared.TRITON_SHARED, blocks, gate_up, grouped_gemm, act_backward, combine
)
forward_maps = partial(gpu.forward_maps, TRITON_LAYER)
forward = partial(gpu.forward, TRITON_LAYER)
backward = partial(gpu.backward, TRITON_LAYER)
