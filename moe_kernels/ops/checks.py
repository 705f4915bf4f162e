"""Argument checks shared by the ops. Only those of ids read values."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from moe_kernels import env
from moe_kernels.ops.dtypes import FLOATS
from moe_kernels.ops.gradients import PLAIN, in_transform, is_differentiated, is_plain

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


_MOST_KNOWN = 4096
_KNOWN: set[tuple] = set()  # layouts that have passed


def once(check: Callable, form: Hashable, *arguments: Any) -> bool:
    """Call a check that reads no values, unless plain tensors of the same layouts have passed it.

    Args:
        check: takes the form and the arguments, and raises.
        form: what the check depends on beside layouts.
        arguments: tensors, NamedTuples of tensors, and None. With others it is called every time.

    Returns:
        Whether all are plain (:func:`~moe_kernels.ops.gradients.is_plain`).
    """
    flat = []
    for argument in arguments:
        flat += argument if isinstance(argument, tuple) else (argument,)
    if not is_plain(*flat):
        check(form, *arguments)
        return False
    layouts = [
        t is not None and (t.is_nested or t.shape, t.dtype, t.device, t.layout, t.requires_grad)
        for t in flat
    ]
    key = (check, form, torch.is_grad_enabled(), *map(type, arguments), *layouts)
    if key not in _KNOWN:
        check(form, *arguments)
        if len(_KNOWN) >= _MOST_KNOWN:  # many batch sizes
            _KNOWN.clear()
        _KNOWN.add(key)
    return True


def tensors(**named: object) -> None:
    """Raise TypeError unless everything in ``named`` is a dense tensor."""
    for name, value in named.items():
        # type() before isinstance(), which is slow for tensors
        if type(value) not in PLAIN and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.layout is not torch.strided or value.is_nested:
            kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
            raise TypeError(
                f"{name} must be a dense tensor (torch.strided), got {kind}: convert it first, for "
                "example by to_dense(), or to_padded_tensor() of a nested one"
            )


def optional_tensors(**named: object) -> None:
    """Raise TypeError unless everything in ``named`` is a dense tensor or None."""
    tensors(**{name: value for name, value in named.items() if value is not None})


def ndim(name: str, tensor: Tensor, expected: int) -> None:
    """Raise ValueError unless ``tensor`` has ``expected`` dimensions."""
    if tensor.ndim != expected:
        raise ValueError(
            f"{name} must have {expected} dimensions, got {tensor.ndim}: {tuple(tensor.shape)}"
        )


def shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless ``tensor`` has the shape ``expected``."""
    if tensor.shape != expected:
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")


def dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless the dtype of ``tensor`` is one of ``allowed``."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name} must be {names}, got {tensor.dtype}")


def floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` has a dtype that the kernels compute in."""
    dtype(name, tensor, FLOATS)


def integer(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` is of an integer type."""
    dtype(name, tensor, _INTEGERS)


def device(name: str, tensor: Tensor, expected: torch.device) -> None:
    """Raise ValueError unless ``tensor`` is on ``expected``."""
    if tensor.device != expected:
        raise ValueError(f"{name} must be on {expected}, got {tensor.device}")


def contiguous(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless ``tensor`` is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, has strides {tensor.stride()}")


def frozen(name: str, tensor: Tensor | None, why: str) -> None:
    """Raise ValueError if a gradient would be expected for a tensor that never gets one."""
    if tensor is None or not torch.is_grad_enabled():
        return
    if in_transform():
        differentiated = is_differentiated(tensor)
        remedy = "leave it out of what torch.func differentiates"
    elif tensor.is_leaf:
        differentiated, remedy = tensor.requires_grad, f"call {name}.requires_grad_(False)"
    else:
        differentiated = tensor.requires_grad
        remedy = f"{name} was computed from a tensor that requires grad, so detach it"
    if differentiated:
        raise ValueError(f"{name} requires grad, but {why}: {remedy}")


def modality_range(modality_ids: Tensor, num_modalities: int) -> None:
    """Raise ValueError unless all ids are in -1..num_modalities. Synchronises with a GPU."""
    if modality_ids.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(modality_ids))
    if low < -1 or high > num_modalities:
        raise ValueError(
            f"modality_ids must be in -1..{num_modalities} (-1 padding, 0 the base modality, then "
            f"{num_modalities} added), got {low}..{high}"
        )


def index_range(name: str, indices: Tensor, size: int) -> None:
    """Raise ValueError unless all ``indices`` are in 0..size-1. Synchronises with a GPU."""
    if indices.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(indices))
    if low < 0 or high >= size:
        raise ValueError(f"{name} must be in 0..{size - 1}, got {low}..{high}")


def reads_values(device: torch.device) -> bool:
    """Return whether the values of tensors on ``device`` are checked.

    They are not on CUDA, where that makes the host wait, unless ``MOE_KERNELS_CHECK=1``.
    """
    return device.type == "cpu" or env.check_values()


def id_ranges(
    topk_ids: Tensor | None,
    num_experts: int,
    modality_ids: Tensor | None,
    num_modalities: int,
    backend: str,
) -> None:
    """Raise ValueError unless all ids are in range; None is not checked.

    Values are read where :func:`reads_values` says. The backend "cpu" checks modality ids itself as
    it sorts.
    """
    if not reads_values((modality_ids if topk_ids is None else topk_ids).device):
        return
    if topk_ids is not None:
        index_range("topk_ids", topk_ids, num_experts)
    if modality_ids is not None and backend != "cpu":
        modality_range(modality_ids, num_modalities)
