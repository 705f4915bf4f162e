"""Prints what ranks send in a training step, and what the mask's imbalance costs, by formula.

    python benchmarks/scaling.py                       # the tables of docs/scaling.md
    python benchmarks/scaling.py --ranks 16 --between 25 --rank 64

Nothing is measured: seconds are bytes over the stated rates, and hops times the stated latency.
lib/collectives.py has the formulas.
"""

import argparse
import sys

from lib.pages.ranks import Cluster, mask, sent, times


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plain = Cluster()

    def add(name: str, kind: type, default: float, help: str, **options) -> None:
        parser.add_argument(
            name, type=kind, default=default, help=f"{help} (default: {default})", **options
        )

    add("--ranks", int, list(plain.ranks), "multiples of --per-node", nargs="+")
    add("--per-node", int, plain.per_node, "ranks of a node")
    add("--within", float, plain.within / 1e9, "GB/s of a rank within its node")
    add("--between", float, plain.between / 1e9, "GB/s of a rank's link to other nodes")
    add("--latency", float, plain.latency * 1e6, "microseconds of a hop")
    add("--tflops", float, plain.flops / 1e12, "of a rank")
    add("--rank", int, plain.rank, "of the adapters, on experts and attention")
    add("--num-tokens", int, plain.num_tokens, "added tokens")
    args = parser.parse_args(arguments)
    if any(ranks % args.per_node for ranks in args.ranks):
        parser.error(f"--ranks must be multiples of --per-node {args.per_node}")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    cluster = Cluster(
        tuple(args.ranks), args.per_node, args.within * 1e9, args.between * 1e9,
        args.latency / 1e6, args.tflops * 1e12, args.rank, args.num_tokens,
    )  # fmt: skip
    for table in (sent, times, mask):
        print(table(cluster))
    return 0


if __name__ == "__main__":
    sys.exit(main())
