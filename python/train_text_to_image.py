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
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from shared.cli import Options, exit_code, option, parse
from shared.files import copy_whole, replacing, save_figure, write_json
from shared.models import load_causal_lm, require_experts
from shared.options import ModelOptions, TextOptions, out_folder
from shared.pictures import CaptionedPictures, digits, emoji, folder
from shared.reports.losses import plot_losses
from shared.reports.text_to_image import plot_drawings, summarize
from shared.stages import Stage, Stages, Workspace, digest, model_identity
from shared.text_to_image import (
    CaptionReader,
    Painter,
    PictureTokens,
    describe_codebook,
    measure_model,
    measure_samples,
)
from shared.training import mean_nll, schedule, train
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels import ModalityLoraConfig
from moe_kernels.imaging import (
    FittingError,
    ImageTokenizer,
    PatchTokenizer,
    VQTokenizer,
    generate_image_codes,
    load_image_tokenizer,
    warn_if_collapsed,
)
from moe_kernels.models import initialise_lora

ROW_INITS = ("normal", "gaussian", "mean", "gromov_wasserstein", "permuted")
TARGET_MODULES = ("experts", "attention", "router")
LORA_INITS = ("zero", "gromov_wasserstein", "permuted")
COUPLED_INITS = ("gromov_wasserstein", "permuted")  # computed by POT
_INIT_ROWS = 16  # texts and pictures that a Gromov-Wasserstein start of the adapters sees


# --- options


@dataclass(kw_only=True)
class PictureOptions(Options):
    """Pictures."""

    data: str = option("digits", "digits, emoji, or a folder of pictures")
    emoji_folder: str | None = option(None, "unpacked npm package emoji-datasource-twitter")
    emoji_categories: list[str] = option([], "categories of emoji; default: all", metavar="NAME")
    image_size: int = option(32, "pixels of a side; digits have 28", at_least=1)
    held_out: int = option(200, "pictures to hold out", at_least=1)

    def load(self) -> CaptionedPictures:
        if self.data == "digits":
            return digits()
        if self.data == "emoji":
            return emoji(Path(self.emoji_folder), self.image_size, self.emoji_categories or None)
        return folder(Path(self.data), self.image_size)


@dataclass(kw_only=True)
class TokenizerOptions(Options):
    """Image tokenizer."""

    tokenizer: str = option(
        "patch", "patch (k-means over patches), vq (a VQ-VAE), or the folder of a fitted one"
    )
    num_codes: int = option(256, "codes of the codebook", at_least=1)
    patch_size: int = option(4, "pixels of a token's side", at_least=1)
    vq_steps: int = option(5000, "training steps of a VQ-VAE", at_least=1)
    vq_lr: float = option(4e-3, "learning rate of a VQ-VAE", above=0)


@dataclass(kw_only=True)
class AdapterOptions(Options):
    """Adapters."""

    r: int = option(16, "rank of the updates", at_least=1)
    lora_alpha: float | None = option(None, "scale of the updates; default: twice the rank")
    target_modules: list[str] = option(
        ["experts", "attention"], "modules to update", choices=TARGET_MODULES
    )
    shared_A: bool = option(False, "use one A for all experts of a layer")
    init: str = option("normal", "start of the added rows", choices=ROW_INITS)
    lora_init: str = option("zero", "start of the adapters", choices=LORA_INITS)


@dataclass(kw_only=True)
class TeachingOptions(Options):
    """Training."""

    steps: int = option(1000, "training steps", at_least=1)
    batch: int = option(16, "pictures in a batch", at_least=1)
    gradient_accumulation: int = option(1, "batches in a step", at_least=1, metavar="N")
    gradient_checkpointing: bool = option(False, "use less memory; a third slower")
    lr: float = option(1e-3, "learning rate", above=0)
    caption_dropout: float = option(0.1, "share of captions left empty, for guidance")


@dataclass(kw_only=True)
class DrawingOptions(Options):
    """Drawing."""

    captions: list[str] = option([], "captions to draw; default: ten of the pictures'")
    samples_per_caption: int = option(6, "drawings of each caption", at_least=1, metavar="N")
    guidance: list[float] = option([1.0, 3.0], "scales of guidance; 1 is none", at_least=0)
    temperature: float = option(1.0, "temperature of sampling", above=0)


