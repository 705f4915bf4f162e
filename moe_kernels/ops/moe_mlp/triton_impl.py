"""``moe_mlp`` in Triton: no host sync, no float atomics, every sum in a fixed order.

Forward: shrink, gate_up with SwiGLU, shrink, down, weighted combine. Backward: one pass each for
du2 with dB2, dA' with all that follows from it, du1 with dB1, the rows of dX and their combine, dA1
and dA2, and one for each added experts' weight.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.ops import triton_kernels as shared
from moe_kernels.ops import triton_tile_maps as maps
from moe_kernels.ops.moe_mlp import triton_kernels as kernels
from moe_kernels.ops.moe_mlp.triton_tiles import Tiles, choose_tiles
from moe_kernels.ops.moe_mlp.weights import ExpertWeights
from moe_kernels.ops.triton_tile_maps import TileMap


class _Layer(NamedTuple):
    """What the launches of one call share."""

    topk_weights: Tensor  # (T, K)
    perm: Tensor
    inv_perm: Tensor
    segments: Tensor
    weights: ExpertWeights  # added experts in the base's dtype, adapters in their own
    tiles: Tiles
    expert_tiles: TileMap  # of every expert, and of the rows that were not dispatched
    adapted_tiles: TileMap  # of every pair (modality, expert)

    @property
    def num_base(self) -> int:
        return self.weights.gate_up_proj.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_weights.shape[1]

    @property
    def num_slots(self) -> int:
        return self.perm.numel()

    @property
    def sizes(self) -> tuple[int, int]:
        """hidden, inter"""
        return self.weights.down_proj.shape[1:]

    def stacks(self, name: str) -> tuple[Tensor, Tensor, bool]:
        """A frozen stack, the added experts' (or a stand-in), and whether there are any."""
        base, extra = getattr(self.weights, name), getattr(self.weights, f"extra_{name}")
        there = extra is not None and extra.shape[0] > 0
        return base, extra if there else base, there

    def lora(self, name: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """lora_A, lora_B and scaling of "gate_up" or "down"; None where there is none."""
        return tuple(getattr(self.weights, f"{name}_{part}") for part in ("A", "B", "scaling"))


def forward(
    hidden_states: Tensor,
    topk_weights: Tensor,
    perm: Tensor,
    inv_perm: Tensor,
    segment_offsets: Tensor,
    weights: ExpertWeights,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (T, H), pre_act (T*K, 2I), u1 (T*K, r1), u2 (T*K, r2)."""
    shared.check_dtype(hidden_states.dtype)
    layer = _layer(topk_weights, perm, inv_perm, segment_offsets, weights)
    hidden, inter = layer.sizes
    rows = layer.num_slots
    u1 = _shrink(layer, hidden_states, "gate_up", save_for_backward)
    act = hidden_states.new_empty(rows, inter)
    pre_act = hidden_states.new_empty(rows if save_for_backward else 0, 2 * inter)
    _gate_up(layer, hidden_states, u1, pre_act, act, save_for_backward)
    u2 = _shrink(layer, act, "down", save_for_backward)
    expert_out = _product(layer, act, "down_proj", "down", u2, transposed=True)
    out = _combine(layer, expert_out, weighted=True)
    if not save_for_backward:
        u1, u2 = (u.new_empty(0, u.shape[1]) for u in (u1, u2))
    return out, pre_act, u1, u2


def backward(
    grad_out: Tensor,
    hidden_states: Tensor,
    topk_weights: Tensor,
    perm: Tensor,
    inv_perm: Tensor,
    segment_offsets: Tensor,
    weights: ExpertWeights,
    pre_act: Tensor,
    u1: Tensor,
    u2: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in its order; of parameters in float32."""
    if not any(needs):
        return []
    layer = _layer(topk_weights, perm, inv_perm, segment_offsets, weights)
    need_hidden, need_weights, need_extra_gate_up, need_extra_down, *need_lora = needs
    need_A1, need_B1, need_A2, need_B2 = need_lora
    chunks = _adapted_tiles(
        layer.segments, layer.weights, rows := layer.num_slots, maps.chunk_rows(rows)
    )
    du2, grad_B2 = _du_and_dB(layer, chunks, "down", u2, grad_out, True, need_B2)
    d_pre, act, dots = _act_backward(
        layer, grad_out, pre_act, du2, act_of_adapted=need_A2, act_of_added=need_extra_down
    )
    du1, grad_B1 = _du_and_dB(layer, chunks, "gate_up", u1, d_pre, need_hidden or need_A1, need_B1)
    grads = []
    if need_hidden:
        d_rows = _product(layer, d_pre, "gate_up_proj", "gate_up", du1, transposed=False)
        grads.append(_combine(layer, d_rows, weighted=False))
    if need_weights:
        grads.append(dots)
    if need_extra_gate_up:
        grads.append(_extra_gradient(layer, d_pre, hidden_states, weighted=False))
    if need_extra_down:
        grads.append(_extra_gradient(layer, grad_out, act, weighted=True))
    if need_A1:
        grads.append(_grad_A(layer, chunks, "gate_up", du1, hidden_states))
    if need_B1:
        grads.append(grad_B1)
    if need_A2:
        grads.append(_grad_A(layer, chunks, "down", du2, act))
    if need_B2:
        grads.append(grad_B2)
    return grads


def _layer(topk_weights, perm, inv_perm, segment_offsets, weights: ExpertWeights) -> _Layer:
    weights = weights.in_compute_dtype(adapters=False)
    rows = perm.numel()
    tiles = choose_tiles(rows, weights)
    experts = maps.by_expert(weights.num_experts, weights.num_modalities)
    return _Layer(
        topk_weights, perm, inv_perm, segment_offsets, weights, tiles,
        maps.tile_map(segment_offsets, experts, rows, tiles.m),
        _adapted_tiles(segment_offsets, weights, rows, tiles.m),
    )  # fmt: skip


def _adapted_tiles(segments: Tensor, weights: ExpertWeights, rows: int, block: int) -> TileMap:
    pairs = maps.by_adapter(weights.gate_up_proj.shape[0], weights.num_modalities)
    return maps.tile_map(segments, pairs, rows, block)


def _rank(lora_A: Tensor | None) -> dict[str, int]:
    return {"RANK": 0 if lora_A is None else lora_A.shape[2], "BLOCK_R": shared.STEP_R}


def _shrink(layer: _Layer, left: Tensor, name: str, save: bool) -> Tensor:
    """u = left A^T (T*K, r); (T*K, 0) without adapters. What is saved for backward has zeros where
    there is no adapter: an op's output is a function of its inputs.
    """
    lora_A, _, _ = layer.lora(name)
    if lora_A is None:
        return left.new_empty(layer.num_slots, 0)
    out = (left.new_zeros if save else left.new_empty)(layer.num_slots, lora_A.shape[2])
    by_token = name == "gate_up"
    return _launch_project(layer, left, lora_A, out, by_token, (1, lora_A.shape[3]))


def _project(layer: _Layer, left: Tensor, lora_B: Tensor, *, by_token: bool) -> Tensor:
    """du = left B (T*K, r) in float32, adapted rows alone."""
    rank = lora_B.shape[3]
    out = torch.empty(layer.num_slots, rank, dtype=torch.float32, device=left.device)
    return _launch_project(layer, left, lora_B, out, by_token, (rank, 1))


def _launch_project(
    layer: _Layer, left: Tensor, matrix: Tensor, out: Tensor, by_token: bool, strides
) -> Tensor:
    return shared.project(
        left, matrix, layer.perm, layer.adapted_tiles, out, strides=strides, top_k=layer.top_k,
        by_token=by_token, num_base=layer.num_base, experts=matrix.shape[1],
        block_k=layer.tiles.k,
    )  # fmt: skip


def _operand(
    layer: _Layer, name: str, block_n: int, *, transposed: bool
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


def _grid(layer: _Layer, width: int, block_n: int) -> tuple[int]:
    return (layer.expert_tiles.num_tiles * -(-width // block_n),)


def _blocks(tiles: Tiles, block_n: int) -> dict[str, int]:
    return {
        "BLOCK_M": tiles.m, "BLOCK_N": block_n, "BLOCK_K": tiles.k, "GROUP_M": tiles.group,
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip


def _gate_up(layer: _Layer, x: Tensor, u1: Tensor, pre_act: Tensor, act: Tensor, save: bool):
    hidden, inter = layer.sizes
    lora_A, lora_B, scaling = layer.lora("gate_up")
    base, extra, flags = _operand(layer, "gate_up_proj", layer.tiles.n_gated, transposed=True)
    if layer.num_slots == 0:
        return
    kernels.gate_up_kernel[_grid(layer, inter, layer.tiles.n_gated)](
        x, base, extra, layer.perm, layer.expert_tiles.tiles, layer.segments, u1,
        extra if lora_B is None else lora_B, layer.topk_weights if scaling is None else scaling,
        pre_act, act, layer.expert_tiles.num_tiles, layer.num_base, layer.weights.num_experts,
            layer.weights.num_modalities,
        hidden, inter, TOP_K=layer.top_k, 
        SAVE=save, **flags, **_rank(lora_A),
        **_blocks(layer.tiles, layer.tiles.n_gated),
    )  # fmt: skip


def _product(
    layer: _Layer, left: Tensor, stack: str, name: str, u: Tensor | None, *, transposed: bool
) -> Tensor:
    """(T*K, N) rows: left W^T + s u B^T if ``transposed``, else left W + s u A."""
    lora_A, lora_B, scaling = layer.lora(name)
    base, extra, flags = _operand(layer, stack, layer.tiles.n, transposed=transposed)
    size_n, size_k = extra.shape[1:] if transposed else extra.shape[:0:-1]
    matrix = lora_B if transposed else lora_A
    blocks = _rank(lora_A if u is not None else None)
    strides_v = (1, blocks["RANK"]) if transposed else (size_n, 1)
    out = left.new_empty(layer.num_slots, size_n)
    if layer.num_slots:
        kernels.rows_kernel[_grid(layer, size_n, layer.tiles.n)](
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


def _act_backward(
    layer: _Layer,
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
    rows = layer.num_slots
    d_pre = torch.empty_like(pre_act)
    act = pre_act.new_empty(rows if act_of_adapted or act_of_added else 0, inter)
    parts = -(-inter // layer.tiles.n_gated)
    shape = (parts, *layer.topk_weights.shape)
    dots = torch.zeros(shape, dtype=torch.float32, device=pre_act.device)
    if rows:
        kernels.act_backward_kernel[_grid(layer, inter, layer.tiles.n_gated)](
            grad_out, base, extra, layer.perm, layer.expert_tiles.tiles, layer.segments,
            grad_out if du2 is None else du2, extra if lora_A is None else lora_A,
            layer.topk_weights if scaling is None else scaling, layer.topk_weights, pre_act, d_pre,
            act, dots, layer.expert_tiles.num_tiles, layer.num_base, layer.weights.num_experts,
            layer.weights.num_modalities, rows,
            hidden, inter, 1 if lora_A is None else lora_A.shape[1], TOP_K=layer.top_k,
            WRITE_ADAPTED=act_of_adapted, WRITE_ADDED=act_of_added, **flags,
            **_rank(lora_A), **_blocks(layer.tiles, layer.tiles.n_gated),
        )  # fmt: skip
    return d_pre, act, dots.sum(0)


def _combine(layer: _Layer, rows: Tensor, *, weighted: bool) -> Tensor:
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


def _du_and_dB(
    layer: _Layer, chunks: TileMap, name: str, u: Tensor, dy: Tensor, need_du: bool, need_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """du = dy B (T*K, r) in float32, adapted rows alone, and dB; in one pass over dy where
    that is cheaper.

    ``dy`` are the rows of d_pre, or grad_out by token for the down projection.
    """
    lora_A, lora_B, _ = layer.lora(name)
    if lora_A is None:
        return None, None
    by_token = name == "down"
    together = need_du and need_B and lora_A.shape[2] <= shared.MAX_PROJECTED
    grad, du = None, None
    if need_B:
        grad, parts = _outer(
            layer, chunks, name, u, dy, right_by_token=by_token, transposed=True,
            matrix=lora_B.flatten(0, 1) if together else None,
        )  # fmt: skip
        grad = grad.view(lora_B.shape)
    if together:
        du = shared.sum_parts(parts, layer.adapted_tiles)
    elif need_du:
        du = _project(layer, dy, lora_B, by_token=by_token)
    return du, grad


def _grad_A(layer: _Layer, chunks: TileMap, name: str, du: Tensor, left: Tensor) -> Tensor:
    """dA in float32, from du and hidden_states, or the activation for the down projection."""
    lora_A, _, _ = layer.lora(name)
    grad, _ = _outer(
        layer, chunks, name, du, left, right_by_token=name == "gate_up", transposed=False
    )
    grad = grad.view(layer.weights.num_modalities, layer.num_base, *lora_A.shape[2:])
    return grad.sum(1, keepdim=True) if lora_A.shape[1] != layer.num_base else grad


def _outer(layer: _Layer, chunks: TileMap, name: str, skinny: Tensor, wide: Tensor, **options):
    """Sums of (s w skinny)^T wide over each adapter's rows; the routing weight w belongs to the
    down projection's rows alone.
    """
    return shared.outer(
        skinny, wide, layer.perm, chunks, layer.lora(name)[2], top_k=layer.top_k,
        weights=layer.topk_weights if name == "down" else None, **options,
    )  # fmt: skip


def _extra_gradient(layer: _Layer, left: Tensor, right: Tensor, *, weighted: bool) -> Tensor:
    """sum of (w left)^T right over each added expert's rows.

    Not in chunks: a wide result has programs enough, and partial sums would be large.
    """
    added = maps.by_added_expert(
        layer.num_base, layer.weights.num_experts - layer.num_base, layer.weights.num_modalities
    )
    rows = maps.tile_map(layer.segments, added, layer.num_slots, max(1, layer.num_slots))
    grad, _ = shared.outer(
        left, right, layer.perm, rows, torch.ones(1, device=left.device), transposed=False,
        top_k=layer.top_k, weights=layer.topk_weights if weighted else None,
        left_by_token=weighted, right_by_token=not weighted,
    )  # fmt: skip
    return grad
