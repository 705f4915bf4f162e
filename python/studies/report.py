"""Pages of results: prose by hand, and figures, tables and verdicts computed from the JSON.

A marker ``<!-- study:NAME.ARGUMENT... -->`` is filled by the block NAME, which is called with the
results and the arguments, or by the value of the JSON with these keys. A run's row, or a verdict,
fills the cells that follow its label or claim in a table.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import takewhile
from operator import getitem
from typing import Any

import numpy as np
from scipy import stats

from moe_kernels.programs.shared import markers
from moe_kernels.programs.shared.tables import markdown_table as table

SETUP = "setup"
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
Results = dict[str, Any]
Get = Callable[[Results], Any] | str  # a function of a result, or its keys, joined by dots
Column = Callable[[Results, str, str], str]  # results, name of a run and of its baseline -> a cell
Block = Callable[..., "str | Verdict"]  # results, arguments -> text


class NotMeasured(LookupError):
    """The results lack a run that a block needs."""


# --- pages


@dataclass(frozen=True)
class Verdict:
    """Outcome of a claim, what it rests on, and its p where a test was made."""

    outcome: str
    evidence: str
    p: float | None = None

    def __str__(self) -> str:
        p = "" if self.p is None else f"{self.p:.2g}"
        return " | ".join((self.outcome, self.evidence, p))


def render(page: str, data: Results, blocks: Mapping[str, Block]) -> str:
    """Return the page with the text between its markers made anew.

    ``joint`` sums up the page's verdicts.

    Raises:
        ValueError: a block has no marker, or a marker is neither a block nor a value.
    """
    found = _found(page, data, {**COMMON, **blocks}, ["joint"])
    claims = {claim_of(page, name): v for name, v in found.items() if isinstance(v, Verdict)}
    texts = {name: str(text) for name, text in found.items()}
    return markers.fill(page, texts | {"joint": joint(claims)}, "study")


def fill(page: str, data: Results, blocks: Mapping[str, Block]) -> str:
    """Do as :func:`render` does for a page without runs and verdicts."""
    texts = {name: str(text) for name, text in _found(page, data, blocks, []).items()}
    return markers.fill(page, texts, "study")


def _found(
    page: str, data: Results, blocks: Mapping[str, Block], others: Sequence[str]
) -> dict[str, str | Verdict]:
    """Return what the page's markers stand for, but those of ``others``."""
    names = dict.fromkeys(markers.names(page, "study"))
    if missing := sorted({*blocks, *others} - {name.split(".")[0] for name in names}):
        raise ValueError(f"the page has no marker for {', '.join(missing)}")
    return {name: _call(name, data, blocks) for name in names if name not in others}


def _call(name: str, data: Results, blocks: Mapping[str, Block]) -> str | Verdict:
    kind, *arguments = name.split(".")
    if kind not in blocks:
        return _value(data, name)
    try:
        return blocks[kind](data, *arguments)
    except NotMeasured as missing:
        return f"*not measured: {missing}*"


def claim_of(page: str, name: str) -> str:
    """First cell of the first row of a table whose second cell begins with the marker."""
    found = re.search(rf"^\| (.+?) \| <!-- study:{re.escape(name)} -->", page, re.MULTILINE)
    if not found:
        raise ValueError(f"study:{name} stands in no row of a table, after its claim")
    return found[1]


def _value(data: Results, path: str) -> str:
    try:
        value = figure(data, path)
    except (KeyError, TypeError) as error:
        problem = f"unknown marker study:{path}: neither a block nor in the results"
        raise ValueError(problem) from error
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- figures


def seeds_of(data: Results, name: str) -> dict[str, Results]:
    """Results of a run, or of the SETUP of all runs, by seed, in the order of the seeds."""
    if name not in (SETUP, *data["runs"]):
        raise NotMeasured(f"run {name}")
    found = data["setups"] if name == SETUP else data["runs"][name]["seeds"]
    return {seed: found[seed] for seed in sorted(found, key=int)}


def figure(result: Results, get: Get) -> Any:
    """Take a figure out of a result.

    Raises:
        KeyError: the result lacks one of the keys.
    """
    return get(result) if callable(get) else reduce(getitem, get.split("."), result)


def values(data: Results, name: str, get: Get) -> np.ndarray:
    """One number for each seed, in the order of the seeds."""
    found = seeds_of(data, name).values()
    return np.array([figure(result, get) for result in found], dtype=float)


