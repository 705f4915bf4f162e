"""Teach a text model to draw: options and stages of `train_text_to_image` and `demo`."""

from __future__ import annotations

import time
from dataclasses import MISSING, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels import ModalityLoraConfig, extras, imaging
from moe_kernels.imaging.generation import check_positions
from moe_kernels.models import initialise_lora
from moe_kernels.programs.shared import pictures
from moe_kernels.programs.shared.cli import Options, console, option
from moe_kernels.programs.shared.coloured_digits import COUNT, SMALLEST, coloured_digits
from moe_kernels.programs.shared.files import read_json, write_json
from moe_kernels.programs.shared.film import Film
from moe_kernels.programs.shared.models import load_causal_lm, load_tokenizer, require_experts
from moe_kernels.programs.shared.options import ModelOptions, TextOptions, out_folder
from moe_kernels.programs.shared.pictures import CaptionedPictures, TokenizedPictures, spread
from moe_kernels.programs.shared.stages import Stages, StageSetup, Workspace, digest, model_identity
from moe_kernels.programs.shared.text_to_image import (
    Judge,
    Painter,
    measure_model,
)
from moe_kernels.programs.shared.training import mean_nll, train

ROW_INITS = ("normal", "gaussian", "mean", "gromov_wasserstein", "permuted")
TARGET_MODULES = ("experts", "attention", "router")
LORA_INITS = ("zero", "gromov_wasserstein", "permuted")
COUPLED_INITS = ("gromov_wasserstein", "permuted")  # computed by POT
_CAPTIONS = 10  # that are drawn where none is asked for
_FILM_CAPTIONS = 12
_INIT_ROWS = 16  # texts and pictures that a Gromov-Wasserstein start of the adapters sees


# --- options


@dataclass(kw_only=True)
class PictureOptions(Options):
    """Pictures."""

    data: str = option("digits", "digits, coloured-digits, emoji, or a folder of pictures")
    emoji_folder: str | None = option(None, "unpacked npm package emoji-datasource-twitter")
    emoji_categories: list[str] = option([], "categories of emoji; default: all", metavar="NAME")
    image_size: int = option(32, "pixels of a side; digits have 28", at_least=1, at_most=4096)
    held_out: int = option(200, "pictures to hold out", at_least=1)
    held_out_names: list[str] = option(
        [], "captions to hold out, with all their pictures", metavar="NAME"
    )
    held_out_random_names: int = option(
        0, "captions to hold out in the same way, drawn by --seed", at_least=0, metavar="N"
    )
    images: int | None = option(
        None, "pictures to use, with those of --held-out, without those of held-out captions; "
        f"default: all, of coloured digits {COUNT:,}", at_least=2, metavar="N",
    )  # fmt: skip

    def load_pictures(self) -> tuple[CaptionedPictures, CaptionedPictures]:
        """Return the pictures for training, and the held-out ones."""
        if self.data == "coloured-digits":
            count = (self.images or COUNT) - self.held_out
            return coloured_digits(self.image_size, count, self.held_out, self.seed)
        if self.data == "digits":
            loaded = pictures.digits()
        elif self.data == "emoji":
            categories = self.emoji_categories or None
            loaded = pictures.emoji(Path(self.emoji_folder), self.image_size, categories)
        else:
            loaded = pictures.folder(Path(self.data), self.image_size)
        if not self.names_held_out:
            return self._split(loaded)
        rest, apart = loaded.hold_out_names(
            self.held_out_names, self.held_out_random_names, self.seed
        )
        train, held_out = self._split(rest)
        return train, held_out.join(apart, self.seed)

    @property
    def names_held_out(self) -> bool:
        return bool(self.held_out_names or self.held_out_random_names)

    def _split(self, loaded: CaptionedPictures) -> tuple[CaptionedPictures, CaptionedPictures]:
        count = len(loaded.rows_of_pictures)
        if self.images and self.images < count:
            loaded, _ = loaded.split(count - self.images, self.seed)
        return loaded.split(self.held_out, self.seed)


