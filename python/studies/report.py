"""What the pages of results share: figures out of the JSON, tables, intervals and verdicts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

OUTCOMES = HOLDS, FAILS, UNDECIDED = (
    "**Holds here:**", "**Does not hold here:**", "**Undecided:**",
)  # fmt: skip
Results = dict[str, Any]
Get = Callable[[Results], float]


# --- figures


def values(data: Results, name: str, get: Get) -> np.ndarray:
    """One number for each seed, in the order of the seeds."""
    seeds = data["runs"][name]["seeds"]
    return np.array([get(seeds[seed]) for seed in sorted(seeds, key=int)], dtype=float)


def test_nll(result: Results) -> float:
    return result["test_nll"]


def paired(data: Results, name: str, baseline: str, get: Get = test_nll) -> np.ndarray:
    """A figure less the baseline's, on the seeds that both have."""
    first, second = (data["runs"][n]["seeds"] for n in (name, baseline))
    seeds = sorted(first.keys() & second.keys(), key=int)
    return np.array([get(first[seed]) - get(second[seed]) for seed in seeds])


def present(data: Results, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in data["runs"]]


def parameters(data: Results, name: str) -> str:
    return f"{values(data, name, lambda result: result['trained_parameters'])[0]:,.0f}"


# --- statistics


def interval(numbers: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t; infinite with one number."""
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return mean, -math.inf, math.inf
    half = stats.t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers))
    return mean, mean - half, mean + half


def p_value(numbers: np.ndarray) -> float:
    """Of a mean of zero, by Student's t, two-sided; 1 with one number."""
    if len(numbers) < 2 or not numbers.any():
        return 1.0
    return float(stats.ttest_1samp(numbers, 0.0).pvalue)


def outcome(low: float, high: float) -> str:
    """Of a claim that something lies below zero, by its interval."""
    return HOLDS if high < 0 else FAILS if low > 0 else UNDECIDED


# --- text


def mean_and_spread(numbers: np.ndarray, digits: int = 3) -> str:
    """Mean and standard deviation over the seeds that have a number."""
    there = numbers[np.isfinite(numbers)]
    if not len(there):
        return "never"
    spread = f" ± {there.std(ddof=1):.{digits}f}" if len(there) > 1 else ""
    missing = f" ({len(there)} of {len(numbers)} seeds)" if len(there) < len(numbers) else ""
    return f"{there.mean():.{digits}f}{spread}{missing}"


def mean_and_interval(numbers: np.ndarray, digits: int = 3) -> str:
    mean, low, high = interval(numbers)
    if len(numbers) < 2:
        return f"{mean:+.{digits}f} (one seed)"
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def difference(data: Results, name: str, baseline: str, get: Get = test_nll) -> str:
    """How far a figure is from the baseline's, seed by seed; nothing for the baseline itself."""
    return "" if name == baseline else mean_and_interval(paired(data, name, baseline, get))


def verdict(
    data: Results, name: str, baseline: str, claim: str, get: Get = test_nll,
    of: str = "test loss, nats a token",
) -> str:  # fmt: skip
    """claim: what holds if ``name`` has the lower figure"""
    return verdict_on(paired(data, name, baseline, get), claim, of)


def verdict_on(differences: np.ndarray, claim: str, of: str, *, above: bool = False) -> str:
    """claim: what holds if the mean of the differences, one a seed, is below zero, or above it"""
    mean, low, high = interval(differences)
    if len(differences) < 2:
        return f"{UNDECIDED} {claim} ({of}: {mean:+.3f}, one seed)."
    found = f"{of}: {mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    said = outcome(-high, -low) if above else outcome(low, high)
    return f"{said} {claim} ({found}, p {p_value(differences):.2g})."


def verdicts(data: Results, claims: Sequence[tuple[str, str, str]]) -> list[str]:
    """Of (run, baseline, claim), where both runs are there."""
    return [
        verdict(data, name, baseline, claim)
        for name, baseline, claim in claims
        if len(present(data, (name, baseline))) == 2
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def cost_rows(data: Results, names: dict[str, str], first: str) -> list[list[str]]:
    """Of a training step by method: parameters, tokens a second, its time over that of the method
    ``first``, and peak MiB.
    """
    speeds = {
        method: np.array([each["tokens_per_second"] for each in rounds])
        for method, rounds in data["cost"].items()
    }
    return [
        [names[method], f"{rounds[0]['trained_parameters']:,}", mean_and_spread(speeds[method], 0),
         mean_and_spread(speeds[first] / speeds[method], 2),
         mean_and_spread(np.array([each["peak_bytes"] for each in rounds]) / 2**20, 0)]
        for method, rounds in data["cost"].items()
    ]  # fmt: skip


def tuning_section(data: Results) -> str:
    """The rates that were tried, and whether one at the end of the grid was the best."""
    tuned = data["tuning"]["choice_nll"]
    rates = list(dict.fromkeys(rate for losses in tuned.values() for rate in losses))
    rows = [
        [trains, *(f"**{loss:.3f}**" if loss == min(losses.values()) else f"{loss:.3f}"
                   for loss in losses.values())]
        for trains, losses in tuned.items()
    ]  # fmt: skip
    ends = [
        trains
        for trains, losses in tuned.items()
        if min(losses, key=losses.get) in (rates[0], rates[-1])
    ]
    said = (
        f"\n\nThe best was at an end of what was tried for: {'; '.join(ends)}. A better one may "
        "lie beyond."
        if ends and len(rates) > 1
        else ""
    )
    return table(["what trains", *(f"lr {rate}" for rate in rates)], rows) + said


def all_verdicts(sections: Sequence[str]) -> list[str]:
    lines = [line for section in sections for line in section.split("\n")]
    return [line for line in lines if line.startswith(OUTCOMES)]


def hold_together(said: Sequence[str], level: float = 0.05) -> list[str]:
    """Of verdicts with a p, those that are decided with a joint error of at most ``level``: Holm's
    step-down procedure.
    """
    tested = [
        (float(found[1]), line) for line in said if (found := re.search(r", p (\S+)\)", line))
    ]
    ranked, kept = sorted(tested), []
    for rank, (p, line) in enumerate(ranked):
        if p > level / (len(ranked) - rank):
            break
        kept.append(line)
    return kept


def in_short(sections: Sequence[str]) -> str:
    """All verdicts, in the order of the sections, by their outcome."""
    lines = all_verdicts(sections)
    found = {each: [line for line in lines if line.startswith(each)] for each in OUTCOMES}
    if not any(found.values()):
        return ""
    count = sum(" p " in line for lines in found.values() for line in lines)
    parts = [
        "## In short",
        f"{count} of these verdicts have a p, each by its own 95 % interval: if nothing were true, "
        f"{0.05 * count:.1f} of them would be decided by chance. Those with p below "
        f"{0.05 / max(count, 1):.4f} hold for all of them together (Bonferroni).",
    ]
    for each, lines in found.items():
        if lines:
            listed = "".join(f"\n- {line.removeprefix(each).strip()}" for line in lines)
            parts.append(f"{each}\n{listed}")
    return "\n\n".join(parts)
