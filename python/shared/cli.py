"""Command lines of the programs: options, exit codes, and the console."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import moe_kernels
from shared.models import DTYPES

console = Console(highlight=False)


def add_run_options(parser: argparse.ArgumentParser, out: Path) -> None:
    """--seed, --dtype, --device, --backend and --out."""
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the base; default: %(default)s")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--backend", choices=moe_kernels.backends.NAMES, help="default: the best one here")
    add("--out", type=Path, default=out, help="default: %(default)s")


def settle_device(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Fills in --device, and --backend where there is one; an error if either is not there."""
    given.device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=given.device).device
        if hasattr(given, "backend"):
            given.backend = moe_kernels.backends.select(given.backend, device)
    except (RuntimeError, ValueError, AssertionError) as error:
        parser.error(f"--device {given.device}: {error}")


def exit_code(work: Callable[[], Any]) -> int:
    """Run a program and return its exit code: an error that its user can mend becomes one line."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        work()
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 130
    except (ValueError, OSError, ImportError, ArithmeticError, torch.OutOfMemoryError) as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    return 0
