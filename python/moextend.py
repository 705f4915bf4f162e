"""What do added experts buy, and what do they cost? Trains, measures, and writes the page.

    python python/moextend.py                    # everything: more than an hour on two cores
    python python/moextend.py --seeds 0 1 --results out/part   # some seeds, beside others
    python python/moextend.py --remake           # a few runs of the page: do they come out again?
    python python/moextend.py --quick            # one seed, short: shows that it runs
    python python/moextend.py --page             # the page alone, from the JSON

Every run is a small text model that learns to answer questions about handwritten digits, which a
frozen encoder sees, or to write source code; _moextend_runs.py says what each measures. Runs are
kept under --out, keyed by their settings: an interrupted sweep goes on where it stood, and seeds
may be run side by side before one call with all of them writes the page. Learning rates are chosen
for each kind of training on a seed of their own, by held-out questions that are not reported.
"""

from __future__ import annotations

import sys

from _moextend_cost import METHODS as COST_METHODS
from _moextend_cost import __file__ as COST_PROGRAM
from _moextend_page import NAME, write_page
from _moextend_runs import Budget, Ground, Run, measure_run
from _questions import EncoderSettings
from _redundancy_cost import measure_cost
from _sweep import Program, run_program, sweep_parser
from _text_model import TextModelSettings

# What the runs may take, set before they were made.
CORE_HOURS = 2.0
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
# Three of six layers with an expert each train 75,744 numbers, the low-rank updates 73,728; two
# experts in each of three layers, and one in each of six, about twice as many.
RUNS = {
    "gated": Run(),
    "sequence": Run(gate="sequence"),
    "published": Run(gate="none"),
    "projector": Run(method="projector"),
    "lora": Run(method="lora"),
    "lora-all-tokens": Run(method="all_tokens"),
    "full": Run(method="full"),
    **{
        f"layers-{layers}": Run(gate="sequence", layers=layers)
        for layers in ("interval", "first-half", "second-half", "random", "all")
    },
    "calibration-multiplicative": Run(gate="sequence", calibration="multiplicative"),
    "calibration-none": Run(gate="sequence", calibration=None),
    "init-mean": Run(gate="sequence", init="mean"),
    "init-random": Run(gate="sequence", init="random"),
    "two-experts": Run(gate="sequence", experts=2),
    "code-gated": Run(task="code"),
    "code-published": Run(task="code", gate="none"),
    "code-full": Run(task="code", method="full"),
}
QUICK_RUNS = ("gated", "published", "full", "layers-random", "code-gated")
QUICK = Budget(
    text=TextModelSettings(
        vocab_size=512, hidden_size=64, layers=4, experts=8, experts_per_token=2,
        intermediate_size=32, text_steps=150,
    ),
    word_questions=8000, encoder=EncoderSettings(steps=60, held_out=400), align_steps=30,
    score_steps=5, steps=30, held_out_questions=100, held_out_blocks=32,
)  # fmt: skip


def tuned(run: Run) -> Run:
    return Run(run.task, run.method, run.gate)


def main(arguments: list[str] | None = None) -> int:
    program = Program(
        name=NAME, runs=RUNS, quick_runs=QUICK_RUNS, budget=Budget(), quick_budget=QUICK,
        learning_rates=LEARNING_RATES, tuned=tuned, ground=Ground, measure=measure_run,
        write_page=write_page, core_hours=CORE_HOURS, found_before=Ground.to_dict,
        cost=lambda ground: measure_cost(ground.folder, COST_PROGRAM, COST_METHODS),
    )  # fmt: skip
    return run_program(program, sweep_parser(NAME, __doc__, RUNS).parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
