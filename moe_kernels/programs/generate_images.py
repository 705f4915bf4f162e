"""Draw pictures for captions with a model that moe-kernels train-text-to-image taught.

    moe-kernels generate-images MODEL --run out/text_to_image --captions "a handwritten seven"
    moe-kernels generate-images MODEL --run out/text_to_image --captions-file captions.txt

MODEL is the model that was taught: a local folder or a hub id. --run names the folder with its
adapter/ and image_tokenizer/. Pictures are written one by one under --out, with an overview in
pictures.png and the settings in pictures.json; the same command continues an interrupted run.
"""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.imaging import SampleRow, generate_images, load_image_tokenizer, plot_samples
from moe_kernels.programs.shared.cli import Options, console, exit_code, option, parse
from moe_kernels.programs.shared.files import (
    read_json,
    read_text,
    replacing,
    save_figure,
    write_json,
)
from moe_kernels.programs.shared.models import load_causal_lm, load_tokenizer
from moe_kernels.programs.shared.options import ModelOptions, out_folder
from moe_kernels.programs.shared.outputs import check_outputs
from moe_kernels.programs.shared.picture_files import MAX_CAPTION
from moe_kernels.programs.shared.stages import model_identity
from moe_kernels.programs.shared.training import in_batches
from moe_kernels.progress import bar

FILES = ("pictures.json", "pictures.png", "[0-9][0-9][0-9][0-9]*-*.png")


@dataclass(kw_only=True)
class SamplingOptions(Options):
    """Sampling."""

    count: int = option(4, "pictures of each caption", at_least=1, at_most=10_000)
    guidance: float = option(3.0, "scale of guidance; 1 is none", at_least=0)
    temperature: float = option(1.0, "temperature of sampling", above=0)
    top_k: int = option(0, "likeliest codes to choose from; 0 is all", at_least=0)
    top_p: float = option(1.0, "total probability of the codes to choose from", above=0)
    batch: int = option(32, "pictures in a batch", at_least=1)


@dataclass(kw_only=True)
class DrawOptions(SamplingOptions, ModelOptions):
    """Model and captions."""

    model: str = option(
        MISSING, "local folder or hub id of the model that was taught", positional=True
    )
    captions: list[str] = option([], "captions to draw", metavar="TEXT")
    captions_file: str | None = option(None, "file with a caption a line", is_file=True)
    run: Path = option(MISSING, "--out of moe-kernels train-text-to-image")
    out: Path = out_folder("pictures")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_p > 1:
            raise ValueError("--top-p must be at most 1")
        captions = self.all_captions()
        if not captions:
            raise ValueError("give --captions, or --captions-file")
        if long := [caption for caption in captions if len(caption) > MAX_CAPTION]:
            raise ValueError(
                f"a caption may have {MAX_CAPTION:,} characters; {long[0][:40]!r}... has "
                f"{len(long[0]):,}"
            )

    def all_captions(self) -> list[str]:
        lines = read_text(self.captions_file).splitlines() if self.captions_file else []
        return self.captions + [line for line in lines if line.strip()]


def load(options: DrawOptions):
    """Return the taught model, its text tokenizer, and the image tokenizer."""
    adapter = options.run / "adapter"
    config = ModalityLoraConfig.from_adapter(adapter, options.backend)
    image_tokenizer = load_image_tokenizer(options.run / "image_tokenizer")
    model = load_causal_lm(options.model, options.dtype, options.device)
    patch_model(model, config).load_adapter(adapter)
    return model, load_tokenizer(options.model), image_tokenizer


def picture_paths(out: Path, number: int, caption: str, count: int) -> list[Path]:
    slug = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60] or "caption"
    return [out / f"{number:04d}-{slug}-{index}.png" for index in range(count)]


def settings_of(options: DrawOptions, captions: list[str]) -> dict[str, Any]:
    """Return everything that the pictures depend on, as read back from JSON."""
    parts = ("adapter", "image_tokenizer")
    settings = {
        "model": model_identity(options.model),
        **{part: model_identity(str(options.run / part)) for part in parts},
        "captions": captions,
        **options.of(SamplingOptions),
        **options.pick("dtype", "device", "backend", "seed"),
    }
    return json.loads(json.dumps(settings))


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raise if the folder holds pictures drawn with other settings."""
    listing = out / "pictures.json"
    if listing.is_file() and read_json(listing) != settings:
        raise ValueError(f"{out} holds pictures of other settings: give another --out")


def draw_missing(
    options: DrawOptions, captions: list[str], paths: list[list[Path]], settings: dict[str, Any]
) -> None:
    """Draw the batches of which a picture is missing."""
    captioned = zip(captions, paths, strict=True)
    pictures = [(caption, path) for caption, files in captioned for path in files]
    # Batches are the same in every run, each with its own seed, so that a picture does not depend
    # on the pictures that existed already.
    batches = in_batches(pictures, options.batch)
    missing = [i for i, b in enumerate(batches) if not all(path.is_file() for _, path in b)]
    if not missing:
        return
    model, tokenizer, image_tokenizer = load(options)
    write_json(options.out / "pictures.json", settings)
    for index in bar(missing, desc="drawing", unit="batches"):
        drawn = generate_images(
            model, [caption for caption, _ in batches[index]], tokenizer=tokenizer,
            image_tokenizer=image_tokenizer, guidance_scale=options.guidance,
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
            batch_size=options.batch, seed=options.seed + index,
        )  # fmt: skip
        for picture, (_, path) in zip(drawn, batches[index], strict=True):
            with replacing(path) as temporary:
                picture.save(temporary, format="png")


def overview(captions: list[str], paths: list[list[Path]]) -> Figure:
    """Return a figure with a line for each caption."""
    rows = [
        SampleRow(caption, [Image.open(file, formats=["PNG"]) for file in files], real=[])
        for caption, files in zip(captions, paths, strict=True)
    ]
    return plot_samples(rows, "Pictures for captions")


def run(options: DrawOptions) -> None:
    captions, out = options.all_captions(), options.out
    settings = settings_of(options, captions)
    check_outputs(out, FILES, marker="pictures.json")
    check_settings(out, settings)
    paths = [picture_paths(out, i, text, options.count) for i, text in enumerate(captions)]
    draw_missing(options, captions, paths, settings)
    save_figure(overview(captions, paths), out / "pictures.png")
    console.print(f"{sum(map(len, paths))} pictures in {out}", markup=False)


def main(arguments: list[str] | None = None) -> int:
    options = parse(DrawOptions, arguments, __doc__, prog="moe-kernels generate-images")
    return exit_code(lambda: run(options))
