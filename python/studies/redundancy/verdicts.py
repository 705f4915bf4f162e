"""Figures out of the JSON of redundancy.py, and verdicts on the claims of arXiv 2503.22517."""

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
from scipy import stats

from studies import looks, report
from studies.report import FAILS, HOLDS, UNDECIDED, Block, Results, Verdict
from studies.starts import GW, Starts

_CONTROLS = ("plora", "init-gaussian", "init-mean", "init-permuted")
_VARIANTS = ("cosine", "euclidean", "exact", "embedding", "head")
# Runs that differ in their start; those named after GW are compared with the others.
STARTS = {
    "rows": (*_CONTROLS, f"init-{GW}"),
    "variants": (*_CONTROLS, *(f"init-{GW}-{variant}" for variant in _VARIANTS)),
    "few": ("few-normal", "few-gaussian", "few-permuted", f"few-{GW}"),
    "emoji": ("emoji-plora", "emoji-permuted", f"emoji-{GW}"),
    "adapters": ("plora", "lora-permuted", f"lora-{GW}"),
}


def steps(result: Results) -> float:
    """Steps to the fixed loss; NaN where it was not reached or training diverged later."""
    found = result["steps_to_fixed_loss"]
    return found if found is not None and math.isfinite(result["test_nll"]) else math.nan


def layer_similarity(data: Results, modality: str) -> np.ndarray:
    """Similarity of experts before training, the mean of pairs, (seeds, layers)."""
    return looks.layer_similarity(data, "plora", modality, "before")


def layer_losses(data: Results) -> np.ndarray:
    """Image loss where one layer was adapted alone, (seeds, layers)."""
    layers = range(layer_similarity(data, "text").shape[1])
    return np.array([report.values(data, f"layer-{layer}", "test_nll") for layer in layers]).T


def is_masked(settings: dict[str, Any]) -> bool:
    """Return whether a run trains on image tokens alone."""
    return settings["method"] not in ("all_tokens", "full")


# --- is redundancy the source?


def layer_verdict(data: Results) -> Verdict:
    """Judge by what is left of similarity and loss without the means of layers and seeds."""
    alike = layer_similarity(data, "text")
    within, p = residual_correlation(alike, -layer_losses(data))
    found = UNDECIDED if p >= 0.05 else HOLDS if within > 0 else FAILS
    return Verdict(found, f"correlation {within:+.2f}; p by permutation within seeds", p)


def source_verdict(data: Results) -> Verdict:
    """One verdict on the whole question: it holds only if every part does."""
    lower = partial(report.lower, data)
    parts = {
        "Mixtures of Experts reach a lower loss than their dense parent":
            [lower("source-8x6", "source-dense"), lower("source-16x4", "source-dense")],
        "updates of the experts add to added rows": [lower("own-rate-experts", "rows")],
        "they beat a network of its own": [lower("own-rate-experts", "own-rate-copy")],
        "they beat added experts": [lower("own-rate-experts", "own-rate-added-experts")],
        "layers whose experts are more alike gain more": [layer_verdict(data)],
    }  # fmt: skip
    every = {verdict.outcome for verdicts in parts.values() for verdict in verdicts}
    found = HOLDS if every == {HOLDS} else FAILS if FAILS in every else UNDECIDED
    answers = {HOLDS: "yes", FAILS: "no, the reverse", UNDECIDED: "not shown"}
    evidence = "; ".join(
        f"{claim}: {', '.join(dict.fromkeys(answers[each.outcome] for each in verdicts))}"
        for claim, verdicts in parts.items()
    )
    return Verdict(found, evidence)


def joint_rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(seeds, layers) each: mean Spearman correlation, and the share of permutations of layers,
    common to the seeds, that have as high a one."""
    pairs = list(zip(x, y, strict=True))
    every = np.array([
        np.mean([stats.spearmanr(a, b[list(order)]).statistic for a, b in pairs])
        for order in itertools.permutations(range(x.shape[1]))
    ])  # fmt: skip
    found = every[0]  # of the layers in their order
    return float(found), float(np.mean(every >= found - 1e-12))


def residual_correlation(x: np.ndarray, y: np.ndarray, draws: int = 9999) -> tuple[float, float]:
    """(seeds, layers) each: Pearson's correlation without the means of layers and seeds, and its
    two-sided p by permutations of the layers within seeds."""

    def residuals(z: np.ndarray) -> np.ndarray:
        """Return residuals of norm 1; zeros where the means are all there is."""
        left = z - z.mean(0) - z.mean(1, keepdims=True) + z.mean()
        return left / max(np.linalg.norm(left), 1e-6)

    x, y, rng = residuals(x), residuals(y), np.random.default_rng(0)
    found = float((x * y).sum())
    drawn = [abs((x * rng.permuted(y, axis=1)).sum()) for _ in range(draws)]
    return found, (1 + sum(each >= abs(found) - 1e-12 for each in drawn)) / (1 + draws)


JUDGED = Starts(STARTS, ("steps", steps))
VERDICTS: dict[str, Block] = {
    "text-kept": report.text_kept(
        is_masked, lambda tokens: f"{len(tokens)} runs, each on "
        f"{' or '.join(f'{size:,}' for size in sorted(set(tokens)))} text tokens"),
    "alike-layers": layer_verdict,
    "source": source_verdict,
    "start": JUDGED.verdict,
    "loads-part": report.verdict_on(
        "mean divergence of layers after less before, bits",
        partial(looks.loads_part, run="plora"), above=True,
    ),
    "outputs-part": report.verdict_on("CKA", partial(looks.outputs_part, run="plora")),
}  # fmt: skip
