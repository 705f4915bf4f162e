"""GPU forward and backward of ``moe_mlp``, written against a backend's launch table.

There is no host sync and no float atomic, and every sum has a fixed order.

Forward, 7 launches with adapters: dispatch and the tile maps, shrink, gate_up with the activation,
shrink, down, weighted combine; 6 where gate_up gives u2 in parts, which down adds. Backward, 9: the
tile maps; du2; dA' with all that follows from it; dB1 with du1, and dA2; what finishes their sums;
the rows of dX and their combine; dB2 and dA1; what finishes these; 7 where dA' leaves du1, dB1 and
dA2, whose sums the last launch finishes. Where du1 costs less in a pass of its own it is a launch
more, and the gradients of added experts are three more, with the launch that makes their factors.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.ops import triton_tile_maps as maps
from moe_kernels.ops.moe_mlp.activation import ExpertForm
from moe_kernels.ops.moe_mlp.tiles import Tiles
from moe_kernels.ops.moe_mlp.triton_tiles import choose_tiles
from moe_kernels.ops.moe_mlp.weights import ExpertWeights, Saved
from moe_kernels.ops.triton_launches import Folded, SharedLaunches, Shrink, Wgrad, check_dtype
from moe_kernels.ops.triton_tile_maps import RequestedMaps, TileMap


class LayerLaunches(NamedTuple):
    """A backend's launches for ``moe_mlp``; ``triton_impl`` has the functions' descriptions.

    Attributes:
        shared: launches that other ops use too.
        tile_rows: rows of a tile of one expert, and of one adapter, from Triton's tiles, the number
            of rows, the weights (shapes, layout, dtype and device alone) and how experts compute.
        gate_up: its third result is u2 (T*K, r2), or parts (n, T*K, r2) of it in float32.
        grouped_gemm: takes either as u, and returns a whole u beside its product, or one without
            rows for parts of which nothing is to be saved.
        combine: the weighted sum of each token's rows.
        act_backward: its third result are parts (n, T, K) of <dA', a>, which ``wgrad`` adds. Its
            fourth is what it has folded, or None where du1, dB1 and dA2 are still to be computed.
    """

    shared: SharedLaunches
    tile_rows: Callable[[Tiles, int, ExpertWeights, ExpertForm], tuple[int, int]]
    gate_up: Callable[..., tuple[Tensor, Tensor, Tensor]]
    grouped_gemm: Callable[..., tuple[Tensor, Tensor | None]]
    act_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Folded | None]]
    combine: Callable[..., Tensor]


class Wanted(NamedTuple):
    """Results that are needed of dA' beside the gradient of the pre-activation."""

    du1: bool  # by dX
    B1: bool
    A2: bool
    act_of_added: bool  # the activation of rows of added experts


_LORA = {
    name: attrgetter(f"{name}_A", f"{name}_B", f"{name}_scaling") for name in ("gate_up", "down")
}


