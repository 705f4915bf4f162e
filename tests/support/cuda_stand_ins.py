"""CPU kernels in plain torch for the ops of the backend "cuda", written from their definitions."""

import torch
from support.host_kernels import tile_map
from torch import Tensor

from moe_kernels.ops.dispatch import reference

NAN = float("nan")


def tile_maps(
    segment_offsets: Tensor, num_rows: int, blocks: list[int], groups: list[int]
) -> list[Tensor]:
    # Rows behind the last segment are not dispatched.
    maps, offsets = [], [*segment_offsets.tolist(), num_rows]
    for index, block in enumerate(blocks):
        num, period, stride, offset, width = groups[5 * index : 5 * index + 5]
        firsts = [g % period * stride + g // period + offset for g in range(num)]
        bounds = [
            (offsets[first], offsets[min(first + width, len(offsets) - 1)]) for first in firsts
        ]
        if num:
            maps += tile_map(bounds, num_rows, block)
        else:
            maps += [segment_offsets.new_empty(3, 0), segment_offsets.new_empty(3, 0)]
    return maps


def dispatch_with_maps(
    topk_ids: Tensor, num_experts: int, modality_ids: Tensor | None, num_modalities: int,
    blocks: list[int], groups: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    fields = reference.dispatch(topk_ids, num_experts, modality_ids, num_modalities)
    return *fields, tile_maps(fields[-1], topk_ids.numel(), blocks, groups)


def combine(
    rows: Tensor, inv_perm: Tensor, num_rows: Tensor, weights: Tensor | None, num_tokens: int
) -> Tensor:
    dispatched = (inv_perm < num_rows).unsqueeze(1)
    slot_rows = torch.where(dispatched, rows[inv_perm].float(), 0.0)
    if weights is not None:
        slot_rows = torch.where(dispatched, slot_rows * weights.reshape(-1, 1).float(), 0.0)
    top_k = rows.shape[0] // max(1, num_tokens)
    return slot_rows.view(num_tokens, top_k, rows.shape[1]).sum(1).to(rows.dtype)


def shrink(
    out: Tensor, left: Tensor, matrix: Tensor, perm: Tensor, tiles: Tensor,
    segment_offsets: Tensor | None, num_pairs: int, num_base: int, experts: int, top_k: int,
    by_token: bool, rank_first: bool,
) -> None:  # fmt: skip
    if segment_offsets is not None:
        out.zero_()
    matrices = matrix.reshape(-1, experts, *matrix.shape[-2:]).to(left.dtype).float()
    for pair, first, end in tiles.T.tolist():
        rows = perm[first:end] // top_k if by_token else slice(first, end)
        pair_matrix = matrices[pair // num_base, min(pair % num_base, experts - 1)]
        product = left[rows].float() @ (pair_matrix.T if rank_first else pair_matrix)
        out[first:end] = product.to(out.dtype)


def wgrad(
    left: list[Tensor], right: list[Tensor], tiles: list[Tensor], groups: list[Tensor],
    factors: list[Tensor], weights: list[Tensor | None], matrix: Tensor | None,
    chunks: list[int], transposed: list[bool], left_by_token: list[bool],
    right_by_token: list[bool], perm: Tensor | None, dots: Tensor | None,
    dots_dtype: torch.dtype, top_k: int, folded: list[Tensor], segments: Tensor | None,
    num_base: int, modalities: int,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    lists = left, right, tiles, groups, factors, weights, chunks, transposed
    problems = zip(*lists, left_by_token, right_by_token, strict=True)
    sums = [sums_of(*problem, perm, top_k) for problem in problems]
    du = torch.empty(0, 0)
    if matrix is not None:
        rows = right[0][perm // top_k] if right_by_token[0] else right[0]
        du = torch.full((perm.numel(), left[0].shape[1]), float("nan"))
        for pair_matrix, (first, end) in zip(matrix, groups[0][:2].T.tolist(), strict=True):
            du[first:end] = rows[first:end].float() @ pair_matrix.to(rows.dtype).float()
    dots = torch.empty(0, top_k) if dots is None else dots.sum(0)
    for slots in folded:
        pairs = [(m, e) for m in range(modalities) for e in range(num_base)]
        sums.append(torch.stack([slots[slots_of(segments, modalities, *p)].sum(0) for p in pairs]))
    return sums, du, dots.to(dots_dtype)


def slots_of(segments: Tensor, modalities: int, modality: int, expert: int) -> slice:
    """Return the slots of the sums over a pair's rows, one for each tile of 128 of the expert's."""
    start, low, high = segments[expert * (modalities + 1) :][
        [0, modality + 1, modality + 2]
    ].tolist()
    first = low // 128 + 2 * (expert * modalities + modality)
    tiles = (high - 1 - start) // 128 - (low - start) // 128 + 1 if high > low else 0
    return slice(first, first + tiles)


def sums_of(
    left: Tensor, right: Tensor, tiles: Tensor, groups: Tensor, factors: Tensor,
    weights: Tensor | None, chunk: int, transposed: bool, left_by_token: bool,
    right_by_token: bool, perm: Tensor, top_k: int,
) -> Tensor:  # fmt: skip
    """Return the sums of a problem of ``wgrad``."""
    bounds = groups[:2].T.tolist()
    expected_tiles, expected_groups = tile_map(bounds, perm.numel(), chunk)
    assert torch.equal(tiles, expected_tiles) and torch.equal(groups, expected_groups)
    factors = factors.repeat_interleave(len(bounds) // factors.numel())
    sums = [torch.empty(0, left.shape[1], right.shape[1])]
    for (first, end), factor in zip(bounds, factors, strict=True):
        slots, rows = perm[first:end], slice(first, end)
        scaled = factor * left[slots // top_k if left_by_token else rows].float()
        if weights is not None:
            scaled = scaled * weights.reshape(-1)[slots, None].float()
        right_rows = right[slots // top_k if right_by_token else rows].float()
        sums.append((scaled.to(right.dtype).float().T @ right_rows)[None])
    sums = torch.cat(sums)
    return sums.mT.contiguous() if transposed else sums


def experts(
    left: Tensor, stack: Tensor, extra: Tensor | None, perm: Tensor, tiles: Tensor,
    segment_offsets: Tensor, u: Tensor | None, v: Tensor | None, scaling: Tensor | None,
    block_m: int, *, by_token: bool, transposed: bool,
) -> Tensor:  # fmt: skip
    """Return left W + s u V for every dispatched row, in float32, and NaN for all other rows."""
    weights = torch.cat([stack, *([] if extra is None else [extra])]).float()
    segments, groups = segment_offsets.tolist(), (segment_offsets.numel() - 1) // len(weights)
    bounds = list(zip(segments[::groups], segments[groups::groups], strict=False))
    bounds.append((segments[-1], perm.numel()))
    assert torch.equal(tiles, tile_map(bounds, perm.numel(), block_m)[0])
    rows = left[perm // (perm.numel() // max(1, len(left)))] if by_token else left
    weights = weights.mT if transposed else weights
    out = torch.full((perm.numel(), weights.shape[2]), float("nan"))
    for expert, (first, end) in enumerate(bounds[:-1]):
        out[first:end] = rows[first:end].float() @ weights[expert]
    if u is None:
        return out
    u = sum_of(u, left.dtype if transposed else torch.float32)
    v = v.mT if transposed else v
    for modality, adapted, matrix in adapters(v.to(left.dtype).float(), segments, len(stack)):
        out[adapted] += (scaling[modality] * u[adapted].float()).to(left.dtype).float() @ matrix
    return out


def sum_of(u: Tensor, dtype: torch.dtype) -> Tensor:
    """Return u, of which there may be parts."""
    return u.sum(0).to(dtype) if u.dim() == 3 else u


def adapters(stack: Tensor, segments: list[int], num_base: int):
    """Yield modality, rows and matrix of each pair with an adapter."""
    groups = len(stack) + 1
    for index in range(num_base * groups):
        expert, modality = divmod(index, groups)
        if modality:
            matrix = stack[modality - 1].expand(num_base, -1, -1)[expert]
            yield modality - 1, slice(segments[index], segments[index + 1]), matrix


def gate_up(*arguments: Tensor | int | bool | None) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, save, a = arguments
    left, stack, segments = arguments[0], arguments[1], arguments[5]
    pre_act = experts(*arguments, by_token=True, transposed=True).to(left.dtype)
    gate, up = pre_act.float().chunk(2, dim=1)
    act = (torch.nn.functional.silu(gate) * up).to(left.dtype)
    for tensor in (pre_act, act):
        tensor[segments[-1] :] = 0  # rows that are not dispatched
    parts = torch.full((2, len(act), a.shape[2]) if a is not None else (0, len(act), 0), NAN)
    if a is not None:
        for _, rows, matrix in adapters(a.to(left.dtype).float(), segments.tolist(), len(stack)):
            for part, half in zip(parts, (slice(8), slice(8, None)), strict=True):  # of the columns
                part[rows] = act[rows, half].float() @ matrix[:, half].T
    return pre_act if save else pre_act[:0].clone(), act, parts


def grouped_gemm(*arguments: Tensor | int | bool | None) -> tuple[Tensor, Tensor]:
    *arguments, transposed, save = arguments
    left, u = arguments[0], arguments[6]
    assert not save or u.dim() == 3
    out = experts(*arguments, by_token=False, transposed=transposed).to(left.dtype)
    dtype, rank = left.dtype if transposed else torch.float32, 0 if u is None else u.shape[-1]
    saved = torch.zeros(len(out) if save else 0, rank, dtype=dtype)
    if save:
        v, segments, stack = arguments[7], arguments[5].tolist(), arguments[1]
        for _, adapted, _ in adapters(v, segments, len(stack)):
            saved[adapted] = sum_of(u, dtype)[adapted]
    return out, saved


def act_backward(
    *arguments: Tensor | int | bool | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    *arguments, weights, pre_act, keep_adapted, keep_added, u1, b1, scaling, wanted = arguments
    left, perm, rows = arguments[0], arguments[3], int(arguments[5][-1])
    d_act = experts(*arguments, by_token=True, transposed=False)
    gate, up = pre_act.float().chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    act = (gate * sigmoid * up).to(left.dtype)
    weighted = d_act * weights.reshape(-1, 1)[perm].float()
    d_gate = weighted * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_pre = torch.cat([d_gate, weighted * gate * sigmoid], dim=1).to(left.dtype)
    of_warps = 2 if arguments[9] == 16 else 1
    parts = torch.zeros(-(-act.shape[1] // 128) * of_warps, perm.numel())  # per 128 columns
    for part, columns in enumerate(torch.arange(act.shape[1]).split(128)):
        dots = (d_act[:, columns] * act[:, columns].float()).sum(1)
        parts[part, perm[:rows]] = dots[:rows]
    folded = fold(d_pre, act, weights, *arguments[3:9], u1, b1, scaling, wanted)
    act = act if keep_adapted or keep_added else act[:0].clone()
    return d_pre, act, parts.view(len(parts), *weights.shape), folded


def fold(
    d_pre: Tensor, act: Tensor, weights: Tensor, perm: Tensor, tiles: Tensor, segments: Tensor,
    du2: Tensor | None, a2: Tensor | None, scaling2: Tensor | None, u1: Tensor | None,
    b1: Tensor | None, scaling1: Tensor | None, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Return du1 in parts, and dB1 and dA2 in slots of tiles of 128 rows; NaN elsewhere."""
    if u1 is None:
        rank = 0 if du2 is None else du2.shape[1]
        sizes = (len(perm), 0), (d_pre.shape[1], 0), (rank, act.shape[1])
        return [torch.empty(0, *size) for size in sizes]
    modalities, experts, width, rank = b1.shape
    inter, nan = width // 2, float("nan")
    slots = len(perm) // 128 + 2 * modalities * experts
    du1 = torch.full((-(-inter // 128), len(perm), rank), nan)
    d_b1, d_a2 = (
        torch.full((slots, width, rank), nan),
        torch.full((slots, du2.shape[1], inter), nan),
    )
    for modality in range(modalities):
        for expert in range(experts):
            of_expert = segments[expert * (modalities + 1) :]
            start, low, high = of_expert[[0, modality + 1, modality + 2]].tolist()
            matrix = b1[modality, expert].to(d_pre.dtype).float().unflatten(0, (2, inter))
            by_half = d_pre[low:high].float().unflatten(1, (2, inter))
            for part, columns in enumerate(torch.arange(inter).split(128)):
                du1[part, low:high] = torch.einsum(
                    "rhc,hcn->rn", by_half[:, :, columns], matrix[:, columns]
                )
            place = slots_of(segments, modalities, modality, expert)
            for slot in range(place.start, place.stop):
                tile = (low - start) // 128 + slot - place.start
                rows = slice(max(low, start + 128 * tile), min(high, start + 128 * tile + 128))
                left = (scaling1[modality] * u1[rows].float()).to(d_pre.dtype).float()
                d_b1[slot] = d_pre[rows].float().T @ left
                factor = scaling2[modality] * weights.reshape(-1)[perm[rows]].float()
                left = (factor[:, None] * du2[rows]).to(d_pre.dtype).float()
                d_a2[slot] = left.T @ act[rows].float()
    return [
        t if is_wanted else t[:0] for t, is_wanted in zip((du1, d_b1, d_a2), wanted, strict=True)
    ]


def add_low_rank(
    out: Tensor, u: Tensor, v: Tensor, scaling: Tensor, perm: Tensor, tiles: Tensor,
    rank_last: bool,
) -> None:  # fmt: skip
    v = (v.mT if rank_last else v).to(out.dtype).float()
    for modality, first, end in tiles.T.tolist():
        scaled = (scaling[modality] * u[first:end].float()).to(out.dtype).float()
        tokens = perm[first:end]
        out[tokens] = (out[tokens].float() + scaled @ v[modality]).to(out.dtype)


def register() -> torch.library.Library:
    """Register these kernels for the CPU; they stay registered while the returned library lives."""
    library = torch.library.Library("moe_kernels_native", "IMPL")
    for function in (
        dispatch_with_maps, tile_maps, combine, shrink, wgrad, gate_up, grouped_gemm, act_backward,
        add_low_rank,
    ):  # fmt: skip
        library.impl(function.__name__, function, "CPU")
    return library