@dataclass(kw_only=True)
class TokenizerOptions(Options):
    """Image tokenizer."""

    tokenizer: str = option(
        "patch", "patch (k-means over patches), vq (a VQ-VAE), or the folder of a fitted one"
    )
    num_codes: int = option(256, "codes of the codebook", at_least=1, at_most=2**20)
    patch_size: int = option(4, "pixels of a token's side", at_least=1)
    vq_steps: int = option(5000, "training steps of a VQ-VAE", at_least=1)
    vq_lr: float = option(4e-3, "learning rate of a VQ-VAE", above=0)


@dataclass(kw_only=True)
class AdapterOptions(Options):
    """Adapters."""

    r: int = option(16, "rank of the updates", at_least=1)
    lora_alpha: float | None = option(
        None, "scale of the updates; default: twice the rank", at_least=0, at_most=1e9
    )
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
    rows_lr: float | None = option(None, "learning rate of the added rows; default: --lr", above=0)
    caption_dropout: float = option(0.1, "share of captions left empty, for guidance")


@dataclass(kw_only=True)
class FilmOptions(Options):
    """Film of the training."""

    film_every: int = option(0, "steps from frame to frame; 0: no film", at_least=0, metavar="N")
    film_guidance: float = option(1.0, "scale of guidance in the film", at_least=0)


@dataclass(kw_only=True)
class DrawingOptions(Options):
    """Drawing."""

    captions: list[str] = option(
        [], "captions to draw; default: ten of training; or the held-out ones and as many of them"
    )
    samples_per_caption: int = option(
        6, "drawings of each caption", at_least=1, at_most=10_000, metavar="N"
    )
    guidance: list[float] = option([1.0, 3.0], "scales of guidance; 1 is none", at_least=0)
    temperature: float = option(1.0, "temperature of sampling", above=0)


@dataclass(kw_only=True)
class TextToImageOptions(
    PictureOptions, TokenizerOptions, AdapterOptions, TeachingOptions, FilmOptions, TextOptions,
    DrawingOptions, ModelOptions,
):  # fmt: skip
    """Model."""

    model: str = option(MISSING, "local folder or hub id of a Mixture of Experts", positional=True)
    out: Path = out_folder("text_to_image")
    # Batches of measurements; None: as in training.
    text_batch: int = 4
    image_batch: int | None = None
    drawing_batch: int | None = None
    curve_pictures: int = 64  # held-out pictures for the curve; the report has the loss of all

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lora_alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha
        self.image_batch = self.image_batch or self.batch
        self.drawing_batch = self.drawing_batch or self.batch
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError("--caption-dropout must lie in 0..1")
        guided = any(scale != 1 for scale in (*self.guidance, self.film_guidance))
        if guided and self.caption_dropout == 0:
            raise ValueError(
                "--guidance and --film-guidance other than 1 need a model trained with "
                "--caption-dropout above 0"
            )
        if self.data == "emoji" and self.emoji_folder is None:
            raise ValueError(
                "--data emoji needs --emoji-folder: the npm package emoji-datasource-twitter"
            )
        if self.data == "coloured-digits" and self.image_size < SMALLEST:
            raise ValueError(f"--data coloured-digits needs --image-size {SMALLEST} or more")
        if self.data == "coloured-digits" and self.names_held_out:
            raise ValueError(
                "--data coloured-digits holds out a tenth of its captions by itself: leave out "
                "--held-out-names and --held-out-random-names"
            )
        size = 28 if self.data == "digits" else self.image_size
        if self.tokenizer in ("patch", "vq") and size % self.patch_size:
            raise ValueError(f"--patch-size {self.patch_size} does not divide pictures of {size}")


# --- what the stages use


