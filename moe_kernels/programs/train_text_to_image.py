"""Teach a text-only Mixture-of-Experts model to draw, and show that its text is unchanged.

    moe-kernels train-text-to-image MODEL --data digits
    moe-kernels train-text-to-image MODEL --data coloured-digits --tokenizer vq
    moe-kernels train-text-to-image MODEL --data emoji --emoji-folder package
    moe-kernels train-text-to-image MODEL --data my_pictures

MODEL is a local folder or a hub id of a Mixtral, OLMoE or Qwen-MoE model. --data is "digits" (5,000
digits of MNIST), "coloured-digits" (the same in eight colours at five places, with a tenth of the
combinations held out), "emoji" (the npm package emoji-datasource-twitter), or a folder of pictures
with a metadata.csv or .jsonl that has file_name and text.

1. tokenize: a codebook is learnt from the pictures, and turns them into tokens.
2. teach: the model is patched in place; low-rank updates and the rows of the added tokens learn
   caption -> image tokens; everything else is frozen.
3. measure: the loss of held-out pictures, and held-out text before and after, bit by bit.
4. draw: pictures for some captions, at every --guidance, beside real ones.
5. judge: a reader that learnt from the training pictures tells what the drawings show.

Under --out: adapter/ and image_tokenizer/ (for moe-kernels generate-images),
held_out.safetensors (for moe-kernels analyze-routing), report.json, training.png,
samples-*.png, held-out-*.png, failures-*.png, reconstruction.png; film.gif (--film-every).
Every stage is kept, keyed by its settings: a second run, or one that was interrupted, continues
where the first stopped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from safetensors.torch import save_file

from moe_kernels.programs.shared.cli import exit_code, parse
from moe_kernels.programs.shared.drawing import (
    Setup,
    TextToImageOptions,
    film_labels,
    run_stages,
)
from moe_kernels.programs.shared.files import copy_whole, replacing, save_figure, write_json
from moe_kernels.programs.shared.film import read_frames, save_film
from moe_kernels.programs.shared.outputs import ADAPTER, IMAGE_TOKENIZER, check_outputs
from moe_kernels.programs.shared.pictures import grouped
from moe_kernels.programs.shared.reports.losses import plot_losses
from moe_kernels.programs.shared.reports.text_to_image import (
    plot_drawings,
    plot_failures,
    plot_reconstruction,
    summarize,
)
from moe_kernels.programs.shared.stages import Stages

FILES = (
    *ADAPTER, *IMAGE_TOKENIZER, "image_tokenizer-last-good/*", "held_out.safetensors",
    "report.json", "training.png", "samples-guidance-*.png",
    "held-out-guidance-*.png", "failures-guidance-*.png", "reconstruction.png",
    "film.gif",
)  # fmt: skip

SHEETS = {"trained": "samples", "held_out": "held-out"}  # their names, by group of captions


def save_held_out(setup: Setup, path: Path) -> None:
    """Write the held-out pictures as sequences: input_ids and attention_mask, (N, S) int64."""
    held_out = setup.tokens.held_out
    (batch,) = setup.painter.batches(held_out, len(held_out))
    del batch["labels"]
    with replacing(path) as temporary:
        save_file(batch, temporary)


def plot_samples(setup: Setup, guidance: str, group: str, labels: list[int]) -> Figure:
    """Draw the sheet of a group of captions, "trained" or "held_out", with these numbers."""
    codes = setup.results["draw"]["codes"][guidance]
    samples, title = setup.results["judge"]["samples"][guidance], f"guidance {guidance}"
    if group == "held_out":
        title = f"captions that no training picture has, {title}"
    if "read_right" in samples:
        share = samples["read_right"][group]["caption"]["share"]
        title += f": {share:.1%} read as their caption"
    return plot_drawings(
        codes, samples, setup.labels, setup.tokens, title, nearest=True, shown=labels
    )


def save_sheets(setup: Setup) -> None:
    """Write the drawings of captions of training, of held-out ones, and those read wrongly.

    Beside them, what the image tokenizer makes of held-out pictures.
    """
    labels, out = np.array(setup.labels), setup.options.out
    groups = grouped(labels, setup.train.present)
    figures = {"reconstruction": plot_reconstruction(setup.tokens, setup.labels)}
    for guidance, codes in setup.results["draw"]["codes"].items():
        for group, mine in groups.items():
            figure = plot_samples(setup, guidance, group, labels[mine].tolist())
            figures[f"{SHEETS[group]}-guidance-{guidance}"] = figure
        samples = setup.results["judge"]["samples"][guidance]
        if "read" in samples:
            figures[f"failures-guidance-{guidance}"] = plot_failures(
                codes, samples, setup.asked.tolist(), setup.tokens, f"guidance {guidance}"
            )
    for name, figure in figures.items():
        if figure is not None:
            save_figure(figure, out / f"{name}.png")


def write_results(setup: Setup) -> None:
    out, tokens, results = setup.options.out, setup.tokens, setup.results
    judged, history = results["judge"], results["teach"]["history"]
    copy_whole(setup.folder("teach") / "adapter", out / "adapter")
    tokens.tokenizer.save(out / "image_tokenizer")
    save_held_out(setup, out / "held_out.safetensors")
    save_sheets(setup)
    if setup.options.film_every:
        captions = [tokens.captions[label] for label in film_labels(setup.train)]
        frames = read_frames(setup.folder("teach") / "film")
        save_film(frames, captions, tokens.tokenizer.decode, out / "film.gif")
    curve = plot_losses({"text to image": history}, "nats an image token")
    save_figure(curve, out / "training.png")
    report = {
        **results["measure"],
        "set_aside": setup.train.reasons,
        "listed_more_than_once": setup.train.listed_again + setup.held_out.listed_again,
        "image_tokenizer": results["tokenize"],
        "reader": judged["reader"],
        "samples": judged["samples"],
        "training": history,
        "captions": [tokens.captions[label] for label in setup.labels],
        "held_out_captions": [tokens.captions[label] for label in setup.train.unseen],
        **setup.stages.describe(setup.options),
    }
    write_json(out / "report.json", report)
    summarize(report, out)


def run(options: TextToImageOptions) -> None:
    check_outputs(options.out, FILES)
    setup = Setup.load(options, Stages(options.out / "stages"))
    run_stages(setup)
    write_results(setup)


def main(arguments: list[str] | None = None) -> int:
    options = parse(TextToImageOptions, arguments, __doc__, prog="moe-kernels train-text-to-image")
    return exit_code(lambda: run(options))
