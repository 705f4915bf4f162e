"""Helpers of the plots: saving, text that the font can show, and pictures with an edge."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from moe_kernels.files import replacing

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_EDGE = "0.75"  # of a picture without a frame of its own


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format that the file name's suffix names (png, pdf, svg)."""
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format=path.suffix.removeprefix(".") or "png")


def printable(text: str, most: int = 80, width: int = 80) -> str:
    r"""Return a text of anyone's as a figure can show it.

    Characters that the font lacks become escapes such as ``\u072c``, dollar signs begin no formula,
    runs of blanks become one, and what is longer than ``most`` characters ends in "...". Lines have
    at most ``width`` characters.
    """
    fonts = _fonts()
    shown = "".join(
        letter if letter.isspace() or any(font.get_char_index(ord(letter)) for font in fonts)
        else letter.encode("unicode_escape").decode()
        for letter in text
    )  # fmt: skip
    shown = " ".join(shown.split())
    shown = shown if len(shown) <= most else shown[: most - 3] + "..."
    return textwrap.fill(shown, width).replace("$", r"\$")


def _fonts() -> list:
    """Return matplotlib's default font, and those that it falls back to."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    families = FontProperties().get_family()
    return [get_font(findfont(FontProperties(family=[family]))) for family in families]


def draw_picture(
    panel: Axes, picture: np.ndarray, left: float, top: float, *, frame: str | None = None
) -> None:
    """Draw a picture one unit wide, with a thin edge, or in a frame of a colour.

    White pictures would have no edge on a white page.

    Args:
        panel: where to draw; its y axis points down.
        picture: (H, W) or (H, W, 3) floats in [0, 1].
        left, top: where its upper left corner is.
        frame: colour of the frame; None: an edge alone.
    """
    from matplotlib.patches import Rectangle

    height = picture.shape[0] / picture.shape[1]
    # One-channel pictures are drawn as ink on paper, 1 in black; imshow ignores the colour map
    # for RGB.
    extent = (left, left + 1, top + height, top)
    panel.imshow(picture, cmap="gray_r", vmin=0, vmax=1, extent=extent)
    width, colour = (0.5, _EDGE) if frame is None else (1, frame)
    edge = Rectangle((left, top), 1, height, fill=False, ec=colour, linewidth=width, clip_on=False)
    panel.add_patch(edge)
