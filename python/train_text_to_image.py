"""Teaches a text-only Mixture-of-Experts model to draw, and shows that its text stays.

    python python/train_text_to_image.py MODEL --data digits
    python python/train_text_to_image.py MODEL --data emoji --emoji-folder package
    python python/train_text_to_image.py MODEL --data my_pictures

MODEL is a local folder or a hub id of a Mixtral, OLMoE or Qwen-MoE model. --data: "digits" (5,000
of MNIST), "emoji" (the npm package emoji-datasource-twitter), or a folder of pictures with a
metadata.csv or .jsonl that has file_name and text.

1. tokenize: pictures become tokens of a codebook that is learnt from them.
2. teach: the model is patched in place; low-rank updates and the added tokens' rows learn
   caption -> image tokens; all else is frozen.
3. measure: held-out pictures, and held-out text before and after, bit by bit.
4. draw: pictures for some captions, at every --guidance, beside real ones.

Under --out: adapter/ and image_tokenizer/ (what generate_images.py takes), held_out.safetensors
(what analyze_routing.py takes), report.json, training.png, samples-*.png. Every stage is kept,
keyed by its settings: a second run, or one that was interrupted, goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from shared.cli import add_run_options, exit_code, settle_device
from shared.files import copy_whole, replacing, save_figure, write_text
from shared.models import load_causal_lm, require_experts
from shared.pictures import CaptionedPictures, digits, emoji, folder
from shared.reports.text_to_image import plot_training, summarize
from shared.stages import Stages, Workspace, digest, model_identity
from shared.text_to_image import (
    CaptionReader,
    Painter,
    TokenizedPictures,
    measure_model,
    measure_samples,
)
from shared.texts import documentation, text_blocks
from shared.training import mean_nll, train
from transformers import AutoTokenizer, PreTrainedModel

import moe_kernels
from moe_kernels import ModalityLoraConfig
from moe_kernels.imaging import (
    FittingError,
    ImageTokenizer,
    PatchTokenizer,
    SampleRow,
    VQTokenizer,
    generate_image_codes,
    load_image_tokenizer,
    nearest_indices,
    plot_samples,
    warn_if_collapsed,
)
from moe_kernels.models import initialise_lora

ROW_INITS = ("normal", "gaussian", "mean", "gromov_wasserstein", "permuted")
TARGET_MODULES = ("experts", "attention", "router")
LORA_INITS = ("zero", "gromov_wasserstein", "permuted")
# Text and pictures that a Gromov-Wasserstein start of the adapters looks at.
_INIT_ROWS = 16


@dataclass(frozen=True)
class Settings:
    """What was asked for; each stage is keyed by the part that it depends on."""

    model: str
    dtype: str
    device: str
    backend: str | None
    seed: int
    data: str
    emoji_folder: str | None
    emoji_categories: tuple[str, ...]
    image_size: int
    held_out: int
    tokenizer: str
    num_codes: int
    patch_size: int
    vq_steps: int
    vq_lr: float
    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    shared_A: bool
    init: str
    lora_init: str
    steps: int
    batch: int
    gradient_accumulation: int
    gradient_checkpointing: bool
    lr: float
    caption_dropout: float
    text: str | None
    text_tokens: int
    text_block: int
    captions: tuple[str, ...]
    samples_per_caption: int
    guidance: tuple[float, ...]
    temperature: float

    def pick(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}


def load_pictures(settings: Settings) -> CaptionedPictures:
    if settings.data == "digits":
        return digits()
    if settings.data == "emoji":
        categories = list(settings.emoji_categories) or None
        return emoji(Path(settings.emoji_folder), settings.image_size, categories)
    return folder(Path(settings.data), settings.image_size)


class Program:
    """The stages; what several of them need is loaded once."""

    def __init__(self, settings: Settings, out: Path):
        self.settings, self.out = settings, out
        self.stages = Stages(out / "stages")
        pictures = load_pictures(settings)
        self.train_pictures, self.held_out_pictures = pictures.split(
            settings.held_out, settings.seed
        )
        self.image_tokenizer: ImageTokenizer | None = None

    # --- what the stages depend on

    @cached_property
    def tokenizer_inputs(self) -> dict[str, Any]:
        settings, train, held_out = self.settings, self.train_pictures, self.held_out_pictures
        names = ["seed", "tokenizer", "num_codes", "patch_size"]
        names += ["vq_steps", "vq_lr"] if settings.tokenizer == "vq" else []
        inputs = settings.pick(*names) | {"captions": train.names}
        for part in (train, held_out):
            inputs[f"pictures {len(inputs)}"] = digest(part.images, part.labels)
        if settings.tokenizer not in ("patch", "vq"):
            inputs["tokenizer"] = model_identity(settings.tokenizer)
        return inputs

    @cached_property
    def adapter_inputs(self) -> dict[str, Any]:
        settings = self.settings
        names = (
            "dtype", "device", "backend", "r", "lora_alpha", "target_modules", "shared_A", "init",
            "lora_init", "steps", "batch", "gradient_accumulation", "gradient_checkpointing", "lr",
            "caption_dropout",
        )  # fmt: skip
        inputs = self.tokenizer_inputs | settings.pick(*names)
        inputs["base"] = model_identity(settings.model)
        if settings.lora_init != "zero":
            inputs["text"] = digest(self.blocks)
        return inputs

    # --- what stages share

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.settings.model)

    @cached_property
    def train_codes(self) -> TokenizedPictures:
        return TokenizedPictures.encode(self.image_tokenizer, self.train_pictures)

    @cached_property
    def held_out_codes(self) -> TokenizedPictures:
        return TokenizedPictures.encode(self.image_tokenizer, self.held_out_pictures)

    @cached_property
    def blocks(self) -> torch.Tensor:
        """(blocks, block) token ids of held-out text."""
        settings = self.settings
        text = Path(settings.text).read_text() if settings.text else documentation()["test"]
        blocks = text_blocks(self.tokenizer, text, settings.text_block, settings.text_block)
        return blocks[: max(1, settings.text_tokens // settings.text_block)]

    def load_base(self) -> PreTrainedModel:
        return load_causal_lm(self.settings.model, self.settings.dtype, self.settings.device)

    def patch(self, model: PreTrainedModel) -> Painter:
        settings, init = self.settings, {"init": self.settings.init}
        if settings.init in ("gromov_wasserstein", "permuted"):
            usage = self.image_tokenizer.codebook_usage(self.train_codes.codes)
            init |= {
                "features": self.image_tokenizer.codebook,
                "num_delimiters": 2,
                "frequencies": usage,
            }
        painter = Painter.create(
            model, self.tokenizer,
            ModalityLoraConfig(
                r=settings.r, lora_alpha=settings.lora_alpha, backend=settings.backend,
                target_modules=settings.target_modules, shared_A=settings.shared_A,
            ),
            self.image_tokenizer.num_codes, self.train_pictures.names, seed=settings.seed, **init,
        )  # fmt: skip
        if settings.lora_init != "zero":
            pictures = painter.batches(self.train_codes.head(_INIT_ROWS), 4)
            rows = [{"input_ids": ids} for ids in self.blocks[:_INIT_ROWS].split(4)] + pictures
            initialise_lora(
                model, [on_device(row, model.device) for row in rows],
                lora_init=settings.lora_init, seed=settings.seed, progress=True,
            )  # fmt: skip
        return painter

    # --- stages

    def tokenize(self) -> None:
        def build(workspace: Workspace) -> dict[str, Any]:
            try:
                tokenizer = self.fit_tokenizer()
            except FittingError as error:
                kept = self.out / "image_tokenizer-last-good"
                error.last_good.save(kept)
                message = f"{error}; the last good one is in {kept} (--tokenizer); or lower --vq-lr"
                raise FloatingPointError(message) from error
            tokenizer.save(workspace.folder / "image_tokenizer")
            usage = tokenizer.codebook_usage(tokenizer.encode(self.train_pictures.images))
            warn_if_collapsed(usage)  # one that was fitted elsewhere was not asked on these
            return {
                "codes": tokenizer.num_codes,
                "codes_used": int((usage > 0).sum()),
                "tokens_per_image": tokenizer.tokens_per_image,
                "held_out_mean_squared_error": tokenizer.reconstruction_error(
                    self.held_out_pictures.images
                ),
            }

        folder = self.stages.run("tokenize", self.tokenizer_inputs, build).folder
        self.image_tokenizer = load_image_tokenizer(folder / "image_tokenizer")

    def fit_tokenizer(self) -> ImageTokenizer:
        settings, images = self.settings, self.train_pictures.images
        if settings.tokenizer == "patch":
            return PatchTokenizer.fit(
                images, num_codes=settings.num_codes, patch_size=settings.patch_size,
                seed=settings.seed,
            )  # fmt: skip
        if settings.tokenizer == "vq":
            return VQTokenizer.fit(
                images, num_codes=settings.num_codes, downsample=settings.patch_size,
                steps=settings.vq_steps, lr=settings.vq_lr, seed=settings.seed,
                device=settings.device, progress=True,
            )  # fmt: skip
        return load_image_tokenizer(settings.tokenizer)

    def teach(self) -> Path:
        settings = self.settings

        def build(workspace: Workspace) -> dict[str, Any]:
            painter = self.patch(self.load_base())
            # A part suffices for the curve; the report has the loss of all of them.
            held_out = painter.batches(self.held_out_codes.head(64), settings.batch)
            if settings.gradient_checkpointing:
                painter.model.gradient_checkpointing_enable()
            history = train(
                painter.patched,
                painter.dataset(self.train_codes, settings.caption_dropout, settings.seed),
                lambda model: mean_nll(model, held_out), workspace, collator=painter.collator,
                max_steps=settings.steps, per_device_train_batch_size=settings.batch,
                gradient_accumulation_steps=settings.gradient_accumulation,
                learning_rate=settings.lr, weight_decay=0.01, warmup_steps=settings.steps // 20,
                seed=settings.seed, use_cpu=settings.device == "cpu",
            )  # fmt: skip
            painter.patched.save_adapter(workspace.folder / "adapter")
            return {"history": history}

        return self.stages.run("teach", self.adapter_inputs, build).folder

    def measure(self, taught: Path) -> None:
        def build(workspace: Workspace) -> dict[str, Any]:
            self.painter, measured = measure_model(
                self.load_base(), self.patch, taught / "adapter", self.blocks, self.held_out_codes,
                text_batch=4, image_batch=self.settings.batch,
            )  # fmt: skip
            return measured

        self.stages.run("measure", self.adapter_inputs | {"text": digest(self.blocks)}, build)

    @cached_property
    def painter(self) -> Painter:
        """With the trained adapter."""
        painter = self.patch(self.load_base())
        painter.patched.load_adapter(self.taught / "adapter")
        return painter

    @cached_property
    def asked(self) -> list[int]:
        """The captions to draw, as numbers: those given, or some of the training pictures'."""
        names, wanted = self.train_pictures.names, self.settings.captions
        if unknown := [caption for caption in wanted if caption not in names]:
            raise ValueError(
                f"no picture has the caption {unknown[0]!r}; generate_images.py draws any caption"
            )
        if wanted:
            return [names.index(caption) for caption in wanted]
        present = np.unique(self.train_pictures.labels)
        return present[np.linspace(0, len(present) - 1, min(10, len(present))).astype(int)].tolist()

    def draw(self) -> None:
        settings = self.settings
        each = settings.samples_per_caption

        def build(workspace: Workspace) -> dict[str, Any]:
            painter = self.painter
            captions = [painter.caption_ids[label] for label in self.asked for _ in range(each)]
            reader = CaptionReader.fit(self.train_codes, self.image_tokenizer.decode)
            result = {}
            for guidance in settings.guidance:
                codes = generate_image_codes(
                    painter.model, captions, painter.vocabulary,
                    self.image_tokenizer.tokens_per_image, guidance_scale=guidance,
                    pad_token_id=painter.collator.pad_token_id,
                    empty_caption=painter.empty_caption, temperature=settings.temperature,
                    batch_size=settings.batch, seed=settings.seed, progress=True,
                )  # fmt: skip
                asked = torch.tensor(self.asked).repeat_interleave(each)
                result[f"{guidance:g}"] = measure_samples(
                    codes, asked, self.train_codes, self.held_out_codes,
                    self.image_tokenizer.decode, reader,
                ) | {"codes": codes.tolist()}  # fmt: skip
            return result

        names = ("captions", "samples_per_caption", "guidance", "temperature")
        self.stages.run("draw", self.adapter_inputs | settings.pick(*names), build)

    # --- what is left under --out

    def write_results(self) -> dict[str, Any]:
        results, out = self.stages.results, self.out
        copy_whole(self.taught / "adapter", out / "adapter")
        self.image_tokenizer.save(out / "image_tokenizer")
        self.save_held_out()
        samples = results["draw"]
        for guidance, measured in samples.items():
            self.plot_samples(guidance, torch.tensor(measured["codes"]), measured)
        save_figure(plot_training(results["teach"]["history"]), out / "training.png")
        report = {
            **results["measure"],
            "image_tokenizer": results["tokenize"],
            "samples": {
                guidance: {k: v for k, v in measured.items() if k != "codes"}
                for guidance, measured in samples.items()
            },
            "training": results["teach"]["history"],
            "captions": [self.train_pictures.names[label] for label in self.asked],
            "seconds": self.stages.seconds,
            "settings": dataclasses.asdict(self.settings),
            "threads": torch.get_num_threads(),
            "versions": {m.__name__: m.__version__ for m in (moe_kernels, torch, transformers)},
        }
        write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
        return report

    def save_held_out(self) -> None:
        """The held-out pictures as sequences: input_ids and attention_mask, (N, S) int64."""
        (batch,) = self.painter.batches(self.held_out_codes, len(self.held_out_codes))
        del batch["labels"]
        with replacing(self.out / "held_out.safetensors") as temporary:
            save_file(batch, temporary)

    def plot_samples(self, guidance: str, codes: torch.Tensor, measured: dict[str, Any]) -> None:
        decode, each = self.image_tokenizer.decode, self.settings.samples_per_caption
        trained = decode(self.train_codes.codes)
        nearest = trained[nearest_indices(decode(codes), trained)]
        rows, held_out = [], []
        for number, label in enumerate(self.asked):
            mine = slice(number * each, (number + 1) * each)
            real, is_held_out = self.real_pictures(label)
            held_out.append(is_held_out)
            misread = torch.tensor(measured["read"][mine]) != label if "read" in measured else None
            name = self.train_pictures.names[label]
            rows.append(
                SampleRow(f'"{name}"', decode(codes[mine]), decode(real), misread, nearest[mine])
            )
        title = f"guidance {guidance}"
        if "read" in measured:
            title += f": {measured['read_as_their_caption']:.1%} read as their caption"
        path = self.out / f"samples-guidance-{guidance}.png"
        heading = "real, held out" if all(held_out) else "real"
        save_figure(plot_samples(rows, title, real_heading=heading), path)

    def real_pictures(self, label: int, count: int = 3) -> tuple[torch.Tensor, bool]:
        """Codes of real pictures of a caption, held-out ones where there are any; whether so."""
        for part in (self.held_out_codes, self.train_codes):
            if (mine := np.flatnonzero(part.labels == label)).size:
                return part.codes[torch.from_numpy(mine[:count])], part is self.held_out_codes
        raise AssertionError("every asked caption has a training picture")

    def run(self) -> dict[str, Any]:
        _ = self.asked, self.blocks  # refuses what cannot work before anything long
        self.tokenize()
        self.taught = self.teach()
        self.measure(self.taught)
        self.draw()
        report = self.write_results()
        summarize(report, self.out)
        return report