@dataclass(kw_only=True)
class TextToImageOptions(
    PictureOptions, TokenizerOptions, AdapterOptions, TeachingOptions, TextOptions, DrawingOptions,
    ModelOptions,
):  # fmt: skip
    """Model."""

    model: str = option(MISSING, "local folder or hub id of a Mixture of Experts", positional=True)
    out: Path = out_folder("text_to_image")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError("--caption-dropout must lie in 0..1")
        if any(scale != 1 for scale in self.guidance) and self.caption_dropout == 0:
            raise ValueError(
                "--guidance other than 1 needs a model trained with --caption-dropout above 0"
            )
        if self.data == "emoji" and self.emoji_folder is None:
            raise ValueError(
                "--data emoji needs --emoji-folder: the npm package emoji-datasource-twitter"
            )
        size = 28 if self.data == "digits" else self.image_size
        if self.tokenizer in ("patch", "vq") and size % self.patch_size:
            raise ValueError(f"--patch-size {self.patch_size} does not divide pictures of {size}")

    @property
    def lora(self) -> ModalityLoraConfig:
        return ModalityLoraConfig(
            r=self.r, lora_alpha=self.lora_alpha, backend=self.backend, shared_A=self.shared_A,
            target_modules=tuple(self.target_modules),
        )  # fmt: skip


# --- what several stages use


class Setup:
    """Pictures, text and models; each is loaded once."""

    def __init__(self, options: TextToImageOptions):
        self.options = options
        pictures = options.load()
        self.train_pictures, self.held_out_pictures = pictures.split(options.held_out, options.seed)
        self.painter: Painter | None = None  # with the trained adapter, see `taught_painter`

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.options.model)

    @cached_property
    def blocks(self) -> torch.Tensor:
        """Token ids of held-out text, (blocks, block)."""
        return self.options.text_blocks(self.tokenizer)

    @cached_property
    def captions_to_draw(self) -> list[int]:
        """Numbers of the given captions, or of ten of the training pictures' captions.

        Raises:
            ValueError: no picture has a given caption.
        """
        names, given = self.train_pictures.names, self.options.captions
        if unknown := [caption for caption in given if caption not in names]:
            raise ValueError(
                f"no picture has the caption {unknown[0]!r}; generate_images.py draws any caption"
            )
        if given:
            return [names.index(caption) for caption in given]
        present = np.unique(self.train_pictures.labels)
        return present[np.linspace(0, len(present) - 1, min(10, len(present))).astype(int)].tolist()

    def load_base(self) -> PreTrainedModel:
        return load_causal_lm(self.options.model, self.options.dtype, self.options.device)


def check_model(options: TextToImageOptions) -> None:
    """Raise before any work unless the model can be taught.

    Raises:
        ValueError: the model is dense, or a start needs a package that is not installed.
    """
    if {options.init, options.lora_init} & set(COUPLED_INITS) and find_spec("ot") is None:
        raise ValueError("this --init needs POT: pip install 'modality-moe-kernels[ot]'")
    require_experts(options.model)


# --- tokenize


def tokenizer_inputs(setup: Setup) -> dict[str, Any]:
    options = setup.options
    inputs = options.pick("seed", "tokenizer", "num_codes", "patch_size")
    if options.tokenizer == "vq":
        inputs |= options.pick("vq_steps", "vq_lr")
    elif options.tokenizer != "patch":
        inputs["tokenizer"] = model_identity(options.tokenizer)
    parts = {"train": setup.train_pictures, "held_out": setup.held_out_pictures}
    pictures = {name: digest(part.images, part.labels) for name, part in parts.items()}
    return inputs | pictures | {"captions": setup.train_pictures.names}


def tokenize(setup: Setup, stages: Stages) -> Stage:
    """Fit the image tokenizer, or copy a fitted one."""

    def build(workspace: Workspace) -> dict[str, Any]:
        train_images = setup.train_pictures.images
        try:
            tokenizer = fit_tokenizer(setup.options, train_images)
        except FittingError as error:
            kept = setup.options.out / "image_tokenizer-last-good"
            error.last_good.save(kept)
            message = f"{error}; the last good one is in {kept} (--tokenizer); or lower --vq-lr"
            raise FloatingPointError(message) from error
        tokenizer.save(workspace.folder / "image_tokenizer")
        # Fitting warns by itself, but a tokenizer fitted elsewhere has not seen these pictures.
        warn_if_collapsed(tokenizer.codebook_usage(tokenizer.encode(train_images)))
        return describe_codebook(tokenizer, train_images, setup.held_out_pictures.images)

    return stages.run("tokenize", tokenizer_inputs(setup), build)


