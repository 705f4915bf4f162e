"""Test on a real base whether the routing does what the paper says, and write the page.

    python python/pathways.py --base MOE --dense DENSE    # everything: 10 hours of a core
    python python/pathways.py --base MOE --dense DENSE --runs rows attention experts both
    python python/pathways.py --base MOE --dense DENSE --seeds 0      # one seed of every run
    python python/pathways.py --base MOE --dense DENSE --quick        # short: shows that it runs
    python python/pathways.py --page               # write the page alone, from the JSON

MOE is a Mixture of Experts with a shared expert that moe-kernels convert made of DENSE, its parent,
a Llama or Mistral. Every run teaches one of them to draw coloured digits;
studies/pathways/runs.py defines what a run measures. Seeds differ in adapters, in the order of the
pictures, and in the handwriting and the combinations that are held out; the bases are the same.

On one core and a base of 135 M parameters an epoch takes five to seven minutes. Runs that compare
what trains have three epochs, and runs that compare starts have one. One thread a process is the
fastest: several processes, each with OMP_NUM_THREADS=1, some runs and an --out of its own, share a
machine well.

Finished runs are kept under --out, keyed by their settings, and an interrupted sweep continues from
them, a run from its last checkpoint. So --runs and --seeds make a sweep in parts, each with a
folder of its own, outside --out, for --results. Put the folders under stages/ of all parts
together, and a last call without --runs and --seeds fills the page.
"""

import sys

from studies.pathways import study


def main(arguments: list[str] | None = None) -> int:
    return study.main(__doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
