"""Blocks of the page of moextend.py: rows, tables, and values within sentences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations

import numpy as np
from scipy import stats

from moe_kernels.moextend import LayerScores
from studies import report
from studies.moextend import verdicts
from studies.moextend.runs import KINDS, LORA_RANKS
from studies.report import SETUP, Block, Column, NotMeasured, Results, mean_and_spread, spread

# --- columns of a run


def sized(data: Results, name: str, baseline: str) -> str:
    """Parameters, and how many times the baseline's."""
    here, there = report.parameters(data, name), report.parameters(data, baseline)
    return f"{here:,}" if name == baseline else f"{here:,} ({here / there:.2f} times)"


def plain(kind: str) -> tuple[Column, Column]:
    """Columns of text without ids: change of its loss, and logits changed."""
    change = spread(lambda r: r["plain"][kind]["nll_after"] - r["plain"][kind]["nll_before"])
    return change, report.count(f"plain.{kind}.logits_changed")


# --- tables and lists


def trade_line(data: Results) -> str:
    """List what learns more and forgets less than experts as published, where these learn most."""
    tried, lines = verdicts.tried_rates(data), []
    for ours, published in tried.items():
        task, kind = ours.split(": ", 1)
        if kind != "added experts, as published" or not published:
            continue
        least_change, least_loss = min(published.values(), key=lambda point: point[1])
        better = [
            f"{trains.removeprefix(f'{task}: ')} at lr {lr} ({loss:.3f}, {change:+.4f})"
            for trains, points in tried.items() if trains.startswith(task)
            for lr, (change, loss) in points.items()
            if change < least_change and loss < least_loss
        ]  # fmt: skip
        lines.append(
            f"- {task}: experts as published ({least_loss:.3f}, {least_change:+.4f}) are beaten in "
            f"both by {'; '.join(better) or 'nothing that was tried'}."
        )
    if not lines:
        raise NotMeasured("experts as published at several learning rates")
    return "\n".join(lines)


def rates_table(data: Results) -> str:
    rows = [
        [trains, lr, f"{loss:.3f}", f"{change:+.4f}"]
        for trains, points in verdicts.tried_rates(data).items()
        for lr, (change, loss) in points.items()
    ]
    return report.table(["what trains", "lr", "test loss on the task", "change of text loss"], rows)


def listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def overlaps_table(data: Results) -> str:
    """Layers of the top half and of the random halves, with the number they have in common."""
    made = [name for name in verdicts.RANDOM if name in data["runs"]]
    rows = []
    for seed, result in report.seeds_of(data, "sequence").items():
        top = result["layers"]
        halves = [data["runs"][name]["seeds"][seed]["layers"] for name in made]
        drawn = [f"{listed(half)} ({len(set(half) & set(top))})" for half in halves]
        rows.append([seed, listed(top), *drawn])
    head = ["seed", "top half", *(f"a random half ({name[-1]})" for name in made)]
    return report.table(head, rows)


def rank_correlation(first: LayerScores, second: LayerScores) -> float:
    return float(stats.spearmanr(first.d, second.d).statistic)


def top_half(scores: LayerScores) -> set[int]:
    return set(scores.order[: max(1, len(scores.layers) // 2)])


def agreement_row(data: Results, scored: str) -> str:
    """Agreement of a seed's two scores, by different questions, and of different seeds."""
    scores, again = (verdicts.layer_scores(data, scored, n) for n in ("scores", "scores_again"))
    twice = list(zip(scores, again, strict=True))
    pairs = [rank_correlation(a, b) for a, b in combinations(scores, 2)]
    return " | ".join((
        "; ".join(listed(sorted(top_half(each))) for each in scores),
        mean_and_spread(np.array([rank_correlation(*each) for each in twice]), 2),
        "; ".join(str(len(top_half(a) & top_half(b))) for a, b in twice),
        f"{np.mean(pairs):+.2f}" if pairs else "",
    ))  # fmt: skip


def right(result: Results, kind: str) -> str:
    """Per cent of a kind of questions that are right; empty for code, which asks none."""
    accuracy = result["test"].get("accuracy")
    return f"{100 * accuracy[kind]:.1f}" if accuracy else ""


# --- values within sentences


def setup_figure(data: Results, digits: str, path: str, scale: float = 1) -> str:
    """Mean and spread over seeds of a figure of the setups."""
    return spread(path, int(digits), scale)(data, SETUP, "")


def logits(data: Results) -> str:
    """Number of text logits that are compared."""
    first = next(iter(report.seeds_of(data, next(iter(data["runs"]))).values()))
    return f"{first['text']['held_out_tokens'] * data['budget']['text']['vocab_size']:,}"


BLOCKS: dict[str, Block] = {
    **verdicts.VERDICTS,
    "text": report.row(
        spread("text.nll_before_training"),
        report.column("max_abs_logit_difference_by_patching", lambda found: f"{found.max():.1e}"),
        spread(verdicts.at_step_0), spread(report.forgotten),
        report.count("text.logits_changed_by_training"),
    ),
    "plain": report.row(*plain("code"), *plain("words"), spread(verdicts.words, 1)),
    "question": report.row(
        sized, *(spread(f"test.accuracy.{kind}", 1, scale=100) for kind in KINDS),
        spread("test_nll"), report.difference,
    ),
    "code": report.row(
        sized, spread("test_nll"),
        lambda data, name, _: mean_and_spread(verdicts.since_start(data, name)),
        spread(report.forgotten),
    ),
    "disturbance": report.row(*(
        spread(f"disturbance.{rows}.{key}", digits, scale, zero="0")
        for rows in ("text", "task")
        for key, digits, scale in (
            ("output_change", 3, 1), ("changed_rows", 1, 100), ("rerouted_rows", 1, 100)
        )
    )),
    "trade": trade_line,
    "rates-tried": rates_table,
    "overlaps": overlaps_table,
    "agreement": agreement_row,
    "every-run": report.runs_table({
        "layers": (lambda result: listed(result["layers"]), ""),
        "parameters": ("trained_parameters", ","),
        "lr": ("lr", "g"),
        "loss": ("test_nll", ".3f"),
        "digit, %": (partial(right, kind="digit"), ""),
        "sum, %": (partial(right, kind="sum"), ""),
        "change of text loss": (report.forgotten, "+.4f"),
        "seconds": ("seconds", ".0f"),
    }),
    "figure": lambda data, digits, *keys: setup_figure(data, digits, ".".join(keys)),
    "percent": lambda data, *keys: setup_figure(data, "1", ".".join(keys), scale=100),
    "words-right": lambda data: spread(verdicts.words, 1)(data, SETUP, ""),
    "since-start": lambda data, name: report.mean_and_interval(verdicts.since_start(data, name)),
    "apart": lambda data, *pair: f"{np.abs(report.paired(data, *pair)).max():.1e}",
    "seeds": lambda data: str(len(data["setups"])),
    "questions": lambda data: f"{2 * data['budget']['held_out_questions']:,}",
    "tested": lambda data: str(data["budget"]["encoder"]["held_out"] // 2),
    "lora-rank": lambda data, of: str(LORA_RANKS[of]),
    "logits": logits,
}  # fmt: skip