def fit_tokenizer(options: TextToImageOptions, images: np.ndarray) -> ImageTokenizer:
    if options.tokenizer == "patch":
        return PatchTokenizer.fit(
            images, num_codes=options.num_codes, patch_size=options.patch_size, seed=options.seed
        )
    if options.tokenizer == "vq":
        return VQTokenizer.fit(
            images, num_codes=options.num_codes, downsample=options.patch_size,
            steps=options.vq_steps, lr=options.vq_lr, seed=options.seed, device=options.device,
            progress=True,
        )  # fmt: skip
    return load_image_tokenizer(options.tokenizer)


def load_tokens(setup: Setup, tokenized: Stage) -> PictureTokens:
    tokenizer = load_image_tokenizer(tokenized.folder / "image_tokenizer")
    return PictureTokens.encode(tokenizer, setup.train_pictures, setup.held_out_pictures)


# --- teach


def patch(setup: Setup, tokens: PictureTokens, model: PreTrainedModel) -> Painter:
    """Patch the model and add the image tokens, started as the options say."""
    options, init = setup.options, {"init": setup.options.init}
    if options.init in COUPLED_INITS:
        init |= {
            "features": tokens.tokenizer.codebook,
            "num_delimiters": 2,
            "frequencies": tokens.tokenizer.codebook_usage(tokens.train.codes),
        }
    painter = Painter.create(
        model, setup.tokenizer, options.lora, tokens.tokenizer.num_codes, tokens.captions,
        seed=options.seed, **init,
    )  # fmt: skip
    if options.lora_init != "zero":
        pictures = painter.batches(tokens.train.head(_INIT_ROWS), 4)
        rows = [{"input_ids": ids} for ids in setup.blocks[:_INIT_ROWS].split(4)] + pictures
        initialise_lora(
            model, [on_device(row, model.device) for row in rows],
            lora_init=options.lora_init, seed=options.seed, progress=True,
        )  # fmt: skip
    return painter


def on_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}


def adapter_inputs(setup: Setup) -> dict[str, Any]:
    options = setup.options
    inputs = options.pick("seed", "dtype", "device", "backend")
    inputs |= options.of(AdapterOptions, TeachingOptions) | {"base": model_identity(options.model)}
    return inputs | ({} if options.lora_init == "zero" else {"text": digest(setup.blocks)})


def teach(setup: Setup, stages: Stages, tokenized: Stage, tokens: PictureTokens) -> Stage:
    """Train the adapters and the added rows on captioned pictures."""
    options = setup.options

    def build(workspace: Workspace) -> dict[str, Any]:
        painter = patch(setup, tokens, setup.load_base())
        # A part suffices for the curve; the report has the loss of all of them.
        held_out = painter.batches(tokens.held_out.head(64), options.batch)
        if options.gradient_checkpointing:
            painter.model.gradient_checkpointing_enable()
        history = train(
            painter.patched, painter.dataset(tokens.train, options.caption_dropout, options.seed),
            lambda model: mean_nll(model, held_out), workspace, collator=painter.collator,
            gradient_accumulation_steps=options.gradient_accumulation,
            **schedule(
                options.steps, options.batch, options.lr, warmup_steps=options.steps // 20,
                seed=options.seed, device=options.device,
            ),
        )  # fmt: skip
        painter.patched.save_adapter(workspace.folder / "adapter")
        return {"history": history}

    return stages.run("teach", adapter_inputs(setup), build, after=[tokenized])


def taught_painter(setup: Setup, tokens: PictureTokens, taught: Stage) -> Painter:
    """Return the model with the trained adapter, loaded unless `measure` has left it."""
    if setup.painter is None:
        setup.painter = patch(setup, tokens, setup.load_base())
        setup.painter.patched.load_adapter(taught.folder / "adapter")
    return setup.painter


# --- measure and draw


