"""Blocks of the page of moextend.py: rows, tables, and values within sentences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy import stats

from moe_kernels.moextend import LayerScores
from studies.moextend import figures
from studies.moextend.figures import RANDOM, tried_rates
from studies.moextend.runs import KINDS, LORA_RANKS
from studies.moextend.verdicts import VERDICTS
from studies.report import (
    Block,
    Column,
    NotMeasured,
    Results,
    at,
    count,
    difference,
    forgotten,
    mean_and_interval,
    mean_and_spread,
    paired,
    parameters,
    row,
    seeds_of,
    spread,
    table,
    test_nll,
    values,
)

KINDS_RIGHT = [spread(at("test", "accuracy", kind, scale=100), 1) for kind in KINDS]


def sized(data: Results, name: str, baseline: str) -> str:
    """Parameters, and how many times the baseline's."""
    here, there = parameters(data, name), parameters(data, baseline)
    return f"{here:,}" if name == baseline else f"{here:,} ({here / there:.2f} times)"


def patching(data: Results, name: str, _: str) -> str:
    return f"{values(data, name, at('max_abs_logit_difference_by_patching')).max():.1e}"


def plain(kind: str) -> tuple[Column, Column]:
    """Columns of text without ids: change of its loss, and logits changed."""
    before, after = (at("plain", kind, f"nll_{when}") for when in ("before", "after"))
    change = spread(lambda result: after(result) - before(result))
    return change, count(at("plain", kind, "logits_changed"))


def disturbed(rows: str) -> list[Column]:
    """Columns of what copies change in logits, and shares of rows, on "text" or on the "task"."""

    def column(key: str, digits: int, scale: float) -> Column:
        get = at("disturbance", rows, key, scale=scale)
        return lambda data, name, _: (
            mean_and_spread(found, digits) if (found := values(data, name, get)).any() else "0"
        )

    return [column("output_change", 3, 1), *(column(f"{each}_rows", 1, 100)
            for each in ("changed", "rerouted"))]  # fmt: skip


def change_since_start(data: Results, name: str, _: str) -> str:
    return mean_and_spread(figures.since_start(data, name))


# --- tables and lists


def trade_line(data: Results) -> str:
    """List what learns more and forgets less than experts as published, where these learn most."""
    lines = []
    for ours, points in tried_rates(data).items():
        task, kind = ours.split(": ", 1)
        if kind != "added experts, as published" or not points:
            continue
        change, loss = min(points.values(), key=lambda point: point[1])
        better = [
            f"{other.split(': ', 1)[1]} at lr {lr} ({theirs[1]:.3f}, {theirs[0]:+.4f})"
            for other, tried in tried_rates(data).items()
            if other.startswith(task) and other != ours
            for lr, theirs in tried.items() if theirs[0] < change and theirs[1] < loss
        ]  # fmt: skip
        lines.append(
            f"- {task}: experts as published ({loss:.3f}, {change:+.4f}) are beaten in both by "
            f"{'; '.join(better) or 'nothing that was tried'}."
        )
    if not lines:
        raise NotMeasured("experts as published at several learning rates")
    return "\n".join(lines)


def rates_table(data: Results) -> str:
    rows = [
        [trains, lr, f"{loss:.3f}", f"{change:+.4f}"]
        for trains, points in tried_rates(data).items()
        for lr, (change, loss) in points.items()
    ]
    return table(["what trains", "lr", "test loss on the task", "change of text loss"], rows)


def listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def overlaps_table(data: Results) -> str:
    made, rows = [name for name in RANDOM if name in data["runs"]], []
    for seed, result in seeds_of(data, "sequence").items():
        halves = [data["runs"][name]["seeds"][seed]["layers"] for name in made]
        shared = [len(set(half) & set(result["layers"])) for half in halves]
        drawn = [f"{listed(half)} ({n})" for half, n in zip(halves, shared, strict=True)]
        rows.append([seed, listed(result["layers"]), *drawn])
    return table(["seed", "top half", *(f"a random half ({name[-1]})" for name in made)], rows)


