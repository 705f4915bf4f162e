"""A film of a training: the same captions drawn every so many steps, as an animated GIF."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import TrainerCallback

from moe_kernels.imaging import to_pil
from moe_kernels.programs.shared.files import read_json, replacing, write_json
from moe_kernels.programs.shared.pictures import spread

MOST_BYTES = 1_000_000  # of a film
_COLUMNS, _SIDE, _GAP, _LINE = 4, 96, 12, 13  # pictures in a row; pixels
_MILLISECONDS, _LAST = 250, 3000  # a frame, and the last one
_FRAMES = 120  # the most of a film


class Film(TrainerCallback):
    """Callback that draws a frame at the first step, every ``every`` steps, and at the last one.

    A frame is a file of its own, so that a run that goes on keeps those of earlier runs.

    Args:
        folder: folder of the frames
        draw: draws the pictures of a frame from the model as it is, and leaves the random numbers
            of training as they were; returns (N, tokens) codes
    """

    def __init__(self, every: int, folder: Path, draw: Callable[[], torch.Tensor]):
        self.every, self.folder, self.draw = every, folder, draw

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._frame(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._frame(state.global_step)

    def _frame(self, step: int) -> None:
        file = self.folder / f"{step:07d}.json"
        if not file.exists():
            self.folder.mkdir(exist_ok=True)
            write_json(file, self.draw().tolist(), indent=None)


def read_frames(folder: Path) -> dict[int, torch.Tensor]:
    """Return the codes of each frame, (N, tokens), by step in ascending order."""
    return {int(file.stem): torch.tensor(read_json(file)) for file in sorted(folder.glob("*.json"))}


def save_film(
    frames: dict[int, torch.Tensor], captions: Sequence[str],
    decode: Callable[[torch.Tensor], torch.Tensor], path: Path, most_bytes: int = MOST_BYTES,
) -> None:  # fmt: skip
    """Write frames as a GIF of at most ``most_bytes``.

    Where it would be larger, frames are left out evenly, but never the last one.

    Args:
        frames: codes of each frame by step
        captions: of the pictures of a frame
    """
    panels = [_panel(to_pil(decode(codes)), captions, step) for step, codes in frames.items()]
    count = min(len(panels), _FRAMES)
    while len(film := _encode(_last_of(panels, count))) > most_bytes and count > 1:
        count = max(1, min(count - 1, int(count * most_bytes / len(film))))
    with replacing(path) as temporary:
        temporary.write_bytes(film)


def _last_of(frames: list[Image.Image], count: int) -> list[Image.Image]:
    """Return so many of the frames, evenly spaced, the last one among them."""
    return spread(frames[::-1], count)[::-1]


def _encode(frames: list[Image.Image]) -> bytes:
    buffer = io.BytesIO()
    lasts = [_MILLISECONDS] * (len(frames) - 1) + [_LAST]
    first, *rest = frames
    first.save(
        buffer, "GIF", save_all=True, append_images=rest, duration=lasts, loop=0, optimize=True
    )
    return buffer.getvalue()


def _panel(pictures: list[Image.Image], captions: Sequence[str], step: int) -> Image.Image:
    """Return a frame: the step above, then rows of pictures with their captions below."""
    font = ImageFont.load_default()
    columns = min(_COLUMNS, len(pictures))
    width, height = _SIDE + _GAP, _SIDE + 3 * _LINE
    rows = -(-len(pictures) // columns)
    panel = Image.new("RGB", (columns * width + _GAP, rows * height + _LINE + _GAP), "white")
    pen = ImageDraw.Draw(panel)
    pen.text((_GAP, _GAP // 2), f"step {step}", fill="black", font=font)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = _GAP + number % columns * width
        top = _LINE + _GAP + number // columns * height
        large = picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
        panel.paste(large, (left, top))
        pen.rectangle((left - 1, top - 1, left + _SIDE, top + _SIDE), outline="lightgrey")
        lines = textwrap.wrap(caption, 18, max_lines=2, placeholder="...")
        pen.multiline_text((left, top + _SIDE + 2), "\n".join(lines), "black", font, spacing=1)
    return panel.quantize(128, Image.Quantize.FASTOCTREE)  # keeps colours that are rare