@dataclass
class Setup(StageSetup):
    """Options, finished stages, pictures and text of a run.

    blocks: (blocks, block) token ids of held-out text
    labels: numbers of the captions to draw
    """

    options: TextToImageOptions
    stages: Stages
    train: CaptionedPictures
    held_out: CaptionedPictures
    tokenizer: PreTrainedTokenizerBase
    blocks: torch.Tensor
    labels: list[int]

    @classmethod
    def load(cls, options: TextToImageOptions, stages: Stages) -> Setup:
        """Load everything but models.

        Raises:
            ValueError: the model cannot be taught, no picture has a caption that is to be drawn,
                or the text is too short.
            ImportError: a start needs a package that is not installed.
        """
        if {options.init, options.lora_init} & set(COUPLED_INITS):
            extras.load("ot", "this --init")
        require_experts(options.model)
        train, held_out = options.load_pictures()
        train.print_set_aside()
        if again := train.listed_again + held_out.listed_again:
            console.print(
                f"{again} pictures are listed more than once: all rows of such a picture are "
                "trained on, or all are held out"
            )
        labels = choose_labels(train, options.captions)
        tokenizer = load_tokenizer(options.model)
        blocks = options.text_blocks(tokenizer)
        return cls(options, stages, train, held_out, tokenizer, blocks, labels)

    @property
    def asked(self) -> torch.Tensor:
        """(N,) numbers of the captions of all drawings, those of one caption together."""
        return torch.tensor(self.labels).repeat_interleave(self.options.samples_per_caption)

    @cached_property
    def tokens(self) -> PictureTokens:
        """The fitted image tokenizer, and the encoded pictures."""
        tokenizer = imaging.load_image_tokenizer(self.folder("tokenize") / "image_tokenizer")
        parts = (TokenizedPictures.encode(tokenizer, part) for part in (self.train, self.held_out))
        return PictureTokens(tokenizer, *parts)

    @cached_property
    def painter(self) -> Painter:
        """The model with the trained adapter."""
        painter = patch(self, self.load_base())
        painter.patched.load_adapter(self.folder("teach") / "adapter")
        return painter

    def load_base(self) -> PreTrainedModel:
        return load_causal_lm(self.options.model, self.options.dtype, self.options.device)


def choose_labels(train: CaptionedPictures, captions: list[str]) -> list[int]:
    """Return the numbers of the captions to draw.

    Without captions these are ten that the pictures have; or, where captions are held out, those
    and as many that the pictures have.
    """
    if unknown := [caption for caption in captions if caption not in train.names]:
        raise ValueError(
            f"no picture has the caption {unknown[0]!r}; "
            "moe-kernels generate-images draws any caption"
        )
    if captions:
        return [train.names.index(caption) for caption in captions]
    present = train.present
    count = min(len(train.unseen) or _CAPTIONS, len(present))
    return [*spread(present.tolist(), count), *train.unseen]


def film_labels(train: CaptionedPictures) -> list[int]:
    """Return the numbers of the captions of a film, whatever captions are drawn at the end."""
    return spread(choose_labels(train, []), _FILM_CAPTIONS)


@dataclass(frozen=True)
class PictureTokens:
    """The image tokenizer, and the encoded pictures."""

    tokenizer: imaging.ImageTokenizer
    train: TokenizedPictures
    held_out: TokenizedPictures

    @property
    def captions(self) -> tuple[str, ...]:
        return self.train.pictures.names


# --- the image tokenizer


def tokenizer_inputs(setup: Setup) -> dict[str, Any]:
    options = setup.options
    inputs = options.pick("seed", "tokenizer", "num_codes", "patch_size")
    if options.tokenizer == "vq":
        inputs |= options.pick("vq_steps", "vq_lr")
    elif options.tokenizer != "patch":
        inputs["tokenizer"] = model_identity(options.tokenizer)
    parts = {"train": setup.train, "held_out": setup.held_out}
    digests = {name: digest(part.images, part.labels) for name, part in parts.items()}
    return inputs | digests | {"captions": setup.train.names}


