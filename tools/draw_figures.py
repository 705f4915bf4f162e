"""Draw the diagrams of the README and of docs/methods.md.

python tools/draw_figures.py                # writes docs/images/expert_gemm.svg and methods.svg
python tools/draw_figures.py --output out   # writes them elsewhere
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams |= {
    "font.family": "DejaVu Sans",
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "path",  # looks the same wherever it is shown
    "svg.hashsalt": "moe_kernels",  # the same file from every run
}

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, Rectangle  # noqa: E402

IMAGES = Path(__file__).parent.parent / "docs/images"
INK, MUTED = "#1f2933", "#5b6875"
TEXT, TEXT_EDGE = "#bcd4ee", "#2f6fb3"
IMAGE, IMAGE_EDGE = "#fbc98e", "#c65f08"
FROZEN, FROZEN_EDGE = "#e4e7eb", "#8491a0"


class Canvas:
    """Axes without a frame, one unit of x as long as one of y."""

    def __init__(self, width: float, height: float):
        self.figure = plt.figure(figsize=(width, height), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.axis("off")

    def box(self, x, y, width, height, fill, edge, **kwargs) -> None:
        settings = {"facecolor": fill, "edgecolor": edge, "linewidth": 1.2} | kwargs
        self.axes.add_patch(Rectangle((x, y), width, height, **settings))

    def rows(self, x, y, width, height, count, fill, edge) -> None:
        """A matrix of ``count`` rows, upwards from y."""
        for i in range(count):
            self.box(x, y + i * height, width, height, fill, edge, linewidth=0.8)

    def text(self, x, y, words, size=10.5, color=INK, **kwargs) -> None:
        settings = {"ha": "center", "va": "center"} | kwargs
        self.axes.text(x, y, words, fontsize=size, color=color, **settings)

    def arrow(self, start, end, color=INK, bend=0.0, width=1.6) -> None:
        self.axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-|>",
                mutation_scale=13,
                color=color,
                linewidth=width,
                shrinkA=0,
                shrinkB=0,
                connectionstyle=f"arc3,rad={bend}",
            )
        )

    def save(self, path: Path) -> None:
        self.figure.savefig(path, facecolor="white", metadata={"Date": None})
        plt.close(self.figure)


def expert_gemm() -> Canvas:
    """Text rows and image rows of one expert through one product."""
    canvas = Canvas(9.9, 4.25)
    _inputs(canvas)
    _frozen_product(canvas)
    _low_rank_path(canvas)
    _outputs(canvas)
    return canvas


ROW = 0.26
TOP, SPLIT, BOTTOM = 3.42, 2.12, 1.34  # of the text rows, between both kinds, of the image rows
NUM_TEXT, NUM_IMAGE = 5, 3


def _both_kinds(canvas: Canvas, x: float, width: float) -> None:
    canvas.rows(x, SPLIT, width, ROW, NUM_TEXT, TEXT, TEXT_EDGE)
    canvas.rows(x, BOTTOM, width, ROW, NUM_IMAGE, IMAGE, IMAGE_EDGE)


def _heading(canvas: Canvas, x: float, title: str, subtitle: str) -> None:
    canvas.text(x, 3.97, title, 11, weight="bold")
    canvas.text(x, 3.7, subtitle, 9.5, MUTED)


def _inputs(canvas: Canvas) -> None:
    _both_kinds(canvas, 1.15, 1.3)
    _heading(canvas, 1.8, "rows of one expert", "sorted by modality")
    canvas.text(1.0, (TOP + SPLIT) / 2, "text", 11.5, TEXT_EDGE, weight="bold", ha="right")
    canvas.text(1.0, (SPLIT + BOTTOM) / 2, "image", 11.5, IMAGE_EDGE, weight="bold", ha="right")


def _frozen_product(canvas: Canvas) -> None:
    _heading(canvas, 4.6, "one GEMM", "text and image share its tiles")
    canvas.arrow((2.6, 2.38), (3.62, 2.38))
    canvas.box(3.75, 1.62, 1.7, 1.52, FROZEN, FROZEN_EDGE)
    canvas.text(4.6, 2.52, r"$W^{\mathsf{T}}$", 17)
    canvas.text(4.6, 2.06, "frozen", 10, MUTED)
    canvas.arrow((5.58, 2.38), (6.6, 2.38))


def _low_rank_path(canvas: Canvas) -> None:
    """Down, through the tall matrix and the wide one, and up into the same sum."""
    y = 0.72
    canvas.arrow((1.8, BOTTOM - 0.07), (3.57, y), IMAGE_EDGE, bend=0.3)
    canvas.box(3.7, y - 0.42, 0.36, 0.84, IMAGE, IMAGE_EDGE)
    canvas.text(3.88, y, r"$A^{\mathsf{T}}$", 12.5)
    canvas.arrow((4.16, y), (4.53, y), IMAGE_EDGE)
    canvas.box(4.62, y - 0.18, 0.9, 0.36, IMAGE, IMAGE_EDGE)
    canvas.text(5.07, y, r"$B^{\mathsf{T}}$", 12.5)
    canvas.arrow((5.64, y), (7.4, BOTTOM - 0.07), IMAGE_EDGE, bend=0.3)
    canvas.text(4.6, 0.12, "rank r, trained, for image rows only", 9.5, IMAGE_EDGE)
    canvas.text(7.42, 0.66, "added in the\nsame accumulator", 9.5, IMAGE_EDGE, ha="left")


def _outputs(canvas: Canvas) -> None:
    _both_kinds(canvas, 6.75, 1.3)
    _heading(canvas, 7.4, "output", "no second pass over it")
    middle = (TOP + SPLIT) / 2
    canvas.text(8.2, middle + 0.14, r"$x\,W^{\mathsf{T}}$", 13, TEXT_EDGE, ha="left")
    canvas.text(8.2, middle - 0.2, "the same bits", 9.5, TEXT_EDGE, ha="left")
    words = r"$x\,W^{\mathsf{T}}\!+ s\,x A^{\mathsf{T}}B^{\mathsf{T}}$"
    canvas.text(8.2, (SPLIT + BOTTOM) / 2, words, 13, IMAGE_EDGE, ha="left")


FIGURES = {"expert_gemm": expert_gemm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder (default: docs/images)")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw().save(folder / f"{name}.svg")
        print(f"wrote {folder / name}.svg")


if __name__ == "__main__":
    main()
