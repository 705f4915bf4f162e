"""Runs one layer, forward and backward, for profilers and sanitizers.

compute-sanitizer --tool racecheck python benchmarks/one_layer.py --shape odd
ncu -k regex:gate_up -c 1 --set full python benchmarks/one_layer.py --shape olmoe --tokens 8192
"""

import argparse

import torch
from lib.cases import DTYPES, Case, make_problem
from lib.providers import set_up_provider

from moe_kernels import backends
from moe_kernels.testing import SHAPES


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--backend", choices=backends.NAMES, default="triton")
    parser.add_argument("--shape", choices=SHAPES, default="odd")
    parser.add_argument("--tokens", type=int, help="default: the shape's")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--image-share", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    case = Case.named(
        args.shape, T=args.tokens, dtype=args.dtype, device=args.device,
        image_share=args.image_share,
    )  # fmt: skip
    problem = make_problem(case)
    runner = set_up_provider(f"ours:{args.backend}", problem)
    for _ in range(args.repeats):
        runner.clear()
        runner.backward(runner.forward(), problem.grad_out)
    gradients = runner.gradients()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    print(f"{case.name}, T = {case.shape.T}: {len(gradients)} gradients, finite")


if __name__ == "__main__":
    main()
