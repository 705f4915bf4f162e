"""Verdicts on MoExtend (arXiv 2408.03511), computed from the JSON of moextend.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from studies.moextend.figures import at_step_0, random_differences, since_start, words_lost
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
    """Is text without ids out of reach for what trained?"""
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


def adding_hurts(data: Results, name: str) -> Verdict:
    return judge("change of text loss at step 0", values(data, name, at_step_0), above=True)


def forgets(data: Results, name: str) -> Verdict:
    return judge("change of text loss", values(data, name, forgotten), above=True)


def forgets_words(data: Results, name: str) -> Verdict:
    return judge("no longer right, percentage points", words_lost(data, name), above=True)


def forgets_less(data: Results, name: str, baseline: str) -> Verdict:
    return judge("difference of changes of text loss", paired(data, name, baseline, forgotten))


def learns(data: Results, name: str) -> Verdict:
    return judge("test loss less the aligned projector's", since_start(data, name))


def beats_random(data: Results) -> Verdict:
    return judge("test loss less the mean of a seed's random halves", random_differences(data))


VERDICTS: dict[str, Callable[..., Verdict]] = {
    "text-kept": text_kept,
    "adding-hurts": adding_hurts,
    "forgets": forgets,
    "forgets-words": forgets_words,
    "forgets-less": forgets_less,
    "learns": learns,
    "beats-random": beats_random,
}
