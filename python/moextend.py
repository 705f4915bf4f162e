"""Measure what added experts buy and what they cost: train, measure, and write the page.

    python python/moextend.py                    # everything: two hours of a core
    python python/moextend.py --seeds 0 1 --results out/part   # some seeds, beside others
    python python/moextend.py --remake           # repeat a few published runs and compare
    python python/moextend.py --quick            # one seed, short: shows that it runs
    python python/moextend.py --page             # write the page alone, from the JSON

Every run trains a small text model to answer questions about handwritten digits, which a frozen
encoder sees, or to write source code; studies/moextend/runs.py defines what a run measures.
Finished runs are kept under --out, keyed by their settings, and an interrupted sweep continues from
them. Seeds may run in separate processes before one call with all of them writes the page. Learning
rates are chosen for each kind of training on a seed of their own, by held-out questions that are
not reported.
"""

import sys

from studies.moextend import study


def main(arguments: list[str] | None = None) -> int:
    return study.main(__doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
