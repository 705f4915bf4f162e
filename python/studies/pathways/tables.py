"""Rows, tables and values of the page of pathways.py."""

from dataclasses import replace

import numpy as np
import torch

from moe_kernels.analysis import RoutingStatistics
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
RISE = 0.1  # share by which the loss of an unstable run rises between two points of its curve
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
    """Say how many of the runs have converged, and how much losses fell in the last fifth."""
    falls: dict[int, list[float]] = {}
    for name, run in data["runs"].items():
        falls.setdefault(run["settings"]["epochs"], []).extend(
            report.values(data, name, "fall_at_end")
        )
    done = sum(fall < CONVERGED for each in falls.values() for fall in each)
    ranges = ", and ".join(
        f"by {100 * min(each):.1f} to {100 * max(each):.1f} % in the {len(each)} runs of {epochs} "
        f"epoch{'s' * (epochs > 1)}"
        for epochs, each in falls.items()
    )
    total = sum(map(len, falls.values()))
    return (
        f"{done} of {total} runs converged. In the last fifth of the steps, losses fell {ranges}; "
        f"less than {100 * CONVERGED:g} % would count"
    )


def rises(data: Results) -> str:
    """Name the runs whose held-out loss rose between two measurements of its curve."""
    found = []
    for name in data["runs"]:
        for seed, result in report.seeds_of(data, name).items():
            curve = [point for point in result["curve"] if point[0]]
            before, after = max(
                zip(curve, curve[1:], strict=False), key=lambda pair: pair[1][1] / pair[0][1]
            )
            if after[1] > (1 + RISE) * before[1]:
                found.append(
                    f"{name}, seed {seed}, from {before[1]:.2f} at step {before[0]} to "
                    f"{after[1]:.2f} at step {after[0]}"
                )
    return "; ".join(found) or "none"


def routing_row(data: Results, run: str, when: str) -> str:
    """Columns of :func:`looks.routing_row`, and the image share of the k most chosen experts."""
    chosen = first_setup(data)["base"]["top_k"]
    shares = np.array([
        float(_load(each, "image").topk(chosen).values.sum(-1).mean())
        for each in looks.routings(data, run, when)
    ])  # fmt: skip
    return f"{looks.routing_row(data, run, when)} | {mean_and_spread(100 * shares, 0)}"


def largest_divergence(data: Results) -> str:
    """Largest divergence that images can reach, the mean of layers, of the first seed.

    Text's loads are fixed, and an image load is at most 1/k. The divergence is convex in the image
    loads, and falls with the load that text has where images go: it is largest where the k experts
    that text loads least have 1/k each.
    """
    found, chosen = _first_routing(data)
    text = found.counts[:, found.modalities.index("text")]
    least = text.topk(chosen, largest=False).indices
    counts = torch.stack([text, torch.zeros_like(text).scatter(-1, least, 1)], dim=1)
    best = replace(
        found, modalities=looks.MODALITIES, counts=counts, rows=counts.sum(-1) // chosen
    )  # fmt: skip
    return f"{float(best.divergence(*looks.MODALITIES).mean()):.2f}"


def could_be_image_alone(data: Results) -> str:
    """Say how many experts could have nine tenths of their load from images."""
    found, chosen = _first_routing(data)
    text = _load(found, "text")
    return f"{int((9 * text <= 1 / chosen).sum())} of {text.numel()}"


def _load(statistics: RoutingStatistics, modality: str) -> torch.Tensor:
    """(layers, experts) shares of a modality's choices."""
    return statistics.load()[:, statistics.modalities.index(modality)]


def _first_routing(data: Results) -> tuple[RoutingStatistics, int]:
    """Routing before training, whose text no run changes, and the number of chosen experts."""
    return looks.routings(data, "rows", "before")[0], first_setup(data)["base"]["top_k"]


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
    whats = ("similarity on images", "divergence")
    heads = [f"{what}, {when}" for what in whats for when in looks.WHEN]
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
    "rises": rises,
    "routing": routing_row,
    "largest-divergence": largest_divergence,
    "could-be-image-alone": could_be_image_alone,
    "layers": layers_table,
    "start-row": report.row(
        *LOSS, spread(SPEED), speed_difference,
        report.column("largest_gradient_norm", lambda x: f"{x.min():.3g} to {x.max():.3g}"),
        gradient_ratio,
    ),
    "best-start": STARTS.best,
    "text-loss": lambda data, of: f"{first_setup(data)['text_nll'][of]:.3f}",
    "every-run": report.runs_table({
        "lr": ("lr", "g"),
        "trained parameters": ("trained_parameters", ","),
        "image loss": ("test_nll", ".3f"),
        "largest gradient norm": ("largest_gradient_norm", ",.0f"),
        "fall in the last fifth, %": (lambda result: 100 * result["fall_at_end"], ".2f"),
        "text logits changed": ("text.logits_changed_by_training", ","),
        "seconds": ("seconds", ".0f"),
    }),
}  # fmt: skip
