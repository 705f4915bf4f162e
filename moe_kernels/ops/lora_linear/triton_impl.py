"""The low-rank term of ``lora_linear`` on a GPU: adapted rows alone, no float atomics. The kernels
are Triton's, or those that another backend gives.
"""

import torch
from torch import Tensor

from moe_kernels.ops import triton_tile_maps as maps
from moe_kernels.ops.triton_kernels import TRITON_SHARED, SharedLaunches, check_dtype
from moe_kernels.ops.triton_tile_maps import Groups, TileMap

BLOCK_M, BLOCK_N, BLOCK_K = 32, 128, 64


def forward_maps(num_modalities: int) -> list[tuple[Groups, int]]:
    """The tile map that ``forward`` takes: of adapted rows."""
    return _of_adapters(num_modalities, BLOCK_M)


def forward(
    out: Tensor,
    hidden_states: Tensor,
    perm: Tensor,
    segment_offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    save_for_backward: bool,
    tiles: TileMap,
    *,
    launches: SharedLaunches = TRITON_SHARED,
) -> Tensor:
    """Add s (x A^T) B^T to ``out`` (T, out) in place; returns u = x A^T, (T, r) or (0, r)."""
    check_dtype(hidden_states.dtype)
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    new = hidden_states.new_zeros if save_for_backward else hidden_states.new_empty
    u = new(perm.numel(), lora_A.shape[1])
    _shrink(launches, hidden_states, lora_A, perm, tiles, u, rank_first=True)
    scaling = scaling.float().contiguous()
    launches.add_low_rank(u, lora_B, scaling, perm, tiles, out, rank_last=True, block_n=BLOCK_N)
    return u if save_for_backward else u.new_empty(0, u.shape[1])


def backward(
    grad_out: Tensor,
    hidden_states: Tensor,
    u: Tensor,
    perm: Tensor,
    segment_offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    grad_hidden: Tensor | None,
    needs: list[bool],
    *,
    launches: SharedLaunches = TRITON_SHARED,
) -> list[Tensor]:
    """Add s (dy B) A to ``grad_hidden`` in place; returns those of dA, dB that are needed."""
    chunk = maps.chunk_rows(perm.numel(), max(lora_A.numel(), lora_B.numel()))
    tiles, chunks = launches.tile_maps(
        segment_offsets, perm.numel(), _of_adapters(segment_offsets.numel() - 2, BLOCK_M, chunk)
    )
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    need_A, need_B = needs
    need_du = grad_hidden is not None or need_A
    scaling = scaling.float().contiguous()
    together = need_du and need_B and launches.gives_du(lora_A.shape[1], grad_out)
    if need_B:
        matrix = lora_B if together else None
        grad_B, du = _wgrad(
            launches, u, grad_out, perm, chunks, scaling, transposed=True, matrix=matrix,
            tiles=tiles,
        )  # fmt: skip
    if need_du and not together:
        du = torch.empty(perm.numel(), lora_A.shape[1], dtype=torch.float32, device=perm.device)
        _shrink(launches, grad_out, lora_B, perm, tiles, du, rank_first=False)
    if grad_hidden is not None:
        launches.add_low_rank(
            du, lora_A, scaling, perm, tiles, grad_hidden, rank_last=False, block_n=BLOCK_N
        )
    grads = []
    if need_A:
        grads += _wgrad(launches, du, hidden_states, perm, chunks, scaling, transposed=False)[:1]
    if need_B:
        grads.append(grad_B)
    return grads


def _of_adapters(num_modalities: int, *blocks: int) -> list[tuple[Groups, int]]:
    return [(maps.by_adapter(1, num_modalities), block) for block in blocks]


def _shrink(launches, left: Tensor, matrix: Tensor, perm, tiles, out: Tensor, *, rank_first):
    launches.shrink(
        left, matrix, perm, tiles, out, rank_first=rank_first, top_k=1, by_token=True, num_base=1,
        experts=1, block_k=BLOCK_K,
    )  # fmt: skip


def _wgrad(launches, left: Tensor, right: Tensor, perm, chunks, scaling, **options):
    return launches.wgrad(
        left, right, perm, chunks, scaling, top_k=1, right_by_token=True, **options
    )
