"""The pictures of pathways.py's page."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from moe_kernels import analysis
from moe_kernels.programs.shared.files import save_figure
from studies import looks, report
from studies.report import Results

# Runs of a panel of curves, by its title.
_PANELS = {
    "what trains": ("rows", "attention", "attention-low", "experts", "both"),
    "Mixture of Experts and dense parent": ("rows", "dense-rows", "experts", "dense-experts"),
    "starts": (
        "init-normal", "init-gaussian", "init-mean", "init-permuted", "init-gromov_wasserstein",
        "lora-permuted", "lora-gromov_wasserstein",
    ),
}  # fmt: skip


def draw_pictures(data: Results, folder: Path, note: str = "") -> None:
    """Draw all pictures of the page whose runs were made; note: a line below each."""
    if any(name in data["runs"] for names in _PANELS.values() for name in names):
        save_figure(plot_curves(data), folder / "pathways-curves.png", note)
    if "both" not in data["runs"]:
        return
    _, result = next(iter(report.seeds_of(data, "both").items()))
    statistics = {"before": looks.routings(data, "both", "before")[0]} | {
        f"after training {name}": looks.routings(data, name, "after")[0]
        for name in ("both", "experts", "attention-low") if name in data["runs"]
    }  # fmt: skip
    save_figure(analysis.plot_divergence(statistics), folder / "pathways-divergence.png", note)
    pairs = [result[f"look_{when}"]["pairs"] for when in looks.WHEN]
    similar = map(analysis.ExpertRedundancy.from_dict, pairs)
    save_figure(analysis.plot_redundancy(*similar), folder / "pathways-similarity.png", note)


def plot_curves(data: Results) -> Figure:
    """Plot held-out loss against steps, the mean of seeds; bands go from the least to the most."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    for panel, (title, names) in zip(
        figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True
    ):
        for name in (name for name in names if name in data["runs"]):
            curves = np.array([each["curve"] for each in report.seeds_of(data, name).values()])
            steps, losses = curves[0, 1:, 0], curves[:, 1:, 1]  # step 0 has no logarithm
            (line,) = panel.plot(steps, losses.mean(0), label=name)
            panel.fill_between(
                steps, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.2
            )
        panel.set(title=title, xscale="log", yscale="log", xlabel="steps")
        panel.set_ylabel("image loss, nats a token")
        if panel.get_lines():
            panel.legend(fontsize=8)
    return figure
