"""Study of expert redundancy: its runs, their budget, and what its JSON keeps of a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_kernels.programs.shared.cli import option, parse
from moe_kernels.programs.shared.stages import model_identity
from moe_kernels.programs.shared.text_model import TextModelSettings
from studies.adapters import describe_model, record_look
from studies.redundancy.plots import draw_pictures
from studies.redundancy.runs import (
    FIXED_LOSS,
    WINDOW,
    Budget,
    OwnRateRun,
    Run,
    Setup,
    measure_run,
)
from studies.redundancy.tables import BLOCKS
from studies.step_cost import measure_cost
from studies.sweep import SEEDS, Study, SweepOptions, pick, run_study, runs_option

EMOJI_SEEDS, REAL_SEEDS, REAL_STEPS = (0, 1, 2), (0, 1), 80
# Budget fixed in advance, and what was added after the first seed.
CORE_HOURS, CORE_HOURS_LATER = 3.5, 0.5
LEARNING_RATES = (1e-3, 3e-3, 8e-3, 2e-2)
# Runs that are compared have about as many trained parameters a layer. Of the dense parent: 57,344
# (16 experts at rank 8), 56,320 (8 at rank 11), 57,344 (the whole at rank 16) and 57,216 (a copy of
# 149 neurons). Of the OLMoE: 114,688 (rank 16), 114,432 (a copy of 298 neurons), and a mean of
# 118,008 (19 added experts in four layers, with their calibrations).
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
    "own-rate-plora": OwnRateRun(),
    "own-rate-experts": OwnRateRun(targets=("experts",)),
    "own-rate-copy": OwnRateRun(method="copy", copy_neurons=298),
    "own-rate-added-experts": OwnRateRun(method="added_experts", added_experts=(5, 5, 5, 4)),
    "source-dense": OwnRateRun(base="2x2", targets=("experts",), r=16),
    "source-8x6": OwnRateRun(base="8x6", targets=("experts",), r=11),
    "source-16x4": OwnRateRun(base="16x4", targets=("experts",), r=8),
    "source-copy": OwnRateRun(base="2x2", method="copy", copy_neurons=149),
    # One rate and one seed: these showed that added rows need a rate of their own.
    "shared-rate-dense": Run(base="2x2", targets=("experts",), r=16),
    "shared-rate-8x6": Run(base="8x6", targets=("experts",), r=11),
    "shared-rate-16x4": Run(base="16x4", targets=("experts",), r=8),
    "shared-rate-copy": Run(base="2x2", method="copy", copy_neurons=149),
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
    # Learning rates are not tuned, which would take longer than the runs. Full fine-tuning needs
    # float32.
    "real-plora": Run(base="real", steps=REAL_STEPS, lr=1e-3),
    "real-rows": Run(base="real", method="rows", steps=REAL_STEPS, lr=1e-2),
    "real-all-tokens": Run(base="real", method="all_tokens", steps=REAL_STEPS, lr=1e-3),
    "real-full": Run(base="real", method="full", steps=REAL_STEPS, lr=1e-3, dtype="float32"),
    "real-full-slow": Run(base="real", method="full", steps=REAL_STEPS, lr=2e-4, dtype="float32"),
}
QUICK_RUNS = ("plora", "all-tokens", "rows", "init-gromov_wasserstein")
QUICK = Budget(
    text=TextModelSettings(
        vocab_size=320, hidden_size=64, experts=8, experts_per_token=2, intermediate_size=32,
        text_steps=60,
    ),
    dense_neurons=256, heal_steps=10, images=1000, held_out=200, digit_codes=32, steps=60,
    samples_per_caption=2,
)  # fmt: skip


def tuned(run: Run) -> Run:
    return type(run)(
        method=run.method, targets=run.targets, copy_neurons=run.copy_neurons,
        added_experts=run.added_experts,
    )  # fmt: skip


def runs_with(real: Path | None, emoji: Path | None) -> dict[str, Run]:
    """Return the runs without those that need an absent model or absent emoji."""
    return {
        name: run for name, run in RUNS.items()
        if (real or run.base != "real") and (emoji or run.data != "emoji")
    }  # fmt: skip


def study(real: Path | None, real_name: str, emoji: Path | None) -> Study:
    """real, emoji: as in :class:`Setup`; runs that need an absent one are left out"""

    def identity(run: Run) -> dict[str, Any]:
        inputs = {
            "real": real if run.base == "real" else None,
            "emoji": emoji if run.data == "emoji" else None,
        }
        return {name: model_identity(str(folder)) for name, folder in inputs.items() if folder}

    return Study(
        name="redundancy", runs=runs_with(real, emoji), quick_runs=QUICK_RUNS,
        budget=Budget(), quick_budget=QUICK, learning_rates=lambda run: LEARNING_RATES, tuned=tuned,
        measure=measure_run, record=record,
        setup=lambda budget, seed, stages: Setup(budget, seed, stages, real, emoji),
        cost=lambda setup: measure_cost("redundancy", setup.folder("olmoe")), core_hours=CORE_HOURS,
        core_hours_later=CORE_HOURS_LATER, blocks=BLOCKS, draw=draw_pictures,
        identity=identity, seeds_of={
            **{name: EMOJI_SEEDS for name, run in RUNS.items() if run.data == "emoji"},
            **{name: REAL_SEEDS for name, run in RUNS.items() if run.base == "real"},
            **{name: SEEDS[:1] for name in RUNS if name.startswith("shared-rate-")},
            "real-full-slow": REAL_SEEDS[:1],
        },
        facts={"real": describe_model(real, real_name)} if real else {},
    )  # fmt: skip


# --- what the JSON keeps


def record(run: Run, result: dict[str, Any], is_first: bool) -> dict[str, Any]:
    """Keep what the page shows; pictures and pairs of experts are drawn of the first seed alone."""
    kept = pick(
        result, "trained_parameters", "largest_gradient_norm", "test_nll", "lr", "seconds"
    ) | {
        "steps_to_fixed_loss": steps_to_fixed_loss(result["loss"], FIXED_LOSS[run.data]),
        "text": pick(
            result["text"], "held_out_tokens", "nll_unpatched", "nll_before_training",
            "nll_after_training", "logits_changed_by_training",
            "median_logit_difference_to_unpatched",
        ),
    }  # fmt: skip
    if run.samples:
        kept["samples"] = pick(
            result["samples"], "read_as_their_caption", "pairwise_distance",
            "nearest_training_distance", "classifier_held_out_accuracy",
        )  # fmt: skip
    if run.look:
        kept |= {key: record_look(result[key], is_first) for key in ("look_before", "look_after")}
        kept["guidance"] = {
            guidance: grade_gallery(drawn, len(result["gallery"]["captions"]))
            for guidance, drawn in result["gallery"]["guidance"].items()
        }
        if is_first:
            kept["gallery"] = result["gallery"]
    return kept


def steps_to_fixed_loss(losses: Sequence[float], fixed: float) -> int | None:
    """Steps until the mean of the last WINDOW losses is at most ``fixed``; None: it never is."""
    means = np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")
    reached = np.flatnonzero(means <= fixed)
    return int(reached[0]) + WINDOW if len(reached) else None


def grade_gallery(drawn: dict[str, Any], captions: int) -> dict[str, float]:
    """Shares of pictures that are read as their caption, and that are a training picture."""
    each = len(drawn["read"]) // captions
    copies = [a == b for a, b in zip(drawn["codes"], drawn["nearest"], strict=True)]
    return {
        "read": float(np.mean([read == i // each for i, read in enumerate(drawn["read"])])),
        "copies": float(np.mean(copies)),
    }


# --- the program


@dataclass(kw_only=True)
class RedundancyOptions(SweepOptions):
    """Study."""

    runs: list[str] | None = runs_option(RUNS)
    emoji: Path | None = option(None, "also learn these pictures", metavar="FOLDER", is_folder=True)
    real: Path | None = option(None, "also teach this model", metavar="MODEL", is_folder=True)
    real_name: str | None = option(
        None, "its name on the page; default: its folder", metavar="NAME"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        made = runs_with(self.real, self.emoji)
        if missing := [name for name in self.runs or () if name not in made]:
            raise ValueError(f"runs {missing} need --real or --emoji")


def main(description: str, arguments: list[str] | None = None) -> int:
    given = parse(RedundancyOptions, arguments, description)
    return run_study(study(given.real, given.real_name or str(given.real), given.emoji), given)
