"""Stages of a program: each is computed once and kept in a folder keyed by its settings."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import moe_kernels
from moe_kernels.programs.shared.cli import console
from moe_kernels.programs.shared.files import write_text

CACHE_VERSION = 3  # raise it when a stage gives another result for the same settings
_CHECKPOINTS = "checkpoints"


class Workspace:
    """The folder of an unfinished stage, and the seconds spent on it over all runs."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._started = folder, time.perf_counter()
        self._file = folder / "seconds"
        self._earlier = float(self._file.read_text()) if self._file.exists() else 0.0

    @property
    def seconds(self) -> float:
        return self._earlier + time.perf_counter() - self._started

    @property
    def checkpoints(self) -> Path:
        """The folder of what a later run goes on from; it stays until the stage is finished."""
        return self.folder / _CHECKPOINTS

    def save_seconds(self) -> None:
        write_text(self._file, str(self.seconds))


@dataclass(frozen=True)
class Stage:
    """A finished stage: its files, the JSON result of its build function, and its duration."""

    folder: Path
    result: dict[str, Any]
    seconds: float

    @classmethod
    def load(cls, folder: Path) -> Stage:
        file = folder / "stage.json"
        try:
            described = json.loads(file.read_text())
            return cls(folder, described["result"], described["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({error!r}): remove {folder} to compute this stage again"
            ) from error


class Stages:
    """Run each stage once: a later call with the same settings loads the earlier result."""

    def __init__(self, root: Path):
        self.root = root
        self.finished: dict[str, Stage] = {}

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        return {name: stage.result for name, stage in self.finished.items()}

    @property
    def seconds(self) -> dict[str, float]:
        return {name: stage.seconds for name, stage in self.finished.items()}

    def describe(self, options: Any) -> dict[str, Any]:
        """Return the facts of the run that every report has; options: a dataclass."""
        return {
            "seconds": self.seconds,
            "settings": dataclasses.asdict(options),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }

    def run(
        self,
        name: str,
        inputs: dict[str, Any],
        build: Callable[[Workspace], dict[str, Any]],
        after: Sequence[Stage] = (),
    ) -> Stage:
        """Return the stage, computed now unless it was finished before.

        The build function works in a folder with the suffix `.partial`, where a later run resumes;
        the finished folder is renamed.

        Args:
            inputs: the settings that the result depends on, as JSON
            build: returns the result, as JSON
            after: stages that the result depends on
        """
        folder = self.folder(name, inputs, after)
        if not (folder / "stage.json").exists():
            console.print(f"[bold]{name}[/]")
            _build(folder, inputs, build)
        else:
            console.print(f"[bold]{name}[/]: finished earlier, in {folder}")
            # What a run that was killed while it removed them has left.
            shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)
        self.finished[name] = Stage.load(folder)
        return self.finished[name]

    def folder(self, name: str, inputs: dict[str, Any], after: Sequence[Stage]) -> Path:
        """Return the folder of a finished stage: its name and a hash of all it depends on."""
        stages = [stage.folder.name for stage in after]
        key = json.dumps([name, CACHE_VERSION, inputs, stages, versions()], sort_keys=True)
        return self.root / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


class StageSetup:
    """Base class for what the stages of a program share: each is built with it and a workspace."""

    stages: Stages

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        return self.stages.results

    def folder(self, stage: str) -> Path:
        return self.stages.finished[stage].folder

    def run(
        self, name: str, build: Callable[[Any, Workspace], dict[str, Any]],
        inputs: dict[str, Any], after: str | None = None,
    ) -> None:  # fmt: skip
        """Run a stage, see :meth:`Stages.run`; after: name of the stage that it depends on."""
        before = [self.stages.finished[after]] if after else []
        self.stages.run(name, inputs, lambda workspace: build(self, workspace), before)


def _build(
    folder: Path, inputs: dict[str, Any], build: Callable[[Workspace], dict[str, Any]]
) -> None:
    workspace = Workspace(folder.with_name(f"{folder.name}.partial"))
    try:
        result = build(workspace)
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk, which must not hide the first error
            workspace.save_seconds()
        raise
    stage = {"inputs": inputs, "seconds": workspace.seconds, "result": result}
    write_text(workspace.folder / "stage.json", json.dumps(stage, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    workspace.folder.replace(folder)
    # Not before: a save that fails must not cost the training that led to it.
    shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)


# --- keys


def versions() -> dict[str, str]:
    return {module.__name__: module.__version__ for module in (moe_kernels, torch, transformers)}


def digest(*arrays: Any) -> str:
    """Return a hash of the arrays' contents, without their shapes."""
    content = hashlib.sha256()
    for array in arrays:
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()[:16]


def model_identity(model: str) -> Any:
    """Return a hub id as it is, and for a folder the names, sizes and times of its files."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
