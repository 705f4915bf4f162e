"""The pictures of redundancy.py's page."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from shared.files import save_figure

from moe_kernels.analysis import (
    ExpertRedundancy,
    plot_divergence,
    plot_expert_load,
    plot_redundancy,
    plot_specialisation,
)
from moe_kernels.imaging import PatchTokenizer
from studies import report
from studies.redundancy import verdicts
from studies.report import Results

# Runs by their label in the plot of parameters; a line joins those of one label.
_METHODS = {
    "masked LoRA, r 4, 16, 32, 128": ("rank-4", "plora", "rank-32", "rank-128"),
    "added rows alone": ("rows",),
    "attention's adapters alone": ("plora-attention",),
    "experts' adapters alone": ("plora-experts",),
    "a feed-forward network for pictures": ("copy",),
    "added experts": ("added-experts",),
    "LoRA on all tokens, r 16": ("all-tokens",),
    "everything": ("full",),
    "masked LoRA, r 16, rows at their own rate": ("own-rate-plora",),
    "experts' adapters, rows at their own rate": ("own-rate-experts",),
}


def draw_pictures(data: Results, folder: Path) -> None:
    """Draw all pictures of the page whose runs were made."""
    if any(name in data["runs"] for names in _METHODS.values() for name in names):
        save_figure(plot_parameters(data), folder / "redundancy-parameters.png")
    if "plora" not in data["runs"]:
        return
    seed, result = next(iter(report.seeds_of(data, "plora").items()))
    statistics = {when: verdicts.routings(data, when)[0] for when in ("before", "after")}
    for when, found in statistics.items():
        for name, plot, title in (
            ("routing", plot_expert_load, "Expert load by layer"),
            ("specialisation", plot_specialisation, "Specialisation of the experts"),
        ):
            figure = plot(found, title=f"{title}, {when} training, seed {seed}")
            save_figure(figure, folder / f"redundancy-{name}-{when}.png")
    save_figure(plot_divergence(statistics), folder / "redundancy-divergence.png")
    pairs = [result[f"look_{when}"]["pairs"] for when in statistics]
    similar = map(ExpertRedundancy.from_dict, pairs)
    save_figure(plot_redundancy(*similar), folder / "redundancy-similarity.png")
    save_figure(plot_gallery(result["gallery"]), folder / "redundancy-samples.png")


def plot_parameters(data: Results) -> Figure:
    """Plot image loss against parameters; bars are standard deviations over seeds."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    panel = figure.subplots()
    for label, names in _METHODS.items():
        made = [name for name in names if name in data["runs"]]
        if not made:
            continue
        x = [report.parameters(data, name) for name in made]
        y = [report.values(data, name, "test_nll") for name in made]
        spread = [numbers.std(ddof=1) if len(numbers) > 1 else 0 for numbers in y]
        style = "o-" if len(names) > 1 else "^" if names[0].startswith("own-rate") else "s"
        means = [numbers.mean() for numbers in y]
        panel.errorbar(x, means, spread, fmt=style, label=label, capsize=3)
    panel.set(xscale="log", xlabel="trained parameters", ylabel="image loss, nats a token")
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def plot_gallery(gallery: Results) -> Figure:
    """Plot pictures by caption: real ones, then those of each guidance beside the nearest real."""
    tokenizer = PatchTokenizer(torch.tensor(gallery["codebook"]), 4, (28, 28))
    captions, blocks = gallery["captions"], [("real, held out", gallery["real"])]
    for guidance, drawn in gallery["guidance"].items():
        blocks.append((f"guidance {guidance}", drawn["codes"]))
        blocks.append(("nearest of training", drawn["nearest"]))
    each = len(gallery["real"]) // len(captions)
    size = (2.4 + 1.15 * len(blocks), 0.62 * len(captions) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(captions), len(blocks), squeeze=False)
    for column, (heading, codes) in enumerate(blocks):
        pictures = tokenizer.decode(torch.tensor(codes))
        panels[0, column].set_title(heading, fontsize=8)
        for row in range(len(captions)):
            side_by_side = torch.cat(list(pictures[each * row : each * (row + 1)]), dim=1)
            panels[row, column].imshow(side_by_side.numpy(), cmap="gray_r", vmin=0, vmax=1)
            panels[row, column].set(xticks=[], yticks=[])
    for row, caption in enumerate(captions):
        panels[row, 0].set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=8)
    return figure
