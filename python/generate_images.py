"""Draws pictures for captions with a model that train_text_to_image.py taught.

    python python/generate_images.py MODEL --run out/text_to_image --captions "a handwritten seven"
    python python/generate_images.py MODEL --run out/text_to_image --captions-file captions.txt

MODEL is the model that was taught: a local folder or a hub id. --run names the folder with its
adapter/ and image_tokenizer/. Pictures are written one by one under --out, with an overview in
pictures.png and the settings in pictures.json; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich.progress import track
from shared.cli import add_run_options, console, exit_code, settle_device
from shared.files import replacing, save_figure, write_text
from shared.models import load_causal_lm
from shared.stages import model_identity
from transformers import AutoTokenizer

from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.imaging import generate_images, load_image_tokenizer

# The options that a picture depends on, beside the captions and its place among them.
_DECISIVE = (
    "dtype", "device", "backend", "guidance", "temperature", "top_k", "top_p", "seed", "count",
    "batch",
)  # fmt: skip


def load(given: argparse.Namespace):
    """The taught model, its text tokenizer, and the image tokenizer."""
    adapter = given.run / "adapter"
    config = ModalityLoraConfig.from_adapter(adapter, backend=given.backend)
    image_tokenizer = load_image_tokenizer(given.run / "image_tokenizer")
    model = load_causal_lm(given.model, given.dtype, given.device)
    patch_model(model, config).load_adapter(adapter)
    return model, AutoTokenizer.from_pretrained(given.model), image_tokenizer


def picture_paths(out: Path, number: int, caption: str, count: int) -> list[Path]:
    slug = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60] or "caption"
    return [out / f"{number:04d}-{slug}-{index}.png" for index in range(count)]


def check_folder(out: Path, settings: dict[str, Any]) -> None:
    """Refuses a folder with pictures of other settings."""
    listing = out / "pictures.json"
    if listing.is_file() and json.loads(listing.read_text()) != settings:
        raise ValueError(f"{out} holds pictures of other settings: give another --out")


def save_picture(picture: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        picture.save(temporary, format="png")


def overview(captions: list[str], paths: list[list[Path]]) -> Figure:
    """A line for each caption."""
    columns = max(map(len, paths))
    figure = Figure(figsize=(2.5 + 0.8 * columns, 0.85 * len(captions)), layout="constrained")
    panels = figure.subplots(len(captions), columns, squeeze=False)
    for caption, row, files in zip(captions, panels, paths, strict=True):
        for panel, file in zip(row, files, strict=True):
            panel.imshow(np.asarray(Image.open(file)), cmap="gray_r")
            panel.set(xticks=[], yticks=[])
        row[0].set_ylabel(caption, rotation=0, ha="right", va="center")
    return figure


def describe(given: argparse.Namespace, captions: list[str]) -> dict[str, Any]:
    """All that pictures depend on, as JSON gives it back."""
    settings = {
        "model": model_identity(given.model),
        **{part: model_identity(str(given.run / part)) for part in ("adapter", "image_tokenizer")},
        "captions": captions,
        **{name: getattr(given, name) for name in _DECISIVE},
    }
    return json.loads(json.dumps(settings))


def run(given: argparse.Namespace, captions: list[str]) -> None:
    settings = describe(given, captions)
    check_folder(given.out, settings)
    paths = [picture_paths(given.out, i, text, given.count) for i, text in enumerate(captions)]
    places = [(i, path) for i, files in enumerate(paths) for path in files]
    # Chunks are the same in every run, each with a seed of its own: what is drawn does not depend
    # on what was there already.
    chunks = [places[start : start + given.batch] for start in range(0, len(places), given.batch)]
    missing = [i for i, c in enumerate(chunks) if not all(path.is_file() for _, path in c)]
    if missing:
        model, tokenizer, image_tokenizer = load(given)
        write_text(given.out / "pictures.json", json.dumps(settings, indent=2) + "\n")
        for index in track(missing, description="drawing", console=console):
            pictures = generate_images(
                model, [captions[i] for i, _ in chunks[index]], tokenizer=tokenizer,
                image_tokenizer=image_tokenizer, guidance_scale=given.guidance,
                temperature=given.temperature, top_k=given.top_k, top_p=given.top_p,
                batch_size=given.batch, seed=given.seed + index,
            )  # fmt: skip
            for picture, (_, path) in zip(pictures, chunks[index], strict=True):
                save_picture(picture, path)
    save_figure(overview(captions, paths), given.out / "pictures.png")
    console.print(f"{len(places)} pictures in {given.out}", markup=False)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="local folder or hub id of the model that was taught")
    add("--captions", nargs="+", default=[], metavar="TEXT", help="what to draw")
    add("--captions-file", type=Path, help="a caption a line")
    add("--run", type=Path, required=True, help="the --out of train_text_to_image.py")
    add("--count", type=int, default=4, help="pictures for each caption; default: %(default)s")
    add("--guidance", type=float, default=3.0, help="1: none; default: %(default)s")
    add("--temperature", type=float, default=1.0, help="default: %(default)s")
    add("--top-k", type=int, default=0, help="of the codes; 0: all (default)")
    add("--top-p", type=float, default=1.0, help="default: %(default)s")
    add("--batch", type=int, default=32, help="pictures at a time; default: %(default)s")
    add_run_options(parser, out=Path("out/pictures"))
    return parser


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = make_parser()
    given = parser.parse_args(arguments)
    captions = list(given.captions)
    if given.captions_file:
        if not given.captions_file.is_file():
            parser.error(f"--captions-file: {given.captions_file} is not a file")
        captions += [line for line in given.captions_file.read_text().splitlines() if line.strip()]
    if not captions:
        parser.error("give --captions, or --captions-file")
    if given.count < 1 or given.batch < 1 or given.top_k < 0:
        parser.error("--count and --batch must be at least 1, --top-k at least 0")
    if not (0 < given.temperature < math.inf and 0 <= given.guidance < math.inf):
        parser.error("--temperature must be above 0, --guidance at least 0")
    if not 0 < given.top_p <= 1:
        parser.error("--top-p must lie above 0 and at most at 1")
    settle_device(parser, given)
    return given, captions


def main(arguments: list[str] | None = None) -> int:
    given, captions = parse(arguments)
    return exit_code(lambda: run(given, captions))


if __name__ == "__main__":
    sys.exit(main())
