"""Study of pathways on a real base: its runs, their budget, and what its JSON keeps of a result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_kernels.programs.shared.cli import option, parse
from moe_kernels.programs.shared.options import LARGEST_SEED
from moe_kernels.programs.shared.stages import model_identity
from studies.adapters import record_look
from studies.pathways.plots import draw_pictures
from studies.pathways.runs import (
    Budget,
    Run,
    Setup,
    fall_at_end,
    mean_over_log_steps,
    measure_run,
)
from studies.pathways.tables import BLOCKS
from studies.sweep import Study, SweepOptions, pick, run_study, runs_option

SEEDS = (0, 1, 2)
CORE_HOURS = 8.0
LEARNING_RATES, ROWS_RATES = (1.5e-3, 4e-3, 1e-2, 2.5e-2), (3e-3, 1e-2, 3e-2)
RUNS = {
    "rows": Run(adapts=(), look=True),
    "attention": Run(adapts=("attention",), look=True),
    # Added when the loss at the tuned rate, which is the best of short runs, was seen to rise.
    "attention-low": Run(adapts=("attention",), lr=1.5e-3, look=True),
    "experts": Run(adapts=("experts",), look=True),
    "both": Run(look=True),
    "dense-rows": Run(base="dense", adapts=()),
    "dense-experts": Run(base="dense", adapts=("experts",)),
    "all-tokens": Run(epochs=1, all_tokens=True),
    "init-normal": Run(epochs=1),
    "init-gaussian": Run(epochs=1, init="gaussian"),
    "init-mean": Run(epochs=1, init="mean"),
    "init-permuted": Run(epochs=1, init="permuted"),
    "init-gromov_wasserstein": Run(epochs=1, init="gromov_wasserstein"),
    "lora-permuted": Run(epochs=1, lora_init="permuted"),
    "lora-gromov_wasserstein": Run(epochs=1, lora_init="gromov_wasserstein"),
}
QUICK_RUNS = ("rows", "experts", "both", "dense-experts")
QUICK = Budget(
    image_size=16, patch_size=4, codes=32, images=400, held_out=40, choice=16, steps=20, batch=8,
    tuning_steps=5, points=5, text_blocks=2, looked_at=20, captions=4, samples_per_caption=1,
    dtype="float32",
)  # fmt: skip


def learning_rates(run: Run) -> tuple[float, ...]:
    return LEARNING_RATES if run.adapts else ROWS_RATES


def tuned(run: Run) -> Run:
    return Run(base=run.base, adapts=run.adapts, tunes=True)


def study(base: Path | None, dense: Path | None) -> Study:
    """Return the study of these folders, which are those of :class:`Setup`."""

    def identity(_: Run | None) -> dict[str, Any]:
        folders = {"base": base, "dense": dense}
        return {name: model_identity(str(folder)) for name, folder in folders.items()}

    return Study(
        name="pathways", runs=RUNS, quick_runs=QUICK_RUNS, budget=Budget(),
        quick_budget=QUICK, learning_rates=learning_rates, tuned=tuned, measure=measure_run,
        record=record, describe=Setup.to_dict,
        setup=lambda budget, seed, stages: Setup(budget, seed, stages, base, dense),
        cost=None, core_hours=CORE_HOURS, blocks=BLOCKS, draw=draw_pictures, identity=identity,
        seeds=SEEDS,
    )  # fmt: skip


# --- what the JSON keeps


def record(run: Run, result: dict[str, Any], is_first: bool) -> dict[str, Any]:
    """Keep what the page shows; pairs of experts of the first seed alone."""
    kept = pick(
        result, "trained_parameters", "adapter_parameters", "largest_gradient_norm", "test_nll",
        "test_nll_by_captions", "lr", "seconds",
    ) | {
        "curve": [[step, round(loss, 4)] for step, loss in result["curve"]],
        "mean_over_log_steps": mean_over_log_steps(result["curve"]),
        "fall_at_end": fall_at_end(result["curve"]),
        "text": pick(
            result["text"], "held_out_tokens", "nll_unpatched", "nll_before_training",
            "nll_after_training", "logits_changed_by_training",
            "median_logit_difference_to_unpatched",
        ),
    }  # fmt: skip
    if run.draws:
        kept["read"] = result["read"]
    if run.look:
        kept |= {key: record_look(result[key], is_first) for key in ("look_before", "look_after")}
    return kept


# --- the program


@dataclass(kw_only=True)
class PathwaysOptions(SweepOptions):
    """Study."""

    seeds: list[int] | None = option(
        None, f"default: {' '.join(map(str, SEEDS))}", at_least=0, at_most=LARGEST_SEED
    )
    runs: list[str] | None = runs_option(RUNS)
    base: Path | None = option(
        None, "a Mixture of Experts with a shared expert", metavar="MOE", is_folder=True
    )
    dense: Path | None = option(
        None, "the dense model that it was made of", metavar="DENSE", is_folder=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.page and (self.base is None or self.dense is None):
            raise ValueError("--base and --dense are needed for anything but --page")


def main(description: str, arguments: list[str] | None = None) -> int:
    given = parse(PathwaysOptions, arguments, description)
    return run_study(study(given.base, given.dense), given)
