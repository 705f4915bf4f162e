"""Teaches a text-only Mixture-of-Experts model to draw digits, and shows that its text stays.

    python python/demo.py     # a few minutes on two CPU cores; --quick for a trial in seconds

1. A small OLMoE learns text (Python's own documentation).
2. 5,000 real handwritten digits become tokens of a learnt patch codebook.
3. The model is patched in place and learns "a handwritten seven" -> image tokens through a Trainer.
4. It draws 20 digits for each caption; samples.png, training.png, routing.png and report.json
   say how well.

Every stage is kept under --out, keyed by its settings, so that a second run, or one that was
interrupted, goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import tokenizers
import torch
import transformers
from shared.cli import console
from shared.files import write_text
from shared.pictures import CaptionedPictures, digits
from shared.reports.demo import draw_figures, summarize
from shared.stages import Stages, Workspace
from shared.text_model import TextModelSettings, load_text_model, pretrain
from shared.text_to_image import (
    CaptionReader,
    Painter,
    TokenizedPictures,
    measure_model,
    measure_samples,
    record_routing,
)
from shared.texts import documentation, text_blocks
from shared.training import mean_nll, train
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import moe_kernels
from moe_kernels import ModalityLoraConfig
from moe_kernels.analysis import RoutingStatistics
from moe_kernels.imaging import PatchTokenizer, generate_image_codes


@dataclass(frozen=True)
class Settings(TextModelSettings):
    backend: str | None = None

    images: int = 5000
    held_out_images: int = 500
    num_codes: int = 64
    patch_size: int = 4

    r: int = 16
    lora_alpha: float = 32
    steps: int = 1400
    batch: int = 16
    learning_rate: float = 4e-3
    caption_dropout: float = 0.0

    samples_per_caption: int = 20
    temperature: float = 1.0

    def pick(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    @property
    def text(self) -> dict[str, Any]:
        return self.pick(*(field.name for field in dataclasses.fields(TextModelSettings)))

    @property
    def pictures(self) -> dict[str, Any]:
        return self.pick("seed", "images", "held_out_images", "num_codes", "patch_size")

    @property
    def adapter(self) -> dict[str, Any]:
        own = self.pick(
            "backend", "r", "lora_alpha", "steps", "batch", "learning_rate", "caption_dropout"
        )
        return self.text | self.pictures | own

    @property
    def samples(self) -> dict[str, Any]:
        return self.adapter | self.pick("samples_per_caption", "temperature")


QUICK = {
    "vocab_size": 320, "hidden_size": 64, "layers": 2, "experts": 8, "experts_per_token": 2,
    "intermediate_size": 32, "text_steps": 20, "text_batch": 8, "text_block": 64, "images": 500,
    "held_out_images": 100, "num_codes": 32, "r": 4, "lora_alpha": 8, "steps": 20, "batch": 8,
    "samples_per_caption": 4,
}  # fmt: skip


# --- pictures as tokens


def split_digits(settings: Settings) -> tuple[CaptionedPictures, CaptionedPictures]:
    """Those to learn from, and those held out."""
    pictures = digits()
    if settings.images < len(pictures):
        pictures, _ = pictures.split(len(pictures) - settings.images, settings.seed)
    return pictures.split(settings.held_out_images, settings.seed)


@dataclass(frozen=True)
class Pictures:
    tokenizer: PatchTokenizer
    train: TokenizedPictures
    held_out: TokenizedPictures

    @property
    def captions(self) -> tuple[str, ...]:
        return self.train.pictures.names


def tokenize_pictures(settings: Settings, workspace: Workspace) -> dict[str, Any]:
    pictures, held_out = split_digits(settings)
    tokenizer = PatchTokenizer.fit(
        pictures.images, num_codes=settings.num_codes, patch_size=settings.patch_size,
        seed=settings.seed,
    )  # fmt: skip
    tokenizer.save(workspace.folder / "tokenizer")
    usage = tokenizer.codebook_usage(tokenizer.encode(pictures.images))
    return {
        "tokens_per_image": tokenizer.tokens_per_image,
        "codes": tokenizer.num_codes,
        "codes_used": int((usage > 0).sum()),
        "held_out_mean_squared_error": tokenizer.reconstruction_error(held_out.images),
    }


def load_pictures(settings: Settings, folder: Path) -> Pictures:
    tokenizer = PatchTokenizer.load(folder / "tokenizer")
    parts = (TokenizedPictures.encode(tokenizer, part) for part in split_digits(settings))
    return Pictures(tokenizer, *parts)


# --- the patched model learns pictures


def make_painter(
    settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast,
    pictures: Pictures,
) -> Painter:  # fmt: skip
    config = ModalityLoraConfig(
        r=settings.r, lora_alpha=settings.lora_alpha, backend=settings.backend
    )
    return Painter.create(
        model, tokenizer, config, settings.num_codes, pictures.captions, seed=settings.seed,
        init="normal",
    )  # fmt: skip


def teach(
    settings: Settings, text_folder: Path, pictures: Pictures, workspace: Workspace
) -> dict[str, Any]:
    painter = make_painter(settings, *load_text_model(text_folder, settings.device), pictures)
    # A part suffices for the curve; the report has the loss of all of them.
    held_out = painter.batches(pictures.held_out.head(200), 100)
    history = train(
        painter.patched, painter.dataset(pictures.train, settings.caption_dropout),
        lambda model: mean_nll(model, held_out), workspace,
        collator=painter.collator, max_steps=settings.steps,
        per_device_train_batch_size=settings.batch, learning_rate=settings.learning_rate,
        weight_decay=0.01, warmup_steps=settings.steps // 20, seed=settings.seed,
        use_cpu=settings.device == "cpu",
    )  # fmt: skip
    painter.patched.save_adapter(workspace.folder / "adapter")
    length = np.mean([len(ids) for ids in painter.caption_ids]) + pictures.train.codes.shape[1] + 2
    return {"history": history, "tokens_per_second": history["samples_per_second"] * length}


def generate(
    settings: Settings, text_folder: Path, adapter_folder: Path, pictures: Pictures
) -> dict[str, Any]:
    painter = make_painter(settings, *load_text_model(text_folder, settings.device), pictures)
    painter.patched.load_adapter(adapter_folder / "adapter")
    captions = [ids for ids in painter.caption_ids for _ in range(settings.samples_per_caption)]
    started = time.perf_counter()
    codes = generate_image_codes(
        painter.model, captions, painter.vocabulary, pictures.tokenizer.tokens_per_image,
        pad_token_id=painter.collator.pad_token_id, temperature=settings.temperature,
        batch_size=200, seed=settings.seed,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    return {"codes": codes.tolist(), "tokens_per_second": codes.numel() / seconds}


# --- what came of it


def measure(
    settings: Settings, text_folder: Path, adapter_folder: Path, pictures: Pictures,
    codes: torch.Tensor,
) -> dict[str, Any]:  # fmt: skip
    model, tokenizer = load_text_model(text_folder, settings.device)
    held_out_text = documentation()["test"]
    block = settings.text_block
    blocks = text_blocks(tokenizer, held_out_text, block, block)
    batches = {"text_batch": 32, "image_batch": 100}
    painter, measured = measure_model(
        model, lambda model: make_painter(settings, model, tokenizer, pictures),
        adapter_folder / "adapter", blocks, pictures.held_out, **batches,
    )  # fmt: skip
    tokens = len(tokenizer(held_out_text, verbose=False).input_ids)
    nats_a_byte = measured["text"]["nll_after_training"] * tokens / len(held_out_text.encode())
    measured["text"]["bits_per_byte"] = nats_a_byte / math.log(2)
    decode = pictures.tokenizer.decode
    asked = torch.arange(len(pictures.captions)).repeat_interleave(settings.samples_per_caption)
    return {
        **measured,
        "routing": record_routing(painter, blocks, pictures.held_out, **batches).to_dict(),
        "samples": measure_samples(
            codes,
            asked,
            pictures.train,
            pictures.held_out,
            decode,
            CaptionReader.fit(pictures.train, decode),
        ),  # fmt: skip
    }


# --- the report


def describe(settings: Settings, stages: Stages) -> dict[str, Any]:
    """Everything that was measured, as report.json holds it."""
    measured = stages.results["measure"]
    statistics = RoutingStatistics.from_dict(measured["routing"])
    kinds = dataclasses.asdict(statistics.expert_kinds("text", "image"))
    return {
        **{name: measured[name] for name in ("parameters", "text", "image", "samples")},
        "tokenizer": stages.results["tokenize"],
        "routing": {
            "layers": statistics.layers,
            "jensen_shannon_divergence_bits": statistics.divergence("text", "image").tolist(),
            "entropy_nats": statistics.entropy().tolist(),
            "experts": {name: counts.tolist() for name, counts in kinds.items()},
        },
        "seconds": {**stages.seconds, "total": sum(stages.seconds.values())},
        "tokens_per_second": {
            name: stages.results[name]["tokens_per_second"]
            for name in ("pretrain", "teach", "generate")
        },
        "settings": dataclasses.asdict(settings),
        "seed": settings.seed,
        "backend": settings.backend,
        "device": settings.device,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{
                module.__name__: module.__version__
                for module in (moe_kernels, torch, transformers, tokenizers, np, sklearn)
            },
        },
    }


def run(settings: Settings, out: Path) -> dict[str, Any]:
    stages = Stages(out / "stages")
    text = stages.run(
        "pretrain", settings.text, lambda workspace: pretrain(settings, workspace)
    ).folder
    tokenized = stages.run(
        "tokenize", settings.pictures, lambda workspace: tokenize_pictures(settings, workspace)
    ).folder
    pictures = load_pictures(settings, tokenized)
    taught = stages.run(
        "teach", settings.adapter, lambda workspace: teach(settings, text, pictures, workspace)
    ).folder
    stages.run(
        "generate", settings.samples, lambda workspace: generate(settings, text, taught, pictures)
    )
    codes = torch.tensor(stages.results["generate"]["codes"])
    stages.run(
        "measure",
        settings.samples,
        lambda workspace: measure(settings, text, taught, pictures, codes),
    )
    report = describe(settings, stages)
    draw_figures(report, stages.results, pictures, out)
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    summarize(report, out)
    return report


def parse(arguments: list[str] | None) -> tuple[Settings, Path]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, help=f"of text-to-image training (default {Settings.steps})"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--backend", choices=moe_kernels.backends.NAMES, help="default: the best one here"
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="default: %(default)s")
    parser.add_argument(
        "--quick", action="store_true", help="tiny settings: shows that it runs, no more"
    )
    given = parser.parse_args(arguments)
    if given.steps is not None and given.steps < 1:
        parser.error("--steps must be at least 1")
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        backend = moe_kernels.backends.select(given.backend, torch.device(device))
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    chosen = {"seed": given.seed, "device": device, "backend": backend}
    if given.steps is not None:
        chosen["steps"] = given.steps
    return Settings(**((QUICK if given.quick else {}) | chosen)), given.out


def main(arguments: list[str] | None = None) -> int:
    settings, out = parse(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    try:
        run(settings, out)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
