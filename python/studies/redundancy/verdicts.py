"""Verdicts on the claims of arXiv 2503.22517, computed from the JSON of redundancy.py."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from studies.redundancy import figures
from studies.redundancy.figures import GW, STARTS
from studies.report import (
    FAILS,
    HOLDS,
    UNDECIDED,
    NotMeasured,
    Results,
    Verdict,
    interval,
    judge,
    lower,
    outcome,
    paired,
    test_nll,
)

# What must hold for redundancy of the experts to be the source.
SOURCE = {
    "Mixtures of Experts reach a lower loss than their dense parent":
        (("source-8x6", "source-dense"), ("source-16x4", "source-dense")),
    "updates of the experts add to added rows": (("own-rate-experts", "rows"),),
    "they beat a network of its own": (("own-rate-experts", "own-rate-copy"),),
    "they beat added experts": (("own-rate-experts", "own-rate-added-experts"),),
}  # fmt: skip


def is_masked(settings: dict[str, Any]) -> bool:
    """Return whether a run trains on image tokens alone."""
    return settings["method"] not in ("all_tokens", "full")


def text_kept(data: Results) -> Verdict:
    masked = [
        result["text"]
        for run in data["runs"].values() if is_masked(run["settings"])
        for result in run["seeds"].values()
    ]  # fmt: skip
    tokens = " or ".join(f"{n:,}" for n in sorted({text["held_out_tokens"] for text in masked}))
    changed = sum(text["logits_changed_by_training"] for text in masked)
    evidence = f"{len(masked)} runs, each on {tokens} text tokens; {changed:,} logits changed"
    return Verdict(FAILS if changed else HOLDS, evidence)


# --- is redundancy the source?


def layer_verdict(data: Results) -> Verdict:
    """Judge by what is left of similarity and loss without the means of layers and seeds."""
    alike = figures.layer_similarity(data, "text")
    within, p = residual_correlation(alike, -figures.layer_losses(data))
    found = UNDECIDED if p >= 0.05 else HOLDS if within > 0 else FAILS
    return Verdict(found, f"correlation {within:+.2f}; p by permutation within seeds", p)


def source_verdict(data: Results) -> Verdict:
    """One verdict on the whole question: it holds only if every part does."""
    parts = {
        claim: [lower(data, *pair).outcome for pair in pairs] for claim, pairs in SOURCE.items()
    }
    with contextlib.suppress(NotMeasured):
        parts["layers whose experts are more alike gain more"] = [layer_verdict(data).outcome]
    every = list(itertools.chain(*parts.values()))
    found = HOLDS if set(every) == {HOLDS} else FAILS if FAILS in every else UNDECIDED
    answers = {HOLDS: "yes", FAILS: "no, the reverse", UNDECIDED: "not shown"}
    evidence = "; ".join(
        f"{claim}: {', '.join(dict.fromkeys(answers[each] for each in outcomes))}"
        for claim, outcomes in parts.items()
    )
    return Verdict(found, evidence)


def joint_rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(seeds, layers) each: mean Spearman correlation, and the share of permutations of layers,
    common to the seeds, that have as high a one."""

    def mean(order: Sequence[int]) -> float:
        pairs = zip(x, y[:, list(order)], strict=True)
        return float(np.mean([stats.spearmanr(a, b).statistic for a, b in pairs]))

    layers = range(x.shape[1])
    found = mean(layers)
    every = [mean(order) for order in itertools.permutations(layers)]
    return found, float(np.mean([each >= found - 1e-12 for each in every]))


def residual_correlation(
    x: np.ndarray, y: np.ndarray, permutations: int = 9999
) -> tuple[float, float]:
    """(seeds, layers) each: Pearson's correlation without the means of layers and seeds, and its
    two-sided p by permutations of the layers within seeds."""

    def residuals(z: np.ndarray) -> np.ndarray:
        return z - z.mean(0) - z.mean(1, keepdims=True) + z.mean()

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        scale = math.sqrt(float((a**2).sum() * (b**2).sum()))
        return float((a * b).sum()) / scale if scale > 1e-12 else 0.0

    x, y = residuals(x), residuals(y)
    found, rng = correlation(x, y), np.random.default_rng(0)
    drawn = [abs(correlation(x, rng.permuted(y, axis=1))) for _ in range(permutations)]
    return found, (1 + sum(each >= abs(found) - 1e-12 for each in drawn)) / (1 + permutations)


# --- starts and routing


def start_verdict(data: Results, where: str, name: str) -> Verdict:
    """Judge a start: it holds where every control is beaten in loss, in steps or in gradient."""
    found = start_outcomes(data, where, name)
    wins = any(set(outcomes) == {HOLDS} for outcomes in found.values())
    evidence = "; ".join(
        f"{measure}: better than {outcomes.count(HOLDS)} of {len(outcomes)}, worse than "
        f"{outcomes.count(FAILS)}"
        for measure, outcomes in found.items()
    )
    return Verdict(HOLDS if wins else FAILS if FAILS in found["loss"] else UNDECIDED, evidence)


def start_outcomes(data: Results, where: str, name: str) -> dict[str, list[str]]:
    """Outcomes against each control that was run, by measure."""
    controls = [each for each in STARTS[where] if GW not in each and each in data["runs"]]
    if not controls:
        raise NotMeasured("controls")
    measures = {
        "loss": test_nll, "steps": figures.steps, "largest gradient": figures.log_gradient,
    }  # fmt: skip
    return {
        measure: [outcome(*interval(paired(data, name, control, get))[1:]) for control in controls]
        for measure, get in measures.items()
    }


def best_start(data: Results) -> str:
    """Say whether any start beats all of its controls in loss or in steps."""
    tried = [(where, name) for where, names in STARTS.items() for name in names if GW in name]
    found = {name: start_outcomes(data, where, name) for where, name in tried}
    helped = [
        name
        for name, outcomes in found.items()
        if any(set(outcomes[measure]) == {HOLDS} for measure in ("loss", "steps"))
    ]
    if helped:
        return f"These runs beat all of their controls in loss or in steps: {', '.join(helped)}."
    return "**No Gromov-Wasserstein start beats all of its controls in loss or in steps.**"


def change(data: Results, get: Callable[[Sequence[Results]], np.ndarray]) -> np.ndarray:
    """Change by training of a figure of routing or similarity, one number a seed."""
    return get(figures.looks(data, "after")) - get(figures.looks(data, "before"))


VERDICTS: dict[str, Callable[..., Verdict]] = {
    "text-kept": text_kept,
    "alike-layers": layer_verdict,
    "source": source_verdict,
    "start": start_verdict,
    "loads-part": lambda data: judge(
        "mean divergence of layers before less after, bits", -change(data, figures.divergence)),
    "outputs-part": lambda data: judge(
        "CKA", change(data, lambda looks: figures.similarity(looks, "image"))),
}  # fmt: skip
