"""Loss curves of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure


def plot_losses(
    histories: Mapping[str, Mapping[str, Any]], label: str, *, log: bool = False
) -> Figure:
    """Return a figure with a panel for each history: training and held-out loss by step.

    Args:
        histories: title -> what `moe_kernels.programs.shared.training.train` returns
        label: name and unit of the loss
    """
    figure = Figure(figsize=(1.5 + 5 * len(histories), 4), layout="constrained")
    panels = figure.subplots(1, len(histories), squeeze=False, sharey=not log).flat
    for panel, (title, history) in zip(panels, histories.items(), strict=True):
        # One point draws no line.
        marker = "." if len(history["loss"]) == 1 else None
        panel.plot(
            *zip(*history["loss"], strict=True), linewidth=1, marker=marker, label="training"
        )
        panel.plot(*zip(*history["held_out"], strict=True), "o-", label="held out")
        panel.set(title=title, xlabel="step", ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
        if log:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}")
        else:  # the axes are shared
            panel.label_outer()
        panel.legend()
    return figure
