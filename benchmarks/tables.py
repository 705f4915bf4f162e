"""Writes the tables of the pages that show results, out of the files in benchmarks/results/.

python benchmarks/tables.py
"""

from collections.abc import Callable, Mapping

from lib import pages, result_files
from lib.pages import cpu, gpu, ranks, readme
from lib.pages.tables import steps_table, summary, targets_table

from moe_kernels.programs.shared import markers, memory_tables

# The pages that show each file of results.
PAGES = {
    cpu.RESULTS: ("README.md", "docs/results/cpu.md", "docs/peft.md"),
    gpu.RESULTS: ("docs/results/gpu.md",),
    ranks.RESULTS: ("docs/scaling.md",),
    cpu.PACKED: ("docs/kernels.md",),
    cpu.MIXED_ADAPTERS: ("docs/adapters.md",),
}

# What stands between the markers <!-- bench:NAME --> of a page, out of its results.
BLOCKS: dict[str, Callable[[Mapping], str]] = {
    "machine": pages.machine,
    "speed": readme.speed,
    "targets": lambda results: summary(results["targets"]),
    "all_targets": lambda results: targets_table(results["targets"]),
    "training": pages.training,
    "decode": pages.decode,
    "steps": lambda results: steps_table(results["steps"]),
    "targets_twice": cpu.targets_twice,
    "overhead": cpu.overhead,
    "adapters": cpu.adapters,
    "floors": cpu.floors,
    "decode_gap": cpu.decode_gap,
    "added": cpu.added,
    "peft": cpu.peft,
    "low_rank": cpu.low_rank,
    "packed": cpu.packed,
    "mixed_adapters": cpu.mixed_adapters,
    "gpu_layers": gpu.layers,
    "gpu_ceilings": gpu.ceilings,
    "gpu_rates": gpu.rates,
    "gpu_kernels": gpu.kernels,
    "loading": ranks.loading,
    "training_memory": lambda results: memory_tables.measured(
        result_files.read(result_files.RESULTS / memory_tables.RESULTS)
    ),
    # by formula, of no results
    "fits": lambda results: memory_tables.fits(),
    "sent": lambda results: ranks.sent(ranks.Cluster()),
    "times": lambda results: ranks.times(ranks.Cluster()),
    "mask": lambda results: ranks.mask(ranks.Cluster()),
}


def render(page: str, results: Mapping) -> str:
    """Return the page with its tables made from ``results``.

    Raises:
        ValueError: a marker has no block, or no partner.
        KeyError: a block needs a section that was not measured.
    """
    used = set(markers.names(page, "bench")) & BLOCKS.keys()
    return markers.fill(page, {name: BLOCKS[name](results) for name in used}, "bench")


def main() -> None:
    for name, shown_on in PAGES.items():
        results = result_files.read(result_files.RESULTS / name)
        for page in shown_on:
            path = result_files.ROOT / page
            path.write_text(render(path.read_text(), results))
            print(f"wrote the tables of {page}")


if __name__ == "__main__":
    main()
