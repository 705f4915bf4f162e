"""Verdicts on MoExtend (arXiv 2408.03511), computed from the JSON of moextend.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from studies.moextend import figures
from studies.report import (
    FAILS,
    HOLDS,
    NotMeasured,
    Results,
    Verdict,
    forgotten,
    judge,
    paired,
    values,
)


def is_masked(settings: dict[str, Any]) -> bool:
    """Return whether training cannot reach text without ids."""
    if settings["method"] == "extension":
        return settings["gate"] != "none"
    return settings["method"] in ("lora", "projector")


def text_kept(data: Results) -> Verdict:
    masked = [
        result
        for run in data["runs"].values()
        if is_masked(run["settings"])
        for result in run["seeds"].values()
    ]
    if not masked:
        raise NotMeasured("runs that keep text")
    tokens = sum(result["text"]["held_out_tokens"] for result in masked)
    changed = sum(result["text"]["logits_changed_by_training"] for result in masked)
    for each in (each for result in masked for each in result["plain"].values()):
        tokens, changed = tokens + each["tokens"], changed + each["logits_changed"]
    evidence = (
        f"{len(masked)} runs on {tokens // len(masked):,} tokens of documentation, code and "
        f"questions without ids each; {changed:,} logits changed"
    )
    return Verdict(FAILS if changed else HOLDS, evidence)


VERDICTS: dict[str, Callable[..., Verdict]] = {
    "text-kept": text_kept,
    "adding-hurts": lambda data, name: judge(
        "change of text loss at step 0", values(data, name, figures.at_step_0), above=True),
    "forgets-words": lambda data, name: judge(
        "no longer right, percentage points", figures.words_lost(data, name), above=True),
    "forgets-less": lambda data, *pair: judge(
        "difference of changes of text loss", paired(data, *pair, forgotten)),
    "learns": lambda data, name: judge(
        "test loss less the aligned projector's", figures.since_start(data, name)),
    "beats-random": lambda data: judge(
        "test loss less the mean of a seed's random halves", figures.random_differences(data)),
}  # fmt: skip
