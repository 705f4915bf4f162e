"""Runs of a study over seeds: kept on disk, written as JSON, shown on a page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

import moe_kernels
from moe_kernels.programs.shared.cli import Options, console, exit_code, option
from moe_kernels.programs.shared.files import QUICK_NOTE, read_json, write_text
from moe_kernels.programs.shared.options import LARGEST_SEED
from moe_kernels.programs.shared.outputs import check_outputs
from moe_kernels.programs.shared.stages import Stages, Workspace
from studies.report import Block, Results, render

# The pages, and where results go unless --results says otherwise.
PAGES = RESULTS = Path(__file__).parents[2] / "docs" / "results"
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 1000
# Other processors and numbers of threads round in another order, which training amplifies.
REMADE = 0.1
# Levels of keys that have lines of their own in the JSON, so that there is one run a line.
_LEVELS = {"runs": 3, "setups": 1, "tuning": 3}


@dataclass(frozen=True)
class Study:
    """Runs to make, and how to measure, keep and show them.

    name: of the JSON, the page and the folder under out/
    runs: by name, dataclasses with ``trains``, the name of a learning rate that runs share, and
        ``lr``, None where that rate is tuned
    quick_runs: names of the runs of --quick and --remake
    learning_rates: (run) -> rates to choose from
    tuned: (run) -> the run on which its learning rate is tuned
    setup: (budget, seed, stages) -> models and data that all runs of a seed share
    measure: (setup, run, learning rate, workspace) -> a result, for JSON, with ``choice_nll``,
        ``test_nll`` and ``text``
    record: (run, result, whether the seed is the first) -> what the JSON keeps of a result
    cost: (setup) -> cost of a training step, for JSON; None: it is not measured
    core_hours, core_hours_later: budget fixed in advance, and what was added after the first runs
    blocks: of the page, by the name of their markers
    draw: (results, folder) draws the pictures of the page
    describe: (setup) -> figures of a seed that hold for all of its runs
    record_tuning: (result) -> what the JSON keeps of each run that chose a learning rate
    identity: (run) -> inputs of a result beside its settings, such as files; (None) -> those of
        what all runs of a seed share
    seeds: those of a sweep that names none
    seeds_of: name of a run -> its seeds, where it has fewer than the others
    facts: further values for the JSON
    """

    name: str
    runs: Mapping[str, Any]
    quick_runs: Sequence[str]
    budget: Any
    quick_budget: Any
    learning_rates: Callable[[Any], Sequence[float]]
    tuned: Callable[[Any], Any]
    setup: Callable[[Any, int, Stages], Any]
    measure: Callable[[Any, Any, float, Workspace], dict[str, Any]]
    record: Callable[[Any, dict[str, Any], bool], dict[str, Any]]
    cost: Callable[[Any], dict[str, Any]] | None
    core_hours: float
    blocks: Mapping[str, Block]
    draw: Callable[[Results, Path, str], None]
    describe: Callable[[Any], dict[str, Any]] | None = None
    record_tuning: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    identity: Callable[[Any], dict[str, Any]] = lambda run: {}
    seeds_of: Mapping[str, Sequence[int]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    core_hours_later: float = 0.0
    seeds: Sequence[int] = SEEDS


class Sweep:
    """Runs of a study, of which the missing ones are computed, in stages."""

    def __init__(self, study: Study, budget: Any, out: Path):
        self.study, self.budget, self.stages = study, budget, Stages(out / "stages")
        self._setups: dict[int, Any] = {}

    def setup(self, seed: int) -> Any:
        """Return the seed's setup; only the last one is held."""
        if seed not in self._setups:
            self._setups = {seed: self.study.setup(self.budget, seed, self.stages)}
        return self._setups[seed]

    def result(self, name: str, run: Any, seed: int, lr: float) -> dict[str, Any]:
        inputs = dataclasses.asdict(run) | {"seed": seed, "lr": lr} | self.study.identity(run)
        inputs["budget"] = dataclasses.asdict(self.budget)
        stage, measure = f"run-{seed}-{name}", self.study.measure
        finished = self.stages.run(
            stage, inputs, lambda workspace: measure(self.setup(seed), run, lr, workspace)
        )
        return finished.result | {"seconds": finished.seconds, "lr": lr}

    def describe(self, seed: int) -> dict[str, Any]:
        stage, describe = f"setup-{seed}", self.study.describe
        inputs = {"budget": dataclasses.asdict(self.budget)} | self.study.identity(None)
        return self.stages.run(stage, inputs, lambda _: describe(self.setup(seed))).result

    def tune(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Loss on the data held out for choices, by what trains and learning rate."""
        runs = [self.study.runs[name] for name in names]
        # Of the runs that share a rate, the first decides it.
        families = {run.trains: self.study.tuned(run) for run in reversed(runs) if run.lr is None}
        tuned = {}
        for trains, run in families.items():
            name = tuning_name(trains)
            tuned[trains] = {
                f"{lr:g}": self.choice_loss(f"{name}-{lr:g}", run, lr)
                for lr in self.study.learning_rates(run)
            }
        return tuned

    def choice_loss(self, name: str, run: Any, lr: float) -> float:
        """Return the loss at a learning rate; infinite where it is too high to train at all."""
        try:
            loss = self.result(name, run, TUNING_SEED, lr)["choice_nll"]
        except FloatingPointError:
            return math.inf
        return loss if math.isfinite(loss) else math.inf

    def tuning(self, tuned: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Return what the JSON holds of tuning: losses, the rates they chose, and figures."""
        rates = {trains: float(min(losses, key=losses.get)) for trains, losses in tuned.items()}
        found = {"seed": TUNING_SEED, "choice_nll": tuned, "learning_rate": rates}
        if self.study.record_tuning is None:
            return found

        def figures(trains: str, lr: str) -> dict[str, Any]:
            result = self.stages.results.get(f"run-{TUNING_SEED}-{tuning_name(trains)}-{lr}")
            return self.study.record_tuning(result) if result else {}

        return found | {
            "figures": {
                trains: {lr: figures(trains, lr) for lr in losses}
                for trains, losses in tuned.items()
            }
        }

    def cost(self) -> dict[str, Any]:
        """Measure a step on the tuning seed's base; only an idle machine gives true figures."""
        inputs = {"budget": dataclasses.asdict(self.budget)}
        cost = self.study.cost
        return self.stages.run("cost", inputs, lambda _: cost(self.setup(TUNING_SEED))).result

    def everything(self, seeds: Sequence[int], names: Sequence[str], cost: bool) -> Results:
        """Run what is missing and return the results as the JSON holds them."""
        study = self.study
        tuning = self.tuning(self.tune(names))
        runs: dict[str, Any] = {
            name: {"settings": dataclasses.asdict(study.runs[name]), "seeds": {}} for name in names
        }
        setups = {}
        for seed in seeds:
            if study.describe is not None:
                setups[str(seed)] = self.describe(seed)
            for name in names:
                run = study.runs[name]
                if seed in study.seeds_of.get(name, seeds):
                    lr = run.lr or tuning["learning_rate"][run.trains]
                    result = self.result(name, run, seed, lr)
                    runs[name]["seeds"][str(seed)] = study.record(run, result, seed == min(seeds))
        return {
            "cost": self.cost() if cost and study.cost else {},
            "budget": dataclasses.asdict(self.budget)
            | {"core_hours": study.core_hours, "core_hours_later": study.core_hours_later},
            "tuning": tuning,
            "setups": setups,
            "runs": {name: run for name, run in runs.items() if run["seeds"]},
            "seconds": self.seconds(),
            "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
            "threads": torch.get_num_threads(),
            "versions": {m.__name__: m.__version__ for m in (moe_kernels, torch, transformers)},
            **study.facts,
        }

    def seconds(self) -> float:
        """Time of runs and setups, with what they had to make first, such as a base."""
        kept = ("run-", "setup-")
        return sum(s for name, s in self.stages.seconds.items() if name.startswith(kept))

    def remake(self, published: Results) -> None:
        """Repeat some runs of a page at its learning rates, and print both losses.

        Raises:
            ValueError: a loss is off by more than REMADE, or text changed where it had not.
        """
        seed, off = SEEDS[0], []
        listing = Table(
            "run", "loss on the page", "made again", "text logits changed", title=f"seed {seed}"
        )
        for name in self.study.quick_runs:
            run = self.study.runs[name]
            before = published["runs"][name]["seeds"][str(seed)]
            again = self.result(name, run, seed, before["lr"])
            losses = before["test_nll"], again["test_nll"]
            changed, changed_before = (
                result["text"]["logits_changed_by_training"] for result in (again, before)
            )
            listing.add_row(name, f"{losses[0]:.4f}", f"{losses[1]:.4f}", f"{changed:,}")
            if abs(losses[0] - losses[1]) > REMADE or (changed > 0) != (changed_before > 0):
                off.append(name)
        console.print(listing)
        if off:
            raise ValueError(
                f"{', '.join(off)}: the loss is off the page's by more than {REMADE} nats a token, "
                "or text changed where it had not"
            )


def tuning_name(trains: str) -> str:
    return "tune-" + re.sub("[^a-z0-9]+", "-", trains)


def pick(found: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: found[name] for name in names}


def training_arguments(
    steps: int, batch: int, lr: float, *, warmup_steps: int, seed: int
) -> dict[str, Any]:
    """Return the arguments of the programs' ``shared.training.train`` that all runs share."""
    return {
        "max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": lr,
        "weight_decay": 0.01, "warmup_steps": warmup_steps, "seed": seed, "use_cpu": True,
        "every": 1, "save_steps": 10**9,
    }  # fmt: skip


def record_training(model: torch.nn.Module, history: dict[str, Any]) -> dict[str, Any]:
    """Return what every result says of its training."""
    losses = [round(loss, 4) for _, loss in history["loss"]]
    return {"trained_parameters": trained_parameters(model), "loss": losses}


def trained_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# --- the JSON


def to_json(data: Results) -> str:
    """Return the JSON with one line a run, so that versions of it can be compared line by line."""
    lines = [f"{json.dumps(key)}: {_lines(data[key], _LEVELS.get(key, 0))}" for key in data]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _lines(value: Any, levels: int) -> str:
    """JSON with a line for each key of dicts that hold dicts, ``levels`` deep."""
    nested = isinstance(value, dict) and any(isinstance(v, dict) for v in value.values())
    if not (levels and nested):
        return json.dumps(value, separators=(",", ":"))
    lines = [f"{json.dumps(key)}: {_lines(each, levels - 1)}" for key, each in value.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


# --- the command line


def runs_option(runs: Iterable[str]) -> Any:
    """Return the option --runs of a study with runs of these names."""
    return option(None, "default: all", metavar="NAME", choices=list(runs))


@dataclass(kw_only=True)
class SweepOptions(Options):
    """Sweep.

    A study adds ``runs``, made by :func:`runs_option`.
    """

    seeds: list[int] | None = option(
        None, f"default: {' '.join(map(str, SEEDS))}", at_least=0, at_most=LARGEST_SEED
    )
    remake: bool = option(False, "repeat a few published runs and compare")
    quick: bool = option(False, "one seed, short, and few runs")
    page: bool = option(False, "write the page from the JSON, run nothing")
    no_cost: bool = option(False, "skip the cost of a step, for a busy machine")
    results: Path | None = option(None, "folder of JSON and page; default: docs/results")
    out: Path | None = option(None, "folder of the runs; default: out/ and the name of the study")


def read_published(file: Path) -> Results:
    """Return the JSON of a study.

    Raises:
        ValueError: it is not there, is damaged, or was not written by a study.
    """
    if not file.is_file():
        raise ValueError(
            f"{file} is missing: run the study first, or give --results the folder that has it"
        )
    published = read_json(file)
    if not isinstance(published, dict) or "runs" not in published:
        raise ValueError(f"{file} is no file of a study: give --results another folder")
    return published


def missing_runs(file: Path, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Runs of a file that are not among these names and seeds."""
    published = read_published(file)["runs"] if file.exists() else {}
    return [
        f"{name} of seed {seed}"
        for name, run in published.items()
        for seed in run["seeds"]
        if name not in names or int(seed) not in seeds
    ]


def run_study(study: Study, given: SweepOptions) -> int:
    """Run what the options ask for; return the exit code."""
    return exit_code(lambda: _run(study, given))


def _run(study: Study, given: SweepOptions) -> None:
    kind = "-quick" if given.quick else "-remade" if given.remake else ""
    out = given.out or Path("out") / (study.name + kind)
    results = given.results or (out if given.quick else RESULTS)
    seeds = given.seeds or study.seeds[: 1 if given.quick else None]
    names = given.runs or list(study.quick_runs if given.quick else study.runs)
    file = results / f"{study.name}.json"
    if given.remake:
        check_outputs(out, ())
        return Sweep(study, study.budget, out).remake(read_published(file))
    if not given.page:
        if lost := missing_runs(file, names, seeds):
            problem = f"{file} has {lost[0]}, which this command leaves out"
            if given.results:
                raise ValueError(f"{problem}; give --results another folder")
            console.print(f"{problem}: the page goes to {out}", markup=False, soft_wrap=True)
            results, file = out, out / f"{study.name}.json"
        check_outputs(out, (f"{study.name}.json", f"{study.name}.md", f"{study.name}-*.png"))
        budget = study.quick_budget if given.quick else study.budget
        measured = Sweep(study, budget, out).everything(seeds, names, not given.no_cost)
        write_text(file, to_json(measured))
    write_page(study, file, results)
    console.print(f"written to {results}", markup=False)


def is_quick(study: Study, data: Results) -> bool:
    """Return whether results were made by --quick: their budget says so."""
    quick = json.loads(json.dumps(dataclasses.asdict(study.quick_budget)))
    return all(data["budget"].get(name) == value for name, value in quick.items())


def write_page(study: Study, file: Path, folder: Path) -> None:
    """Write the page and its pictures from the JSON; its prose is that of docs/results."""
    data = read_published(file)
    text = render((PAGES / f"{study.name}.md").read_text(), data, study.blocks)
    study.draw(data, folder, QUICK_NOTE if is_quick(study, data) else "")
    write_text(folder / f"{study.name}.md", text)
