"""Do the claims about expert redundancy hold? Trains, measures, and writes the page.

    python python/redundancy.py                    # everything: hours on two cores
    python python/redundancy.py --seeds 0 1 --results out/part   # some seeds, beside others
    python python/redundancy.py --quick            # one seed, short: shows that it runs
    python python/redundancy.py --page             # the page alone, from the JSON

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
from _runs import Stages, console, write_text
from _text_model import TextModelSettings

import moe_kernels

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 1000
LEARNING_RATES = (1e-3, 3e-3, 8e-3, 2e-2)
# At equal trained parameters: 16 experts at rank 8, 8 at rank 11 and the whole at rank 16 train
# 57,344, 56,320 and 57,344 numbers a layer, a copy of 149 neurons 57,216. On the OLMoE, rank 16
# trains 114,688, a copy of 298 neurons 114,432.
RUNS = {
    "plora": Run(samples=True, look=True),
    "plora-attention": Run(targets=("attention",), samples=True),
    "plora-experts": Run(targets=("experts",), samples=True),
    "all-tokens": Run(method="all_tokens", samples=True),
    "full": Run(method="full", samples=True),
    "rows": Run(method="rows", samples=True),
    "copy": Run(method="copy", copy_neurons=298, samples=True),
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
    "init-gromov_wasserstein-exact": Run(init="gromov_wasserstein", solver="exact"),
}
QUICK_RUNS = ("plora", "all-tokens", "rows", "init-gromov_wasserstein")
QUICK = Budget(
    text=TextModelSettings(
        vocab_size=320, hidden_size=64, experts=8, experts_per_token=2, intermediate_size=32,
        text_steps=60,
    ),
    dense_neurons=256, heal_steps=10, images=1000, held_out=200, num_codes=32, steps=60,
    samples_per_caption=2,
)  # fmt: skip


class Sweep:
    def __init__(self, budget: Budget, out: Path):
        self.budget, self.stages = budget, Stages(out / "stages")
        self.grounds: dict[int, Ground] = {}

    def ground(self, seed: int) -> Ground:
        if seed not in self.grounds:
            self.grounds = {seed: Ground(self.budget, seed, self.stages)}
        return self.grounds[seed]

    def result(self, name: str, run: Run, seed: int, lr: float) -> dict[str, Any]:
        inputs = dataclasses.asdict(run) | {"seed": seed, "lr": lr}
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


def sweep(seeds: list[int], names: list[str], budget: Budget, out: Path) -> dict[str, Any]:
    """Runs what is missing; returns everything as the JSON holds it."""
    runner = Sweep(budget, out)
    # Adapters of attention want another rate than those of experts, or than rows alone.
    families = {
        RUNS[name].trains: Run(
            method=RUNS[name].method, targets=RUNS[name].targets,
            copy_neurons=RUNS[name].copy_neurons,
        )
        for name in reversed(names)
    }  # fmt: skip
    tuned = runner.tune(families)
    rates = chosen(tuned)
    runs: dict[str, Any] = {
        name: {"settings": dataclasses.asdict(RUNS[name]), "seeds": {}} for name in names
    }
    for seed in seeds:
        for name in names:
            run = RUNS[name]
            runs[name]["seeds"][str(seed)] = runner.result(name, run, seed, rates[run.trains])
    return {
        "cost": runner.cost(),
        "budget": dataclasses.asdict(budget),
        "tuning": {"seed": TUNING_SEED, "choice_nll": tuned, "learning_rate": rates},
        "runs": runs,
        # Of runs, tuning too; what a run had to make first is part of it.
        "seconds": sum(s for name, s in runner.stages.seconds.items() if name.startswith("run-")),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (moe_kernels, torch, transformers)},
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", help=f"default: {' '.join(map(str, SEEDS))}")
    add("--runs", nargs="+", choices=RUNS, metavar="NAME", help="default: all")
    add("--quick", action="store_true", help="one seed, short, and few runs")
    add("--page", action="store_true", help="write the page from the JSON, run nothing")
    add("--results", type=Path, help="folder of JSON and page; default: docs/results")
    add("--out", type=Path, help="folder of the runs; default: out/redundancy")
    given = parser.parse_args(arguments)
    out = given.out or Path("out/redundancy-quick" if given.quick else "out/redundancy")
    results = given.results or (out if given.quick else RESULTS)
    if not given.page:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        seeds = given.seeds or ([SEEDS[0]] if given.quick else list(SEEDS))
        names = given.runs or (list(QUICK_RUNS) if given.quick else list(RUNS))
        try:
            measured = sweep(seeds, names, QUICK if given.quick else Budget(), out)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
            return 130
        write_text(results / "redundancy.json", json.dumps(measured) + "\n")
    write_page(results / "redundancy.json", results)
    console.print(f"written to {results}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
