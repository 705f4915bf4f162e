"""Do the claims about expert redundancy hold? Trains, measures, and writes the page.

    python python/redundancy.py                    # digits: two hours of one core
    python python/redundancy.py --emoji FOLDER --real MODEL      # the whole page
    python python/redundancy.py --seeds 0 1 --results out/part   # some seeds, beside others
    python python/redundancy.py --remake           # a few runs of the page: do they come out again?
    python python/redundancy.py --quick            # one seed, short: shows that it runs
    python python/redundancy.py --page             # the page alone, from the JSON

FOLDER is the unpacked npm package emoji-datasource-twitter; MODEL a pretrained Mixture of Experts,
such as convert_dense_to_moe.py leaves.

Every run is a small text model that learns to draw digits; _redundancy_runs.py says what each
measures. Runs are kept under --out, keyed by their settings: an interrupted sweep goes on where it
stood, and seeds may be run side by side before one call with all of them writes the page. Learning
rates are chosen for each kind of training on a seed of their own, by held-out pictures that are not
reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from _redundancy_cost import measure_cost
from _redundancy_page import write_page
from _redundancy_runs import Budget, Ground, Run, measure_run
from _runs import NUM_EXPERTS, Stages, console, exit_code, write_text
from _text_model import TextModelSettings
from rich.table import Table
from transformers import AutoConfig

import moe_kernels

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SEEDS = (0, 1, 2, 3, 4)
REAL_SEEDS, REAL_STEPS = (0, 1), 80
FEWER_SEEDS = {"real-full-slow": (0,)}
# What the runs may take, set before they were made.
CORE_HOURS = 3.5
TUNING_SEED = 1000
LEARNING_RATES = (1e-3, 3e-3, 8e-3, 2e-2)
# At equal trained parameters: 16 experts at rank 8, 8 at rank 11 and the whole at rank 16 train
# 57,344, 56,320 and 57,344 numbers a layer, a copy of 149 neurons 57,216. On the OLMoE, rank 16
# trains 114,688, a copy of 298 neurons 114,432, and 19 experts in four layers 117,344 in the mean.
RUNS = {
    "plora": Run(samples=True, look=True),
    "plora-attention": Run(targets=("attention",), samples=True),
    "plora-experts": Run(targets=("experts",), samples=True),
    "all-tokens": Run(method="all_tokens", samples=True),
    "full": Run(method="full", samples=True),
    "rows": Run(method="rows", samples=True),
    "copy": Run(method="copy", copy_neurons=298, samples=True),
    "added-experts": Run(method="added_experts", added_experts=(5, 5, 5, 4), samples=True),
    **{f"rank-{r}": Run(r=r) for r in (4, 32, 128)},
    "source-dense": Run(base="2x2", targets=("experts",), r=16),
    "source-8x6": Run(base="8x6", targets=("experts",), r=11),
    "source-16x4": Run(base="16x4", targets=("experts",), r=8),
    "source-copy": Run(base="2x2", method="copy", copy_neurons=149),
    **{f"layer-{i}": Run(targets=("experts",), layers=(i,)) for i in range(4)},
    **{f"init-{init}": Run(init=init) for init in ("gaussian", "mean", "permuted")},
    "init-gromov_wasserstein": Run(init="gromov_wasserstein"),
    "lora-gromov_wasserstein": Run(lora_init="gromov_wasserstein"),
    "lora-permuted": Run(lora_init="permuted"),
    "few-normal": Run(pictures=500),
    **{f"few-{init}": Run(init=init, pictures=500) for init in ("gaussian", "permuted")},
    "few-gromov_wasserstein": Run(init="gromov_wasserstein", pictures=500),
    **{
        f"init-gromov_wasserstein-{name}": Run(init="gromov_wasserstein", **options)
        for name, options in {
            "exact": {"solver": "exact"},
            "cosine": {"feature_metric": "cosine"},
            "euclidean": {"row_metric": "euclidean"},
            "embedding": {"init_where": "embedding"},
            "head": {"init_where": "head"},
        }.items()
    },
    "emoji-plora": Run(data="emoji"),
    "emoji-rows": Run(data="emoji", method="rows"),
    "emoji-all-tokens": Run(data="emoji", method="all_tokens"),
    "emoji-full": Run(data="emoji", method="full"),
    "emoji-gromov_wasserstein": Run(data="emoji", init="gromov_wasserstein"),
    "emoji-permuted": Run(data="emoji", init="permuted"),
    # Learning rates not tuned: that would take longer than the runs. In float32 what trains whole.
    "real-plora": Run(base="real", steps=REAL_STEPS, lr=1e-3),
    "real-rows": Run(base="real", method="rows", steps=REAL_STEPS, lr=1e-2),
    "real-all-tokens": Run(base="real", method="all_tokens", steps=REAL_STEPS, lr=1e-3),
    "real-full": Run(base="real", method="full", steps=REAL_STEPS, lr=1e-3, dtype="float32"),
    "real-full-slow": Run(base="real", method="full", steps=REAL_STEPS, lr=2e-4, dtype="float32"),
}
QUICK_RUNS = ("plora", "all-tokens", "rows", "init-gromov_wasserstein")
REMADE_SEED = 0
QUICK = Budget(
    text=TextModelSettings(
        vocab_size=320, hidden_size=64, experts=8, experts_per_token=2, intermediate_size=32,
        text_steps=60,
    ),
    dense_neurons=256, heal_steps=10, images=1000, held_out=200, digit_codes=32, steps=60,
    samples_per_caption=2,
)  # fmt: skip


class Sweep:
    """real, emoji: as in :class:`Ground`"""

    def __init__(self, budget: Budget, out: Path, real: Path | None, emoji: Path | None):
        self.budget, self.stages = budget, Stages(out / "stages")
        self.real, self.emoji = real, emoji
        self.grounds: dict[int, Ground] = {}

    def ground(self, seed: int) -> Ground:
        if seed not in self.grounds:
            self.grounds = {seed: Ground(self.budget, seed, self.stages, self.real, self.emoji)}
        return self.grounds[seed]

    def result(self, name: str, run: Run, seed: int, lr: float) -> dict[str, Any]:
        inputs = dataclasses.asdict(run) | {"seed": seed, "lr": lr}
        inputs |= self.ground(seed).identity(run)
        inputs["budget"] = dataclasses.asdict(self.budget)
        stage = f"run-{seed}-{name}"
        self.stages.run(stage, inputs, lambda place: measure_run(self.ground(seed), run, lr, place))
        return self.stages.results[stage] | {"seconds": self.stages.seconds[stage]}

    def tune(self, families: dict[str, Run]) -> dict[str, dict[str, float]]:
        """Held-out loss on the choice pictures, by what trains and learning rate."""
        tuned = {}
        for trains, run in families.items():
            name = "tune-" + trains.replace(",", "").replace(" ", "-")
            losses = [self.result(f"{name}-{lr:g}", run, TUNING_SEED, lr) for lr in LEARNING_RATES]
            tuned[trains] = {
                f"{lr:g}": result["choice_nll"]
                for lr, result in zip(LEARNING_RATES, losses, strict=True)
            }
        return tuned

    def cost(self) -> dict[str, Any]:
        """On the tuning seed's base, alone on the machine if the figures are to mean anything."""
        base = self.ground(TUNING_SEED).folder("olmoe")
        self.stages.run("cost", {"base": base.name}, lambda place: measure_cost(base))
        return self.stages.results["cost"]


