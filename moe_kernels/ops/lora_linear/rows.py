"""Rows of a linear layer sorted by modality, as the backends of ``lora_linear`` take them."""

from typing import NamedTuple

from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops import checks


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


def dispatch_shapes(
    num_tokens: int, num_modalities: int, backend: str
) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the fields of :class:`LinearDispatch`.

    A backend whose kernels take rows in tiles has a function ``num_tiles``.
    """
    num_tiles = getattr(backends.implementation("lora_linear", backend), "num_tiles", None)
    maps = ((3, 0), (3, 0))
    if num_tiles is not None:
        maps = ((3, num_tiles(num_tokens, num_modalities)), (3, num_modalities))
    return (num_tokens,), (num_modalities + 2,), *maps


def check_dispatch_fits(
    dispatched: LinearDispatch, num_tokens: int, num_modalities: int, backend: str
) -> None:
    """Raise ValueError unless ``dispatched`` fits the tokens, the modalities and the backend.

    The backend "cpu" checks values itself. On CUDA ``MOE_KERNELS_CHECK=1`` asks for that.
    """
    shapes = dispatch_shapes(num_tokens, num_modalities, backend)
    for (name, tensor), shape in zip(dispatched._asdict().items(), shapes, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"dispatched.{name} must have shape {shape} for {num_tokens} tokens on backend "
                f"{backend!r}, got {tuple(tensor.shape)}: make it by linear_dispatch(modality_ids, "
                f"{num_modalities}, backend={backend!r})"
            )
    if backend == "cpu" or not checks.reads_values(dispatched.perm.device):
        return
    modality_of_tile, *bounds_of_tile = dispatched.tiles
    checks.index_range("dispatched.perm", dispatched.perm, num_tokens)
    checks.index_range("dispatched.segment_offsets", dispatched.segment_offsets, num_tokens + 1)
    checks.index_range("dispatched.tiles[0]", modality_of_tile, num_modalities)
    for bound in bounds_of_tile:
        checks.index_range("dispatched.tiles[1:]", bound, num_tokens + 1)
