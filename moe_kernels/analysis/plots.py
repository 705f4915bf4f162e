"""Plots of routing and of expert redundancy; needs matplotlib.

Every function returns its figure. With ``path`` it also writes the figure to that file, in the
format that the file name's suffix names (png, pdf, svg).
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from moe_kernels import extras, figures
from moe_kernels.analysis.redundancy import ExpertRedundancy
from moe_kernels.analysis.statistics import RoutingStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "tab:blue", "tab:orange", "0.6"
_MOST_TICKS = 16


def plot_expert_load(
    statistics: RoutingStatistics,
    path: str | os.PathLike[str] | None = None,
    *,
    modalities: Sequence[str] | None = None,
    title: str = "Expert load by layer",
) -> Figure:
    """Draw one heat map of expert load (layer x expert) for each modality, on one colour scale.

    With several modalities, another panel shows the divergence of each from the first by layer.

    Args:
        statistics: counts of a recorder.
        path: the file to write; None: none.
        modalities: their names; default: all that have rows in ``statistics``.
        title: title of the figure.
    """
    extras.load("matplotlib", "plot_expert_load")
    modalities = tuple(modalities or statistics.seen())
    load = statistics.load() * statistics.counts.new_tensor(statistics.num_experts).view(-1, 1, 1)
    load = load.masked_fill(~statistics.exists().unsqueeze(1), torch.nan)
    several = len(modalities) > 1
    figure, panels = _layer_panels(len(statistics.layers), [3] * len(modalities) + [2] * several)
    highest = float(load.nan_to_num().max())
    for panel, name in zip(panels, modalities, strict=False):
        values = load[:, statistics.modalities.index(name)]
        image = _heat_map(panel, values, "viridis", highest)
        panel.set_title(_name(name))
    # Below the panels: beside them, the label would read as that of the next panel.
    figure.set_figheight(figure.get_figheight() + 0.6)
    figure.colorbar(
        image, ax=panels[: len(modalities)], label="load / even load", location="bottom",
        aspect=50, shrink=0.6, pad=0.1 / figure.get_figheight(),
    )  # fmt: skip
    if several:
        _divergences(panels[-1], statistics, modalities)
    _label_layers(panels, statistics.layers)
    return _finish(figure, title, path)


def plot_specialisation(
    statistics: RoutingStatistics,
    path: str | os.PathLike[str] | None = None,
    *,
    modalities: tuple[str, str] = ("text", "image"),
    title: str = "Specialisation of the experts",
) -> Figure:
    """Draw a heat map of specialisation (layer x expert), and a bar chart of expert kinds by layer.

    A specialisation of 0 means that the expert serves the first modality only, 1 the second only,
    0.5 both equally. Unused experts are grey. The kinds are those of
    :meth:`RoutingStatistics.expert_kinds`.

    Args:
        statistics: counts of a recorder.
        path: the file to write; None: none.
        modalities: the first and the second modality.
        title: title of the figure.
    """
    extras.load("matplotlib", "plot_specialisation")
    first, second = map(_name, modalities)
    values = statistics.specialisation(*modalities)
    values = values.masked_fill(statistics.unused(*modalities), torch.nan)
    figure, (panel, counts) = _layer_panels(len(statistics.layers), (5, 3))
    image = _heat_map(panel, values, "RdBu_r", 1.0)  # has no grey, so grey can mean unused
    bar = figure.colorbar(image, ax=panel, ticks=[0, 0.5, 1], shrink=0.9, pad=0.02)
    bar.ax.set_yticklabels([f"{first} only", "both alike", f"{second} only"])
    kinds = statistics.expert_kinds(*modalities)
    left = statistics.counts.new_zeros(len(statistics.layers))
    colormap = image.get_cmap()
    for number, label, color in (
        (kinds.only_first, f"{first} only", colormap(0.0)),
        (kinds.agnostic, "agnostic", colormap(0.5)),
        (kinds.only_second, f"{second} only", colormap(1.0)),
        (kinds.unused, "unused", _GREY),
    ):
        counts.barh(
            range(len(left)), number.tolist(), left=left.tolist(), color=color, label=label,
            edgecolor="0.4", linewidth=0.4,
        )  # fmt: skip
        left = left + number
    counts.set(xlabel="experts", xlim=(0, statistics.counts.shape[-1]))
    counts.xaxis.get_major_locator().set_params(integer=True)
    # Above the panel, since a legend inside it would cover bars.
    counts.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4 if len(first + second) < 20 else 2,
        fontsize=8, frameon=False, columnspacing=1.0, handlelength=1.2,
    )  # fmt: skip
    _label_layers((panel, counts), statistics.layers)
    return _finish(figure, title, path)


def plot_divergence(
    statistics: RoutingStatistics | Mapping[str, RoutingStatistics],
    path: str | os.PathLike[str] | None = None,
    *,
    modalities: tuple[str, str] = ("text", "image"),
    title: str | None = None,
) -> Figure:
    """Draw the Jensen-Shannon divergence of two modalities' loads against the layer.

    Args:
        statistics: counts of a recorder, or several of them by label, such as
            ``{"before": ..., "after": ...}``: one line each.
        path: the file to write; None: none.
        modalities: the two modalities to compare.
        title: title of the figure; default: the names of the modalities.
    """
    extras.load("matplotlib", "plot_divergence")
    by_label = statistics if isinstance(statistics, Mapping) else {"": statistics}
    layers = _same_layers(by_label)
    figure, panel = _line_panel(len(layers))
    highest = 0.1
    for label, labelled in by_label.items():
        divergence = labelled.divergence(*modalities)
        highest = max(highest, float(divergence.max()))
        _line(panel, divergence, label)
    panel.set(ylim=(0, min(1.02, 1.15 * highest)), ylabel="Jensen-Shannon divergence (bits)")
    _label_columns(panel, layers)
    if len(by_label) > 1:
        panel.legend(frameon=False)
    return _finish(figure, title or f"Routing of {' against '.join(map(_name, modalities))}", path)


def plot_redundancy(
    before: ExpertRedundancy,
    after: ExpertRedundancy | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draw the mean similarity of two different experts by layer, before and after training.

    The shaded band reaches from the least similar to the most similar pair.

    Args:
        before: redundancy of a model.
        after: redundancy of the same model later; None: one line only.
        path: the file to write; None: none.
        title: title of the figure; default: the modality.

    Raises:
        ValueError: the two differ in their layers, modality or metric.
    """
    extras.load("matplotlib", "plot_redundancy")
    from matplotlib.patches import Patch

    by_label = {"before": before} | ({} if after is None else {"after": after})
    layers = _same_layers(by_label)
    kinds = {(redundancy.modality, redundancy.metric) for redundancy in by_label.values()}
    if len(kinds) > 1:
        raise ValueError(f"before and after have different modality or metric: {kinds}")
    figure, panel = _line_panel(len(layers))
    figure.set_figheight(4.3)  # for the legend above
    for (label, redundancy), color in zip(by_label.items(), (_BLUE, _ORANGE), strict=False):
        mean = redundancy.mean()
        name = "" if after is None else f"{label}, "
        _line(panel, mean, f"{name}mean {mean.nanmean():.3f}", color=color)
        low, high = redundancy.extremes()
        panel.fill_between(range(len(layers)), low.tolist(), high.tolist(), color=color, alpha=0.12)
    metric = {"cka": "debiased linear CKA", "cosine": "cosine"}[before.metric]
    panel.set(ylabel=f"{metric} of two experts' outputs")
    panel.axhline(0, color="0.6", linewidth=0.8)
    _label_columns(panel, layers)
    band = Patch(color=_GREY, alpha=0.3, label="band: least to most similar pair")
    # Above the panel, since a legend inside it would cover lines.
    panel.legend(
        handles=[*panel.get_legend_handles_labels()[0], band], loc="lower center",
        bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False,
    )  # fmt: skip
    return _finish(figure, title or f"Redundancy of experts on {_name(before.modality)} rows", path)


