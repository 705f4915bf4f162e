"""The pictures of moextend.py's page."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def plot_layers(data: Results) -> Figure:
    """Plot the scores of every seed, by layer, for both tasks."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    scored = {"pictures-sequence": "pictures, gate by sequence", "code-modality": "code"}
    for panel, (name, title) in zip(panels, scored.items(), strict=True):
        d = np.array([scores.d.tolist() for scores in layer_scores(data, name)])
        panel.plot(d.T, "o-", color="0.7", markersize=4, linewidth=0.8)
        panel.plot(d.mean(0), "_", color="tab:orange", markersize=20, markeredgewidth=2)
        panel.set(title=f"{title}: each seed, and the mean", xlabel="layer")
    figure.axes[0].set(ylabel="score d", ylim=(0, None))  # shared, when both are drawn
    return figure


def plot_trade(data: Results) -> Figure:
    """Plot what is learnt against what is forgotten."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panel = figure.subplots()
    kept = 0
    for name in (name for name in _METHODS if name in data["runs"]):
        x, y = report.values(data, name, report.forgotten), since_start(data, name)
        _, low, high = report.interval(y)
        ends = [[y.mean() - low], [high - y.mean()]] if np.isfinite(low) else None
        span = [[x.mean() - x.min()], [x.max() - x.mean()]]
        if not x.any():  # side by side, in the strip of runs that change no bit
            kept += 1
            x = x - 0.0015 * kept
        panel.errorbar(x.mean(), y.mean(), ends, span, fmt="o", capsize=3, label=_METHODS[name])
    _scale_forgetting(panel)
    panel.set_xlim(left=-0.0015 * (kept + 1))
    panel.axvspan(-0.0015 * (kept + 1), -1e-4, color="0.92", zorder=0)
    panel.text(0.01, 0.02, "text keeps its bits", transform=panel.transAxes, fontsize=8)
    panel.axhline(0, color="0.6", linewidth=1, zorder=0)
    panel.set(ylabel="change of loss on answers, nats a token")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _scale_forgetting(panel: Axes) -> None:
    """Scale the axis of forgetting: linear up to 0.01 nats, logarithmic beyond."""
    panel.set_xscale("symlog", linthresh=0.01)
    panel.grid(axis="x", alpha=0.3)
    panel.set(xlabel="change of text loss, nats a token (logarithmic beyond 0.01)")


def plot_rates(data: Results) -> Figure:
    """Plot learning against forgetting at every learning rate, on the tuning seed."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for panel, task in zip(figure.subplots(1, 2), ("pictures", "code"), strict=True):
        for trains, points in tried_rates(data).items():
            if not trains.startswith(task):
                continue
            x, y = zip(*points.values(), strict=True)
            panel.plot(x, y, "o-", label=trains.removeprefix(f"{task}: "))
            for lr, point in points.items():
                panel.annotate(lr, point, fontsize=7)
        _scale_forgetting(panel)
        panel.set(title=task, ylabel="loss on the task, nats a token")
        if panel.lines:
            panel.legend(fontsize=8)
    return figure


def draw_pictures(data: Results, folder: Path) -> None:
    scores = layer_scores(data, "pictures-sequence")[0]
    save_figure(plot_layer_scores(scores), folder / "moextend-scores.png")
    save_figure(plot_layers(data), folder / "moextend-layers.png")
    save_figure(plot_trade(data), folder / "moextend-trade.png")
    save_figure(plot_rates(data), folder / "moextend-rates.png")
