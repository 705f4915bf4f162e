"""Teach a text-only Mixture-of-Experts model to draw, and show that its text is unchanged.

    python python/train_text_to_image.py MODEL --data digits
    python python/train_text_to_image.py MODEL --data emoji --emoji-folder package
    python python/train_text_to_image.py MODEL --data my_pictures

MODEL is a local folder or a hub id of a Mixtral, OLMoE or Qwen-MoE model. --data is "digits" (5,000
digits of MNIST), "emoji" (the npm package emoji-datasource-twitter), or a folder of pictures with a
metadata.csv or .jsonl that has file_name and text.

1. tokenize: a codebook is learnt from the pictures, and turns them into tokens.
2. teach: the model is patched in place; low-rank updates and the rows of the added tokens learn
   caption -> image tokens; everything else is frozen.
3. measure: the loss of held-out pictures, and held-out text before and after, bit by bit.
4. draw: pictures for some captions, at every --guidance, beside real ones.

Under --out: adapter/ and image_tokenizer/ (for generate_images.py), held_out.safetensors (for
analyze_routing.py), report.json, training.png, samples-*.png. Every stage is kept, keyed by its
settings: a second run, or one that was interrupted, continues where the first stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file
from shared.cli import exit_code, parse
from shared.drawing import (
    PictureTokens,
    Setup,
    TextToImageOptions,
    draw,
    measure,
    taught_painter,
    teach,
    tokenize,
)
from shared.files import copy_whole, replacing, save_figure, write_json
from shared.reports.losses import plot_losses
from shared.reports.text_to_image import plot_drawings, summarize
from shared.stages import Stage, Stages
from shared.text_to_image import Painter


def save_held_out(painter: Painter, tokens: PictureTokens, path: Path) -> None:
    """Write the held-out pictures as sequences: input_ids and attention_mask, (N, S) int64."""
    (batch,) = painter.batches(tokens.held_out, len(tokens.held_out))
    del batch["labels"]
    with replacing(path) as temporary:
        save_file(batch, temporary)


def write_results(
    setup: Setup, tokens: PictureTokens, taught: Stage, measured: Stage, drawn: Stage,
    stages: Stages,
) -> None:  # fmt: skip
    options, out, history = setup.options, setup.options.out, taught.result["history"]
    copy_whole(taught.folder / "adapter", out / "adapter")
    tokens.tokenizer.save(out / "image_tokenizer")
    save_held_out(taught_painter(setup, tokens, taught), tokens, out / "held_out.safetensors")
    for guidance, samples in drawn.result["samples"].items():
        title, codes = f"guidance {guidance}", drawn.result["codes"][guidance]
        if "read_as_their_caption" in samples:
            title += f": {samples['read_as_their_caption']:.1%} read as their caption"
        figure = plot_drawings(codes, samples, setup.labels, tokens, title, nearest=True)
        save_figure(figure, out / f"samples-guidance-{guidance}.png")
    curve = plot_losses({"text to image": history}, "nats an image token")
    save_figure(curve, out / "training.png")
    report = {
        **measured.result,
        "image_tokenizer": tokens.stage.result,
        "samples": drawn.result["samples"],
        "training": history,
        "captions": [tokens.captions[label] for label in setup.labels],
        **stages.describe(options),
    }
    write_json(out / "report.json", report)
    summarize(report, out)


def run(options: TextToImageOptions) -> None:
    setup, stages = Setup.load(options), Stages(options.out / "stages")
    tokens = tokenize(setup, stages)
    taught = teach(setup, tokens, stages)
    measured = measure(setup, tokens, taught, stages)
    drawn = draw(setup, tokens, taught, stages)
    write_results(setup, tokens, taught, measured, drawn, stages)


def main(arguments: list[str] | None = None) -> int:
    options = parse(TextToImageOptions, arguments, __doc__)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
