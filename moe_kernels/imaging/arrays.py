"""Tensors from what callers pass, whatever torch's default device and dtype are."""

import reprlib
from typing import Any

import torch
from torch import Tensor


def as_tensor(values: Any, name: str) -> Tensor:
    """Return a tensor as it is; make one on the CPU of a list, an array or a number.

    `torch.as_tensor` would move even tensors to the default device.

    Raises:
        TypeError: these are no numbers, or rows of several lengths; the error has this name.
    """
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor, an array or a list of numbers; got {reprlib.repr(values)}"
        ) from error
