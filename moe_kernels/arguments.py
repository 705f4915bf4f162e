"""Checks of what callers pass to public functions, before any work."""

import numbers
import operator
from typing import Any

from torch import Tensor


def as_integer(value: Any) -> int | None:
    """Convert an integer of any library to Python's; None for a bool or anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def integers(**named: Any) -> tuple[int, ...]:
    """Return integers of any library as Python's, which JSON can hold and torch takes as sizes.

    Raises:
        TypeError: one is no integer; the message has its name.
    """
    numbers = {name: as_integer(value) for name, value in named.items()}
    for name, number in numbers.items():
        if number is None:
            raise TypeError(f"{name} must be an integer; got {named[name]!r}")
    return tuple(numbers.values())


def floats(**named: Any) -> tuple[float, ...]:
    """Return numbers of any library as Python's floats.

    Raises:
        TypeError: one is no real number; the message has its name.
    """
    for name, value in named.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number; got {value!r}")
    return tuple(map(float, named.values()))


def tensors(shape: str, **named: Any) -> None:
    """Raise TypeError unless all are tensors or None.

    Args:
        shape: what they must be, for the message, such as "(B, S) of integers".
        **named: by the names in the message.
    """
    for name, value in named.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor {shape}; got {type(value).__name__}: make one of it by "
                "torch.as_tensor"
            )


def token_batches(name: str, batches: Any) -> None:
    """Raise TypeError or ValueError unless this is a sequence of token ids (B, S)."""
    if isinstance(batches, Tensor) and batches.ndim != 3:
        raise ValueError(
            f"{name} must be a list of tensors (B, S) of token ids; got one tensor "
            f"{tuple(batches.shape)}: put it into a list"
        )
    for ids in batches:
        tensors("(B, S) of token ids", **{f"each of {name}": ids})
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(f"{name} must be (B, S) token ids; got {ids.dtype} {tuple(ids.shape)}")
