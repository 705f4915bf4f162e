"""Memory above the inputs, measured and by formula."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lib.cases import Case

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or the profiler reports its start on stderr


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """Return the most bytes that torch's allocator held during ``function`` above those before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    peak = held = 0
    for change in _allocations(profiler):
        held += change
        peak = max(peak, held)
    return peak


def _allocations(profiler: profile) -> Iterable[int]:
    """Bytes of each allocation (positive) and release (negative), in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]


def saved_bytes(forward: Callable[[], Tensor], inputs: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for backward: each storage once, without those of ``inputs``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()  # alive until the sum is taken, so that no address is reused
    total = sum(storages.values())
    del out
    return total


def saved_formula(provider: str, case: Case) -> int | None:
    """Bytes that ``provider`` must keep for backward in tensors of T * K rows, if known.

    Ours: the pre-activation (2I), u1 and u2 (r each), and the dispatch (two int64). Split LoRA: x
    gathered (H), the pre-activation (2I), silu(gate) and the activation (I each), the expert's
    output (H), u1 and u2 (r each), the mask, and two int64 of indices.
    """
    shape = case.shape
    widths = {
        "ours": 2 * shape.I + 2 * shape.r,
        "split": 2 * shape.H + 4 * shape.I + 2 * shape.r + 1,
    }
    width = widths.get(provider.partition(":")[0])
    return None if width is None else case.rows * (width * case.torch_dtype.itemsize + 16)