class Layer(NamedTuple):
    """Arguments that the launches of one call share."""

    shared: SharedLaunches
    topk_weights: Tensor  # (T, K)
    perm: Tensor
    inv_perm: Tensor
    segments: Tensor
    weights: ExpertWeights  # added experts in the base's dtype, adapters in their own
    form: ExpertForm
    tiles: Tiles  # of Triton's kernels
    expert_tiles: TileMap  # of every expert, and of the rows that were not dispatched
    adapted_tiles: TileMap  # of every pair (modality, expert)
    chunks: TileMap | None = None  # the same in long tiles; backward alone
    added: TileMap | None = None  # of every added expert that trains, a tile each

    @property
    def num_base(self) -> int:
        return self.weights.gate_up_proj.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_weights.shape[1]

    @property
    def num_rows(self) -> int:
        return self.perm.numel()

    @property
    def sizes(self) -> tuple[int, int]:
        """Hidden and intermediate size, H and I."""
        return self.weights.sizes

    def stacks(self, name: str) -> tuple[Tensor, Tensor, bool]:
        """Return a frozen stack, the added experts' (or a stand-in), and whether there are any."""
        base, extra = getattr(self.weights, name), getattr(self.weights, f"extra_{name}")
        present = extra is not None and extra.shape[0] > 0
        return base, extra if present else base, present

    def lora(self, name: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return lora_A, lora_B and scaling of "gate_up" or "down"; None where there is none."""
        fields = _LORA[name]
        return fields(self.weights)


def forward(
    launches: LayerLaunches,
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    modality_ids: Tensor | None,
    weights: ExpertWeights,
    form: ExpertForm,
    save_for_backward: bool,
) -> tuple[Tensor, Saved]:
    """Return out (T, H), and what the backward pass needs, whole only if it is to be saved."""
    check_dtype(hidden_states.dtype)
    weights = weights.in_compute_dtype(hidden_states.dtype, adapters=False)
    tiles = choose_tiles(topk_ids.numel(), weights, hidden_states.dtype)
    fields, (expert_tiles, adapted_tiles) = launches.shared.dispatch_with_maps(
        topk_ids,
        weights.num_experts,
        modality_ids,
        weights.num_modalities,
        _forward_maps(launches, tiles, topk_ids.numel(), weights, form),
    )
    perm, inv_perm, _, _, segment_offsets = fields
    layer = Layer(
        shared=launches.shared,
        topk_weights=topk_weights,
        perm=perm,
        inv_perm=inv_perm,
        segments=segment_offsets,
        weights=weights,
        form=form,
        tiles=tiles,
        expert_tiles=expert_tiles,
        adapted_tiles=adapted_tiles,
    )
    save = save_for_backward
    u1 = shrink_to_u(layer, hidden_states, "gate_up", save)
    pre_act, act, u2 = launches.gate_up(layer, hidden_states, u1, save)
    expert_out, u2 = launches.grouped_gemm(
        layer, act, "down_proj", "down", u2, transposed=True, save=save
    )
    out = launches.combine(layer, expert_out, weighted=True)
    return out, Saved(pre_act, u1, u2, perm, inv_perm, segment_offsets)


def backward(
    launches: LayerLaunches,
    grad_out: Tensor,
    hidden_states: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    form: ExpertForm,
    saved: Saved,
    needs: list[bool],
    frozen_extra: int = 0,
) -> list[Tensor]:
    """Return the gradients that ``needs`` asks for, in its order; of parameters in float32.

    That of routing weights has their dtype, on "cuda" if it is float32 or of 16 bits.
    """
    if not any(needs):
        return []
    need_hidden, need_weights, need_extra_gate_up, need_extra_down, *need_lora = needs
    need_A1, need_B1, need_A2, need_B2 = need_lora
    weights = weights.in_compute_dtype(hidden_states.dtype, adapters=False)
    tiles = choose_tiles(saved.perm.numel(), weights, hidden_states.dtype)
    frozen = frozen_extra if need_extra_gate_up or need_extra_down else None
    expert_tiles, adapted_tiles, chunks, *added = _backward_maps(
        launches, tiles, saved, weights, form, frozen
    )
    layer = Layer(
        shared=launches.shared,
        topk_weights=topk_weights,
        perm=saved.perm,
        inv_perm=saved.inv_perm,
        segments=saved.segment_offsets,
        weights=weights,
        form=form,
        tiles=tiles,
        expert_tiles=expert_tiles,
        adapted_tiles=adapted_tiles,
        chunks=chunks,
        added=added[0] if added else None,
    )
    du2 = _shrink_to_du(layer, grad_out, "down")
    wanted = Wanted(need_hidden, need_B1, need_A2, need_extra_down)
    d_pre, act, dots, folded = launches.act_backward(layer, grad_out, saved, du2, wanted)
    dots = dots if need_weights else None
    if folded is None:
        (grad_B1, grad_A2), du1, grad_weights = _first_sums(
            layer, saved.u1, d_pre, du2, act, dots,
            need_du=need_hidden or need_A1, need_B1=need_B1, need_A2=need_A2,
        )  # fmt: skip
    elif need_hidden:
        du1 = folded.du1
    elif need_A1:
        du1 = _shrink_to_du(layer, d_pre, "gate_up")
    grad_hidden = None
    if need_hidden:
        d_rows, du1 = launches.grouped_gemm(
            layer, d_pre, "gate_up_proj", "gate_up", du1, transposed=False, save=need_A1
        )
        grad_hidden = launches.combine(layer, d_rows, weighted=False)
    last = [
        _sum_for_A(layer, "gate_up", du1, hidden_states) if need_A1 else None,
        _sum_for_B(layer, "down", saved.u2, grad_out) if need_B2 else None,
    ]
    if folded is None:
        grad_A1, grad_B2 = _sums(layer, *last)
    else:
        (grad_A1, grad_B2, grad_B1, grad_A2), grad_weights = _folded_sums(
            layer, last, dots, folded, wanted
        )
    extra_gate_up, extra_down = _extra_sums(
        layer, d_pre, hidden_states, grad_out, act, need_extra_gate_up, need_extra_down
    )
    grads = (
        grad_hidden, grad_weights, extra_gate_up, extra_down,
        _of_A(layer, "gate_up", grad_A1), _of_B(layer, "gate_up", grad_B1),
        _of_A(layer, "down", grad_A2), _of_B(layer, "down", grad_B2),
    )  # fmt: skip
    return [grad for grad in grads if grad is not None]


def _forward_maps(
    launches: LayerLaunches, tiles: Tiles, rows: int, weights: ExpertWeights, form: ExpertForm
) -> RequestedMaps:
    """Request the maps of every expert, and of every pair with an adapter."""
    expert_rows, adapter_rows = launches.tile_rows(tiles, rows, weights, form)
    num_base, modalities = weights.gate_up_proj.shape[0], weights.num_modalities
    return [
        (maps.by_expert(weights.num_experts, modalities), expert_rows),
        (maps.by_adapter(num_base, modalities), adapter_rows),
    ]


def _backward_maps(
    launches: LayerLaunches,
    tiles: Tiles,
    saved: Saved,
    weights: ExpertWeights,
    form: ExpertForm,
    frozen_extra: int | None,
) -> list[TileMap]:
    """Make the maps of the forward pass, and the long tiles of sums over rows.

    ``frozen_extra``: None where no gradient of added experts is needed.
    """
    rows, segment_offsets = saved.perm.numel(), saved.segment_offsets
    requested = _forward_maps(launches, tiles, rows, weights, form)
    pairs, _ = requested[1]
    chunk = launches.shared.chunk_rows(rows, _largest_sum(weights), segment_offsets.device)
    requested.append((pairs, chunk))
    num_base, segments = weights.gate_up_proj.shape[0], weights.num_modalities + 1
    groups = maps.by_added_expert(num_base, weights.num_extra, weights.num_modalities)
    added = (groups, max(1, rows))  # no chunks: programs enough, and partial sums would be large
    if frozen_extra == 0:
        requested.append(added)
    found = launches.shared.tile_maps(segment_offsets, rows, requested)
    if frozen_extra:
        # Groups without rows: no work, and zeros in the tensor of all added experts.
        first_trained = segment_offsets[(num_base + frozen_extra) * segments]
        without = torch.maximum(segment_offsets, first_trained)
        found += launches.shared.tile_maps(without, rows, [added])
    return found


def _largest_sum(weights: ExpertWeights) -> int:
    """Return the number of elements of an expert's largest adapter gradient."""
    (hidden, inter), (of_gate_up, of_down) = weights.sizes, weights.ranks
    return max(
        1, of_gate_up * max(hidden, weights.gate_up_proj.shape[1]), of_down * max(hidden, inter)
    )


def shrink_to_u(layer: Layer, left: Tensor, name: str, save: bool) -> Tensor:
    """Return u = left A^T (T*K, r); (T*K, 0) without adapters.

    A tensor that is saved for backward has zeros in rows without an adapter: an op's output is a
    function of its inputs.
    """
    lora_A, _, _ = layer.lora(name)
    if lora_A is None:
        return left.new_empty(layer.num_rows, 0)
    out = left.new_empty(layer.num_rows, lora_A.shape[2])
    by_token = name == "gate_up"
    return _shrink(layer, left, lora_A, out, by_token=by_token, rank_first=True, fill=save)


def _shrink_to_du(layer: Layer, dy: Tensor, name: str) -> Tensor | None:
    """Return du = dy B (T*K, r) in float32, written on adapted rows alone; None without adapters.

    ``dy`` are the rows of d_pre, or grad_out by token for the down projection.
    """
    _, lora_B, _ = layer.lora(name)
    if lora_B is None:
        return None
    out = torch.empty(layer.num_rows, lora_B.shape[3], dtype=torch.float32, device=dy.device)
    return _shrink(layer, dy, lora_B, out, by_token=name == "down", rank_first=False)


def _shrink(
    layer: Layer,
    left: Tensor,
    matrix: Tensor,
    out: Tensor,
    *,
    by_token: bool,
    rank_first: bool,
    fill: bool = False,
) -> Tensor:
    return layer.shared.shrink(
        Shrink(
            left=left,
            matrix=matrix,
            perm=layer.perm,
            tiles=layer.adapted_tiles,
            out=out,
            rank_first=rank_first,
            by_token=by_token,
            top_k=layer.top_k,
            num_base=layer.num_base,
            experts=matrix.shape[1],
            segments=layer.segments if fill else None,
        )
    )


def _first_sums(
    layer: Layer,
    u1: Tensor,
    d_pre: Tensor,
    du2: Tensor | None,
    act: Tensor,
    dots: Tensor | None,
    *,
    need_du: bool,
    need_B1: bool,
    need_A2: bool,
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """Return (dB1, dA2), du1 (T*K, r) in float32, and the sum of the parts ``dots``.

    du1 comes from dB1's pass over d_pre where that is cheaper.
    """
    lora_A, _, _ = layer.lora("gate_up")
    need_du = need_du and lora_A is not None
    together = need_du and need_B1 and layer.shared.gives_du(lora_A.shape[2], d_pre, layer.num_rows)
    problems = [
        _sum_for_B(layer, "gate_up", u1, d_pre, with_du=together) if need_B1 else None,
        _sum_for_A(layer, "down", du2, act) if need_A2 else None,
    ]
    found, dots = _wgrad(layer, problems, dots)
    sums, (du, _) = zip(*found, strict=True)
    if need_du and not together:
        du = _shrink_to_du(layer, d_pre, "gate_up")
    return sums, du, dots


def _folded_sums(
    layer: Layer,
    problems: Sequence[Wgrad | None],
    dots: Tensor | None,
    folded: Folded,
    wanted: Wanted,
) -> tuple[list[Tensor | None], Tensor | None]:
    """Return the sums of the problems, dB1 and dA2, and that of the parts ``dots``."""
    found, dots = _wgrad(layer, problems, dots, folded)
    sums = [sums for sums, _ in found]
    of_slots = iter(sums[len(problems) :])
    return [
        *sums[: len(problems)],
        *(next(of_slots) if is_wanted else None for is_wanted in (wanted.B1, wanted.A2)),
    ], dots


def _sums(layer: Layer, *problems: Wgrad | None) -> list[Tensor | None]:
    """Return the sums of each problem, all from one launch; None for None."""
    found, _ = _wgrad(layer, problems)
    return [sums for sums, _ in found]


def _wgrad(
    layer: Layer,
    problems: Sequence[Wgrad | None],
    dots: Tensor | None = None,
    folded: Folded | None = None,
) -> tuple[list[tuple[Tensor | None, Tensor | None]], Tensor | None]:
    """Launch ``wgrad`` for the problems that are not None, if there is anything to do.

    The results of what was folded come behind those of the problems.
    """
    present = [problem for problem in problems if problem is not None]
    if not present and dots is None and (folded is None or not folded.slots):
        return [(None, None) for _ in problems], None
    found, dots = layer.shared.wgrad(present, dots, layer.topk_weights.dtype, folded)
    results = iter(found)
    of_problems = [(None, None) if problem is None else next(results) for problem in problems]
    return [*of_problems, *results], dots


def _sum_for_B(layer: Layer, name: str, u: Tensor, dy: Tensor, *, with_du: bool = False) -> Wgrad:
    """Return the problem of dB, and of du = dy B if ``with_du``."""
    _, lora_B, _ = layer.lora(name)
    return _sum_for(
        layer,
        name,
        u,
        dy,
        right_by_token=name == "down",
        transposed=True,
        matrix=lora_B.flatten(0, 1) if with_du else None,
        tiles=layer.adapted_tiles,
    )


def _sum_for_A(layer: Layer, name: str, du: Tensor, left: Tensor) -> Wgrad:
    """Return the problem of dA, of du and hidden_states, or of du and the activation for "down"."""
    return _sum_for(layer, name, du, left, right_by_token=name == "gate_up", transposed=False)


def _sum_for(layer: Layer, name: str, skinny: Tensor, wide: Tensor, **options) -> Wgrad:
    """Return the problem of sums of (s w skinny)^T wide over each adapter's rows.

    Only the down projection's rows have the routing weight w.
    """
    return Wgrad(
        left=skinny,
        right=wide,
        perm=layer.perm,
        rows=layer.chunks,
        factors=layer.lora(name)[2],
        weights=layer.topk_weights if name == "down" else None,
        top_k=layer.top_k,
        **options,
    )


def _extra_sums(
    layer: Layer,
    d_pre: Tensor,
    hidden_states: Tensor,
    grad_out: Tensor,
    act: Tensor,
    need_gate_up: bool,
    need_down: bool,
) -> list[Tensor | None]:
    """Return the gradients of both weights of the added experts, from one launch."""
    if not (need_gate_up or need_down):
        return [None, None]
    common = {
        "perm": layer.perm,
        "rows": layer.added,
        "factors": torch.ones(1, dtype=torch.float32, device=d_pre.device),
        "top_k": layer.top_k,
        "transposed": False,
    }
    of_gate_up = Wgrad(left=d_pre, right=hidden_states, right_by_token=True, **common)
    of_down = Wgrad(
        left=grad_out, right=act, weights=layer.topk_weights, left_by_token=True, **common
    )
    return _sums(layer, of_gate_up if need_gate_up else None, of_down if need_down else None)


def _of_A(layer: Layer, name: str, sums: Tensor | None) -> Tensor | None:
    """Return dA from each pair's sums: (M, E, r, n), or (M, 1, r, n) where experts share A."""
    if sums is None:
        return None
    lora_A, _, _ = layer.lora(name)
    grad = sums.view(layer.weights.num_modalities, layer.num_base, *lora_A.shape[2:])
    return grad.sum(1, keepdim=True) if lora_A.shape[1] != layer.num_base else grad


def _of_B(layer: Layer, name: str, sums: Tensor | None) -> Tensor | None:
    """Return dB (M, E, n, r) from each pair's sums."""
    return None if sums is None else sums.view(layer.lora(name)[1].shape)