def forgotten(result: Results) -> float:
    """Change of the text loss by training."""
    return result["text"]["nll_after_training"] - result["text"]["nll_before_training"]


def paired(data: Results, name: str, baseline: str, get: Get = "test_nll") -> np.ndarray:
    """Differences to the baseline's figure, on the seeds that both runs have."""
    ours, theirs = seeds_of(data, name), seeds_of(data, baseline)
    both = [seed for seed in ours if seed in theirs]
    return np.array([figure(ours[seed], get) - figure(theirs[seed], get) for seed in both])


def parameters(data: Results, name: str) -> int:
    return next(iter(seeds_of(data, name).values()))["trained_parameters"]


# --- statistics


def interval(numbers: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t; infinite with one number."""
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return mean, -math.inf, math.inf
    half = stats.t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers))
    return mean, mean - half, mean + half


def outcome(differences: np.ndarray) -> str:
    """Outcome of the claim that differences have a mean below zero, by its interval."""
    _, low, high = interval(differences)
    return HOLDS if high < 0 else FAILS if low > 0 else UNDECIDED


def mean_and_spread(numbers: np.ndarray, digits: int = 3) -> str:
    """Mean and standard deviation over the seeds that have a number."""
    known = numbers[np.isfinite(numbers)]
    if not len(known):
        return "never"
    spread = f" ± {known.std(ddof=1):.{digits}f}" if len(known) > 1 else ""
    missing = f" ({len(known)} of {len(numbers)} seeds)" if len(known) < len(numbers) else ""
    return f"{known.mean():.{digits}f}{spread}{missing}"


def mean_and_interval(numbers: np.ndarray, digits: int = 3) -> str:
    mean, low, high = interval(numbers)
    if len(numbers) < 2:
        return f"{mean:+.{digits}f} (one seed)"
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


# --- verdicts


def verdict_on(
    measure: str, differences: Callable[..., np.ndarray], *, above: bool = False
) -> Callable[..., Verdict]:
    """Block on the claim that differences, one a seed, have a mean below zero, or ``above`` it.

    Its p is two-sided, by Student's t; with one seed there is none.
    """

    def judge(data: Results, *names: str) -> Verdict:
        numbers = differences(data, *names)
        evidence = f"{measure}: {mean_and_interval(numbers)}"
        if len(numbers) < 2:
            return Verdict(UNDECIDED, evidence)
        p = float(stats.ttest_1samp(numbers, 0.0).pvalue) if numbers.any() else 1.0
        return Verdict(outcome(-numbers if above else numbers), evidence, p)

    return judge


lower = verdict_on("test loss", paired)


def text_kept(is_masked: Callable[[Any], bool], tested: Callable[[list[int]], str]) -> Block:
    """Block on the claim that runs with masked settings change no logit of any text.

    tested: (tokens of each run) -> what was compared, in words
    """

    def judge(data: Results) -> Verdict:
        masked = [run for run in data["runs"].values() if is_masked(run["settings"])]
        tokens, changed = [], 0
        for result in (result for run in masked for result in run["seeds"].values()):
            plain = result.get("plain", {}).values()  # text without ids, where it was measured
            tokens.append(result["text"]["held_out_tokens"] + sum(each["tokens"] for each in plain))
            changed += result["text"]["logits_changed_by_training"]
            changed += sum(each["logits_changed"] for each in plain)
        if not tokens:
            raise NotMeasured("runs that keep text")
        evidence = f"{tested(tokens)}; {changed:,} logits changed"
        return Verdict(FAILS if changed else HOLDS, evidence)

    return judge


def joint(claims: Mapping[str, Verdict]) -> str:
    """The verdicts that stay decided if all of them are to be right together."""
    tested = {claim: verdict for claim, verdict in claims.items() if verdict.p is not None}
    decided = sum(verdict.outcome != UNDECIDED for verdict in tested.values())
    kept = [claim for claim in hold_together(tested) if tested[claim].outcome != UNDECIDED]
    text = (
        f"{len(tested)} verdicts have a p, and {decided} of them are decided, each by an interval "
        "of its own. If every true difference were zero, chance would decide about "
        f"{0.05 * len(tested):.1f}. "
        f"With a joint error of at most 5 % (Holm), {len(kept)} stay decided."
    )
    rows = [[claim, str(tested[claim])] for claim in kept]
    head = ["claim", "verdict", "difference (95 % interval)", "p"]
    return f"{text}\n\n{table(head, rows)}" if kept else text


def hold_together(claims: Mapping[str, Verdict], level: float = 0.05) -> list[str]:
    """Claims that are significant at a joint error of ``level``: Holm's step-down procedure."""
    ranked = sorted(claims, key=lambda claim: claims[claim].p)
    levels = [level / left for left in range(len(ranked), 0, -1)]
    steps = zip(ranked, levels, strict=True)
    return [claim for claim, _ in takewhile(lambda step: claims[step[0]].p <= step[1], steps)]


# --- tables


def row(*columns: Column) -> Block:
    """Block of a run's row; columns that compare take its second argument, a baseline."""
    return lambda data, run, baseline="": " | ".join(
        column(data, run, baseline or run) for column in columns
    )


def column(get: Get, show: Callable[[np.ndarray], str]) -> Column:
    """Column that shows a figure's numbers, one a seed."""
    return lambda data, name, _: show(values(data, name, get))


def spread(get: Get, digits: int = 3, scale: float = 1, zero: str | None = None) -> Column:
    """Column of a figure's mean and standard deviation over seeds; zero: shown if all are 0."""

    def show(numbers: np.ndarray) -> str:
        if zero is not None and not numbers.any():
            return zero
        return mean_and_spread(scale * numbers, digits)

    return column(get, show)


def count(get: Get) -> Column:
    """Column of a count's mean over seeds."""
    return column(get, lambda numbers: f"{numbers.mean():,.0f}")


SEEDS = column("test_nll", lambda numbers: str(len(numbers)))
PARAMETERS = count("trained_parameters")


def difference(data: Results, name: str, baseline: str) -> str:
    """Mean difference to the baseline's test loss, seed by seed; empty for the baseline itself."""
    return "" if name == baseline else mean_and_interval(paired(data, name, baseline))


def runs_table(columns: Mapping[str, tuple[Get, str]]) -> Block:
    """Block of a table, a line for each run and seed; columns: heading -> figure and format."""

    def block(data: Results) -> str:
        rows = [
            [name, seed, *(format(figure(result, get), how) for get, how in columns.values())]
            for name in data["runs"]
            for seed, result in seeds_of(data, name).items()
        ]
        return table(["run", "seed", *columns], rows)

    return block


def cost_row(data: Results, method: str) -> str:
    """Cost of a training step; the time is relative to that of the first method."""
    if method not in data["cost"]:
        raise NotMeasured("the cost of a training step")
    first, rounds = next(iter(data["cost"].values())), data["cost"][method]
    speed, base = (np.array([r["tokens_per_second"] for r in each]) for each in (rounds, first))
    memory = np.array([each["peak_bytes"] for each in rounds]) / 2**20
    return " | ".join((
        f"{rounds[0]['trained_parameters']:,}", mean_and_spread(speed, 0),
        mean_and_spread(base / speed, 2), mean_and_spread(memory, 0),
    ))  # fmt: skip


def tuning_tables(data: Results) -> str:
    """A table for each list of learning rates, and where the best rate is the first or last."""
    tuned, texts = data["tuning"]["choice_nll"], []
    for rates in dict.fromkeys(map(tuple, tuned.values())):
        rows, ends = [], []
        for trains, losses in tuned.items():
            if tuple(losses) == rates:
                cells = {rate: f"{loss:.3f}" for rate, loss in losses.items()}
                best = min(losses, key=losses.get)
                rows.append([trains, *(cells | {best: f"**{cells[best]}**"}).values()])
                if best in (rates[0], rates[-1]):
                    ends.append(trains)
        texts.append(table(["what trains", *(f"lr {rate}" for rate in rates)], rows))
        if ends and len(rates) > 1:
            texts.append(
                f"The best rate was the lowest or highest that was tried for: {'; '.join(ends)}. A "
                "better one may lie beyond."
            )
    return "\n\n".join(texts)


def base_model(data: Results) -> str:
    text = data["budget"]["text"]
    return (
        f"{text['layers']} layers, hidden size {text['hidden_size']}, {text['experts']} experts of "
        f"width {text['intermediate_size']}, {text['experts_per_token']} chosen"
    )


COMMON: Mapping[str, Block] = {
    "lower": lower,
    "forgets": verdict_on("change of text loss", partial(values, get=forgotten), above=True),
    "base": base_model,
    "rates": tuning_tables,
    "hours": lambda data: f"{data['seconds'] / 3600:.1f}",
    "versions-used": lambda data: ", ".join(f"{n} {v}" for n, v in data["versions"].items()),
}
