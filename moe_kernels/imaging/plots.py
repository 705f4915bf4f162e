"""Generated pictures beside real ones; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SampleRow:
    """One caption; generated, real: (N, H, W[, C]) in [0, 1]; misread: (N,) bool, framed red."""

    caption: str
    generated: torch.Tensor
    real: torch.Tensor
    misread: torch.Tensor | None = None


def plot_samples(rows: Sequence[SampleRow], title: str) -> Figure:
    """A line for each caption: its text, the generated pictures, and real ones to compare."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = max(len(row.generated) for row in rows)
    real_columns = max(len(row.real) for row in rows)
    height, width = rows[0].generated.shape[1:3]
    step_x, step_y, left = 1.08 * width, 1.08 * height, 5.4 * width
    right, bottom, top = left + (columns + 1 + real_columns) * step_x, len(rows) * step_y, -height
    inch = 0.45 / width
    figure = Figure(figsize=((right + width) * inch, (bottom - top) * inch + 0.75))
    panel = figure.add_axes((0, 0.01, 1, 1 - 0.75 / figure.get_figheight()))
    for number, row in enumerate(rows):
        y = number * step_y
        panel.text(left - 0.4 * width, y + height / 2, row.caption, ha="right", va="center")
        for column, picture in enumerate([*row.generated, *row.real]):
            is_real = column >= len(row.generated)
            place = columns + 1 + column - len(row.generated) if is_real else column
            x = left + place * step_x
            extent = (x, x + width, y + height, y)
            panel.imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=1, extent=extent)
            if not is_real and row.misread is not None and bool(row.misread[column]):
                frame = Rectangle((x, y), width, height, fill=False, edgecolor="red", linewidth=1)
                panel.add_patch(frame)
    panel.text(
        left + columns * step_x / 2,
        -0.2 * height,
        "generated (red frame: misread)",
        ha="center",
    )
    x = left + (columns + 1 + real_columns / 2) * step_x
    panel.text(x, -0.2 * height, "real, held out", ha="center")
    panel.set(xlim=(0, right + width), ylim=(bottom, top), aspect="equal")
    panel.axis("off")
    figure.suptitle(title, fontsize=11)
    return figure
