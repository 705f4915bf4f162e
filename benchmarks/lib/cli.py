"""What the programs here have in common: options, progress, and the file at the end."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lib import result_files
from lib.cases import DTYPES
from lib.runs import Options


def make_parser(description: str, name: str, *, dtypes: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    if dtypes:
        parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=10, help="at most (default %(default)s)")
    parser.add_argument(
        "--max-seconds", type=float, default=10.0, metavar="S",
        help="for the rounds of a case after the first few (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, help=f"default: benchmarks/results/{name}-<device>.json"
    )
    return parser


def add_rotation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rotate-mb", type=int, default=600, metavar="MB",
        help="weights that decoding goes through in turn (default %(default)s)",
    )  # fmt: skip


def options_of(given: argparse.Namespace, **settings: Any) -> Options:
    return Options(rounds=given.rounds, max_seconds=given.max_seconds, **settings)


@contextmanager
def progress(items: Sequence[Any]) -> Iterator[tuple[Iterable[Any], Callable[[], None]]]:
    """The items with a bar that counts them, and a function that counts rounds beside it."""
    with tqdm(items, unit="case", dynamic_ncols=True) as bar:
        done = 0

        def on_round() -> None:
            nonlocal done
            done += 1
            bar.set_postfix(rounds=done)

        yield bar, on_round


def finish(name: str, given: argparse.Namespace, data: dict) -> None:
    """Write the results."""
    path = given.output or result_files.default_path(name, given.device)
    settings = {key: value for key, value in vars(given).items() if key != "output"}
    result_files.write(
        path, {"environment": result_files.environment(given.device), "arguments": settings, **data}
    )
    print(f"wrote {path}")
