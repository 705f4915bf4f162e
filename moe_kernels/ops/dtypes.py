"""Dtypes that the ops compute in."""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products of ``dtype`` are accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
