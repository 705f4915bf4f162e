"""Prints bytes and operations of every kernel of a GPU backend, by formula, and the floor.

    python tools/cost_model.py --shape olmoe --tokens 8192 --backend cuda

Of at most 16 tokens under "cuda" it has both courses of inference: the default one, which is that
of training, and the two kernels that MOE_KERNELS_DECODE=1 switches on.

Under "cuda" it also predicts the products of the engine of sm_90, which MOE_KERNELS_ENGINE=1
switches on, from its tiles: --loop-tflops is the rate within the main loop, --edges the time of the
first loads and the last stores. The defaults follow from Triton's products on an H100, whose times
fit a main loop of 670 to 730 TFLOP/s and 4 to 10 us a tile around it (docs/kernels.md). It also has
what the main loop reads from the L2, with the clusters that the shape has and without.

It needs no GPU and measures nothing: an unnecessary pass over a tensor shows in the bytes.
Milliseconds are those of --bandwidth and --tflops, whichever takes longer: a lower bound. See
benchmarks/lib/costs.py for what is counted.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # for its lib
from lib.cases import DTYPES, Case
from lib.costs import PARTS_OF_DU, engine_table, table

from moe_kernels.testing import SHAPES


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="olmoe")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--backend", choices=PARTS_OF_DU, default="triton")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--image-share", nargs="+", type=float, default=[0.0, 0.25, 1.0])
    parser.add_argument("--bandwidth", type=float, default=3.35, help="TB/s (default: H100 SXM)")
    parser.add_argument("--tflops", type=float, default=800.0, help="of large GEMMs")
    parser.add_argument("--loop-tflops", type=float, default=700.0)
    parser.add_argument("--edges", type=float, default=10.0, help="us")
    parser.add_argument("--multiprocessors", type=int, default=132)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    for share in args.image_share:
        case = Case.named(
            args.shape, T=args.tokens, r=args.rank, dtype=args.dtype, image_share=share
        )
        print(f"{args.shape}, T = {args.tokens}, rank {args.rank}, {share:.0%} image rows")
        print(table(case, args.bandwidth, args.tflops, args.backend))
        if args.backend == "cuda" and args.dtype == "bfloat16":
            print("The engine, predicted and not yet run on a GPU:")
            print(engine_table(case, args.loop_tflops, args.multiprocessors, args.edges))


if __name__ == "__main__":
    main()
