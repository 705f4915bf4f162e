"""Routing as pictures; needs matplotlib."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from moe_kernels.analysis.statistics import RoutingStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_expert_load(
    statistics: RoutingStatistics,
    path: str | os.PathLike | None = None,
    *,
    modalities: tuple[str, str] = ("text", "image"),
    title: str = "Expert load by layer",
) -> Figure:
    """Two heat maps, layer x expert, on one colour scale, and the divergence between them by layer.

    Returns the figure, and writes it to ``path`` if given.
    """
    # Not pyplot: it would choose a display backend and keep the figure alive.
    from matplotlib.figure import Figure

    first, second = modalities
    load = statistics.load()
    layers, _, experts = load.shape
    figure = Figure(figsize=(13, 1.6 + 0.5 * layers + 0.8), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    highest = float(load.max()) * experts
    for panel, name in zip(panels, modalities, strict=False):
        values = (load[:, statistics.modalities.index(name)] * experts).numpy()
        image = panel.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=highest)
        panel.set(title=name, xlabel="expert", ylabel="layer", yticks=range(layers))
    figure.colorbar(image, ax=panels[:2], label="load / even load")
    divergence = statistics.divergence(first, second).numpy()
    panels[2].barh(range(layers), divergence, color="tab:orange")
    panels[2].invert_yaxis()
    panels[2].set(
        title=f"{first} against {second}", xlabel="Jensen-Shannon divergence (bits)",
        ylabel="layer", yticks=range(layers), xlim=(0, 1),
    )  # fmt: skip
    figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure
