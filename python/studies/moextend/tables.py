"""Blocks of the page of moextend.py: rows, tables, and values within sentences."""

from collections.abc import Sequence
from functools import partial
from itertools import combinations

import numpy as np
from scipy import stats

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


def agreement_row(data: Results, scored: str) -> str:
    """Agreement of a seed's two scores, by different questions, and of different seeds."""
    scores, again = (verdicts.layer_scores(data, scored, n) for n in ("scores", "scores_again"))
    twice, half = list(zip(scores, again, strict=True)), max(1, len(scores[0].layers) // 2)
    top = [[set(each.order[:half]) for each in pair] for pair in twice]
    of_questions, of_seeds = (
        np.array([stats.spearmanr(a.d, b.d).statistic for a, b in pairs])
        for pairs in (twice, combinations(scores, 2))
    )
    return " | ".join((
        "; ".join(listed(sorted(first)) for first, _ in top),
        mean_and_spread(of_questions, 2),
        "; ".join(str(len(first & second)) for first, second in top),
        f"{of_seeds.mean():+.2f}" if len(of_seeds) else "",
    ))  # fmt: skip


def right(result: Results, kind: str) -> str:
    """Per cent of a kind of questions that are right; empty for code, which asks none."""
    accuracy = result["test"].get("accuracy")
    return f"{100 * accuracy[kind]:.1f}" if accuracy else ""


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
    "step": report.cost_row,
    "rates-tried": rates_table,
    "overlaps": overlaps_table,
    "agreement": agreement_row,
    "every-run": report.runs_table({
        "layers": (lambda result: listed(result["layers"]), ""),
        "parameters": ("trained_parameters", ","),
        "lr": ("lr", "g"),
        "loss": ("test_nll", ".3f"),
        **{f"{kind}, %": (partial(right, kind=kind), "") for kind in KINDS},
        "change of text loss": (report.forgotten, "+.4f"),
        "seconds": ("seconds", ".0f"),
    }),
    "figure": lambda data, digits, *keys: spread(".".join(keys), int(digits))(data, SETUP, ""),
    "percent": lambda data, *keys: spread(".".join(keys), 1, 100)(data, SETUP, ""),
    "words-right": lambda data: spread(verdicts.words, 1)(data, SETUP, ""),
    "since-start": lambda data, name: report.mean_and_interval(verdicts.since_start(data, name)),
    "apart": lambda data, *pair: f"{np.abs(report.paired(data, *pair)).max():.1e}",
    "seeds": lambda data: str(len(data["setups"])),
    "questions": lambda data: f"{2 * data['budget']['held_out_questions']:,}",
    "tested": lambda data: str(data["budget"]["encoder"]["held_out"] // 2),
    "lora-rank": lambda data, of: str(LORA_RANKS[of]),
    "logits": lambda data: report.count(  # of text that a run compares, here the first
        lambda result: result["text"]["held_out_tokens"] * data["budget"]["text"]["vocab_size"]
    )(data, next(iter(data["runs"])), ""),
}  # fmt: skip
