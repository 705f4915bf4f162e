"""Options, progress and the file of results, which all programs here share."""

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


def make_parser(
    description: str, *, output: str, rounds: int | None = 10, max_seconds: float | None = 10.0
) -> argparse.ArgumentParser:  # fmt: skip
    """Return a parser with the common options.

    Args:
        description: of the program.
        output: the file that it writes by default, for --help.
        rounds: the default; None: it depends on the device.
        max_seconds: likewise.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"at most (default: {rounds or 'by device'})"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=max_seconds, metavar="S",
        help="for the rounds of a case after the first few "
        f"(default: {max_seconds or 'by device'})",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=output_file, help=f"default: {output}")
    return parser


def output_file(text: str) -> Path:
    """Return the path; refuse a file that no benchmark has written, since it would be replaced."""
    path = Path(text)
    if path.exists() and not result_files.is_result(path):
        raise argparse.ArgumentTypeError(f"{path} is not a file of results: give another name")
    return path


def make_sweep_parser(description: str, name: str, **swept: list) -> argparse.ArgumentParser:
    """Return a parser of a program ``bench_NAME.py``.

    Args:
        swept: defaults of the options that take several values, which are of the same type.
    """
    parser = make_parser(description, output=f"benchmarks/results/{name}-<device>.json")
    for option, values in swept.items():
        choices = DTYPES if option == "dtype" else None
        parser.add_argument(
            f"--{option.replace('_', '-')}", nargs="+", type=type(values[0]), default=values,
            choices=choices, help=f"default: {' '.join(map(str, values))}",
        )  # fmt: skip
    return parser


def add_rotation(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how many weights decoding goes through."""
    parser.add_argument(
        "--rotate-mb", type=int, default=600, metavar="MB",
        help="weights that decoding goes through in turn (default: 600)",
    )  # fmt: skip


def options_of(args: argparse.Namespace, **settings: Any) -> Options:
    """Return what the command line says of rounds, and other ``settings``."""
    return Options(**{"rounds": args.rounds, "max_seconds": args.max_seconds} | settings)


@contextmanager
def progress(items: Sequence[Any]) -> Iterator[tuple[Iterable[Any], Callable[[], None]]]:
    """The items with a progress bar, and a function that counts rounds beside it."""
    with tqdm(items, unit="case", dynamic_ncols=True) as bar:
        done = 0

        def on_round() -> None:
            nonlocal done
            done += 1
            bar.set_postfix(rounds=done)

        yield bar, on_round


def run_cases(
    args: argparse.Namespace, cases: Sequence[Any], run: Callable[[Any, Options], dict],
    **settings: Any,
) -> list[dict]:  # fmt: skip
    """Run every case and return the records."""
    with progress(cases) as (remaining, on_round):
        options = options_of(args, on_round=on_round, **settings)
        return [run(case, options) for case in remaining]


def write_results(args: argparse.Namespace, path: Path, data: dict) -> None:
    """Write what was measured, with the environment and the options."""
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "ends")}
    environment = result_files.environment(args.device)
    result_files.write(path, {"environment": environment, "arguments": settings, **data})


def finish(name: str, args: argparse.Namespace, data: dict) -> None:
    """Write the results of a program ``bench_NAME.py``, and say where."""
    path = args.output or result_files.RESULTS / f"{name}-{args.device}.json"
    write_results(args, path, data)
    print(f"wrote {path}")
