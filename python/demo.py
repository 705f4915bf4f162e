"""Teach a text-only Mixture-of-Experts model to draw digits, and show that its text is unchanged.

    python python/demo.py     # a few minutes on two CPU cores; --quick for a trial in seconds

1. A small OLMoE learns text (Python's own documentation).
2. 5,000 real handwritten digits become tokens of a learnt patch codebook.
3. The model is patched in place and learns "a handwritten seven" -> image tokens with a Trainer.
4. It draws 20 digits for each caption; samples.png, training.png, routing.png and report.json
   show how well.

Every stage is kept under --out, keyed by its settings: a second run, or one that was interrupted,
continues where the first stopped.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import tokenizers
import torch
from shared.cli import exit_code, option, parse
from shared.files import write_json
from shared.options import BackendOptions, out_folder
from shared.pictures import CaptionedPictures, digits
from shared.reports.demo import draw_figures, summarize
from shared.stages import Stage, Stages, Workspace
from shared.text_model import TextModelSettings, load_text_model, pretrain
from shared.text_to_image import (
    CaptionReader,
    Painter,
    PictureTokens,
    describe_codebook,
    measure_model,
    measure_samples,
    record_routing,
)
from shared.texts import documentation, text_blocks
from shared.training import mean_nll, schedule, train
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels import ModalityLoraConfig
from moe_kernels.analysis import RoutingStatistics
from moe_kernels.imaging import PatchTokenizer, generate_image_codes

_BATCHES = {"text_batch": 32, "image_batch": 100}  # of measurements


@dataclass(kw_only=True)
class DemoOptions(BackendOptions):
    """Demo."""

    steps: int = option(1400, "training steps of text to image", at_least=1)
    quick: bool = option(False, "tiny settings: shows that the demo runs, no more")
    out: Path = out_folder("demo")

    text_model: TextModelSettings = field(default_factory=TextModelSettings)
    images: int = 5000
    held_out_images: int = 500
    num_codes: int = 64
    patch_size: int = 4
    r: int = 16
    lora_alpha: float = 32
    batch: int = 16
    learning_rate: float = 4e-3
    caption_dropout: float = 0.0
    samples_per_caption: int = 20
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.text_model = dataclasses.replace(self.text_model, seed=self.seed, device=self.device)


QUICK = {
    "text_model": TextModelSettings(
        vocab_size=320, hidden_size=64, layers=2, experts=8, experts_per_token=2,
        intermediate_size=32, text_steps=20, text_batch=8, text_block=64,
    ),
    "images": 500, "held_out_images": 100, "num_codes": 32, "r": 4, "lora_alpha": 8, "steps": 20,
    "batch": 8, "samples_per_caption": 4,
}  # fmt: skip


# --- stages


def learn_text(options: DemoOptions, stages: Stages) -> Stage:
    return stages.run(
        "pretrain", dataclasses.asdict(options.text_model),
        lambda workspace: pretrain(options.text_model, workspace),
    )  # fmt: skip


def tokenize(options: DemoOptions, stages: Stages) -> Stage:
    def build(workspace: Workspace) -> dict[str, Any]:
        pictures, held_out = split_digits(options)
        tokenizer = PatchTokenizer.fit(
            pictures.images, num_codes=options.num_codes, patch_size=options.patch_size,
            seed=options.seed,
        )  # fmt: skip
        tokenizer.save(workspace.folder / "tokenizer")
        return describe_codebook(tokenizer, pictures.images, held_out.images)

    inputs = options.pick("seed", "images", "held_out_images", "num_codes", "patch_size")
    return stages.run("tokenize", inputs, build)


def split_digits(options: DemoOptions) -> tuple[CaptionedPictures, CaptionedPictures]:
    """Return the digits to learn from, and those held out."""
    pictures = digits()
    if options.images < len(pictures):
        pictures, _ = pictures.split(len(pictures) - options.images, options.seed)
    return pictures.split(options.held_out_images, options.seed)


@dataclass(frozen=True)
class Setup:
    """The text model's folder and the tokenized pictures."""

    options: DemoOptions
    text_folder: Path
    tokens: PictureTokens

    def load_text_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_text_model(self.text_folder, self.options.device)

    def make_painter(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Painter:
        """Patch the model and add the image tokens."""
        options = self.options
        config = ModalityLoraConfig(
            r=options.r, lora_alpha=options.lora_alpha, backend=options.backend
        )
        return Painter.create(
            model, tokenizer, config, options.num_codes, self.tokens.captions, seed=options.seed,
            init="normal",
        )  # fmt: skip


def teach(setup: Setup, stages: Stages, after: list[Stage]) -> Stage:
    """Train the adapters and the added rows on captioned digits."""
    options, tokens = setup.options, setup.tokens

    def build(workspace: Workspace) -> dict[str, Any]:
        painter = setup.make_painter(*setup.load_text_model())
        # A part suffices for the curve; the report has the loss of all of them.
        held_out = painter.batches(tokens.held_out.head(200), 100)
        history = train(
            painter.patched, painter.dataset(tokens.train, options.caption_dropout),
            lambda model: mean_nll(model, held_out), workspace, collator=painter.collator,
            **schedule(
                options.steps, options.batch, options.learning_rate,
                warmup_steps=options.steps // 20, seed=options.seed, device=options.device,
            ),
        )  # fmt: skip
        painter.patched.save_adapter(workspace.folder / "adapter")
        caption = np.mean([len(ids) for ids in painter.caption_ids])
        length = caption + tokens.train.codes.shape[1] + 2
        return {"history": history, "tokens_per_second": history["samples_per_second"] * length}

    names = "backend", "r", "lora_alpha", "steps", "batch", "learning_rate", "caption_dropout"
    return stages.run("teach", options.pick("device", *names), build, after)


def generate(setup: Setup, stages: Stages, taught: Stage) -> Stage:
    """Draw each caption."""
    options, tokens = setup.options, setup.tokens

    def build(workspace: Workspace) -> dict[str, Any]:
        painter = setup.make_painter(*setup.load_text_model())
        painter.patched.load_adapter(taught.folder / "adapter")
        captions = [ids for ids in painter.caption_ids for _ in range(options.samples_per_caption)]
        started = time.perf_counter()
        codes = generate_image_codes(
            painter.model, captions, painter.vocabulary, tokens.tokenizer.tokens_per_image,
            pad_token_id=painter.collator.pad_token_id, temperature=options.temperature,
            batch_size=200, seed=options.seed,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        return {"codes": codes.tolist(), "tokens_per_second": codes.numel() / seconds}

    inputs = options.pick("samples_per_caption", "temperature")
    return stages.run("generate", inputs, build, after=[taught])


def measure(setup: Setup, stages: Stages, taught: Stage, generated: Stage) -> Stage:
    """Compare text bit by bit, record the routing, and grade the drawings."""
    tokens = setup.tokens

    def build(workspace: Workspace) -> dict[str, Any]:
        model, tokenizer = setup.load_text_model()
        block = setup.options.text_model.text_block
        blocks = text_blocks(tokenizer, documentation()["test"], block, block)
        painter, measured = measure_model(
            model, lambda model: setup.make_painter(model, tokenizer), taught.folder / "adapter",
            blocks, tokens.held_out, **_BATCHES,
        )  # fmt: skip
        nll = measured["text"]["nll_after_training"]
        measured["text"]["bits_per_byte"] = bits_per_byte(nll, tokenizer, documentation()["test"])
        routing = record_routing(painter, blocks, tokens.held_out, **_BATCHES)
        samples = grade(torch.tensor(generated.result["codes"]), setup)
        return {**measured, "routing": routing.to_dict(), "samples": samples}

    return stages.run("measure", {}, build, after=[taught, generated])


def bits_per_byte(nll: float, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Convert nats a token; independent of the tokenizer."""
    tokens = len(tokenizer(text, verbose=False).input_ids)
    return nll * tokens / len(text.encode()) / math.log(2)


def grade(codes: torch.Tensor, setup: Setup) -> dict[str, Any]:
    tokens, decode = setup.tokens, setup.tokens.tokenizer.decode
    labels = torch.arange(len(tokens.captions))
    labels = labels.repeat_interleave(setup.options.samples_per_caption)
    reader = CaptionReader.fit(tokens.train, decode)
    return measure_samples(codes, labels, tokens.train, tokens.held_out, decode, reader)


# --- results


def describe(options: DemoOptions, stages: Stages) -> dict[str, Any]:
    """Return the content of report.json: every figure that was measured."""
    results = stages.results
    measured, described = results["measure"], stages.describe(options)
    statistics = RoutingStatistics.from_dict(measured["routing"])
    kinds = dataclasses.asdict(statistics.expert_kinds("text", "image"))
    more = {module.__name__: module.__version__ for module in (tokenizers, np, sklearn)}
    return described | {
        **{name: measured[name] for name in ("parameters", "text", "image", "samples")},
        "tokenizer": results["tokenize"],
        "routing": {
            "layers": statistics.layers,
            "jensen_shannon_divergence_bits": statistics.divergence("text", "image").tolist(),
            "entropy_nats": statistics.entropy().tolist(),
            "experts": {name: counts.tolist() for name, counts in kinds.items()},
        },
        "seconds": {**stages.seconds, "total": sum(stages.seconds.values())},
        "tokens_per_second": {
            name: results[name]["tokens_per_second"] for name in ("pretrain", "teach", "generate")
        },
        **options.pick("seed", "backend", "device"),
        "versions": {"python": platform.python_version(), **described["versions"], **more},
    }


def run(options: DemoOptions) -> None:
    stages = Stages(options.out / "stages")
    text = learn_text(options, stages)
    tokenized = tokenize(options, stages)
    tokenizer = PatchTokenizer.load(tokenized.folder / "tokenizer")
    setup = Setup(options, text.folder, PictureTokens.encode(tokenizer, *split_digits(options)))
    taught = teach(setup, stages, after=[text, tokenized])
    generated = generate(setup, stages, taught)
    measure(setup, stages, taught, generated)
    report = describe(options, stages)
    draw_figures(report, stages.results, setup.tokens, options.out)
    write_json(options.out / "report.json", report)
    summarize(report, options.out)


def main(arguments: list[str] | None = None) -> int:
    options = parse(DemoOptions, arguments, __doc__, quick=QUICK)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
