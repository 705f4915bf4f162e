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
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _runs import DTYPES, console, model_identity, save_figure, write_text
from matplotlib.figure import Figure
from PIL import Image
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_kernels
from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.imaging import generate_images, load_image_tokenizer

# The options that a picture depends on, beside the caption and its number.
_DECISIVE = ("dtype", "guidance", "temperature", "top_k", "top_p", "seed", "count")


def load(given: argparse.Namespace):
    """The taught model, its text tokenizer, and the image tokenizer."""
    adapter = given.run / "adapter"
    config = ModalityLoraConfig.from_adapter(adapter, backend=given.backend)
    image_tokenizer = load_image_tokenizer(given.run / "image_tokenizer")
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype)
    model = model.to(given.device).eval()
    patch_model(model, config).load_adapter(adapter)
    return model, AutoTokenizer.from_pretrained(given.model), image_tokenizer


def picture_paths(out: Path, number: int, caption: str, count: int) -> list[Path]:
    slug = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60] or "caption"
    return [out / f"{number:04d}-{slug}-{index}.png" for index in range(count)]


def settle_folder(out: Path, settings: dict[str, Any]) -> None:
    """Refuses a folder with pictures of other settings; else writes the settings there."""
    listing = out / "pictures.json"
    if listing.is_file() and json.loads(listing.read_text()) != settings:
        raise ValueError(f"{out} holds pictures of other settings: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(listing, json.dumps(settings, indent=2) + "\n")


def save_picture(picture: Image.Image, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    picture.save(temporary, format="png")
    temporary.replace(path)


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


def run(given: argparse.Namespace, captions: list[str]) -> None:
    settings = {
        "model": model_identity(given.model),
        "adapter": model_identity(str(given.run / "adapter")),
        "captions": captions,
        **{name: getattr(given, name) for name in _DECISIVE},
    }
    settings = json.loads(json.dumps(settings))
    settle_folder(given.out, settings)
    paths = [picture_paths(given.out, i, text, given.count) for i, text in enumerate(captions)]
    missing = [i for i, files in enumerate(paths) if not all(file.is_file() for file in files)]
    if missing:
        model, tokenizer, image_tokenizer = load(given)
        for index in track(missing, description="drawing", console=console):
            # A seed for each caption: what was drawn does not depend on what was there already.
            pictures = generate_images(
                model, [captions[index]] * given.count, tokenizer=tokenizer,
                image_tokenizer=image_tokenizer, guidance_scale=given.guidance,
                temperature=given.temperature, top_k=given.top_k, top_p=given.top_p,
                batch_size=given.batch, seed=given.seed + index,
            )  # fmt: skip
            for picture, path in zip(pictures, paths[index], strict=True):
                save_picture(picture, path)
    save_figure(overview(captions, paths), given.out / "pictures.png")
    console.print(f"{sum(map(len, paths))} pictures in {given.out}", markup=False)


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
    add("--seed", type=int, default=0)
    add(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of the base",
    )
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--backend", choices=moe_kernels.backends.NAMES, help="default: the best one here")
    add("--out", type=Path, default=Path("out/pictures"), help="default: %(default)s")
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
    if given.count < 1 or given.batch < 1 or given.temperature <= 0:
        parser.error("--count and --batch must be at least 1, --temperature above 0")
    given.device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return given, captions


def main(arguments: list[str] | None = None) -> int:
    given, captions = parse(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        run(given, captions)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        console.print(f"error: {error}", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
