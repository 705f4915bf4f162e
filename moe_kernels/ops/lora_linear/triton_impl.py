"""The low-rank term of ``lora_linear`` in Triton: adapted rows alone, no float atomics."""

import torch
from torch import Tensor

from moe_kernels.ops import triton_kernels as kernels
from moe_kernels.ops import triton_tile_maps as maps
from moe_kernels.ops.triton_tile_maps import TileMap

BLOCK_M, BLOCK_N, BLOCK_K = 32, 128, 64


def forward(
    out: Tensor,
    hidden_states: Tensor,
    perm: Tensor,
    segment_offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    save_for_backward: bool,
) -> Tensor:
    """Add s (x A^T) B^T to ``out`` (T, out) in place; returns u = x A^T, (T, r) or (0, r)."""
    kernels.check_dtype(hidden_states.dtype)
    tiles = _tiles(perm, segment_offsets, BLOCK_M)
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    new = hidden_states.new_zeros if save_for_backward else hidden_states.new_empty
    u = new(perm.numel(), lora_A.shape[1])
    _project(hidden_states, lora_A, perm, tiles, u, (1, lora_A.shape[2]))
    _add(u, lora_B, scaling, perm, tiles, out, (1, lora_B.shape[2]))
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
) -> list[Tensor]:
    """Add s (dy B) A to ``grad_hidden`` in place; returns those of dA, dB that are needed."""
    tiles = _tiles(perm, segment_offsets, BLOCK_M)
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    need_A, need_B = needs
    need_du = grad_hidden is not None or need_A
    chunks = _tiles(perm, segment_offsets, maps.chunk_rows(perm.numel()))
    scaling = scaling.float()
    together = need_du and need_B and lora_A.shape[1] <= kernels.MAX_PROJECTED
    if need_B:
        matrix = lora_B if together else None
        grad_B, parts = _outer(u, grad_out, perm, chunks, scaling, transposed=True, matrix=matrix)
    if together:
        du = kernels.sum_parts(parts, tiles)
    elif need_du:
        du = torch.empty(perm.numel(), lora_A.shape[1], dtype=torch.float32, device=perm.device)
        _project(grad_out, lora_B, perm, tiles, du, (lora_A.shape[1], 1))
    if grad_hidden is not None:
        _add(du, lora_A, scaling, perm, tiles, grad_hidden, (lora_A.shape[2], 1))
    grads = []
    if need_A:
        grads += _outer(du, hidden_states, perm, chunks, scaling, transposed=False)[:1]
    if need_B:
        grads.append(grad_B)
    return grads


def _tiles(perm: Tensor, segment_offsets: Tensor, block: int) -> TileMap:
    num_modalities = segment_offsets.numel() - 2
    return maps.tile_map(segment_offsets, maps.by_adapter(1, num_modalities), perm.numel(), block)


def _project(left: Tensor, matrix: Tensor, perm, tiles, out: Tensor, strides) -> None:
    kernels.project(
        left, matrix, perm, tiles, out, strides=strides, top_k=1, by_token=True, num_base=1,
        experts=1, block_k=BLOCK_K,
    )  # fmt: skip


def _add(u: Tensor, matrix: Tensor, scaling: Tensor, perm, tiles, out: Tensor, strides) -> None:
    """out += s u matrix on adapted rows; ``strides`` of matrix along r and the columns of out."""
    rank, width = u.shape[1], out.shape[1]
    num_tiles = tiles.num_tiles
    if num_tiles and perm.numel():
        kernels.add_low_rank_kernel[(num_tiles, -(-width // BLOCK_N))](
            u, matrix, scaling.float(), perm, tiles.tiles, out, num_tiles, width, *strides,
            RANK=rank, BLOCK_R=kernels.STEP_R, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )  # fmt: skip


def _outer(left: Tensor, right: Tensor, perm, chunks, scaling, **options):
    return kernels.outer(
        left, right, perm, chunks, scaling, top_k=1, right_by_token=True, **options
    )
