"""Tensors from what callers pass, whatever torch's default device and dtype are."""

from typing import Any

import torch
from torch import Tensor


def as_tensor(values: Any) -> Tensor:
    """Return a tensor as it is; make one on the CPU of a list, an array or a number.

    `torch.as_tensor` would move even tensors to the default device.
    """
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