def on_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}


def check_model(settings: Settings) -> None:
    """Before the pictures are tokenized, whether the model can be taught."""
    coupled = {"gromov_wasserstein", "permuted"} & {settings.init, settings.lora_init}
    if coupled and find_spec("ot") is None:
        raise ValueError("this --init needs POT: pip install 'modality-moe-kernels[ot]'")
    require_experts(settings.model)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="local folder or hub id")
    group = parser.add_argument_group("pictures").add_argument
    group("--data", default="digits", help="digits, emoji, or a folder; default: %(default)s")
    group("--emoji-folder", help="the unpacked npm package emoji-datasource-twitter")
    group("--emoji-categories", nargs="+", default=[], metavar="NAME", help="default: all")
    group("--image-size", type=int, default=32, help="not for digits; default: %(default)s")
    group("--held-out", type=int, default=200, help="pictures; default: %(default)s")
    group(
        "--tokenizer", default="patch",
        help="patch (k-means over patches), vq (a VQ-VAE), or the folder of a fitted one",
    )  # fmt: skip
    group("--num-codes", type=int, default=256, help="default: %(default)s")
    group("--patch-size", type=int, default=4, help="pixels a token; default: %(default)s")
    group("--vq-steps", type=int, default=5000, help="default: %(default)s")
    group("--vq-lr", type=float, default=4e-3, help="default: %(default)s")
    group = parser.add_argument_group("adapters").add_argument
    group("--r", type=int, default=16, help="rank; default: %(default)s")
    group("--lora-alpha", type=float, help="default: twice the rank")
    group(
        "--target-modules", nargs="+", default=["experts", "attention"], choices=TARGET_MODULES,
        help="default: experts attention",
    )  # fmt: skip
    group("--shared-A", action="store_true", help="one A for all experts of a layer")
    group("--init", choices=ROW_INITS, default="normal", help="of the added rows")
    group("--lora-init", choices=LORA_INITS, default="zero", help="of the adapters")
    group = parser.add_argument_group("training").add_argument
    group("--steps", type=int, default=1000, help="default: %(default)s")
    group("--batch", type=int, default=16, help="default: %(default)s")
    group("--gradient-accumulation", type=int, default=1, metavar="N")
    group("--gradient-checkpointing", action="store_true", help="less memory, a third slower")
    group("--lr", type=float, default=1e-3, help="default: %(default)s")
    group("--caption-dropout", type=float, default=0.1, help="default: %(default)s")
    group = parser.add_argument_group("what is measured").add_argument
    group("--text", metavar="FILE", help="held-out text; default: Python's documentation")
    group("--text-tokens", type=int, default=2048, help="default: %(default)s")
    group("--text-block", type=int, default=128, help="default: %(default)s")
    group("--captions", nargs="+", default=[], help="to draw; default: ten of the pictures'")
    group("--samples-per-caption", type=int, default=6, metavar="N")
    group("--guidance", type=float, nargs="+", default=[1.0, 3.0], help="default: 1 3")
    group("--temperature", type=float, default=1.0, help="default: %(default)s")
    add_run_options(parser, out=Path("out/text_to_image"))
    return parser


