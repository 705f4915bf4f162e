"""Plots of generated pictures beside real ones; needs matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_kernels import extras, figures
from moe_kernels.imaging.pixels import as_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    Pictures = torch.Tensor | Sequence[Image]

# In units of a picture's width: one picture to the next, gap between blocks, width of the captions.
_STEP, _GAP, _CAPTION = 1.08, 1.0, 5.4
_INCHES = 0.45  # width of a picture
_LINE = 0.2  # inches of a line of text
_LETTERS = 6.0  # of a heading, in a picture's width
_MOST, _WIDTH = 80, 26  # characters of a caption, and of a line of it


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

    @property
    def letters(self) -> int:
        """Letters of a line of the heading, which may reach into the gaps beside the block."""
        return int((self.width + 0.8 * _GAP) * _LETTERS)


def plot_samples(
    rows: Sequence[SampleRow],
    title: str,
    *,
    heading: str = "generated",
    real_heading: str = "real, held out",
    through_tokenizer: bool = False,
) -> Figure:
    """Draw a line for each caption: its text, the generated pictures, and real ones to compare.

    Args:
        rows: captions and their pictures. Captions are wrapped, and cut after 80 characters.
        title: title of the figure.
        heading: heading of the generated pictures.
        real_heading: heading of the real pictures.
        through_tokenizer: the real pictures, and those of training, are what the image tokenizer
            makes of them; their headings say so.

    Returns:
        The figure.

    Raises:
        ValueError: there are no pictures.
    """
    matplotlib = extras.load("matplotlib.figure", "plot_samples")
    blocks = _blocks(
        rows, heading, real_heading, ", through the tokenizer" if through_tokenizer else ""
    )
    if not blocks:
        raise ValueError("there are no pictures to plot")
    shape = next(line[0].shape for line in blocks[0].lines if line)
    aspect = shape[0] / shape[1]
    right = _CAPTION + sum(block.width + _GAP for block in blocks)
    headings = [textwrap.fill(block.heading, block.letters) for block in blocks]
    heading_lines = max(len(heading.splitlines()) for heading in headings)
    captions = [figures.printable(row.caption, _MOST, _WIDTH) for row in rows]
    caption_lines = max(len(caption.splitlines()) for caption in captions)
    step = max(_STEP * aspect, (caption_lines + 0.5) * _LINE / _INCHES)  # from row to row
    bottom, top = len(rows) * step, -(0.12 + _LINE * heading_lines) / _INCHES
    title_inches = 0.15 + _LINE * len(title.splitlines())
    figure = matplotlib.Figure(figsize=(right * _INCHES, (bottom - top) * _INCHES + title_inches))
    panel = figure.add_axes((0, 0.01, 1, 0.99 - title_inches / figure.get_figheight()))
    for number, caption in enumerate(captions):
        y = number * step + 0.5 * aspect
        panel.text(_CAPTION - 0.4, y, caption, ha="right", va="center")
    x = _CAPTION
    for block, heading in zip(blocks, headings, strict=True):
        panel.text(x + block.width / 2, -0.1 / _INCHES, heading, ha="center", va="bottom")
        _draw_block(panel, block, x, step)
        x += block.width + _GAP
    panel.set(xlim=(0, right), ylim=(bottom, top), aspect="equal")
    panel.axis("off")
    figure.suptitle(title, fontsize=11, y=1 - 0.08 / figure.get_figheight())
    return figure


def _blocks(
    rows: Sequence[SampleRow], heading: str, real_heading: str, suffix: str
) -> list[_Block]:
    """Return the blocks that have pictures: generated, nearest in training, real."""
    framed = [row.misread for row in rows]
    marked = any(misread is not None for misread in framed)
    blocks = [
        _Block(
            f"{heading} (red frame: misread)" if marked else heading,
            [_pictures(row.generated) for row in rows],
            framed,
        ),
        _Block(
            f"nearest in training{suffix}", [_pictures(row.nearest) for row in rows],
            [None] * len(rows),
        ),
        _Block(
            f"{real_heading}{suffix}", [_pictures(row.real) for row in rows], [None] * len(rows)
        ),
    ]  # fmt: skip
    return [block for block in blocks if any(block.lines)]


def _draw_block(panel: Axes, block: _Block, left: float, step: float) -> None:
    for number, (line, misread) in enumerate(zip(block.lines, block.framed, strict=True)):
        for column, picture in enumerate(line):
            frame = "red" if misread is not None and bool(misread[column]) else None
            x, y = left + column * _STEP, number * step
            figures.draw_picture(panel, picture, x, y, frame=frame)


def _pictures(images: Any) -> list[np.ndarray]:
    """Return each picture as (H, W) or (H, W, 3) floats in [0, 1]."""
    if images is None or not len(images):
        return []
    if not isinstance(images, torch.Tensor | np.ndarray):
        images = np.stack([np.asarray(image) for image in images])
    pixels = as_pixels(images).numpy()
    return list(pixels[..., 0] if pixels.ndim == 4 and pixels.shape[3] == 1 else pixels)
