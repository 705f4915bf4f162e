"""Checkpoints of a training on disk: the newest whole one."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from moe_kernels.files import is_of_the_system
from moe_kernels.programs.shared.cli import console

STATE = "trainer_state.json"
# Files of transformers' Trainer, without which it would start the optimiser, the schedule or the
# random numbers anew, and say nothing.
_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
_ASIDE = "set-aside-"
_NAME = re.compile(rf"(?:{_ASIDE})?checkpoint-(\d+)")


def last_checkpoint(folder: Path, weights: Sequence[str]) -> Path | None:
    """Return the newest whole checkpoint; set aside newer ones that are not whole, and say so.

    They are renamed, because the Trainer would count them as the newest, and remove the ones that
    it makes. One that is not whole is removed as soon as a newer one is whole.

    weights: names of the files that hold the model

    Raises:
        OSError: a checkpoint cannot be read, whole or not.
    """
    steps = {
        path: int(name[1]) for path in folder.glob("*") if (name := _NAME.fullmatch(path.name))
    }
    found = sorted(path for path in steps if not path.name.startswith(_ASIDE))
    problems = {path: problem_of(path, weights) for path in found}
    whole = [path for path, problem in problems.items() if problem is None]
    last = max(whole, key=steps.get, default=None)
    for path in steps.keys() - set(whole):
        if last is not None and steps[path] < steps[last]:
            shutil.rmtree(path, ignore_errors=True)
        elif path in problems:
            _set_aside(path, problems[path])
    return last


def _set_aside(checkpoint: Path, problem: str) -> None:
    aside = checkpoint.with_name(f"{_ASIDE}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    text = f"{checkpoint} is not whole, so it is set aside as {aside.name}: {problem}"
    console.print(text, markup=False, soft_wrap=True)


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that a checkpoint has made."""
    return json.loads((checkpoint / STATE).read_text())["global_step"]


def problem_of(checkpoint: Path, weights: Sequence[str]) -> str | None:
    """Return the reason why a training cannot go on from a checkpoint.

    Raises:
        OSError: a file cannot be read, which says nothing of its content.
    """
    for name in (*weights, *_FILES, STATE):
        file = checkpoint / name
        if not file.is_file():
            return f"it has no {name}"
        try:
            _read(file)
        except Exception as error:  # damaged bytes may raise anything
            if is_of_the_system(error):
                raise
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
