"""Dtypes that the ops compute in, and what holds while they do."""

from contextlib import AbstractContextManager, nullcontext

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products of ``dtype`` are accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager:
    """No autocast inside: frozen weights must not be recast at every call."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def on_device(device: torch.device) -> AbstractContextManager:
    """Launches go to this device: Triton asks which is the current one, not where tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
