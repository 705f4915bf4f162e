"""The demo's figures and its table on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from moe_kernels.analysis import RoutingStatistics, plot_expert_load
from moe_kernels.imaging import SampleRow, plot_samples
from shared.cli import console
from shared.files import save_figure
from shared.reports.losses import plot_losses
from shared.text_to_image import PictureTokens

RESULTS = ("samples.png", "training.png", "routing.png", "report.json")


def plot_pictures(
    report: dict[str, Any], codes: torch.Tensor, tokens: PictureTokens, path: Path
) -> None:
    samples, decode, captions = report["samples"], tokens.tokenizer.decode, tokens.captions
    each = len(codes) // len(captions)
    rows = []
    for digit, caption in enumerate(captions):
        mine = slice(digit * each, (digit + 1) * each)
        misread = torch.tensor(samples["read"][mine]) != digit
        real = tokens.held_out.codes[torch.from_numpy(tokens.held_out.labels == digit)][:6]
        rows.append(SampleRow(f'"{caption}"', decode(codes[mine]), decode(real), misread))
    accuracy = samples["classifier_held_out_accuracy"]["tokenized"]
    title = (
        f"{samples['read_as_their_caption']:.1%} of {samples['count']} pictures are read as their "
        f"caption (the same classifier on real ones: {accuracy:.1%})\n"
        f"largest change of a text logit by this training: "
        f"{report['text']['max_abs_logit_difference_by_training']}"
    )
    save_figure(plot_samples(rows, title), path)


def draw_figures(
    report: dict[str, Any], results: dict[str, Any], tokens: PictureTokens, out: Path
) -> None:
    """Write samples.png, training.png and routing.png; results: by stage."""
    codes = torch.tensor(results["generate"]["codes"])
    plot_pictures(report, codes, tokens, out / "samples.png")
    histories = {
        "text pretraining": results["pretrain"]["history"],
        "text to image, adapters and added rows only": results["teach"]["history"],
    }
    save_figure(plot_losses(histories, "nats a token", log=True), out / "training.png")
    statistics = RoutingStatistics.from_dict(results["measure"]["routing"])
    save_figure(plot_expert_load(statistics), out / "routing.png")


def summarize(report: dict[str, Any], out: Path) -> None:
    """Print a table of the results."""
    parameters, text, image = report["parameters"], report["text"], report["image"]
    samples = report["samples"]
    accuracy, spread = samples["classifier_held_out_accuracy"], samples["pairwise_distance"]
    near, count = samples["nearest_training_distance"], samples["count"]
    table = Table(title="Digits from a text model", show_header=False, show_lines=True)
    table.add_row("parameters trained", f"{parameters['trained']:,} ({parameters['share']:.1%})")
    table.add_row(
        "text, held out: nats a token",
        f"{text['nll_before_training']:.6f} before, {text['nll_after_training']:.6f} after",
    )
    table.add_row(
        "largest change of a text logit",
        f"{text['max_abs_logit_difference_by_training']} by training; against the unpatched model "
        f"(rounding) {text['max_abs_logit_difference_to_unpatched']:.1e}, "
        f"median {text['median_logit_difference_to_unpatched']:.1e}",
    )
    table.add_row(
        "image, held out: nats a token",
        f"{image['nll_start']:.3f} before, {image['nll_end']:.3f} after, "
        f"{image['nll_adapters_off']:.3f} with the adapters off",
    )
    table.add_row(
        "pictures read as their caption",
        f"{samples['read_as_their_caption']:.1%} of {count}; the classifier on held-out digits: "
        f"{accuracy['tokenized']:.1%} (raw {accuracy['raw']:.1%})",
    )
    table.add_row(
        "diversity",
        f"{samples['distinct']} of {count} distinct; distance within a caption "
        f"{spread['generated']:.2f} (real {spread['held_out_real']:.2f})",
    )
    table.add_row(
        "nearest training picture",
        f"distance {near['generated']:.2f} (held-out real {near['held_out_real']:.2f}), "
        f"{samples['copies_of_a_training_image']['generated']} copies",
    )
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items())
    table.add_row("seconds", seconds)
    table.add_row(
        "backend", f"{report['backend']} on {report['device']}, {report['threads']} threads"
    )
    console.print(table)
    console.print("written: " + ", ".join(str(out / name) for name in RESULTS))