def tokenize(setup: Setup, workspace: Workspace) -> dict[str, Any]:
    """Fit the image tokenizer, or copy a fitted one."""
    try:
        tokenizer = fit_tokenizer(setup.options, setup.train.images)
    except imaging.FittingError as error:
        kept = setup.options.out / "image_tokenizer-last-good"
        error.last_good.save(kept)
        message = f"{error}; the last good one is in {kept} (--tokenizer); or lower --vq-lr"
        raise FloatingPointError(message) from error
    tokenizer.save(workspace.folder / "image_tokenizer")
    usage = tokenizer.codebook_usage(tokenizer.encode(setup.train.images))
    # Fitting warns by itself, but a tokenizer fitted elsewhere has not seen these pictures.
    imaging.warn_if_collapsed(usage)
    return {
        "codes": tokenizer.num_codes,
        "codes_used": int((usage > 0).sum()),
        "tokens_per_image": tokenizer.tokens_per_image,
        "held_out_mean_squared_error": tokenizer.reconstruction_error(setup.held_out.images),
    }


def fit_tokenizer(options: TextToImageOptions, images: np.ndarray) -> imaging.ImageTokenizer:
    common = options.pick("num_codes", "seed")
    if options.tokenizer == "patch":
        return imaging.PatchTokenizer.fit(images, patch_size=options.patch_size, **common)
    if options.tokenizer == "vq":
        return imaging.VQTokenizer.fit(
            images, downsample=options.patch_size, steps=options.vq_steps, lr=options.vq_lr,
            device=options.device, progress=True, **common,
        )  # fmt: skip
    return imaging.load_image_tokenizer(options.tokenizer)


# --- teaching


def patch(setup: Setup, model: PreTrainedModel) -> Painter:
    """Patch the model, add the image tokens, and initialise both by the options."""
    options, tokens, init = setup.options, setup.tokens, {"init": setup.options.init}
    if options.init in COUPLED_INITS:
        usage = tokens.tokenizer.codebook_usage(tokens.train.codes)
        init |= {
            "features": tokens.tokenizer.codebook, "num_delimiters": 2, "frequencies": usage
        }  # fmt: skip
    config = ModalityLoraConfig(
        target_modules=tuple(options.target_modules),
        **options.pick("r", "lora_alpha", "backend", "shared_A"),
    )
    painter = Painter.create(
        model, setup.tokenizer, config, tokens.tokenizer.num_codes, tokens.captions,
        seed=options.seed, **init,
    )  # fmt: skip
    if options.lora_init != "zero":
        rows = [{"input_ids": ids} for ids in setup.blocks[:_INIT_ROWS].split(4)]
        rows += painter.batches(tokens.train.head(_INIT_ROWS), 4)
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
    if options.film_every:
        inputs |= options.of(FilmOptions) | {"film_labels": film_labels(setup.train)}
    return inputs | ({} if options.lora_init == "zero" else {"text": digest(setup.blocks)})


def check_length(painter: Painter, tokens: PictureTokens) -> None:
    """Raise unless the model has positions for a whole picture with the longest caption."""
    longest = max(map(len, painter.caption_ids))
    check_positions(painter.model, longest + tokens.tokenizer.tokens_per_image + 2)


def teach(setup: Setup, workspace: Workspace) -> dict[str, Any]:
    """Train the adapters and the added rows on captioned pictures."""
    options, tokens = setup.options, setup.tokens
    painter = patch(setup, setup.load_base())
    check_length(painter, tokens)
    _train_fast(painter)
    held_out = painter.batches(tokens.held_out.head(options.curve_pictures), options.image_batch)
    if options.gradient_checkpointing:
        painter.model.gradient_checkpointing_enable()
    labels = film_labels(setup.train)
    film = Film(
        options.film_every, workspace.folder / "film",
        lambda: draw_codes(setup, painter, labels, options.film_guidance, temperature=1.0),
    )  # fmt: skip
    history = train(
        painter.patched, painter.dataset(tokens.train, options.caption_dropout, options.seed),
        lambda model: mean_nll(model, held_out), workspace, collator=painter.collator,
        max_steps=options.steps, per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.gradient_accumulation, learning_rate=options.lr,
        warmup_steps=options.steps // 20, seed=options.seed, use_cpu=options.device == "cpu",
        rows_lr=options.rows_lr, callbacks=[film] if options.film_every else [],
    )  # fmt: skip
    painter.patched.save_adapter(workspace.folder / "adapter")
    caption = np.mean([len(ids) for ids in painter.caption_ids])
    length = caption + tokens.train.codes.shape[1] + 2
    return {"history": history, "tokens_per_second": history["samples_per_second"] * length}