def check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    counts = (
        "image_size", "held_out", "num_codes", "patch_size", "vq_steps", "r", "steps", "batch",
        "gradient_accumulation", "text_tokens", "samples_per_caption",
    )  # fmt: skip
    for name in counts:
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("lr", "vq_lr", "temperature"):
        if not 0 < getattr(given, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if given.text_block < 2:
        parser.error("--text-block must be at least 2")
    if not all(0 <= scale < math.inf for scale in given.guidance):
        parser.error("--guidance must be at least 0; 1 is none")
    if not 0 <= given.caption_dropout <= 1:
        parser.error("--caption-dropout must lie in 0..1")
    if any(scale != 1 for scale in given.guidance) and given.caption_dropout == 0:
        parser.error("--guidance other than 1 needs a model trained with --caption-dropout above 0")
    if given.data == "emoji" and given.emoji_folder is None:
        parser.error("--data emoji needs --emoji-folder: the npm package emoji-datasource-twitter")
    if given.text and not Path(given.text).is_file():
        parser.error(f"--text: {given.text} is not a file")
    size = 28 if given.data == "digits" else given.image_size
    if given.tokenizer in ("patch", "vq") and size % given.patch_size:
        parser.error(f"--patch-size {given.patch_size} does not divide pictures of {size}")


def parse(arguments: list[str] | None) -> tuple[Settings, Path]:
    parser = make_parser()
    given = parser.parse_args(arguments)
    check(parser, given)
    settle_device(parser, given)
    if given.lora_alpha is None:
        given.lora_alpha = 2 * given.r
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(Settings)}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Settings(**values | lists), given.out


def main(arguments: list[str] | None = None) -> int:
    settings, out = parse(arguments)

    def work() -> None:
        check_model(settings)
        Program(settings, out).run()

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
