"""Verdicts on the claims of arXiv 2503.22517, out of the JSON of pathways.py."""

from functools import partial
from typing import Any

import numpy as np

from studies import looks, report
from studies.report import Block, Results
from studies.starts import GW, Starts

_CONTROLS = ("init-normal", "init-gaussian", "init-mean", "init-permuted")
SPEED = "mean_over_log_steps"
STARTS = Starts(
    {
        "rows": (*_CONTROLS, f"init-{GW}"),
        "adapters": ("init-normal", "lora-permuted", f"lora-{GW}"),
    },
    ("speed", SPEED),
)


def is_masked(settings: dict[str, Any]) -> bool:
    """Return whether a run trains on image tokens alone."""
    return not settings["all_tokens"]


def more_than_rows(data: Results, run: str, rows: str, other: str, other_rows: str) -> np.ndarray:
    """Loss that a run gains on its rows alone, less what another gains on its own, one a seed.

    Below zero: the first gains more.
    """
    losses = [report.seeds_of(data, name) for name in (run, rows, other, other_rows)]
    common = [seed for seed in losses[0] if all(seed in each for each in losses)]
    ours, alone, theirs, without = (
        np.array([each[seed]["test_nll"] for seed in common]) for each in losses
    )
    return (ours - alone) - (theirs - without)


def more_specialised(data: Results, run: str) -> np.ndarray:
    """Specialised experts after less before, one number a seed."""
    return looks.specialised(data, run, "after") - looks.specialised(data, run, "before")


def parts_more(data: Results, run: str, other: str) -> np.ndarray:
    """Growth of the divergence of loads by a run less that by another, one number a seed."""
    ours, theirs = (
        dict(zip(report.seeds_of(data, name), looks.loads_part(data, name), strict=True))
        for name in (run, other)
    )
    return np.array([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


VERDICTS: dict[str, Block] = {
    "text-kept": report.text_kept(
        is_masked, lambda tokens: f"{len(tokens)} runs, each on {max(tokens):,} text tokens"
    ),
    "lower": report.verdict_on("image loss", report.paired),
    "faster": report.verdict_on(
        "mean loss over the logarithm of steps after the warm-up", partial(report.paired, get=SPEED)
    ),
    "reads": report.verdict_on(
        "share of held-out combinations read right",
        partial(report.paired, get="read.held_out.caption"), above=True,
    ),
    "gains-more": report.verdict_on("image loss, less that of its rows alone", more_than_rows),
    "loads-part": report.verdict_on(
        "mean divergence of layers after less before, bits", looks.loads_part, above=True
    ),
    "parts-more": report.verdict_on("growth of divergence, bits", parts_more, above=True),
    "specialise": report.verdict_on(
        "experts of one modality, after less before", more_specialised, above=True
    ),
    "outputs-part": report.verdict_on("CKA on image rows", looks.outputs_part),
    "start": STARTS.verdict,
}  # fmt: skip
