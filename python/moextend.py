"""What do added experts buy, and what do they cost? Trains, measures, and writes the page.

    python python/moextend.py                    # everything: two hours of a core
    python python/moextend.py --seeds 0 1 --results out/part   # some seeds, beside others
    python python/moextend.py --remake           # a few runs of the page: do they come out again?
    python python/moextend.py --quick            # one seed, short: shows that it runs
    python python/moextend.py --page             # the page alone, from the JSON

Every run is a small text model that learns to answer questions about handwritten digits, which a
frozen encoder sees, or to write source code; studies/moextend/runs.py says what each measures. Runs
are kept under --out, keyed by their settings: an interrupted sweep goes on where it stood; seeds
may be run side by side before one call with all of them writes the page. Learning rates are chosen
for each kind of training on a seed of their own, by held-out questions that are not reported.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from shared.encoder import EncoderSettings
from shared.text_model import TextModelSettings
from studies.moextend.page import NAME, write_page
from studies.moextend.runs import DRAWS, Budget, Ground, Run, measure_run
from studies.moextend.step_cost import METHODS as COST_METHODS
from studies.step_cost import measure_cost
from studies.sweep import Program, run_program, sweep_parser

# What the runs may take, set before they were made: on five seeds 29 runs each, 63 more to choose
# learning rates, all at 20 to 30 seconds, and five minutes for what each of six seeds stands on.
CORE_HOURS = 2.5
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
# Of what changes text: forgetting grows with the rate, so that the page draws both over it.
WIDE_LEARNING_RATES = (1e-4, 3e-4, *LEARNING_RATES)
SLOW = 3e-4
# By sequence: without a gate the same happens on the task, where all tokens may choose then.
BY_SEQUENCE = Run(gate="sequence")
PUBLISHED = Run(gate="none", init="most_selected_tuned")
# Half of the layers with an expert each train as many parameters as the low-rank updates, and two
# experts in half of the layers as many as one in each, within 5 %: a test holds them to it.
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


def main(arguments: list[str] | None = None) -> int:
    program = Program(
        name=NAME, runs=RUNS, quick_runs=QUICK_RUNS, budget=Budget(), quick_budget=QUICK,
        learning_rates=learning_rates, tuned=lambda run: run.decides, ground=Ground,
        measure=measure_run, write_page=write_page, core_hours=CORE_HOURS,
        found_before=Ground.to_dict, tuning_figures=("test_nll", "text"),
        cost=lambda ground: measure_cost(ground.folder, "studies.moextend.step_cost", COST_METHODS),
    )  # fmt: skip
    return run_program(program, sweep_parser(NAME, __doc__, RUNS).parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
