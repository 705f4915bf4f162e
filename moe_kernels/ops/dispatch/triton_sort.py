"""A stable counting sort of routed rows in three Triton launches, without global atomics.

A row's place is the start of its segment, plus the rows of that segment in earlier blocks of rows,
plus those that come earlier in its own block. The first launch counts every block's rows of each
segment, the second adds the counts up over the blocks, the third finds each row's place. Rows that
are not dispatched form a last segment of their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.ops.triton_launch import launch, next_power_of_2

MAX_KEYS = 4095  # segments and the last one, which a program holds at once: more of them spill
BLOCKS = {"BLOCK": 256, "STEP": 16}  # rows of a program, and rows it looks at in one step
SCAN_BLOCKS = {"BLOCK": 128, "BLOCK_KEYS": 16}  # blocks of rows in one step, keys of a program


@triton.jit
def segments_of(
    topk_ids_ptr, modality_ids_ptr, rows, num_rows, num_experts, num_modalities,
    TOP_K: tl.constexpr, HAS_MODALITIES: tl.constexpr,
):  # fmt: skip
    """Return each row's segment in int64: one more than the last for rows that go nowhere."""
    mask = rows < num_rows
    expert = tl.load(topk_ids_ptr + rows, mask=mask, other=-1)
    modality = tl.zeros_like(expert)
    if HAS_MODALITIES:
        modality = tl.load(modality_ids_ptr + rows // TOP_K, mask=mask, other=-1)
    routed = (expert >= 0) & (expert < num_experts)
    routed = routed & (modality >= 0) & (modality <= num_modalities)
    groups = num_modalities + 1
    return tl.where(routed, expert * groups + modality, num_experts * groups)


@triton.jit(do_not_specialize=["num_rows", "num_experts", "num_modalities"])
def count_kernel(
    topk_ids_ptr,  # (T, TOP_K)
    modality_ids_ptr,  # (T,)
    counts_ptr,  # (blocks of rows, num_keys) int32
    num_rows,
    num_experts,
    num_modalities,
    TOP_K: tl.constexpr,
    HAS_MODALITIES: tl.constexpr,
    KEYS: tl.constexpr,  # more than num_keys
    BLOCK: tl.constexpr,
):
    """Store how many of a block's rows have each key."""
    num_keys = num_experts * (num_modalities + 1) + 1
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = segments_of(
        topk_ids_ptr, modality_ids_ptr, rows, num_rows, num_experts, num_modalities, TOP_K,
        HAS_MODALITIES,
    ).to(tl.int32)  # fmt: skip
    counts = tl.histogram(tl.where(rows < num_rows, key, KEYS - 1), KEYS)
    keys = tl.arange(0, KEYS)
    first = tl.program_id(0).to(tl.int64) * num_keys
    tl.store(counts_ptr + first + keys, counts, mask=keys < num_keys)


@triton.jit(do_not_specialize=["num_blocks", "num_keys"])
def scan_kernel(
    counts_ptr,  # (num_blocks, num_keys) int32
    totals_ptr,  # (num_keys,) int32
    num_blocks,
    num_keys,
    BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Replace each count by the rows of its key in earlier blocks; store the rows of each key."""
    keys = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    total = tl.zeros((BLOCK_KEYS,), dtype=tl.int32)
    for start in range(0, num_blocks, BLOCK):
        blocks = start + tl.arange(0, BLOCK)
        mask = (blocks < num_blocks)[:, None] & (keys < num_keys)[None, :]
        counts_ptrs = counts_ptr + blocks.to(tl.int64)[:, None] * num_keys + keys[None, :]
        counts = tl.load(counts_ptrs, mask=mask, other=0)
        before = tl.cumsum(counts, axis=0) - counts + total[None, :]
        tl.store(counts_ptrs, before, mask=mask)
        total += tl.sum(counts, axis=0)
    tl.store(totals_ptr + keys, total, mask=keys < num_keys)


@triton.jit(do_not_specialize=["num_rows", "num_experts", "num_modalities"])
def place_kernel(
    topk_ids_ptr,  # (T, TOP_K)
    modality_ids_ptr,  # (T,)
    before_ptr,  # (blocks of rows, num_keys) int32
    totals_ptr,  # (num_keys,) int32
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
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Store the places of a block's rows; the first program stores all offsets."""
    groups = num_modalities + 1
    num_segments = num_experts * groups
    keys = tl.arange(0, KEYS)
    totals = tl.load(totals_ptr + keys, mask=keys <= num_segments, other=0)
    starts = tl.cumsum(totals, axis=0) - totals
    if tl.program_id(0) == 0:
        tl.store(segments_ptr + keys, starts.to(tl.int64), mask=keys <= num_segments)
        expert = keys // groups
        first = keys % groups == 0
        tl.store(experts_ptr + expert, starts.to(tl.int64), mask=first & (expert <= num_experts))
        ends = tl.gather(starts, tl.minimum(keys + groups, num_segments), 0)
        inside = (ends - starts).to(tl.int64)
        tl.store(tokens_ptr + expert, inside, mask=first & (expert < num_experts))
    first_row = tl.program_id(0) * BLOCK
    rows = first_row + tl.arange(0, BLOCK)
    mask = rows < num_rows
    key = segments_of(
        topk_ids_ptr, modality_ids_ptr, rows, num_rows, num_experts, num_modalities, TOP_K,
        HAS_MODALITIES,
    ).to(tl.int32)  # fmt: skip
    before = before_ptr + tl.program_id(0).to(tl.int64) * (num_segments + 1)
    place = tl.gather(starts, key, 0) + tl.load(before + key, mask=mask, other=0)
    for start in range(0, BLOCK, STEP):
        others = first_row + start + tl.arange(0, STEP)
        key_of_others = segments_of(
            topk_ids_ptr, modality_ids_ptr, others, num_rows, num_experts, num_modalities, TOP_K,
            HAS_MODALITIES,
        ).to(tl.int32)  # fmt: skip
        same = key[:, None] == key_of_others[None, :]
        place += tl.sum((same & (others[None, :] < rows[:, None])).to(tl.int32), axis=1)
    tl.store(inv_perm_ptr + rows, place.to(tl.int64), mask=mask)
    tl.store(perm_ptr + place, rows.to(tl.int64), mask=mask)


def supports(num_rows: int, num_experts: int, num_modalities: int) -> bool:
    """Return whether :func:`sort` takes these sizes."""
    return 0 < num_rows < 2**31 and num_experts * (num_modalities + 1) + 1 <= MAX_KEYS


def sort(
    topk_ids: Tensor,
    num_experts: int,
    modality_ids: Tensor | None,
    num_modalities: int,
    fields: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Write the fields of ``Dispatch``, in order, for (T, K) and (T,) ids.

    The counts take num_rows * num_keys / 64 bytes: 132 KiB for 65,536 rows of 64 experts and one
    modality.
    """
    rows, num_keys = topk_ids.numel(), num_experts * (num_modalities + 1) + 1
    perm, inv_perm, tokens_per_expert, expert_offsets, segment_offsets = fields
    num_blocks = -(-rows // BLOCKS["BLOCK"])
    counts = torch.empty(num_blocks, num_keys, dtype=torch.int32, device=topk_ids.device)
    totals = torch.empty(num_keys, dtype=torch.int32, device=topk_ids.device)
    ids = {
        "topk_ids_ptr": topk_ids,
        "modality_ids_ptr": topk_ids if modality_ids is None else modality_ids,
        "num_rows": rows,
        "num_experts": num_experts,
        "num_modalities": num_modalities,
        "TOP_K": topk_ids.shape[1],
        "HAS_MODALITIES": modality_ids is not None,
        "KEYS": next_power_of_2(num_keys + 1),
    }
    launch(count_kernel, (num_blocks,), counts_ptr=counts, BLOCK=BLOCKS["BLOCK"], **ids)
    launch(
        scan_kernel,
        (-(-num_keys // SCAN_BLOCKS["BLOCK_KEYS"]),),
        counts_ptr=counts,
        totals_ptr=totals,
        num_blocks=num_blocks,
        num_keys=num_keys,
        **SCAN_BLOCKS,
    )
    launch(
        place_kernel,
        (num_blocks,),
        before_ptr=counts,
        totals_ptr=totals,
        perm_ptr=perm,
        inv_perm_ptr=inv_perm,
        tokens_ptr=tokens_per_expert,
        experts_ptr=expert_offsets,
        segments_ptr=segment_offsets,
        **ids,
        **BLOCKS,
    )
