"""The loss curve of train_text_to_image.py, and its table on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from shared.cli import console


def plot_training(history: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    panel.plot(*zip(*history["loss"], strict=True), linewidth=1, label="training")
    panel.plot(*zip(*history["held_out"], strict=True), "o-", label="held out")
    panel.set(xlabel="step", ylabel="nats an image token", title="text to image")
    panel.legend()
    return figure


def summarize(report: dict[str, Any], out: Path) -> None:
    """The table on the terminal."""
    parameters, text, image = report["parameters"], report["text"], report["image"]
    table = Table(show_header=False, show_lines=True)
    table.add_row("parameters trained", f"{parameters['trained']:,} ({parameters['share']:.2%})")
    table.add_row(
        "text, held out: nats a token",
        f"{text['nll_before_training']:.6f} before, {text['nll_after_training']:.6f} after",
    )
    table.add_row("text logits changed by training", f"{text['logits_changed_by_training']:,}")
    table.add_row(
        "image, held out: nats a token",
        f"{image['nll_start']:.3f} before, {image['nll_end']:.3f} after, "
        f"{image['nll_adapters_off']:.3f} with the adapters off",
    )
    for guidance, samples in report["samples"].items():
        near = samples["nearest_training_distance"]
        read = samples.get("read_as_their_caption")
        reads = f"{read:.1%} read as their caption, " if read is not None else ""
        table.add_row(
            f"pictures, guidance {guidance}",
            f"{reads}{samples['distinct']} of {samples['count']} distinct, "
            f"nearest training picture at {near['generated']:.2f} "
            f"(held-out real {near['held_out_real']:.2f})",
        )
    console.print(table)
    console.print(f"written to {out}", markup=False, soft_wrap=True)
