"""Study of MoExtend: its runs, their budget, and what its JSON keeps of a result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moe_kernels.programs.shared.cli import parse
from moe_kernels.programs.shared.encoder import EncoderSettings
from moe_kernels.programs.shared.text_model import TextModelSettings
from studies.moextend.plots import draw_pictures
from studies.moextend.runs import DRAWS, Budget, Run, Setup, measure_run
from studies.moextend.tables import BLOCKS
from studies.step_cost import measure_cost
from studies.sweep import Study, SweepOptions, pick, run_study, runs_option

# Budget fixed in advance: 29 runs on each of five seeds and 63 more to choose learning rates, at 20
# to 30 seconds each, and five minutes for the setup of each of six seeds.
CORE_HOURS = 2.5
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
# For methods that change text: forgetting grows with the rate, and the page shows both over it.
WIDE_LEARNING_RATES = (1e-4, 3e-4, *LEARNING_RATES)
SLOW = 3e-4
# A gate by sequence computes the same on the task as no gate: all of its tokens may choose.
BY_SEQUENCE = Run(gate="sequence")
PUBLISHED = Run(gate="none", init="most_selected_tuned")
# One expert in half of the layers has as many parameters as the low-rank updates, and two experts
# in half of the layers as many as one in every layer, within 5 %: a test checks it.
RUNS = {
    "gated": Run(),
    "sequence": BY_SEQUENCE,
    "published": PUBLISHED,
    "no-gate": Run(gate="none"),
    "projector": Run(method="projector"),
    "lora": Run(method="lora"),
    "lora-sequence": Run(method="lora", gate="sequence"),
    "lora-all-tokens": Run(method="all_tokens"),
    "full": Run(method="full"),
    "full-slow": Run(method="full", lr=SLOW),
    **{
        f"layers-{layers}": replace(BY_SEQUENCE, layers=layers)
        for layers in ("interval", "first-half", "second-half", *DRAWS, "all")
    },
    "calibration-multiplicative": replace(BY_SEQUENCE, calibration="multiplicative"),
    "calibration-none": replace(BY_SEQUENCE, calibration=None),
    "init-mean": replace(BY_SEQUENCE, init="mean"),
    "init-random": replace(BY_SEQUENCE, init="random"),
    "two-experts": replace(BY_SEQUENCE, experts=2),
    "code-gated": Run(task="code"),
    "code-published": replace(PUBLISHED, task="code"),
    "code-no-gate": Run(task="code", gate="none"),
    "code-lora": Run(task="code", method="lora"),
    "code-lora-all-tokens": Run(task="code", method="all_tokens"),
    "code-full": Run(task="code", method="full"),
    "code-layers-random": Run(task="code", layers=DRAWS[0]),
}
QUICK_RUNS = ("gated", "published", "full", "layers-random-a", "code-gated")
QUICK = Budget(
    text=TextModelSettings(
        vocab_size=512, hidden_size=64, layers=4, experts=8, experts_per_token=2,
        intermediate_size=32, text_steps=150,
    ),
    word_questions=8000, encoder=EncoderSettings(steps=60, held_out=400), align_steps=30,
    score_steps=5, steps=30, held_out_questions=100, held_out_blocks=32,
)  # fmt: skip


def learning_rates(run: Run) -> tuple[float, ...]:
    return WIDE_LEARNING_RATES if run.changes_text else LEARNING_RATES


# --- what the JSON keeps


def record(run: Run, result: dict[str, Any], is_first: bool) -> dict[str, Any]:
    """Keep what the page shows."""
    kept = pick(
        result, "layers", "trained_parameters", "test", "test_nll", "lr", "seconds",
        "text_nll_at_step_0", "max_abs_logit_difference_by_patching", "plain",
    )  # fmt: skip
    kept |= {"text": record_text(result), "words": pick(result["words"], "accuracy")}
    if "disturbance" in result:
        kept["disturbance"] = {
            rows: pick(found, "output_change", "changed_rows", "rerouted_rows")
            for rows, found in result["disturbance"].items()
        }
    return kept


def record_text(result: dict[str, Any]) -> dict[str, Any]:
    return pick(
        result["text"], "held_out_tokens", "nll_before_training", "nll_after_training",
        "logits_changed_by_training",
    )  # fmt: skip


def record_tuning(result: dict[str, Any]) -> dict[str, Any]:
    return {"test_nll": result["test_nll"], "text": record_text(result)}


# --- the program


def study() -> Study:
    return Study(
        name="moextend", runs=RUNS, quick_runs=QUICK_RUNS, budget=Budget(), quick_budget=QUICK,
        learning_rates=learning_rates, tuned=lambda run: run.decides, setup=Setup,
        measure=measure_run, record=record, core_hours=CORE_HOURS, blocks=BLOCKS,
        draw=draw_pictures, describe=Setup.to_dict, record_tuning=record_tuning,
        cost=lambda setup: measure_cost("moextend", setup.folder),
    )  # fmt: skip


@dataclass(kw_only=True)
class MoExtendOptions(SweepOptions):
    """Study."""

    runs: list[str] | None = runs_option(RUNS)


def main(description: str, arguments: list[str] | None = None) -> int:
    return run_study(study(), parse(MoExtendOptions, arguments, description))