def chosen(tuned: dict[str, dict[str, float]]) -> dict[str, float]:
    return {trains: float(min(losses, key=losses.get)) for trains, losses in tuned.items()}


def sweep(seeds: list[int], names: list[str], runner: Sweep) -> dict[str, Any]:
    """Runs what is missing; returns everything as the JSON holds it."""
    # Adapters of attention want another rate than those of experts, or than rows alone.
    families = {
        RUNS[name].trains: Run(
            method=RUNS[name].method, targets=RUNS[name].targets,
            copy_neurons=RUNS[name].copy_neurons, added_experts=RUNS[name].added_experts,
        )
        for name in reversed(names) if RUNS[name].lr is None
    }  # fmt: skip
    tuned = runner.tune(families)
    rates = chosen(tuned)
    runs: dict[str, Any] = {
        name: {"settings": dataclasses.asdict(RUNS[name]), "seeds": {}} for name in names
    }
    for seed in seeds:
        for name in names:
            run = RUNS[name]
            if seed in FEWER_SEEDS.get(name, REAL_SEEDS if run.base == "real" else seeds):
                lr = run.lr or rates[run.trains]
                runs[name]["seeds"][str(seed)] = runner.result(name, run, seed, lr)
    return {
        "cost": runner.cost(),
        "budget": dataclasses.asdict(runner.budget) | {"core_hours": CORE_HOURS},
        "tuning": {"seed": TUNING_SEED, "choice_nll": tuned, "learning_rate": rates},
        "runs": {name: run for name, run in runs.items() if run["seeds"]},
        "real": describe(runner.real) if runner.real else None,
        "seconds": sum(runner.stages.seconds.values()),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (moe_kernels, torch, transformers)},
    }


