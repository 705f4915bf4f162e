"""Drawings of train_text_to_image.py, and its table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from moe_kernels.imaging import SampleRow, nearest_indices, plot_samples
from shared.cli import console
from shared.files import save_figure
from shared.text_to_image import PictureTokens

_REAL = 3  # real pictures beside each caption's drawings


def plot_drawings(
    drawn: dict[str, Any], labels: Sequence[int], each: int, tokens: PictureTokens, out: Path
) -> None:
    """Write samples-guidance-*.png: drawings, their nearest training pictures, and real ones.

    Args:
        drawn: guidance -> what was measured of its drawings, with their codes
        labels: numbers of the captions that were drawn
        each: drawings of a caption
    """
    decode = tokens.tokenizer.decode
    trained = decode(tokens.train.codes)
    real = [_real_pictures(tokens, label) for label in labels]
    heading = "real, held out" if all(is_held_out for _, is_held_out in real) else "real"
    for guidance, measured in drawn.items():
        codes = torch.tensor(measured["codes"])
        nearest = trained[nearest_indices(decode(codes), trained)]
        rows = []
        for number, label in enumerate(labels):
            mine = slice(number * each, (number + 1) * each)
            misread = torch.tensor(measured["read"][mine]) != label if "read" in measured else None
            rows.append(SampleRow(
                f'"{tokens.captions[label]}"', decode(codes[mine]), decode(real[number][0]),
                misread, nearest[mine],
            ))  # fmt: skip
        figure = plot_samples(rows, _title(guidance, measured), real_heading=heading)
        save_figure(figure, out / f"samples-guidance-{guidance}.png")


def _title(guidance: str, measured: dict[str, Any]) -> str:
    read = measured.get("read_as_their_caption")
    title = f"guidance {guidance}"
    return title if read is None else f"{title}: {read:.1%} read as their caption"


def _real_pictures(tokens: PictureTokens, label: int) -> tuple[torch.Tensor, bool]:
    """Return codes of real pictures of a caption, and whether they are held-out ones."""
    for part in (tokens.held_out, tokens.train):
        if (mine := np.flatnonzero(part.labels == label)).size:
            return part.codes[torch.from_numpy(mine[:_REAL])], part is tokens.held_out
    raise AssertionError("every caption to draw has a training picture")


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
