"""Teach a text-only Mixture-of-Experts model to draw, and show that its text is unchanged.

    moe-kernels train-text-to-image MODEL --data digits
    moe-kernels train-text-to-image MODEL --data emoji --emoji-folder package
    moe-kernels train-text-to-image MODEL --data my_pictures

MODEL is a local folder or a hub id of a Mixtral, OLMoE or Qwen-MoE model. --data is "digits" (5,000
digits of MNIST), "emoji" (the npm package emoji-datasource-twitter), or a folder of pictures with a
metadata.csv or .jsonl that has file_name and text.

1. tokenize: a codebook is learnt from the pictures, and turns them into tokens.
2. teach: the model is patched in place; low-rank updates and the rows of the added tokens learn
   caption -> image tokens; everything else is frozen.
3. measure: the loss of held-out pictures, and held-out text before and after, bit by bit.
4. draw: pictures for some captions, at every --guidance, beside real ones.

Under --out: adapter/ and image_tokenizer/ (for moe-kernels generate-images),
held_out.safetensors (for moe-kernels analyze-routing), report.json, training.png, samples-*.png.
Every stage is kept, keyed by its settings: a second run, or one that was interrupted, continues
where the first stopped.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from safetensors.torch import save_file

from moe_kernels.programs.shared.cli import exit_code, parse
from moe_kernels.programs.shared.drawing import Setup, TextToImageOptions, run_stages
from moe_kernels.programs.shared.files import copy_whole, replacing, save_figure, write_json
from moe_kernels.programs.shared.outputs import ADAPTER, IMAGE_TOKENIZER, check_outputs
from moe_kernels.programs.shared.reports.losses import plot_losses
from moe_kernels.programs.shared.reports.text_to_image import plot_drawings, summarize
from moe_kernels.programs.shared.stages import Stages

FILES = (
    *ADAPTER, *IMAGE_TOKENIZER, "image_tokenizer-last-good/*", "held_out.safetensors",
    "report.json", "training.png", "samples-guidance-*.png",
)  # fmt: skip


def save_held_out(setup: Setup, path: Path) -> None:
    """Write the held-out pictures as sequences: input_ids and attention_mask, (N, S) int64."""
    held_out = setup.tokens.held_out
    (batch,) = setup.painter.batches(held_out, len(held_out))
    del batch["labels"]
    with replacing(path) as temporary:
        save_file(batch, temporary)


def plot_samples(setup: Setup, guidance: str) -> Figure:
    drawn, title = setup.results["draw"], f"guidance {guidance}"
    codes, samples = drawn["codes"][guidance], drawn["samples"][guidance]
    if "read_as_their_caption" in samples:
        title += f": {samples['read_as_their_caption']:.1%} read as their caption"
    return plot_drawings(codes, samples, setup.labels, setup.tokens, title, nearest=True)


def write_results(setup: Setup) -> None:
    out, tokens, results = setup.options.out, setup.tokens, setup.results
    samples, history = results["draw"]["samples"], results["teach"]["history"]
    copy_whole(setup.folder("teach") / "adapter", out / "adapter")
    tokens.tokenizer.save(out / "image_tokenizer")
    save_held_out(setup, out / "held_out.safetensors")
    for guidance in samples:
        save_figure(plot_samples(setup, guidance), out / f"samples-guidance-{guidance}.png")
    curve = plot_losses({"text to image": history}, "nats an image token")
    save_figure(curve, out / "training.png")
    report = {
        **results["measure"],
        "set_aside": setup.train.reasons,
        "listed_more_than_once": setup.train.listed_again + setup.held_out.listed_again,
        "image_tokenizer": results["tokenize"],
        "samples": samples,
        "training": history,
        "captions": [tokens.captions[label] for label in setup.labels],
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
