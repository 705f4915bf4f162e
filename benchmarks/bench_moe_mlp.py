"""Times one MoE layer: ours, transformers' experts, PEFT, split LoRA and the lower bound.

    python benchmarks/bench_moe_mlp.py                                # one shape, both routings
    python benchmarks/bench_moe_mlp.py --rank 8 16 64 --image-share 0 0.5 1
    python benchmarks/bench_moe_mlp.py --mode decode --tokens 1 8 64

Every option that takes several values is swept.
"""

import itertools
from argparse import Namespace
from collections.abc import Iterator

from lib.cases import Case
from lib.cli import add_rotation, finish, make_sweep_parser, run_cases
from lib.pages.tables import providers_table
from lib.providers import PEFT, provider_names
from lib.runs import run_decode, run_training

from moe_kernels.testing import SHAPES

MODES = ("forward", "backward", "both", "decode")
NAME = "moe_mlp"


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = make_sweep_parser(
        __doc__, NAME, dtype=["bfloat16"], routing=["balanced", "zipf"], image_share=[0.5]
    )
    add_rotation(parser)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["one_layer"])
    parser.add_argument("--mode", choices=MODES, default="both", help="what the table shows")
    parser.add_argument("--rank", nargs="+", type=int, default=[None], metavar="R")
    parser.add_argument("--tokens", nargs="+", type=int, default=[None], metavar="T")
    parser.add_argument("--experts", nargs="+", type=int, default=[None], metavar="E")
    parser.add_argument(
        "--providers", nargs="+", choices=provider_names(), metavar="NAME",
        help=f"of {', '.join(provider_names())}; default: all but the slowest",
    )  # fmt: skip
    return parser.parse_args(arguments)


def cases(args: Namespace) -> Iterator[Case]:
    """Yield the cases; those with the same weights are consecutive, so that these are made once."""
    sweep = (
        args.dtype, args.shape, args.experts, args.rank, args.tokens, args.routing,
        args.image_share,
    )  # fmt: skip
    for dtype, shape, experts, rank, tokens, routing, share in itertools.product(*sweep):
        yield Case.named(
            shape, T=tokens, E=experts, r=rank, dtype=dtype, routing=routing, image_share=share,
            device=args.device, seed=args.seed,
        )  # fmt: skip


def default_providers(mode: str) -> list[str]:
    """Return all providers but the reference, PEFT on anything but grouped_mm and whole blocks.

    For decoding it also leaves out those that only make sense in training, and vice versa.
    """
    training = ("bound", "peft", "split")
    return [
        name
        for name in provider_names()
        if name.partition(":")[2] != "reference"
        and not name.startswith("block")
        and (not name.startswith("peft:") or name == PEFT)
        and not name.startswith(training if mode == "decode" else "read")
    ]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    providers = args.providers or default_providers(args.mode)
    run = run_decode if args.mode == "decode" else run_training
    records = run_cases(
        args, list(cases(args)), lambda case, options: run(case, providers, options),
        memory=providers, backward=args.mode != "forward", rotated_bytes=args.rotate_mb * 10**6,
    )  # fmt: skip
    for record in records:
        print(providers_table(record, args.mode))
    finish(NAME, args, {"training" if args.mode != "decode" else "decode": records})


if __name__ == "__main__":
    main()
