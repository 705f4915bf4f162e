"""``dispatch`` in Triton: one launch for a short batch, a counting sort in three for a long one.

A row's place is the number of rows that come before it. Counting them for every row takes work that
grows with the square of the rows, but a batch of decoding needs one small launch for it. A long
batch is sorted by ``triton_sort``, or by torch in eighteen launches where there are more than 4,094
pairs of an expert and a modality.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.ops.dispatch import reference, triton_sort
from moe_kernels.ops.dispatch.triton_sort import segments_of
from moe_kernels.ops.triton_launch import launch
from moe_kernels.ops.triton_tile_maps import RequestedMaps, TileMap, tile_maps

MAX_COUNTED = 4096  # rows: 16 million comparisons
BLOCKS = {"BLOCK": 32, "STEP": 128}  # rows of a program, and rows it looks at in one step


@triton.jit
def _sort_keys(
    topk_ids_ptr, modality_ids_ptr, rows, num_rows, num_experts, num_modalities,
    TOP_K: tl.constexpr, HAS_MODALITIES: tl.constexpr,
):  # fmt: skip
    """Return segment * num_rows + row: a stable order; rows that are not dispatched come last."""
    segment = segments_of(
        topk_ids_ptr, modality_ids_ptr, rows, num_rows, num_experts, num_modalities, TOP_K,
        HAS_MODALITIES,
    )  # fmt: skip
    return segment * num_rows + rows


@triton.jit(do_not_specialize=["num_rows", "num_experts", "num_modalities"])
def dispatch_kernel(
    topk_ids_ptr,  # (T, TOP_K)
    modality_ids_ptr,  # (T,)
    perm_ptr,  # (T * TOP_K,)
    inv_perm_ptr,  # (T * TOP_K,)
    tokens_ptr,  # (num_experts,)
    experts_ptr,  # (num_experts + 1,)
    segments_ptr,  # (num_experts * (num_modalities + 1) + 1,)
    num_rows,
    num_experts,
    num_modalities,
    TOP_K: tl.constexpr,
    HAS_MODALITIES: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Store the places of BLOCK rows; the last programs store the offsets of BLOCK segments."""
    row_programs = tl.cdiv(num_rows, BLOCK)
    of_rows = tl.program_id(0) < row_programs
    item = tl.where(of_rows, tl.program_id(0), tl.program_id(0) - row_programs) * BLOCK
    item += tl.arange(0, BLOCK)
    groups = num_modalities + 1
    own = _sort_keys(
        topk_ids_ptr, modality_ids_ptr, item, num_rows, num_experts, num_modalities, TOP_K,
        HAS_MODALITIES,
    )  # fmt: skip
    begin = tl.where(of_rows, own, item.to(tl.int64) * num_rows)
    end = (item + groups).to(tl.int64) * num_rows  # of the expert that begins with this segment
    before = tl.zeros((BLOCK,), dtype=tl.int64)
    inside = tl.zeros((BLOCK,), dtype=tl.int64)
    for start in range(0, num_rows, STEP):
        rows = start + tl.arange(0, STEP)
        key = _sort_keys(
            topk_ids_ptr, modality_ids_ptr, rows, num_rows, num_experts, num_modalities, TOP_K,
            HAS_MODALITIES,
        )[None, :]  # fmt: skip
        below = key < begin[:, None]
        before += tl.sum(below.to(tl.int32), axis=1)
        inside += tl.sum(((key < end[:, None]) & (below == 0)).to(tl.int32), axis=1)
    if of_rows:
        mask = item < num_rows
        tl.store(inv_perm_ptr + item, before, mask=mask)
        tl.store(perm_ptr + before, item, mask=mask)
    else:
        tl.store(segments_ptr + item, before, mask=item <= num_experts * groups)
        expert = item // groups
        first = item % groups == 0
        tl.store(experts_ptr + expert, before, mask=first & (expert <= num_experts))
        tl.store(tokens_ptr + expert, inside, mask=first & (expert < num_experts))


def dispatch(
    topk_ids: Tensor, num_experts: int, modality_ids: Tensor | None, num_modalities: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of ``Dispatch``, in order, for (T, K) and (T,) ids."""
    rows, num_segments = topk_ids.numel(), num_experts * (num_modalities + 1)
    is_short = 0 < rows <= MAX_COUNTED
    if not is_short and not triton_sort.supports(rows, num_experts, num_modalities):
        return reference.dispatch(topk_ids, num_experts, modality_ids, num_modalities)
    sizes = (rows, rows, num_experts, num_experts + 1, num_segments + 1)
    fields = tuple(torch.empty(n, dtype=torch.int64, device=topk_ids.device) for n in sizes)
    write = _count if is_short else triton_sort.sort
    write(topk_ids, num_experts, modality_ids, num_modalities, fields)
    return fields


def _count(
    topk_ids: Tensor,
    num_experts: int,
    modality_ids: Tensor | None,
    num_modalities: int,
    fields: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Write the fields of ``Dispatch``, in order, for (T, K) and (T,) ids, in one launch."""
    perm, inv_perm, tokens_per_expert, expert_offsets, segment_offsets = fields
    rows, offsets = topk_ids.numel(), segment_offsets.numel()
    launch(
        dispatch_kernel,
        (sum(-(-n // BLOCKS["BLOCK"]) for n in (rows, offsets)),),
        topk_ids_ptr=topk_ids,
        modality_ids_ptr=topk_ids if modality_ids is None else modality_ids,
        perm_ptr=perm,
        inv_perm_ptr=inv_perm,
        tokens_ptr=tokens_per_expert,
        experts_ptr=expert_offsets,
        segments_ptr=segment_offsets,
        num_rows=rows,
        num_experts=num_experts,
        num_modalities=num_modalities,
        TOP_K=topk_ids.shape[1],
        HAS_MODALITIES=modality_ids is not None,
        **BLOCKS,
    )


def dispatch_with_maps(
    topk_ids: Tensor,
    num_experts: int,
    modality_ids: Tensor | None,
    num_modalities: int,
    requested: RequestedMaps,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], list[TileMap]]:
    """Return the fields of :func:`dispatch`, and the requested tile maps."""
    fields = dispatch(topk_ids, num_experts, modality_ids, num_modalities)
    return fields, tile_maps(fields[-1], topk_ids.numel(), requested)