def rank_correlation(first: LayerScores, second: LayerScores) -> float:
    return float(stats.spearmanr(first.d, second.d).statistic)


def top_half(scores: LayerScores) -> set[int]:
    return set(scores.order[: max(1, len(scores.layers) // 2)])


def agreement_row(data: Results, scored: str) -> str:
    """Agreement of a seed's two scores, by different questions, and of different seeds."""
    scores, again = (figures.layer_scores(data, scored, n) for n in ("scores", "scores_again"))
    twice = list(zip(scores, again, strict=True))
    pairs = [rank_correlation(a, b) for a, b in combinations(scores, 2)]
    return " | ".join((
        "; ".join(listed(sorted(top_half(each))) for each in scores),
        mean_and_spread(np.array([rank_correlation(*each) for each in twice]), 2),
        "; ".join(str(len(top_half(a) & top_half(b))) for a, b in twice),
        f"{np.mean(pairs):+.2f}" if pairs else "",
    ))  # fmt: skip


def runs_table(data: Results) -> str:
    rows = []
    for name in data["runs"]:
        for seed, result in seeds_of(data, name).items():
            right = result["test"].get("accuracy", {})
            rows.append([
                name, seed, listed(result["layers"]), f"{result['trained_parameters']:,}",
                f"{result['lr']:g}", f"{test_nll(result):.3f}",
                *(f"{100 * right[kind]:.1f}" if right else "" for kind in KINDS),
                f"{forgotten(result):+.4f}", f"{result['seconds']:.0f}",
            ])  # fmt: skip
    head = [
        "run", "seed", "layers", "parameters", "lr", "loss", "digit, %", "sum, %",
        "change of text loss", "seconds",
    ]  # fmt: skip
    return table(head, rows)


# --- values within sentences


def setup_figure(data: Results, digits: str, *keys: str, scale: float = 1) -> str:
    """Mean and spread over seeds of a figure of the setups."""
    return mean_and_spread(figures.setups(data, at(*keys, scale=scale)), int(digits))


def logits(data: Results) -> str:
    """Number of text logits that are compared."""
    first = next(iter(seeds_of(data, next(iter(data["runs"]))).values()))
    return f"{first['text']['held_out_tokens'] * data['budget']['text']['vocab_size']:,}"


BLOCKS: dict[str, Block] = {
    **VERDICTS,
    "text": row(
        spread(at("text", "nll_before_training")), patching, spread(figures.at_step_0),
        spread(forgotten), count(figures.changed_logits),
    ),
    "plain": row(*plain("code"), *plain("words"), spread(figures.words, 1)),
    "question": row(sized, *KINDS_RIGHT, spread(test_nll), difference),
    "code": row(sized, spread(test_nll), change_since_start, spread(forgotten)),
    "disturbance": row(*disturbed("text"), *disturbed("task")),
    "trade": trade_line,
    "rates-tried": rates_table,
    "overlaps": overlaps_table,
    "agreement": agreement_row,
    "every-run": runs_table,
    "figure": setup_figure,
    "percent": lambda data, *keys: setup_figure(data, "1", *keys, scale=100),
    "words-right": lambda data: mean_and_spread(figures.setups(data, figures.words), 1),
    "since-start": lambda data, name: mean_and_interval(figures.since_start(data, name)),
    "apart": lambda data, *pair: f"{np.abs(paired(data, *pair)).max():.1e}",
    "seeds": lambda data: str(len(data["setups"])),
    "questions": lambda data: f"{2 * data['budget']['held_out_questions']:,}",
    "tested": lambda data: str(data["budget"]["encoder"]["held_out"] // 2),
    "lora-rank": lambda data, of: str(LORA_RANKS[of]),
    "logits": logits,
}  # fmt: skip