def remake(published: Path, out: Path) -> None:
    """Makes some runs of the page again, by its learning rates, and prints both losses."""
    data = json.loads(published.read_text())
    runner = Sweep(Budget(), out, None, None)
    head = ("run", "image loss on the page", "made again", "text logits changed")
    listing = Table(*head, title=f"seed {REMADE_SEED}")
    for name in QUICK_RUNS:
        there = data["runs"][name]["seeds"][str(REMADE_SEED)]["test_nll"]
        lr = data["tuning"]["learning_rate"][RUNS[name].trains]
        again = runner.result(name, RUNS[name], REMADE_SEED, lr)
        changed = again["text"]["logits_changed_by_training"]
        listing.add_row(name, f"{there:.4f}", f"{again['test_nll']:.4f}", f"{changed:,}")
    console.print(listing)


def describe(folder: Path) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(folder)
    experts = next(getattr(config, name) for name in NUM_EXPERTS if hasattr(config, name))
    return {
        "name": folder.parent.name if folder.name == "model" else folder.name,
        "layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
        "experts": experts, "top_k": config.num_experts_per_tok,
    }  # fmt: skip


def available(real: Path | None, emoji: Path | None) -> list[str]:
    """Names of the runs whose model and pictures were given."""
    return [
        name for name, run in RUNS.items()
        if (real or run.base != "real") and (emoji or run.data != "emoji")
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--emoji", type=Path, metavar="FOLDER", help="also learn these pictures")
    add("--real", type=Path, metavar="MODEL", help="also teach this model (seeds 0 and 1)")
    add("--seeds", type=int, nargs="+", help=f"default: {' '.join(map(str, SEEDS))}")
    add("--runs", nargs="+", choices=RUNS, metavar="NAME", help="default: all")
    add("--quick", action="store_true", help="one seed, short, and few runs")
    add("--remake", action="store_true", help="a few runs of the page again, in ten minutes")
    add("--page", action="store_true", help="write the page from the JSON, run nothing")
    add("--results", type=Path, help="folder of JSON and page; default: docs/results")
    add("--out", type=Path, help="folder of the runs; default: out/redundancy")
    given = parser.parse_args(arguments)
    kind = "-quick" if given.quick else "-remade" if given.remake else ""
    out = given.out or Path(f"out/redundancy{kind}")
    results = given.results or (out if given.quick else RESULTS)
    can = available(given.real, given.emoji)
    names = given.runs or (list(QUICK_RUNS) if given.quick else can)
    if cannot := [name for name in names if name not in can]:
        parser.error(f"runs {cannot} need --real or --emoji")
    for folder in filter(None, (given.real, given.emoji)):
        if not folder.is_dir():
            parser.error(f"there is no folder {folder}")

    def work() -> None:
        if given.remake:
            return remake(results / "redundancy.json", out)
        if not given.page:
            seeds = given.seeds or ([SEEDS[0]] if given.quick else list(SEEDS))
            runner = Sweep(QUICK if given.quick else Budget(), out, given.real, given.emoji)
            measured = sweep(seeds, names, runner)
            write_text(results / "redundancy.json", json.dumps(measured) + "\n")
        write_page(results / "redundancy.json", results)
        console.print(f"written to {results}", markup=False)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
