"""The pictures of moextend.py's page."""

import itertools
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_kernels.moextend import plot_layer_scores
from moe_kernels.programs.shared.files import save_figure
from studies import report
from studies.moextend.verdicts import layer_scores, since_start, tried_rates
from studies.report import Results

_METHODS = {
    "gated": "experts, gate by token",
    "sequence": "experts, gate by sequence",
    "published": "experts, no gate (as published)",
    "no-gate": "experts, no gate, our start",
    "lora": "masked LoRA",
    "lora-sequence": "masked LoRA by sequence",
    "lora-all-tokens": "the same LoRA on all tokens",
    "projector": "the projector goes on alone",
    "full": "full fine-tuning",
    "full-slow": "full fine-tuning, at a low rate",
}


# Markers of the learning rates, in their order: labels at the points would lie over one another.
_MARKERS = "o^sDvPX*"


def plot_layers(data: Results) -> Figure:
    """Plot the scores of every seed, by layer, for both tasks."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    scored = {"pictures-sequence": "pictures, gate by sequence", "code-modality": "code"}
    for panel, (name, title) in zip(panels, scored.items(), strict=True):
        d = np.array([scores.d.tolist() for scores in layer_scores(data, name)])
        panel.plot(d.T, "o-", color="0.7", markersize=4, linewidth=0.8)
        panel.plot(d.mean(0), "_", color="tab:orange", markersize=20, markeredgewidth=2)
        panel.set(title=title, xlabel="layer")
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[0].set(ylabel="score d", ylim=(0, None))  # shared, when both are drawn
    figure.suptitle("Scores of each seed (grey), and their mean (orange)")
    return figure


def plot_trade(data: Results) -> Figure:
    """Plot what is learnt against what is forgotten.

    Runs that change no bit of text forget nothing: they stand side by side in a panel of their own,
    whose x axis has no numbers.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    kept, lost = figure.subplots(1, 2, sharey=True, width_ratios=(1, 3))
    _scale_forgetting(lost)  # before anything is drawn, for limits that suit the scale
    places = 0
    for number, name in enumerate(name for name in _METHODS if name in data["runs"]):
        x, y = report.values(data, name, report.forgotten), since_start(data, name)
        _, low, high = report.interval(y)
        ends = [[y.mean() - low], [high - y.mean()]] if np.isfinite(low) else None
        options = {"fmt": "o", "capsize": 3, "label": _METHODS[name], "color": f"C{number}"}
        if x.any():
            span = [[x.mean() - x.min()], [x.max() - x.mean()]]
            lost.errorbar(x.mean(), y.mean(), ends, span, **options)
        else:
            kept.errorbar(places, y.mean(), ends, **options)
            places += 1
    kept.set(title="text keeps its bits", xticks=[], xlim=(-0.5, max(places, 1) - 0.5))
    kept.set(xlabel="no change of text loss", ylabel="change of loss on answers, nats a token")
    lost.set_title("text changes")
    _widen_forgetting(lost)
    for panel in (kept, lost):
        panel.axhline(0, color="0.6", linewidth=1, zorder=0)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _scale_forgetting(panel: Axes) -> None:
    """Scale the axis of forgetting: linear up to 0.01 nats, logarithmic beyond."""
    panel.set_xscale("symlog", linthresh=0.01)
    panel.grid(axis="x", alpha=0.3)
    panel.set(xlabel="change of text loss, nats a token (logarithmic beyond 0.01)")


def _widen_forgetting(panel: Axes) -> None:
    """Show 0 and 0.01 at least: without a logarithmic part, the ticks would be the limits."""
    low, high = panel.get_xlim()
    panel.set_xlim(min(low, 0), max(high, 0.015))


def plot_rates(data: Results) -> Figure:
    """Plot learning against forgetting at every learning rate, on the tuning seed."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    tried = tried_rates(data)
    rates = sorted({lr for points in tried.values() for lr in points}, key=float)
    markers = dict(zip(rates, itertools.cycle(_MARKERS)))
    trained = list(dict.fromkeys(trains.partition(": ")[2] for trains in tried))
    for panel, task in zip(figure.subplots(1, 2), ("pictures", "code"), strict=True):
        _scale_forgetting(panel)
        for trains, points in tried.items():
            if not trains.startswith(task) or not points:
                continue
            colour = f"C{trained.index(trains.partition(': ')[2])}"
            panel.plot(*zip(*points.values(), strict=True), "-", color=colour)
            for lr, point in points.items():
                panel.plot(*point, markers[lr], color=colour)
        _widen_forgetting(panel)
        panel.set(title=task, ylabel="loss on the task, nats a token")
    keys = [Line2D([], [], color=f"C{number}", label=name) for number, name in enumerate(trained)]
    keys += [
        Line2D([], [], color="0.3", linestyle="", marker=marker, label=f"learning rate {lr}")
        for lr, marker in markers.items()
    ]
    if keys:
        figure.legend(handles=keys, loc="outside right upper", fontsize=8)
    return figure


def draw_pictures(data: Results, folder: Path, note: str = "") -> None:
    """Draw all pictures of the page; note: a line below each."""
    scores = layer_scores(data, "pictures-sequence")[0]
    save_figure(plot_layer_scores(scores), folder / "moextend-scores.png", note)
    save_figure(plot_layers(data), folder / "moextend-layers.png", note)
    save_figure(plot_trade(data), folder / "moextend-trade.png", note)
    save_figure(plot_rates(data), folder / "moextend-rates.png", note)