def measure(setup: Setup, stages: Stages, tokens: PictureTokens, taught: Stage) -> Stage:
    """Compare text bit by bit, and the loss of held-out pictures."""

    def build(workspace: Workspace) -> dict[str, Any]:
        setup.painter, measured = measure_model(
            setup.load_base(), lambda model: patch(setup, tokens, model),
            taught.folder / "adapter", setup.blocks, tokens.held_out,
            text_batch=4, image_batch=setup.options.batch,
        )  # fmt: skip
        return measured

    return stages.run("measure", {"text": digest(setup.blocks)}, build, after=[taught])


def draw(setup: Setup, stages: Stages, tokens: PictureTokens, taught: Stage) -> Stage:
    """Draw each caption at each guidance, and measure the drawings."""
    options = setup.options

    def build(workspace: Workspace) -> dict[str, Any]:
        reader = CaptionReader.fit(tokens.train, tokens.tokenizer.decode)
        labels = torch.tensor(setup.captions_to_draw)
        labels = labels.repeat_interleave(options.samples_per_caption)
        drawn = {}
        for guidance in options.guidance:
            codes = draw_codes(setup, tokens, taught, labels.tolist(), guidance)
            measured = measure_samples(
                codes, labels, tokens.train, tokens.held_out, tokens.tokenizer.decode, reader
            )
            drawn[f"{guidance:g}"] = measured | {"codes": codes.tolist()}
        return drawn

    return stages.run("draw", options.of(DrawingOptions), build, after=[taught])


def draw_codes(
    setup: Setup, tokens: PictureTokens, taught: Stage, labels: Sequence[int], guidance: float
) -> torch.Tensor:
    """Return (N, tokens) codes of a drawing for each caption's number."""
    painter, options = taught_painter(setup, tokens, taught), setup.options
    return generate_image_codes(
        painter.model, [painter.caption_ids[label] for label in labels], painter.vocabulary,
        tokens.tokenizer.tokens_per_image, guidance_scale=guidance,
        pad_token_id=painter.collator.pad_token_id, empty_caption=painter.empty_caption,
        temperature=options.temperature, batch_size=options.batch, seed=options.seed,
        progress=True,
    )  # fmt: skip


# --- results


def save_held_out(painter: Painter, tokens: PictureTokens, path: Path) -> None:
    """Write the held-out pictures as sequences: input_ids and attention_mask, (N, S) int64."""
    (batch,) = painter.batches(tokens.held_out, len(tokens.held_out))
    del batch["labels"]
    with replacing(path) as temporary:
        save_file(batch, temporary)


def write_results(setup: Setup, stages: Stages, tokens: PictureTokens, taught: Stage) -> None:
    options, out, results = setup.options, setup.options.out, stages.results
    copy_whole(taught.folder / "adapter", out / "adapter")
    tokens.tokenizer.save(out / "image_tokenizer")
    save_held_out(taught_painter(setup, tokens, taught), tokens, out / "held_out.safetensors")
    drawn, history = results["draw"], taught.result["history"]
    plot_drawings(drawn, setup.captions_to_draw, options.samples_per_caption, tokens, out)
    save_figure(
        plot_losses({"text to image": history}, "nats an image token"), out / "training.png"
    )
    report = {
        **results["measure"],
        "image_tokenizer": results["tokenize"],
        "samples": {
            guidance: {name: value for name, value in measured.items() if name != "codes"}
            for guidance, measured in drawn.items()
        },
        "training": history,
        "captions": [tokens.captions[label] for label in setup.captions_to_draw],
        **stages.describe(options),
    }
    write_json(out / "report.json", report)
    summarize(report, out)


def run(options: TextToImageOptions) -> None:
    check_model(options)
    setup, stages = Setup(options), Stages(options.out / "stages")
    _ = setup.captions_to_draw, setup.blocks  # refuse what cannot work before anything long
    tokenized = tokenize(setup, stages)
    tokens = load_tokens(setup, tokenized)
    taught = teach(setup, stages, tokenized, tokens)
    measure(setup, stages, tokens, taught)
    draw(setup, stages, tokens, taught)
    write_results(setup, stages, tokens, taught)


def main(arguments: list[str] | None = None) -> int:
    options = parse(TextToImageOptions, arguments, __doc__)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
