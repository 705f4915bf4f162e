"""Plot of layer scores; needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_kernels import extras
from moe_kernels.files import replacing
from moe_kernels.moextend.scores import LayerScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_layer_scores(
    scores: LayerScores,
    path: str | os.PathLike[str] | None = None,
    *,
    chosen: Sequence[int] | None = None,
    title: str = "Shift of the experts' selection by tuning the routers",
) -> Figure:
    """Plot the change of each expert's share, layer x expert, beside the layers' scores.

    Args:
        scores: result of ``score_layers``.
        path: the file to write; its suffix (png, pdf, svg) decides the format.
        chosen: layers to mark; default: the upper half by score.
        title: title of the figure.

    Returns:
        The figure.
    """
    figures = extras.load("matplotlib.figure", "plot_layer_scores")
    matplotlib = extras.load("matplotlib", "plot_layer_scores")
    layers, rows = [str(layer) for layer in scores.layers], range(len(scores.layers))
    if chosen is None:
        chosen = scores.order[: max(1, len(layers) // 2)]
    figure = figures.Figure(figsize=(10, 1.5 + 0.3 * max(6, len(layers))), layout="constrained")
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    numbers = scores.before.new_tensor(scores.num_experts).unsqueeze(1)
    exists = torch.arange(scores.before.shape[1], device=numbers.device) < numbers
    change = (-scores.shift).masked_fill(~exists, torch.nan)
    limit = float(change.nan_to_num().abs().max()) or 1.0
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="0.6")
    image = heat.imshow(
        change.numpy(), aspect="auto", cmap=colours, vmin=-limit, vmax=limit, interpolation="none"
    )
    figure.colorbar(image, ax=heat, label="share after - share before", pad=0.02)
    heat.set(xlabel="expert", ylabel="layer", title="share of selections")
    heat.set_yticks(rows, layers)
    heat.xaxis.get_major_locator().set_params(integer=True)
    marks = ["tab:orange" if layer in chosen else "0.6" for layer in scores.layers]
    bars.barh(rows, scores.d.tolist(), color=marks)
    bars.set(xlabel="d, standard deviation over experts", title="score (orange: chosen)")
    figure.suptitle(title)
    if path is not None:
        path = Path(path)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=130, format=path.suffix.removeprefix(".") or "png")
    return figure