def _train_fast(painter: Painter) -> None:
    """Leave out logits that only the loss reads, and the CPU's slow attention.

    On the CPU the backward pass of torch's attention takes a fifth of a step with sequences as
    short as these; the "eager" one takes a few hundredths.
    """
    painter.patched.fused_loss = True
    if painter.model.device.type == "cpu":
        painter.model.set_attn_implementation("eager")


# --- measuring


def measure(setup: Setup, workspace: Workspace) -> dict[str, Any]:
    """Compare text bit by bit, and the loss of held-out pictures."""
    setup.painter, measured = measure_model(
        setup.load_base(), lambda model: patch(setup, model), setup.folder("teach") / "adapter",
        setup.blocks, setup.tokens.held_out, setup.train.present,
        **setup.options.pick("text_batch", "image_batch"),
    )  # fmt: skip
    return measured


def draw(setup: Setup, workspace: Workspace) -> dict[str, Any]:
    """Draw each caption at each guidance; a guidance that was finished earlier is kept."""
    workspace.checkpoints.mkdir(exist_ok=True)
    drawn = {}
    for scale in setup.options.guidance:
        file = workspace.checkpoints / f"guidance-{scale:g}.json"
        if not file.exists():
            started = time.perf_counter()
            codes = draw_codes(
                setup, setup.painter, setup.asked.tolist(), scale, setup.options.temperature
            ).tolist()
            seconds = time.perf_counter() - started
            write_json(file, {"codes": codes, "seconds": seconds}, indent=None)
        drawn[f"{scale:g}"] = read_json(file)
    tokens = len(setup.asked) * setup.tokens.tokenizer.tokens_per_image * len(drawn)
    return {
        "codes": {scale: each["codes"] for scale, each in drawn.items()},
        "tokens_per_second": tokens / sum(each["seconds"] for each in drawn.values()),
    }


def judge(setup: Setup, workspace: Workspace) -> dict[str, Any]:
    """Measure the drawings of each guidance, and how well the reader reads real pictures."""
    tokens = setup.tokens
    judge = Judge(tokens.train, tokens.held_out, tokens.tokenizer, setup.options.seed)
    return {
        "reader": judge.describe_reader(),
        "samples": {
            scale: judge.measure(torch.tensor(codes), setup.asked)
            for scale, codes in setup.results["draw"]["codes"].items()
        },
    }


def draw_codes(
    setup: Setup, painter: Painter, labels: list[int], guidance: float, temperature: float
) -> torch.Tensor:
    """Return (N, tokens) codes: a drawing for each caption's number."""
    options = setup.options
    return imaging.generate_image_codes(
        painter.model, [painter.caption_ids[label] for label in labels], painter.vocabulary,
        setup.tokens.tokenizer.tokens_per_image, guidance_scale=guidance,
        pad_token_id=painter.collator.pad_token_id, empty_caption=painter.empty_caption,
        temperature=temperature, batch_size=options.drawing_batch, seed=options.seed,
        progress=True,
    )  # fmt: skip


# --- all stages


def run_stages(setup: Setup) -> None:
    """Run every stage, keyed by what its result depends on."""
    options = setup.options
    batches = options.pick("text_batch", "image_batch")
    drawing = options.of(DrawingOptions) | options.pick("drawing_batch")
    setup.run("tokenize", tokenize, tokenizer_inputs(setup))
    setup.run("teach", teach, adapter_inputs(setup), after="tokenize")
    setup.run("measure", measure, batches | {"text": digest(setup.blocks)}, after="teach")
    setup.run("draw", draw, drawing, after="teach")
    setup.run("judge", judge, options.pick("seed"), after="draw")
