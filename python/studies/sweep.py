"""Shared by the programs that write a page of results: runs over seeds, kept on disk, to JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from shared.cli import console, exit_code
from shared.files import write_text
from shared.stages import Stages, Workspace

import moe_kernels

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 1000
# Other processors and numbers of threads round in another order, which training makes larger.
REMADE = 0.1


@dataclass(frozen=True)
class Program:
    """What a program measures.

    name: of its JSON, page and folder under out/
    runs: by name, dataclasses with ``trains``, what runs that share a learning rate have in common,
        and ``lr``, None where that rate is tuned
    quick_runs: those of --quick and --remake
    learning_rates: to choose from, or (run) -> those for what trains as it does
    tuned: the run whose learning rate those like it take
    ground: (budget, seed, stages) -> what all runs of a seed stand on
    measure: (ground, run, learning rate, workspace) -> a result, for JSON, with ``choice_nll``,
        ``test_nll`` and ``text``
    tuning_figures: those of a result that are told of each run that chose a learning rate
    cost: (ground) -> what a training step costs, for JSON
    core_hours, core_hours_later: what the runs may take, set before they were made, and what was
        added when some of them were seen
    write_page: (JSON file, folder)
    found_before: (ground) -> what there is to tell of a seed before its runs
    identity: (run) -> what a result depends on beside settings, such as files
    seeds_of: name of a run -> seeds, where it has not all of them
    facts: for JSON, beside the results
    """

    name: str
    runs: Mapping[str, Any]
    quick_runs: Sequence[str]
    budget: Any
    quick_budget: Any
    learning_rates: Sequence[float] | Callable[[Any], Sequence[float]]
    tuned: Callable[[Any], Any]
    ground: Callable[[Any, int, Stages], Any]
    measure: Callable[[Any, Any, float, Workspace], dict[str, Any]]
    cost: Callable[[Any], dict[str, Any]]
    core_hours: float
    write_page: Callable[[Path, Path], None]
    found_before: Callable[[Any], dict[str, Any]] | None = None
    identity: Callable[[Any], dict[str, Any]] = lambda run: {}
    seeds_of: Mapping[str, Sequence[int]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    core_hours_later: float = 0.0
    tuning_figures: Sequence[str] = ()

    def rates_of(self, run: Any) -> Sequence[float]:
        rates = self.learning_rates
        return rates(run) if callable(rates) else rates


class Sweep:
    """What is missing of a program's runs is computed, in stages."""

    def __init__(self, program: Program, budget: Any, out: Path):
        self.program, self.budget, self.stages = program, budget, Stages(out / "stages")
        self.grounds: dict[int, Any] = {}

    def ground(self, seed: int) -> Any:
        if seed not in self.grounds:
            self.grounds = {seed: self.program.ground(self.budget, seed, self.stages)}
        return self.grounds[seed]

    def result(self, name: str, run: Any, seed: int, lr: float) -> dict[str, Any]:
        inputs = dataclasses.asdict(run) | {"seed": seed, "lr": lr} | self.program.identity(run)
        inputs["budget"] = dataclasses.asdict(self.budget)
        stage, measure = f"run-{seed}-{name}", self.program.measure
        finished = self.stages.run(
            stage, inputs, lambda workspace: measure(self.ground(seed), run, lr, workspace)
        )
        return finished.result | {"seconds": finished.seconds}

    def found_before(self, seed: int) -> dict[str, Any]:
        stage, inputs = f"ground-{seed}", {"budget": dataclasses.asdict(self.budget)}
        tell = self.program.found_before
        return self.stages.run(stage, inputs, lambda _: tell(self.ground(seed))).result

    def tune(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Loss on what is held out to choose by, by what trains and learning rate."""
        runs = [self.program.runs[name] for name in names]
        # Of those that share a rate the first decides it.
        families = {run.trains: self.program.tuned(run) for run in reversed(runs) if run.lr is None}
        tuned = {}
        for trains, run in families.items():
            name = tuning_name(trains)
            tuned[trains] = {
                f"{lr:g}": self.choice_loss(f"{name}-{lr:g}", run, lr)
                for lr in self.program.rates_of(run)
            }
        return tuned

    def choice_loss(self, name: str, run: Any, lr: float) -> float:
        """Infinite where a learning rate is too high to train at all."""
        try:
            loss = self.result(name, run, TUNING_SEED, lr)["choice_nll"]
        except FloatingPointError:
            return math.inf
        return loss if math.isfinite(loss) else math.inf

    def tuning_figures(self, tuned: dict[str, dict[str, float]]) -> dict[str, Any]:
        """More of the runs that chose, by what trains and learning rate."""

        def told(trains: str, lr: str) -> dict[str, Any]:
            result = self.stages.results.get(f"run-{TUNING_SEED}-{tuning_name(trains)}-{lr}", {})
            return {name: result[name] for name in self.program.tuning_figures if name in result}

        return {trains: {lr: told(trains, lr) for lr in rates} for trains, rates in tuned.items()}

    def cost(self) -> dict[str, Any]:
        """On the tuning seed's base, alone on the machine if the figures are to mean anything."""
        inputs = {"budget": dataclasses.asdict(self.budget)}
        stage = self.stages.run(
            "cost", inputs, lambda _: self.program.cost(self.ground(TUNING_SEED))
        )
        return stage.result

    def everything(self, seeds: Sequence[int], names: Sequence[str], cost: bool) -> dict[str, Any]:
        """As the JSON holds it."""
        program = self.program
        tuned = self.tune(names)
        rates = {trains: float(min(losses, key=losses.get)) for trains, losses in tuned.items()}
        runs: dict[str, Any] = {
            name: {"settings": dataclasses.asdict(program.runs[name]), "seeds": {}}
            for name in names
        }
        grounds = {}
        for seed in seeds:
            if program.found_before is not None:
                grounds[str(seed)] = self.found_before(seed)
            for name in names:
                run = program.runs[name]
                if seed in program.seeds_of.get(name, seeds):
                    lr = run.lr or rates[run.trains]
                    result = self.result(name, run, seed, lr)
                    runs[name]["seeds"][str(seed)] = result | {"lr": lr}
        return {
            "cost": self.cost() if cost else {},
            "budget": dataclasses.asdict(self.budget)
            | {
                "core_hours": program.core_hours,
                "core_hours_later": program.core_hours_later,
            },
            "tuning": {
                "seed": TUNING_SEED,
                "choice_nll": tuned,
                "learning_rate": rates,
                **({"figures": self.tuning_figures(tuned)} if program.tuning_figures else {}),
            },
            "grounds": grounds,
            "runs": {name: run for name, run in runs.items() if run["seeds"]},
            "seconds": self.seconds(),
            "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
            "threads": torch.get_num_threads(),
            "versions": {m.__name__: m.__version__ for m in (moe_kernels, torch, transformers)},
            **program.facts,
        }

    def seconds(self) -> float:
        """Of runs and grounds; what they had to make first, such as a base, is part of theirs."""
        kept = ("run-", "ground-")
        return sum(s for name, s in self.stages.seconds.items() if name.startswith(kept))

    def remake(self, published: dict[str, Any]) -> None:
        """Makes some runs of a page again, by its learning rates, and prints both losses.

        Raises:
            ValueError: a loss is off by more than REMADE, or text changed where it had not.
        """
        seed, off = SEEDS[0], []
        listing = Table(
            "run", "loss on the page", "made again", "text logits changed", title=f"seed {seed}"
        )
        for name in self.program.quick_runs:
            run = self.program.runs[name]
            there = published["runs"][name]["seeds"][str(seed)]
            again = self.result(name, run, seed, there["lr"])
            losses = there["test_nll"], again["test_nll"]
            changed, before = (
                result["text"]["logits_changed_by_training"] for result in (again, there)
            )
            listing.add_row(name, f"{losses[0]:.4f}", f"{losses[1]:.4f}", f"{changed:,}")
            if abs(losses[0] - losses[1]) > REMADE or (changed > 0) != (before > 0):
                off.append(name)
        console.print(listing)
        if off:
            raise ValueError(f"{', '.join(off)}: not what the page says, to {REMADE} nats a token")


def tuning_name(trains: str) -> str:
    return "tune-" + re.sub("[^a-z0-9]+", "-", trains)


def sweep_parser(name: str, description: str, runs: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", help=f"default: {' '.join(map(str, SEEDS))}")
    add("--runs", nargs="+", choices=runs, metavar="NAME", help="default: all")
    add("--remake", action="store_true", help="a few runs of the page again, to compare")
    add("--quick", action="store_true", help="one seed, short, and few runs")
    add("--page", action="store_true", help="write the page from the JSON, run nothing")
    add("--no-cost", action="store_true", help="without what a step costs, for a busy machine")
    add("--results", type=Path, help="folder of JSON and page; default: docs/results")
    add("--out", type=Path, help=f"folder of the runs; default: out/{name}")
    return parser


def would_lose(file: Path, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Runs of a file that these runs and seeds are without."""
    there = json.loads(file.read_text())["runs"] if file.exists() else {}
    return [
        f"{name} of seed {seed}"
        for name, run in there.items()
        for seed in run["seeds"]
        if name not in names or int(seed) not in seeds
    ]


def run_program(program: Program, given: argparse.Namespace) -> int:
    """given: of :func:`sweep_parser`; the exit code"""
    kind = "-quick" if given.quick else "-remade" if given.remake else ""
    out = given.out or Path("out") / (program.name + kind)
    results = given.results or (out if given.quick else RESULTS)
    seeds = given.seeds or SEEDS[: 1 if given.quick else None]
    names = given.runs or list(program.quick_runs if given.quick else program.runs)
    published = results / f"{program.name}.json"
    if not (given.page or given.remake) and (lost := would_lose(published, names, seeds)):
        if given.results:
            console.print(
                f"error: {published} has {lost[0]}, which this command leaves out; give --results "
                "another folder",
                markup=False, soft_wrap=True,
            )  # fmt: skip
            return 1
        results = out
        console.print(
            f"{published} has {lost[0]}, which this command leaves out: the page goes to {out}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    file = results / f"{program.name}.json"

    def work() -> None:
        if given.remake:
            published = json.loads(file.read_text())
            return Sweep(program, program.budget, out).remake(published)
        if not given.page:
            budget = program.quick_budget if given.quick else program.budget
            measured = Sweep(program, budget, out).everything(seeds, names, not given.no_cost)
            write_text(file, json.dumps(measured) + "\n")
        program.write_page(file, results)
        console.print(f"written to {results}", markup=False)

    return exit_code(work)
