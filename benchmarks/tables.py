"""Writes the tables of the pages that show results, out of the files in benchmarks/results/.

python benchmarks/tables.py
"""

from collections.abc import Callable, Mapping

from lib import page_blocks, page_blocks_cpu, page_blocks_gpu, page_blocks_readme, result_files
from lib.tables import steps_table
from lib.target_tables import summary, targets_table
from shared import markers

# The pages that show each file of results.
PAGES = {
    page_blocks_cpu.RESULTS: ("README.md", "docs/results/cpu.md"),
    page_blocks_gpu.RESULTS: ("docs/results/gpu.md",),
}

# What stands between the markers <!-- bench:NAME --> of a page, out of its results.
BLOCKS: dict[str, Callable[[Mapping], str]] = {
    "machine": page_blocks.machine,
    "speed": page_blocks_readme.speed,
    "targets": lambda results: summary(results["targets"]),
    "all_targets": lambda results: targets_table(results["targets"]),
    "training": page_blocks.training,
    "decode": page_blocks.decode,
    "steps": lambda results: steps_table(results["steps"]),
    "targets_twice": page_blocks_cpu.targets_twice,
    "overhead": page_blocks_cpu.overhead,
    "adapters": page_blocks_cpu.adapters,
    "floors": page_blocks_cpu.floors,
    "decode_gap": page_blocks_cpu.decode_gap,
    "added": page_blocks_cpu.added,
    "gpu_layers": page_blocks_gpu.layers,
    "gpu_ceilings": page_blocks_gpu.ceilings,
    "gpu_rates": page_blocks_gpu.rates,
    "gpu_kernels": page_blocks_gpu.kernels,
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
    for name, pages in PAGES.items():
        results = result_files.read(result_files.RESULTS / name)
        for page in pages:
            path = result_files.ROOT / page
            path.write_text(render(path.read_text(), results))
            print(f"wrote the tables of {page}")


if __name__ == "__main__":
    main()
