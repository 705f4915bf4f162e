"""The low-rank term of ``lora_linear`` on a GPU, for adapted rows alone and without float atomics.

The launches are Triton's, or those of another backend's table.
"""

import torch
from torch import Tensor

from moe_kernels.ops import triton_tile_maps as maps
from moe_kernels.ops.lora_linear.rows import LinearDispatch
from moe_kernels.ops.lora_weights import LoraWeights
from moe_kernels.ops.triton_launches import (
    ADAPTER_ROWS,
    TRITON_SHARED,
    LowRank,
    SharedLaunches,
    Shrink,
    Wgrad,
    check_dtype,
)
from moe_kernels.ops.triton_tile_maps import RequestedMaps, TileMap

BLOCK_M, BLOCK_N = ADAPTER_ROWS, 128


def num_tiles(num_tokens: int, num_modalities: int) -> int:
    """Return how many tiles :func:`dispatch` makes."""
    return maps.most_tiles(num_tokens, num_modalities, BLOCK_M)


def dispatch(
    modality_ids: Tensor, num_modalities: int, *, launches: SharedLaunches = TRITON_SHARED
) -> LinearDispatch:
    """Sort the rows of ``modality_ids`` (T,) by modality, and cut adapted rows into tiles."""
    topk_ids = torch.zeros_like(modality_ids)[:, None]
    requested = _adapter_maps(num_modalities, BLOCK_M)
    (perm, _, _, _, segment_offsets), (tiles,) = launches.dispatch_with_maps(
        topk_ids, 1, modality_ids, num_modalities, requested
    )
    return LinearDispatch(perm, segment_offsets, tiles.tiles, tiles.groups)


def forward(
    out: Tensor,
    hidden_states: Tensor,
    dispatched: LinearDispatch,
    lora: LoraWeights,
    save_for_backward: bool,
    *,
    launches: SharedLaunches = TRITON_SHARED,
) -> Tensor:
    """Add s (x A^T) B^T to ``out`` (T, out) in place; return u = x A^T, (T, r) or (0, r)."""
    check_dtype(hidden_states.dtype)
    lora_A, lora_B, scaling = lora.for_kernels()
    perm = dispatched.perm
    tiles = TileMap(dispatched.tiles, dispatched.groups, perm.numel(), BLOCK_M)
    u = hidden_states.new_empty(perm.numel(), lora_A.shape[1])
    segments = dispatched.segment_offsets if save_for_backward else None
    _shrink(launches, hidden_states, lora_A, perm, tiles, u, rank_first=True, segments=segments)
    launches.add_low_rank(
        LowRank(u, lora_B, scaling, perm, tiles, out, rank_last=True, block_n=BLOCK_N)
    )
    return u if save_for_backward else u.new_empty(0, u.shape[1])


def backward(
    grad_out: Tensor,
    hidden_states: Tensor,
    u: Tensor,
    perm: Tensor,
    segment_offsets: Tensor,
    lora: LoraWeights,
    grad_hidden: Tensor | None,
    needs: list[bool],
    *,
    launches: SharedLaunches = TRITON_SHARED,
) -> list[Tensor]:
    """Add s (dy B) A to ``grad_hidden`` in place; return those of dA and dB that are needed."""
    lora_A, lora_B, scaling = lora.for_kernels()
    chunk = launches.chunk_rows(perm.numel(), max(lora_A.numel(), lora_B.numel()), perm.device)
    tiles, chunks = launches.tile_maps(
        segment_offsets, perm.numel(), _adapter_maps(segment_offsets.numel() - 2, BLOCK_M, chunk)
    )
    need_A, need_B = needs
    need_du = grad_hidden is not None or need_A
    together = need_du and need_B and launches.gives_du(lora_A.shape[1], grad_out, perm.numel())
    rows = {"perm": perm, "rows": chunks, "factors": scaling, "top_k": 1, "right_by_token": True}
    of_B = Wgrad(
        left=u, right=grad_out, transposed=True, matrix=lora_B if together else None, tiles=tiles,
        **rows,
    )  # fmt: skip
    problems = {"B": of_B} if need_B else {}
    grads, du = {}, None
    if together:
        [(grads["B"], du)], _ = launches.wgrad([problems.pop("B")])
    elif need_du:
        du = torch.empty(perm.numel(), lora_A.shape[1], dtype=torch.float32, device=perm.device)
        _shrink(launches, grad_out, lora_B, perm, tiles, du, rank_first=False)
    if grad_hidden is not None:
        launches.add_low_rank(
            LowRank(du, lora_A, scaling, perm, tiles, grad_hidden, rank_last=False, block_n=BLOCK_N)
        )
    if need_A:
        problems["A"] = Wgrad(left=du, right=hidden_states, transposed=False, **rows)
    if problems:
        sums, _ = launches.wgrad([*problems.values()])
        grads |= {name: grad for name, (grad, _) in zip(problems, sums, strict=True)}
    return [grads[name] for name in ("A", "B") if name in grads]


def _adapter_maps(num_modalities: int, *blocks: int) -> RequestedMaps:
    return [(maps.by_adapter(1, num_modalities), block) for block in blocks]


def _shrink(
    launches: SharedLaunches,
    left: Tensor,
    matrix: Tensor,
    perm: Tensor,
    tiles: TileMap,
    out: Tensor,
    *,
    rank_first: bool,
    segments: Tensor | None = None,
) -> None:
    launches.shrink(
        Shrink(
            left=left,
            matrix=matrix,
            perm=perm,
            tiles=tiles,
            out=out,
            rank_first=rank_first,
            by_token=True,
            top_k=1,
            num_base=1,
            experts=1,
            segments=segments,
        )
    )
