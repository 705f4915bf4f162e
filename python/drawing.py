"""Test on a real base whether the routing does what the paper says, and write the page.

    python python/drawing.py --base MOE --dense DENSE                # everything: eight hours
    python python/drawing.py --base MOE --dense DENSE --runs rows attention experts both
    python python/drawing.py --base MOE --dense DENSE --seeds 0      # one seed of every run
    python python/drawing.py --base MOE --dense DENSE --rows-lr 0.03    # of the added rows
    python python/drawing.py --base MOE --dense DENSE --images 16000    # runs of twice the length
    python python/drawing.py --base MOE --dense DENSE --quick        # short: shows that it runs
    python python/drawing.py --page               # write the page alone, from the JSON

MOE is a Mixture of Experts with a shared expert that moe-kernels convert made of DENSE, its parent,
a Llama or Mistral. Every run teaches one of them to draw coloured digits;
studies/drawing/runs.py defines what a run measures. Seeds differ in adapters, in the order of the
pictures, and in the handwriting and the combinations that are held out; the bases are the same.

On two cores and a base of 135 M parameters, by an estimate of 600 tokens a second, a run takes 7
to 8 minutes. So a seed of all 19 runs takes two hours and a half, and three seeds seven hours. The
runs that choose learning rates, on a seed of their own that is not reported, take another 50
minutes.

Finished runs are kept under --out, keyed by their settings, and an interrupted sweep continues from
them, a run from its last checkpoint. So --runs and --seeds make a sweep in parts, each with a
folder of its own for --results; a last call without them fills the page. Make the run "rows" first:
the rate that it chooses for added rows alone is the one to give as --rows-lr to all later calls.
"""

import sys

from studies.drawing import study


def main(arguments: list[str] | None = None) -> int:
    return study.main(__doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
