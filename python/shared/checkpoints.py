"""Checkpoints of a training on disk: the newest whole one."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from shared.cli import console

STATE = "trainer_state.json"
# Files of transformers' Trainer, without which it would start the optimiser, the schedule or the
# random numbers anew, and say nothing.
_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def last_checkpoint(folder: Path, weights: Sequence[str]) -> Path | None:
    """Return the newest whole checkpoint; remove the others that are not whole, and say so.

    weights: names of the files that hold the model
    """
    whole = []
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        if problem := problem_of(checkpoint, weights):
            text = f"{checkpoint} is not whole, so it is removed: {problem}"
            console.print(text, markup=False, soft_wrap=True)
            shutil.rmtree(checkpoint, ignore_errors=True)
        else:
            whole.append((step_of(checkpoint), checkpoint))
    return max(whole)[1] if whole else None


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that a checkpoint has made."""
    return json.loads((checkpoint / STATE).read_text())["global_step"]


def problem_of(checkpoint: Path, weights: Sequence[str]) -> str | None:
    """Return the reason why a training cannot go on from a checkpoint."""
    for name in (*weights, *_FILES, STATE):
        file = checkpoint / name
        if not file.is_file():
            return f"it has no {name}"
        try:
            _read(file)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, SafetensorError):
            return f"{name} is damaged"
    return None


def _read(file: Path) -> None:
    """Raise if a file is cut off or damaged, as far as its format tells."""
    if file.name == STATE:
        step_of(file.parent)
    elif file.suffix == ".json":
        json.loads(file.read_text())
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            pass
    elif zipfile.ZipFile(file).testzip():
        raise ValueError
