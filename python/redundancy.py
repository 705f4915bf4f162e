"""Do the claims about expert redundancy hold? Trains, measures, and writes the page.

    python python/redundancy.py                    # digits: two hours of one core
    python python/redundancy.py --emoji FOLDER --real MODEL      # the whole page
    python python/redundancy.py --seeds 0 1 --results out/part   # some seeds, beside others
    python python/redundancy.py --remake           # a few runs of the page: do they come out again?
    python python/redundancy.py --quick            # one seed, short: shows that it runs
    python python/redundancy.py --page             # the page alone, from the JSON

FOLDER is the unpacked npm package emoji-datasource-twitter; MODEL a pretrained Mixture of Experts,
such as convert_dense_to_moe.py leaves.

Every run is a small text model that learns to draw digits; studies/redundancy/runs.py says what
each measures. Runs are kept under --out, keyed by their settings: an interrupted sweep goes on
where it stood, and seeds may be run side by side before one call with all of them writes the page.
Learning rates are chosen for each kind of training on a seed of their own, by held-out pictures
that are not reported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from shared.models import count_experts
from shared.stages import model_identity
from shared.text_model import TextModelSettings
from studies.redundancy.page import NAME, write_page
from studies.redundancy.runs import Budget, Ground, OwnRateRun, Run, measure_run
from studies.step_cost import measure_cost
from studies.sweep import SEEDS, Program, run_program, sweep_parser
from transformers import AutoConfig

EMOJI_SEEDS, REAL_SEEDS, REAL_STEPS = (0, 1, 2), (0, 1), 80
# What the runs may take, set before they were made.
CORE_HOURS, CORE_HOURS_LATER = 3.5, 0.5
LEARNING_RATES = (1e-3, 3e-3, 8e-3, 2e-2)
# At equal trained parameters: 16 experts at rank 8, 8 at rank 11 and the whole at rank 16 train
# 57,344, 56,320 and 57,344 numbers a layer, a copy of 149 neurons 57,216. On the OLMoE, rank 16
# trains 114,688, a copy of 298 neurons 114,432, and 19 experts in four layers with their
# calibrations 118,008 in the mean.
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
    # At one rate, on one seed: they showed that rows need their own.
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
    # Learning rates not tuned: that would take longer than the runs. In float32 what trains whole.
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


def describe(folder: Path, name: str) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(folder)
    return {
        "name": name, "layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
        "experts": count_experts(config), "top_k": config.num_experts_per_tok,
    }  # fmt: skip


def program_for(real: Path | None, real_name: str, emoji: Path | None) -> Program:
    """real, emoji: as in :class:`Ground`; runs that need what is not there are left out"""
    runs = {
        name: run for name, run in RUNS.items()
        if (real or run.base != "real") and (emoji or run.data != "emoji")
    }  # fmt: skip

    def identity(run: Run) -> dict[str, Any]:
        inputs = {
            "real": real if run.base == "real" else None,
            "emoji": emoji if run.data == "emoji" else None,
        }
        return {name: model_identity(str(folder)) for name, folder in inputs.items() if folder}

    return Program(
        name=NAME, runs=runs, quick_runs=QUICK_RUNS, budget=Budget(), quick_budget=QUICK,
        learning_rates=LEARNING_RATES, tuned=tuned, measure=measure_run, write_page=write_page,
        ground=lambda budget, seed, stages: Ground(budget, seed, stages, real, emoji),
        cost=lambda ground: measure_cost(ground.folder("olmoe")), core_hours=CORE_HOURS,
        core_hours_later=CORE_HOURS_LATER,
        identity=identity, seeds_of={
            **{name: EMOJI_SEEDS for name, run in RUNS.items() if run.data == "emoji"},
            **{name: REAL_SEEDS for name, run in RUNS.items() if run.base == "real"},
            **{name: SEEDS[:1] for name in RUNS if name.startswith("shared-rate-")},
            "real-full-slow": REAL_SEEDS[:1],
        },
        facts={"real": describe(real, real_name)} if real else {},
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = sweep_parser(NAME, __doc__, RUNS)
    add = parser.add_argument
    add("--emoji", type=Path, metavar="FOLDER", help="also learn these pictures")
    add("--real", type=Path, metavar="MODEL", help="also teach this model")
    add("--real-name", metavar="NAME", help="what the page calls it; default: its folder")
    given = parser.parse_args(arguments)
    for folder in filter(None, (given.real, given.emoji)):
        if not folder.is_dir():
            parser.error(f"there is no folder {folder}")
    program = program_for(given.real, given.real_name or str(given.real), given.emoji)
    if cannot := [name for name in given.runs or () if name not in program.runs]:
        parser.error(f"runs {cannot} need --real or --emoji")
    return run_program(program, given)


if __name__ == "__main__":
    sys.exit(main())
