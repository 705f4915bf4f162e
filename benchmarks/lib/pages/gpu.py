"""Blocks of the page that shows results of a GPU, out of the file of a run."""

import re
from collections.abc import Mapping

from lib.markdown import markdown
from lib.pages import common_rounds, grid, milliseconds
from lib.records import measured_backend, time_of

RESULTS = "gpu-h100.json"


def layers(results: Mapping) -> str:
    """Milliseconds of forward and backward, over the rounds in which all providers ran: later
    rounds are slower, since the card gets warm.
    """
    return grid(
        [common_rounds(record) for record in results["training"]],
        lambda record: f"{_title(record)}, {record['case']['image_share']:.0%} image",
        lambda record, name: milliseconds(record, name, "both"),
    )


def _title(record: Mapping) -> str:
    return f"{record['case']['shape']} T={record['case']['T']}"


def ceilings(results: Mapping) -> str:
    """The rates of a copy and of a large product."""
    measured = results["ceilings"]
    return (
        f"A copy moves {measured['copy_TBps']:.2f} TB/s, read and written; a product of "
        f"{measured['gemm_size']:,} runs at {measured['gemm_TFLOPps']:.0f} TFLOP/s.\n"
    )


def rates(results: Mapping) -> str:
    """TFLOP/s of the base's GEMMs, counted over the time of the whole layer."""
    rows = {}
    for record in results["training"]:
        base, title = measured_backend(record, "ours_base"), _title(record)
        work = {mode: record["flops"][mode] / 1e12 for mode in ("forward", "both")}
        launched = (f"{work[m] / time_of(record, base, m).median:.0f}" for m in work)
        in_graph = (f"{work[m] / (results['graphs'][title][m] / 1e3):.0f}" for m in work)
        rows.setdefault(title, (title, *launched, *in_graph))  # one for all shares of image rows
    header = ("layer", "forward, kept for backward", "and backward", "forward alone, in a graph",
              "and backward, in a graph")  # fmt: skip
    return markdown(header, rows.values())


def kernels(results: Mapping) -> str:
    """Milliseconds of each kernel in one forward and backward, by the profiler."""
    return markdown(
        ("kernel", "launches", "ms"),
        [
            (re.sub(r".*::(\w+_kernel).*", r"\1", name), str(count), f"{ms:.3f}")
            for name, count, ms in results["kernels"]["kernels"]
            if ms >= 0.002
        ],
    )
