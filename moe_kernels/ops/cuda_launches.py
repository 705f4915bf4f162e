"""Launches that several ops share, in the backend "cuda".

Native ops where supported, Triton's kernels otherwise. The choice depends only on shapes, dtypes
and the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels import _native, env
from moe_kernels.ops.cuda_tile_maps import tile_maps
from moe_kernels.ops.dispatch.cuda_impl import dispatch_with_maps
from moe_kernels.ops.triton_launches import (
    TRITON_SHARED,
    Folded,
    LowRank,
    Shrink,
    Wgrad,
    capability,
)

# Compute capabilities on which the low-rank passes are Triton's: its matrix instructions are wgmma
# and tcgen05 there, the extension's are not (docs/kernels.md, note 5). 10.x has not been measured.
TRITON_FROM, TRITON_BELOW = 90, 120
ENGINE = 90  # compute capability of the engine: wgmma exists on this one alone


def has_engine(device: torch.device) -> bool:
    """Return whether the experts' GEMMs are the extension's on this device.

    They have not yet run on a GPU, so the environment must ask for them (``MOE_KERNELS_ENGINE``).

    Raises:
        RuntimeError: it asks, but the extension was built without them.
    """
    if not env.engine() or capability(device) != ENGINE:
        return False
    if not _native.has_engine():
        raise RuntimeError(
            "MOE_KERNELS_ENGINE=1 asks for the engine of sm_90, which this extension was built "
            'without: build it again with "9.0a" in TORCH_CUDA_ARCH_LIST, or unset the variable'
        )
    return True


def uses_triton_passes(device: torch.device) -> bool:
    """Return whether the low-rank passes are Triton's on this device."""
    return TRITON_FROM <= capability(device) < TRITON_BELOW and not has_engine(device)


def match_routing_weights(rows: Tensor, weights: Tensor) -> Tensor:
    """Return routing weights in a dtype that the kernels take: that of the rows, or float32."""
    return weights if weights.dtype == rows.dtype else weights.float()


def shrink(args: Shrink) -> Tensor:
    """See :func:`moe_kernels.ops.triton_launches.shrink`."""
    if uses_triton_passes(args.left.device):
        return TRITON_SHARED.shrink(args)
    _native.ops().shrink(
        args.out,
        args.left,
        args.matrix,
        args.perm,
        args.tiles.tiles,
        args.segments,
        args.tiles.groups.shape[1],
        args.num_base,
        args.experts,
        args.top_k,
        args.by_token,
        args.rank_first,
    )
    return args.out


def wgrad(
    problems: Sequence[Wgrad],
    dots: Tensor | None = None,
    dots_dtype: torch.dtype = torch.float32,
    folded: Folded | None = None,
) -> tuple[list[tuple[Tensor, Tensor | None]], Tensor | None]:
    """See :func:`moe_kernels.ops.triton_launches.wgrad`; two launches do all."""
    first = problems[0] if problems else folded
    perm = None if first is None else first.perm
    if uses_triton_passes((dots if perm is None else perm).device):
        return TRITON_SHARED.wgrad(problems, dots, dots_dtype)
    matrix = problems[0].matrix if problems else None
    sums, du, sum_of_dots = _native.ops().wgrad(
        [args.left for args in problems],
        [args.right for args in problems],
        [args.rows.tiles for args in problems],
        [args.rows.groups for args in problems],
        [args.factors for args in problems],
        [_weights(args) for args in problems],
        matrix,
        [args.rows.block for args in problems],
        [args.transposed for args in problems],
        [args.left_by_token for args in problems],
        [args.right_by_token for args in problems],
        perm,
        dots,
        dots_dtype if dots_dtype in (torch.float16, torch.bfloat16) else torch.float32,
        problems[0].top_k if problems else dots.shape[2] if dots is not None else 1,
        *(([], None, 0, 0) if folded is None else folded[1:2] + folded[3:]),
    )
    dus = [None if matrix is None else du, *[None] * (len(sums) - 1)]
    found = list(zip(sums, dus, strict=False))
    return found, None if dots is None else sum_of_dots


def _weights(args: Wgrad) -> Tensor | None:
    return None if args.weights is None else match_routing_weights(args.right, args.weights)


def gives_du(rank: int, dy: Tensor, num_rows: int) -> bool:
    """Return whether du comes with dB: not in float32, which has no matrix instructions for it."""
    if uses_triton_passes(dy.device):
        return TRITON_SHARED.gives_du(rank, dy, num_rows)
    return dy.dtype != torch.float32 and _native.gives_du(rank, dy.shape[1], num_rows)


def chunk_rows(num_rows: int, size: int, device: torch.device) -> int:
    """See :func:`moe_kernels.ops.triton_launches.chunk_rows`."""
    if uses_triton_passes(device):
        return TRITON_SHARED.chunk_rows(num_rows, size, device)
    return _native.chunk_rows(num_rows, size)


def add_low_rank(args: LowRank) -> None:
    """See :func:`moe_kernels.ops.triton_launches.add_low_rank`.

    Triton's is used for float32, and for rows that are not a multiple of 16 bytes.
    """
    if args.out.dtype == torch.float32 or args.out.shape[1] % 8:
        TRITON_SHARED.add_low_rank(args)
        return
    _native.ops().add_low_rank(
        args.out,
        args.u,
        args.matrix,
        args.scaling,
        args.perm,
        args.tiles.tiles,
        args.rank_last,
    )


CUDA_SHARED = TRITON_SHARED._replace(
    dispatch_with_maps=dispatch_with_maps,
    tile_maps=tile_maps,
    shrink=shrink,
    wgrad=wgrad,
    add_low_rank=add_low_rank,
    gives_du=gives_du,
    chunk_rows=chunk_rows,
)
