"""Sorting of routed rows by expert, then modality."""

from moe_kernels.ops.dispatch.api import Dispatch, dispatch

__all__ = ["Dispatch", "dispatch"]
