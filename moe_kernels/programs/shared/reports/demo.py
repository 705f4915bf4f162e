"""The demo's figures and its table on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_kernels.analysis import RoutingStatistics, plot_expert_load
from moe_kernels.programs.shared.cli import console
from moe_kernels.programs.shared.drawing import Setup
from moe_kernels.programs.shared.files import QUICK_NOTE, save_figure
from moe_kernels.programs.shared.reports.losses import plot_losses
from moe_kernels.programs.shared.reports.text_to_image import plot_drawings, training_rows
from moe_kernels.programs.shared.tables import print_rows

RESULTS = ("samples.png", "training.png", "routing.png", "report.json")


def draw_figures(
    report: dict[str, Any], setup: Setup, routing: RoutingStatistics, out: Path, *, quick: bool
) -> None:
    """Write samples.png, training.png and routing.png; quick: they say that it was too short."""
    results, tokens, note = setup.results, setup.tokens, QUICK_NOTE if quick else ""
    samples, change = report["samples"], report["text"]["max_abs_logit_difference_by_training"]
    accuracy = samples["classifier_held_out_accuracy"]["tokenized"]
    title = (
        f"{samples['read_as_their_caption']:.1%} of {samples['count']} pictures are read as their "
        f"caption (the same classifier on real ones,\nthrough the tokenizer: {accuracy:.1%}); "
        f"largest change of a text logit by this training: {change}"
    )
    labels = range(len(tokens.captions))
    figure = plot_drawings(results["draw"]["codes"]["1"], samples, labels, tokens, title, real=6)
    save_figure(figure, out / "samples.png", note)
    histories = {
        "text pretraining": results["pretrain"]["history"],
        "text to image, adapters and added rows only": results["teach"]["history"],
    }
    save_figure(plot_losses(histories, "nats a token", log=True), out / "training.png", note)
    save_figure(plot_expert_load(routing), out / "routing.png", note)


def summarize(report: dict[str, Any], out: Path) -> None:
    """Print a table of the results."""
    text, samples = report["text"], report["samples"]
    accuracy, spread = samples["classifier_held_out_accuracy"], samples["pairwise_distance"]
    near, count = samples["nearest_training_distance"], samples["count"]
    more = {
        "largest change of a text logit":
        f"{text['max_abs_logit_difference_by_training']} by training; against the unpatched model "
        f"(rounding) {text['max_abs_logit_difference_to_unpatched']:.1e}, "
        f"median {text['median_logit_difference_to_unpatched']:.1e}",
        "pictures read as their caption":
        f"{samples['read_as_their_caption']:.1%} of {count}; the classifier on held-out digits: "
        f"{accuracy['tokenized']:.1%} (raw {accuracy['raw']:.1%})",
        "diversity":
        f"{samples['distinct']} of {count} distinct; distance within a caption "
        f"{spread['generated']:.2f} (real {spread['held_out_real']:.2f})",
        "nearest training picture":
        f"distance {near['generated']:.2f} (held-out real {near['held_out_real']:.2f}), "
        f"{samples['copies_of_a_training_image']['generated']} copies",
        "seconds": ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items()),
        "backend": f"{report['backend']} on {report['device']}, {report['threads']} threads",
    }  # fmt: skip
    print_rows(training_rows(report) | more, "Digits from a text model")
    console.print("written: " + ", ".join(str(out / name) for name in RESULTS))
