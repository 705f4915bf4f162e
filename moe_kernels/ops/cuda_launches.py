"""Launches that several ops share, in the backend "cuda".

Native ops where supported, Triton's kernels otherwise. The choice depends only on shapes, dtypes
and the device.
"""

import torch
from torch import Tensor

from moe_kernels import _native
from moe_kernels.ops.cuda_tile_maps import tile_maps
from moe_kernels.ops.dispatch.cuda_impl import dispatch_with_maps
from moe_kernels.ops.triton_launches import (
    TRITON_SHARED,
    LowRank,
    Shrink,
    Wgrad,
    capability,
    du_parts_fit,
    shrink_to_du,
)

# Compute capabilities whose matrix instructions (wgmma, tcgen05) Triton's GEMMs use and the
# extension's do not, so Triton's are used on them. On an H100 Triton's are half as fast again
# (docs/kernels.md, note 5); 10.x has not been measured.
TRITON_FROM, TRITON_BELOW = 90, 120


def uses_triton_gemm(device: torch.device) -> bool:
    """Return whether the experts' GEMMs and the low-rank passes are Triton's on this device."""
    return TRITON_FROM <= capability(device) < TRITON_BELOW


def match_routing_weights(rows: Tensor, weights: Tensor) -> Tensor:
    """Return routing weights in a dtype that the kernels take: that of the rows, or float32."""
    return weights if weights.dtype == rows.dtype else weights.float()


def shrink(given: Shrink) -> Tensor:
    """See :func:`moe_kernels.ops.triton_launches.shrink`."""
    if uses_triton_gemm(given.left.device):
        return TRITON_SHARED.shrink(given)
    _native.ops().shrink(
        given.out,
        given.left,
        given.matrix,
        given.perm,
        given.tiles.tiles,
        given.tiles.groups.shape[1],
        given.num_base,
        given.experts,
        given.top_k,
        given.by_token,
        given.rank_first,
    )
    return given.out


def wgrad(given: Wgrad) -> tuple[Tensor, Tensor | None]:
    """See :func:`moe_kernels.ops.triton_launches.wgrad`."""
    if uses_triton_gemm(given.right.device):
        return TRITON_SHARED.wgrad(given)
    du, columns = None, _native.cuda_limit("COLUMNS_OF_PART")
    if given.matrix is not None and not du_parts_fit(given, columns):
        du, given = shrink_to_du(shrink, given), given._replace(matrix=None)
    weights = given.weights
    out, du_of_pass = _native.ops().wgrad(
        given.left,
        given.right,
        given.perm,
        given.rows.tiles,
        given.rows.groups,
        given.factors,
        None if weights is None else match_routing_weights(given.right, weights),
        given.matrix,
        given.rows.block,
        given.top_k,
        given.transposed,
        given.left_by_token,
        given.right_by_token,
    )
    return out, du if given.matrix is None else du_of_pass


def gives_du(rank: int, dy: Tensor) -> bool:
    """Return whether du comes with dB: not in float32, which has no matrix instructions for it."""
    if uses_triton_gemm(dy.device):
        return TRITON_SHARED.gives_du(rank, dy)
    return dy.dtype != torch.float32 and rank <= _native.cuda_limit("MAX_RANK_WITH_DU")


def add_low_rank(given: LowRank) -> None:
    """See :func:`moe_kernels.ops.triton_launches.add_low_rank`.

    Triton's is used for float32, and for rows that are not a multiple of 16 bytes.
    """
    if given.out.dtype == torch.float32 or given.out.shape[1] % 8:
        TRITON_SHARED.add_low_rank(given)
        return
    _native.ops().add_low_rank(
        given.out,
        given.u,
        given.matrix,
        given.scaling,
        given.perm,
        given.tiles.tiles,
        given.rank_last,
    )


CUDA_SHARED = TRITON_SHARED._replace(
    dispatch_with_maps=dispatch_with_maps,
    tile_maps=tile_maps,
    shrink=shrink,
    wgrad=wgrad,
    add_low_rank=add_low_rank,
    gives_du=gives_du,
)
