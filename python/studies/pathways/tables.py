"""Rows, tables and values of the page of pathways.py."""

from studies import looks, report
from studies.drawing import ATTRIBUTES, GROUPS
from studies.pathways.verdicts import SPEED, STARTS, VERDICTS
from studies.report import (
    SETUP,
    Block,
    NotMeasured,
    Results,
    mean_and_interval,
    mean_and_spread,
    spread,
)
from studies.starts import gradient_ratio

CONVERGED = 0.01  # a run whose loss falls by less than this share in its last fifth
# Runs that train as many parameters in all layers.
_EQUAL = ("attention", "experts", "both", "dense-experts")

# --- columns of a run


def speed_difference(data: Results, name: str, baseline: str) -> str:
    """Mean difference to the baseline's mean loss over log steps; empty for the baseline."""
    return "" if name == baseline else mean_and_interval(report.paired(data, name, baseline, SPEED))


def converged(data: Results, name: str, _: str) -> str:
    """Number of seeds whose run has converged, and the mean fall in the last fifth."""
    falls = report.values(data, name, "fall_at_end")
    return f"{int((falls < CONVERGED).sum())} of {len(falls)} ({100 * falls.mean():.1f} %)"


def right(where: str) -> tuple[report.Column, ...]:
    """Columns of the shares read right in per cent, of trained and of held-out combinations."""
    return tuple(
        spread(f"{where}.{group}.{attribute}", 0, scale=100)
        for group in GROUPS
        for attribute in ATTRIBUTES
    )


# --- tables and sentences


def first_setup(data: Results) -> Results:
    return next(iter(report.seeds_of(data, SETUP).values()))


def base(data: Results) -> str:
    shape = (
        "{layers} layers, hidden size {hidden_size}, a shared expert of {shared_expert} neurons "
        "and {experts} experts of {intermediate_size}, {top_k} chosen"
    )
    return shape.format(**first_setup(data)["base"])


def equal(data: Results) -> str:
    """Say how far apart the numbers of adapter parameters are."""
    made = [name for name in _EQUAL if name in data["runs"]]
    counts = {name: report.values(data, name, "adapter_parameters")[0] for name in made}
    if len(counts) < 2:
        raise NotMeasured("two runs with adapters")
    apart = max(counts.values()) / min(counts.values()) - 1
    listed = ", ".join(f"{name} {count:,.0f}" for name, count in counts.items())
    return f"{listed}: {100 * apart:.1f} % apart"


def converged_runs(data: Results) -> str:
    """Say how many of the runs have converged."""
    falls = [
        result["fall_at_end"] for name in data["runs"]
        for result in report.seeds_of(data, name).values()
    ]  # fmt: skip
    done = sum(fall < CONVERGED for fall in falls)
    return f"{done} of {len(falls)} runs fall by less than {100 * CONVERGED:g} %"


def layers_table(data: Results, run: str) -> str:
    """Similarity of experts and divergence of loads by layer, before and after a run."""
    columns = [
        *(looks.layer_similarity(data, run, "image", when) for when in looks.WHEN),
        *(looks.layer_divergence(data, run, when) for when in looks.WHEN),
    ]
    rows = [
        [str(layer), *(mean_and_spread(each[:, layer]) for each in columns)]
        for layer in range(columns[0].shape[1])
    ]
    heads = [f"{what}, {when}" for what in ("similarity", "divergence") for when in looks.WHEN]
    return report.table(["layer", *heads], rows)


def rows_rate(data: Results) -> str:
    """Say at which rate added rows learnt beside adapters, and which was the best alone."""
    settings = [run["settings"] for run in data["runs"].values()]
    rates = {each["rows_lr"] for each in settings if each["adapts"]}
    if not rates:
        raise NotMeasured("a run with adapters")
    (rate,) = rates
    best = data["tuning"]["learning_rate"].get("added rows alone")
    alone = "not tried" if best is None else f"{best:g}"
    return f"{rate:g} (the best of added rows alone: {alone})"


LOSS = (spread("test_nll"), report.difference)
BLOCKS: dict[str, Block] = {
    **VERDICTS,
    "base": base,
    "equal": equal,
    "converged": converged_runs,
    "rows-rate": rows_rate,
    "learns": report.row(
        report.SEEDS, report.count("adapter_parameters"), *LOSS, spread(SPEED), speed_difference,
        converged,
    ),
    "read": report.row(*right("read")),
    "reader": lambda data: report.row(*right("reader"))(data, SETUP),
    "captions": report.row(*(spread(f"test_nll_by_captions.{group}") for group in GROUPS)),
    "text": report.row(
        report.SEEDS, spread("text.nll_unpatched"), spread("text.nll_before_training"),
        spread("text.nll_after_training"), report.count("text.logits_changed_by_training"),
        spread("text.median_logit_difference_to_unpatched"),
    ),
    "routing": looks.routing_row,
    "layers": layers_table,
    "start-row": report.row(
        *LOSS, spread(SPEED), speed_difference, spread("largest_gradient_norm", 1), gradient_ratio
    ),
    "best-start": STARTS.best,
    "text-loss": lambda data, of: f"{first_setup(data)['text_nll'][of]:.3f}",
    "every-run": report.runs_table({
        "lr": ("lr", "g"),
        "trained parameters": ("trained_parameters", ","),
        "image loss": ("test_nll", ".3f"),
        "fall in the last fifth, %": (lambda result: 100 * result["fall_at_end"], ".2f"),
        "text logits changed": ("text.logits_changed_by_training", ","),
        "seconds": ("seconds", ".0f"),
    }),
}  # fmt: skip
