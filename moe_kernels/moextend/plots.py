"""Plot of layer scores; needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moe_kernels import extras, figures
from moe_kernels.moextend.scores import LayerScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure


def plot_layer_scores(
    scores: LayerScores,
    path: str | os.PathLike[str] | None = None,
    *,
    chosen: Sequence[int] | None = None,
    title: str | None = None,
) -> Figure:
    """Plot the change of each expert's share, layer x expert, beside the layers' scores.

    Args:
        scores: result of ``score_layers``.
        path: the file to write; its suffix (png, pdf, svg) decides the format.
        chosen: layers to mark; default: the upper half by score.
        title: title of the figure; default: what the routers were tuned on, and whose selections
            were counted.

    Returns:
        The figure.
    """
    matplotlib_figure = extras.load("matplotlib.figure", "plot_layer_scores")
    layers, rows = [str(layer) for layer in scores.layers], range(len(scores.layers))
    if chosen is None:
        chosen = scores.order[: max(1, len(layers) // 2)]
    height = 2.2 + 0.3 * max(6, len(layers))
    figure = matplotlib_figure.Figure(figsize=(10, height), layout="constrained")
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    image = _draw_change(heat, scores)
    # Below its panel: beside it, the label would read as that of the next panel.
    figure.colorbar(
        image, ax=heat, location="bottom", aspect=40, pad=0.1 / height,
        label="share after tuning - share before",
    )  # fmt: skip
    heat.set(xlabel="expert", ylabel="layer", title="change of each expert's share of selections")
    heat.set_yticks(rows, layers)
    heat.xaxis.get_major_locator().set_params(integer=True)
    marks = ["tab:orange" if layer in chosen else "0.6" for layer in scores.layers]
    bars.barh(rows, scores.d.tolist(), color=marks)
    bars.set(xlabel="d, standard deviation over experts", title="score (orange: chosen)")
    figure.suptitle(_title(scores) if title is None else title)
    if path is not None:
        figures.save(figure, path)
    return figure


def _draw_change(panel: Axes, scores: LayerScores) -> ScalarMappable:
    """Draw (L, E) shares after less before, zero in white; experts that do not exist are grey."""
    matplotlib = extras.load("matplotlib", "plot_layer_scores")
    numbers = scores.before.new_tensor(scores.num_experts).unsqueeze(1)
    exists = torch.arange(scores.before.shape[1], device=numbers.device) < numbers
    change = (-scores.shift).masked_fill(~exists, torch.nan)
    limit = float(change.nan_to_num().abs().max()) or 1.0
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="0.6")
    return panel.imshow(
        change.numpy(), aspect="auto", cmap=colours, vmin=-limit, vmax=limit, interpolation="none"
    )


def _title(scores: LayerScores) -> str:
    """Say what the routers were tuned on, and whose selections were counted."""
    tuning = "Shift of the experts' selections by tuning the routers on"
    modality = "unnamed" if scores.modality is None else figures.printable(scores.modality, 30)
    counted = {"modality": f"; {modality} tokens counted", "all": "; all tokens counted", None: ""}
    return f"{tuning} {modality} data{counted[scores.count]}"
