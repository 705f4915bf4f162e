"""The pictures of redundancy.py's page."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from moe_kernels import analysis
from moe_kernels.imaging import PatchTokenizer, SampleRow, plot_samples
from moe_kernels.programs.shared.files import save_figure
from studies import looks, report
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


def draw_pictures(data: Results, folder: Path, note: str = "") -> None:
    """Draw all pictures of the page whose runs were made; note: a line below each."""
    if any(name in data["runs"] for names in _METHODS.values() for name in names):
        save_figure(plot_parameters(data), folder / "redundancy-parameters.png", note)
    if "plora" not in data["runs"]:
        return
    seed, result = next(iter(report.seeds_of(data, "plora").items()))
    statistics = {when: looks.routings(data, "plora", when)[0] for when in looks.WHEN}
    for when, found in statistics.items():
        state = f"{when} training, seed {seed}"
        load = analysis.plot_expert_load(found, title=f"Expert load by layer, {state}")
        save_figure(load, folder / f"redundancy-routing-{when}.png", note)
        own = analysis.plot_specialisation(found, title=f"Specialisation of the experts, {state}")
        save_figure(own, folder / f"redundancy-specialisation-{when}.png", note)
    save_figure(analysis.plot_divergence(statistics), folder / "redundancy-divergence.png", note)
    pairs = [result[f"look_{when}"]["pairs"] for when in statistics]
    similar = map(analysis.ExpertRedundancy.from_dict, pairs)
    save_figure(analysis.plot_redundancy(*similar), folder / "redundancy-similarity.png", note)
    save_figure(plot_gallery(result["gallery"]), folder / "redundancy-samples.png", note)


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
    """Plot pictures by caption: drawings at each guidance, their nearest, and real ones."""
    decode = PatchTokenizer(torch.tensor(gallery["codebook"]), 4, (28, 28)).decode
    by_caption, made = (len(gallery["captions"]), -1), gallery["guidance"]
    real = torch.tensor(gallery["real"]).unflatten(0, by_caption)
    drawn, nearest, read = (
        torch.cat([torch.tensor(each[key]).unflatten(0, by_caption) for each in made.values()], 1)
        for key in ("codes", "nearest", "read")
    )
    rows = [
        SampleRow(caption, decode(drawn[i]), decode(real[i]), read[i] != i, decode(nearest[i]))
        for i, caption in enumerate(gallery["captions"])
    ]
    title = f"From left to right, {real.shape[1]} pictures each at guidance {', '.join(made)}"
    return plot_samples(rows, title, through_tokenizer=True)
