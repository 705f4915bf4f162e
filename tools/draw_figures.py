"""Draw the diagrams of the README, docs/methods.md and docs/kernels.md.

python tools/draw_figures.py                # writes docs/images/*.svg
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


def methods() -> Canvas:
    """Masked low-rank updates along a sequence, and added experts behind their gate."""
    canvas = Canvas(10.6, 4.35)
    _sequence(canvas)
    _gated_router(canvas)
    return canvas


def _sequence(canvas: Canvas) -> None:
    """Tokens, their mask, and what acts on each of them."""
    canvas.text(0.3, 4.05, "A. Masked low-rank updates", 11.5, weight="bold", ha="left")
    tokens = ["a", "red", "fox", "begin", "17", "402", "8", "end"]
    left, width, step = 1.02, 0.5, 0.56
    canvas.text(0.9, 3.43, "tokens", 9.5, MUTED, ha="right")
    canvas.text(0.9, 2.93, "mask m", 9.5, MUTED, ha="right")
    for i, word in enumerate(tokens):
        fill, edge = (TEXT, TEXT_EDGE) if i < 3 else (IMAGE, IMAGE_EDGE)
        x = left + i * step
        canvas.box(x, 3.25, width, 0.36, fill, edge)
        canvas.text(x + width / 2, 3.43, word, 9)
        canvas.text(x + width / 2, 2.93, "0" if i < 3 else "1", 10, edge, weight="bold")
        canvas.arrow((x + width / 2, 2.76), (x + width / 2, 2.4), edge, width=1.2)
    end = left + 7 * step + width
    canvas.box(left, 1.55, end - left, 0.8, FROZEN, FROZEN_EDGE)
    canvas.text((left + end) / 2, 2.08, "pretrained layer: attention, router, experts", 10)
    canvas.text((left + end) / 2, 1.78, "frozen", 9.5, MUTED)
    split = left + 3 * step
    canvas.box(split, 0.98, end - split, 0.42, IMAGE, IMAGE_EDGE)
    canvas.text((split + end) / 2, 1.19, r"$+\; \frac{\alpha}{r}\,B A\,x$   trained", 11)
    canvas.text((left + split - 0.06) / 2, 1.19, "nothing added", 9.5, TEXT_EDGE)
    canvas.text((left + split - 0.06) / 2, 0.55, "same bits", 10, TEXT_EDGE, weight="bold")
    canvas.text((split + end) / 2, 0.55, "predicts codes", 10, IMAGE_EDGE, weight="bold")


def _gated_router(canvas: Canvas) -> None:
    """The logits that each row sees, base experts and added ones."""
    canvas.text(6.0, 4.05, "B. Added experts behind a gate", 11.5, weight="bold", ha="left")
    left, bottom, cell, base, added = 7.0, 1.05, 0.42, 5, 2
    for row in range(5):
        fill, edge = (TEXT, TEXT_EDGE) if row >= 2 else (IMAGE, IMAGE_EDGE)
        y = bottom + row * cell
        for column in range(base + added):
            x = left + column * cell + (0.14 if column >= base else 0)
            shut = row >= 2 and column >= base
            style = {"hatch": "////", "linestyle": ":"} if shut else {}
            canvas.box(
                x, y, cell, cell, "white" if shut else fill, MUTED if shut else edge, **style
            )
    middle, top = left + base * cell / 2, bottom + 5 * cell
    right = left + base * cell + 0.14 + added * cell / 2
    canvas.text(middle, top + 0.2, r"$W h$", 12)
    canvas.text(right, top + 0.2, r"$V h$", 12)
    canvas.text(middle, top + 0.5, "base experts, frozen", 9.5, MUTED)
    canvas.text(right, top + 0.5, "added", 9.5, IMAGE_EDGE)
    canvas.text(left - 0.12, bottom + 3.5 * cell, "text rows", 10, TEXT_EDGE, ha="right")
    canvas.text(left - 0.12, bottom + 1 * cell, "image rows", 10, IMAGE_EDGE, ha="right")
    canvas.text(left + 1.55, 0.72, "softmax and top-k over the filled cells of a row", 9.5, MUTED)
    canvas.text(left + 1.55, 0.42, "text does not see the added columns", 9.5, TEXT_EDGE)


def engine() -> Canvas:
    """Tiles on their way through the GPU engine of sm_90, over time."""
    canvas = Canvas(10.6, 5.2)
    _tiles_together(canvas)
    _tiles_in_turn(canvas)
    canvas.arrow((2.3, 0.28), (10.3, 0.28), MUTED, width=1.2)
    canvas.text(2.2, 0.28, "time, not to scale", 9.5, MUTED, ha="right")
    return canvas


TILES = [(TEXT, TEXT_EDGE), (IMAGE, IMAGE_EDGE), (FROZEN, FROZEN_EDGE), ("white", MUTED)]
STEP, LANE = 0.26, 0.4  # of k, and the height of what a warpgroup does


def _lane(canvas: Canvas, y: float, name: str) -> None:
    canvas.text(2.2, y + LANE / 2, name, 9.5, ha="right")


def _steps(canvas: Canvas, x: float, y: float, tile: int, count: int) -> float:
    """Draw steps of k of a tile; return where they end."""
    for i in range(count):
        canvas.box(x + i * STEP, y, STEP, LANE, *TILES[tile], linewidth=0.8)
    return x + count * STEP


def _work(canvas: Canvas, x: float, y: float, tile: int, width: float, words: str) -> float:
    canvas.box(x, y, width, LANE, *TILES[tile])
    canvas.text(x + width / 2, y + LANE / 2, words, 9)
    return x + width


def _tiles_together(canvas: Canvas) -> None:
    """A tile is multiplied by both warpgroups, and stored while the next one is loaded."""
    canvas.text(0.3, 4.95, "A. gate and up, down, dX", 11.5, weight="bold", ha="left")
    loads, multiplies = 4.3, 3.5
    _lane(canvas, loads, "a warpgroup loads")
    _lane(canvas, multiplies, "two multiply and store,\n64 rows each")
    left, ahead, steps, store = 2.4, 4, 7, 0.95  # steps that are loaded ahead, and of a tile
    busy = left + STEP
    loaded = _steps(canvas, left, loads, 0, steps)
    for tile in range(3):
        canvas.arrow((busy + STEP / 2, loads), (busy + STEP / 2, multiplies + LANE), width=1.0)
        if tile > 0:  # a stage is free again with each step that was multiplied
            loaded = _steps(canvas, busy, loads, tile, steps - ahead)
        busy = _work(canvas, busy, multiplies, tile, steps * STEP, f"multiply tile {tile + 1}")
        if tile < 2:
            _steps(canvas, loaded, loads, tile + 1, ahead)
            busy = _work(canvas, busy, multiplies, tile, store, "store")
    words = "the first steps of the next tile arrive while the sums of this one are stored"
    canvas.text(6.3, 3.15, words, 9.5, MUTED)


def _tiles_in_turn(canvas: Canvas) -> None:
    """Each warpgroup has every second tile: one multiplies while the other computes gradients."""
    canvas.text(0.3, 2.7, "B. dA', whose gradients take long", 11.5, weight="bold", ha="left")
    loads, first, second = 2.05, 1.35, 0.75
    for y, name in ((loads, "a warpgroup loads"), (first, "warpgroup 1"), (second, "warpgroup 2")):
        _lane(canvas, y, name)
    at, steps, long = 2.4, 7, 1.75
    for tile in range(4):
        _steps(canvas, at, loads, tile, steps if tile < 3 else 6)
        y = first if tile % 2 == 0 else second
        end = _work(canvas, at + STEP, y, tile, steps * STEP, f"multiply tile {tile + 1}")
        if tile < 3:
            end = _work(canvas, end, y, tile, long, "gradients, store")
            other = second if tile % 2 == 0 else first
            edge = y if tile % 2 == 0 else y + LANE
            to = other + LANE if tile % 2 == 0 else other
            turn = at + STEP + steps * STEP
            canvas.arrow((turn, edge), (turn, to), IMAGE_EDGE, width=1.0)
        at += steps * STEP


FIGURES = {"expert_gemm": expert_gemm, "methods": methods, "engine": engine}


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
