"""Plots of generated pictures beside real ones; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_kernels import extras
from moe_kernels.imaging.pixels import as_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    Pictures = torch.Tensor | Sequence[Image]

# In units of a picture's width: one picture to the next, gap between blocks, width of the captions.
_STEP, _GAP, _CAPTION = 1.08, 1.0, 5.4
_INCHES = 0.45  # width of a picture


@dataclass(frozen=True)
class SampleRow:
    """One caption and its pictures, each (N, H, W[, C]) in [0, 1] or uint8, or a list of PIL ones.

    Attributes:
        caption: the caption.
        generated: pictures generated from it.
        real: real pictures to compare with.
        misread: (N,) bool, True for the generated pictures that get a red frame.
        nearest: the training picture nearest to each generated one, to reveal copies; see
            :func:`moe_kernels.imaging.nearest_indices`.
    """

    caption: str
    generated: Pictures
    real: Pictures
    misread: torch.Tensor | None = None
    nearest: Pictures | None = None


@dataclass(frozen=True)
class _Block:
    """Pictures under one heading, a line per caption; framed: for each line (N,) bool or None."""

    heading: str
    lines: list[list[np.ndarray]]
    framed: list[torch.Tensor | None]

    @property
    def width(self) -> float:
        return max(len(line) for line in self.lines) * _STEP


def plot_samples(
    rows: Sequence[SampleRow], title: str, *, real_heading: str = "real, held out"
) -> Figure:
    """Draw a line for each caption: its text, the generated pictures, and real ones to compare."""
    figures = extras.load("matplotlib.figure", "plot_samples")
    blocks = _blocks(rows, real_heading)
    if not blocks:
        raise ValueError("there are no pictures to plot")
    shape = next(line[0].shape for line in blocks[0].lines if line)
    aspect = shape[0] / shape[1]
    right = _CAPTION + sum(block.width + _GAP for block in blocks)
    bottom, top = len(rows) * _STEP * aspect, -aspect
    title_inches = 0.35 + 0.2 * len(title.splitlines())
    figure = figures.Figure(figsize=(right * _INCHES, (bottom - top) * _INCHES + title_inches))
    panel = figure.add_axes((0, 0.01, 1, 1 - title_inches / figure.get_figheight()))
    for number, row in enumerate(rows):
        y = (number * _STEP + 0.5) * aspect
        panel.text(_CAPTION - 0.4, y, row.caption, ha="right", va="center")
    x = _CAPTION
    for block in blocks:
        panel.text(x + block.width / 2, -0.2 * aspect, block.heading, ha="center")
        _draw_block(panel, block, x, aspect)
        x += block.width + _GAP
    panel.set(xlim=(0, right), ylim=(bottom, top), aspect="equal")
    panel.axis("off")
    figure.suptitle(title, fontsize=11)
    return figure


def _blocks(rows: Sequence[SampleRow], real_heading: str) -> list[_Block]:
    """Return the blocks that have pictures: generated, nearest of training, real."""
    framed = [row.misread for row in rows]
    marked = any(misread is not None for misread in framed)
    blocks = [
        _Block(
            "generated (red frame: misread)" if marked else "generated",
            [_pictures(row.generated) for row in rows],
            framed,
        ),
        _Block("nearest of training", [_pictures(row.nearest) for row in rows], [None] * len(rows)),
        _Block(real_heading, [_pictures(row.real) for row in rows], [None] * len(rows)),
    ]
    return [block for block in blocks if any(block.lines)]


def _draw_block(panel: Axes, block: _Block, left: float, aspect: float) -> None:
    from matplotlib.patches import Rectangle

    for number, (line, misread) in enumerate(zip(block.lines, block.framed, strict=True)):
        y = number * _STEP * aspect
        for column, picture in enumerate(line):
            x = left + column * _STEP
            # One-channel pictures are drawn as ink on paper, 1 in black; imshow ignores the
            # colour map for RGB.
            panel.imshow(picture, cmap="gray_r", vmin=0, vmax=1, extent=(x, x + 1, y + aspect, y))
            if misread is not None and bool(misread[column]):
                frame = Rectangle((x, y), 1, aspect, fill=False, edgecolor="red", linewidth=1)
                panel.add_patch(frame)


def _pictures(images: Any) -> list[np.ndarray]:
    """Return each picture as (H, W) or (H, W, 3) floats in [0, 1]."""
    if images is None or not len(images):
        return []
    if not isinstance(images, torch.Tensor | np.ndarray):
        images = np.stack([np.asarray(image) for image in images])
    pixels = as_pixels(images).numpy()
    return list(pixels[..., 0] if pixels.ndim == 4 and pixels.shape[3] == 1 else pixels)
