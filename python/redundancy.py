"""Measure the claims about expert redundancy: train, measure, and write the page.

    python python/redundancy.py                    # digits: two hours of one core
    python python/redundancy.py --emoji FOLDER --real MODEL      # the whole page
    python python/redundancy.py --seeds 0 1 --results out/part   # some seeds, beside others
    python python/redundancy.py --remake           # repeat a few published runs and compare
    python python/redundancy.py --quick            # one seed, short: shows that it runs
    python python/redundancy.py --page             # write the page alone, from the JSON

FOLDER is the unpacked npm package emoji-datasource-twitter; MODEL a pretrained Mixture of Experts,
such as moe-kernels convert leaves.

Every run trains a small text model to draw digits; studies/redundancy/runs.py defines what a run
measures. Finished runs are kept under --out, keyed by their settings, and an interrupted sweep
continues from them. Seeds may run in separate processes before one call with all of them writes the
page. Learning rates are chosen for each kind of training on a seed of their own, by held-out
pictures that are not reported.
"""

import sys

from studies.redundancy import study


def main(arguments: list[str] | None = None) -> int:
    return study.main(__doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