def _divergences(panel: Axes, statistics: RoutingStatistics, modalities: Sequence[str]) -> None:
    """Draw bars of the divergence of each modality from the first, side by side in each layer."""
    first, *others = modalities
    width = 0.8 / len(others)
    for number, other in enumerate(others):
        divergence = statistics.divergence(first, other).tolist()
        at = [layer + (number + 0.5) * width - 0.4 for layer in range(len(divergence))]
        color = _ORANGE if len(others) == 1 else f"C{number + 1}"
        panel.barh(at, divergence, width, color=color, label=_name(other))
    against = _name(others[0]) if len(others) == 1 else "each other"
    panel.set(
        title=textwrap.fill(f"{_name(first)} against {against}", 30), xlim=(0, 1),
        xlabel="Jensen-Shannon divergence (bits)",
    )  # fmt: skip
    if len(others) > 1:
        panel.legend(loc="lower right", fontsize=8)


def _same_layers(by_label: Mapping[str, RoutingStatistics | ExpertRedundancy]) -> tuple[str, ...]:
    layers = {labelled.layers for labelled in by_label.values()}
    if len(layers) != 1:
        raise ValueError(
            f"one plot needs the same layers in all of {', '.join(map(repr, by_label))}; got "
            f"{len(layers)} different lists of layers"
        )
    return layers.pop()


