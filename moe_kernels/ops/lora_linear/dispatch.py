"""Rows of a linear layer sorted by modality: the registered op ``moe_kernels::linear_dispatch``.

The rows depend on the modality ids alone, so that all adapted linear layers that see the same
tokens can share them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops import checks
from moe_kernels.ops.dtypes import on_device
from moe_kernels.ops.gradients import is_plain


class LinearDispatch(NamedTuple):
    """Rows of a linear layer sorted by modality, for one backend. All tensors are int64.

    Attributes:
        perm: (T,), the token at each sorted position; padding at the tail.
        segment_offsets: (M+2,), first sorted position of each modality, then the end of the last.
        tiles: (3, n), tiles of adapted rows, for the kernels of a GPU; else no columns.
        groups: (3, M), the adapted rows of each modality, likewise.
    """

    perm: Tensor
    segment_offsets: Tensor
    tiles: Tensor
    groups: Tensor


def linear_dispatch(modality_ids: Tensor, num_modalities: int, *, backend: str) -> LinearDispatch:
    """Sort the rows of a linear layer by modality.

    Args:
        modality_ids: (T,) int64, -1..M. On the CPU another value raises; on CUDA such a row gets no
            update, unless ``MOE_KERNELS_CHECK=1`` asks for the check.
        num_modalities: M.
        backend: a name that :func:`moe_kernels.backends.select` returned.

    Raises:
        ValueError: an id out of range.
    """
    plain = is_plain(modality_ids)
    compute = _linear_dispatch if plain else torch.ops.moe_kernels.linear_dispatch
    return LinearDispatch(*compute(modality_ids, num_modalities, backend))


def check_linear_dispatch(
    dispatched: LinearDispatch, num_tokens: int, num_modalities: int, backend: str
) -> None:
    """Raise ValueError unless ``dispatched`` fits the tokens, the modalities and the backend."""
    shapes = _shapes(num_tokens, num_modalities, backend)
    for (name, tensor), shape in zip(dispatched._asdict().items(), shapes, strict=True):
        checks.shape(f"dispatched.{name}", tensor, shape)


def _shapes(num_tokens: int, num_modalities: int, backend: str) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the fields of :class:`LinearDispatch`."""
    implementation = backends.implementation("lora_linear", backend)
    num_tiles = implementation.num_tiles(num_tokens, num_modalities)
    maps = ((3, 0), (3, 0)) if num_tiles is None else ((3, num_tiles), (3, num_modalities))
    return (num_tokens,), (num_modalities + 2,), *maps


def _linear_dispatch(
    modality_ids: Tensor, num_modalities: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of :class:`LinearDispatch`."""
    checks.id_ranges(None, 0, modality_ids, num_modalities, backend)
    with on_device(modality_ids.device):
        return tuple(
            backends.implementation("lora_linear", backend).dispatch(
                modality_ids.contiguous(), num_modalities
            )
        )


linear_dispatch_op = torch.library.custom_op(
    "moe_kernels::linear_dispatch", _linear_dispatch, mutates_args=()
)


@linear_dispatch_op.register_fake
def _(modality_ids, num_modalities, backend):
    shapes = _shapes(modality_ids.shape[0], num_modalities, backend)
    return tuple(modality_ids.new_empty(shape) for shape in shapes)
