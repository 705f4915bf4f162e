"""Dtypes that the ops compute in, and contexts for computing."""

from contextlib import AbstractContextManager, nullcontext

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of ``dtype`` are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Turn autocast off: frozen weights must not be cast again at every call."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def on_device(device: torch.device) -> AbstractContextManager:
    """Make ``device`` the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