def _layer_panels(layers: int, widths: Sequence[float]) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure with panels side by side, tall enough for a row per layer."""
    # Not pyplot: it would choose a display backend and keep the figure alive.
    from matplotlib.figure import Figure

    height = 1.7 + max(1.6, min(0.5, 7 / layers) * layers)
    figure = Figure(figsize=(0.5 + 1.6 * sum(widths), height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.04)
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    return figure, panels


def _line_panel(layers: int) -> tuple[Figure, Axes]:
    """Return a figure with one panel, wide enough for a column per layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.5, min(0.3 * layers + 2.5, 12)), 3.8), layout="constrained")
    return figure, figure.subplots()


def _heat_map(panel: Axes, values: torch.Tensor, colormap: str, highest: float) -> ScalarMappable:
    """Draw (L, E) values on a colour scale from 0 to ``highest``; NaN is grey."""
    import matplotlib

    colors = matplotlib.colormaps[colormap].with_extremes(bad=_GREY)
    image = panel.imshow(
        values.numpy(), aspect="auto", cmap=colors, vmin=0, vmax=highest, interpolation="nearest"
    )
    ticks = _ticks(values.shape[1])
    panel.set(xlabel="expert", xticks=ticks)
    return image


def _line(panel: Axes, values: torch.Tensor, label: str, **options: str) -> None:
    panel.plot(range(len(values)), values.tolist(), "o-", markersize=4, label=label, **options)


def _label_layers(panels: Sequence[Axes], layers: Sequence[str]) -> None:
    numbers, ticks = _layer_numbers(layers), _ticks(len(layers))
    for panel in panels:
        panel.set(ylim=(len(layers) - 0.5, -0.5), yticks=ticks)
        panel.set_yticklabels([numbers[tick] for tick in ticks])
    panels[0].set_ylabel("layer")


def _label_columns(panel: Axes, layers: Sequence[str]) -> None:
    numbers, ticks = _layer_numbers(layers), _ticks(len(layers))
    panel.set(xlabel="layer", xlim=(-0.5, len(layers) - 0.5), xticks=ticks)
    panel.set_xticklabels([numbers[tick] for tick in ticks])
    panel.grid(axis="y", alpha=0.3)


def _layer_numbers(layers: Sequence[str]) -> list[str]:
    """Return the layer numbers within module names: "3" of "model.layers.3.mlp".

    Positions in the list would be wrong in a model that has dense layers between sparse ones.
    """
    numbers = [re.findall(r"(?<=\.)\d+(?=\.|$)", name) for name in layers]
    return [found[0] if found else str(index) for index, found in enumerate(numbers)]


def _ticks(count: int) -> range:
    """Return evenly spaced ticks, few enough that their labels do not touch."""
    most = _MOST_TICKS if count <= 100 else _MOST_TICKS // 2
    return range(0, count, 1 << ((count - 1) // most).bit_length())


def _name(modality: str) -> str:
    return figures.printable(modality, 40)


def _finish(figure: Figure, title: str, path: str | os.PathLike[str] | None) -> Figure:
    figure.suptitle(title)
    if path is not None:
        figures.save(figure, path)
    return figure
