"""Runs of the redundancy study: what each trains, on what, and how it is measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels import ModalityLoraConfig, imaging
from moe_kernels.conversion import dense_to_moe, heal
from moe_kernels.models.tokens import ROWS
from moe_kernels.moextend import ExpertExtender
from moe_kernels.programs.shared.models import load_causal_lm
from moe_kernels.programs.shared.pictures import (
    CaptionedPictures,
    TokenizedPictures,
    digits,
    emoji,
)
from moe_kernels.programs.shared.stages import Stages, Workspace
from moe_kernels.programs.shared.text_model import TextModelSettings, load_text_model, pretrain
from moe_kernels.programs.shared.text_to_image import (
    Painter,
    compare_text,
    text_logits,
)
from moe_kernels.programs.shared.texts import documentation, text_blocks
from moe_kernels.programs.shared.training import mean_nll, train
from studies.adapters import draw_codes, look, restart_rows, row_start, start_adapters
from studies.pictures import PictureSplits
from studies.sweep import record_training, training_arguments

TEXT_BATCH, IMAGE_BATCH = 32, 100
SCORING_STEPS = 8
GUIDANCE = (1.0, 2.0, 4.0, 8.0)
# Starts are compared by the steps until the mean of the last WINDOW training losses, in nats a
# token, is at most this.
FIXED_LOSS, WINDOW = {"digits": 1.3, "emoji": 2.5}, 20


@dataclass(frozen=True)
class Run:
    """Settings of one training.

    base: "olmoe"; "ExK", the dense parent as E experts of which K serve a token, healed; or "real",
        a pretrained Mixture of Experts
    data: "digits" or "emoji"
    method: "plora" (low-rank updates on image tokens), "all_tokens" (the same on every token),
        "full" (everything trains), "rows" (added rows alone), "copy" (a feed-forward network for
        image tokens beside each layer's experts, started from their first neurons),
        "added_experts" (MoExtend's: whole experts that image tokens alone may choose)
    init_where: added rows that start by ``init``: "both", "embedding" or "head"; others start as
        "normal"
    copy_neurons: width of the copy
    added_experts: number of added experts by layer
    pictures: number of pictures to learn from; None: all
    steps: None: the budget's
    lr: None: the tuned one
    dtype: data type of a "real" base
    """

    base: str = "olmoe"
    data: str = "digits"
    method: str = "plora"
    targets: tuple[str, ...] = ("experts", "attention")
    r: int = 16
    layers: tuple[int, ...] | None = None
    init: str = "normal"
    init_where: str = "both"
    solver: str = "semirelaxed"
    feature_metric: str = "euclidean"
    row_metric: str = "cosine"
    lora_init: str = "zero"
    copy_neurons: int = 0
    added_experts: tuple[int, ...] = ()
    pictures: int | None = None
    steps: int | None = None
    lr: float | None = None
    dtype: str = "bfloat16"
    samples: bool = False
    look: bool = False

    @property
    def trains(self) -> str:
        """Name of the learning rate that runs share."""
        method = self.method.replace("_", " ")
        return f"{method}, {' and '.join(self.targets)}" if method == "plora" else method


@dataclass(frozen=True)
class OwnRateRun(Run):
    """Run whose added rows have their own rate: the best that was tried for rows alone."""

    row_lr: float = 2e-2

    @property
    def trains(self) -> str:
        return f"{super().trains}; rows at {self.row_lr:g}"


@dataclass(frozen=True)
class Budget:
    """Sizes and lengths that all runs of a sweep share."""

    text: TextModelSettings = TextModelSettings()
    dense_neurons: int = 1024
    heal_steps: int = 150
    images: int = 5000
    held_out: int = 600
    digit_codes: int = 64
    emoji_codes: int = 256
    emoji_size: int = 32
    steps: int = 200
    batch: int = 16
    text_blocks: int = 64
    real_batch: int = 8
    real_pictures: int = 96
    real_text_blocks: int = 8
    samples_per_caption: int = 10


class Pictures(PictureSplits):
    """A part of a data set, of which the budget says how large it is."""

    patch_size = 4

    def __init__(self, pictures: CaptionedPictures, budget: Budget, num_codes: int, seed: int):
        self.pictures, self.budget = pictures, budget
        self.num_codes, self.seed = num_codes, seed

    def split(self) -> tuple[CaptionedPictures, CaptionedPictures, CaptionedPictures]:
        learnt, rest = self.pictures.split(self.budget.held_out, self.seed)
        choice, test = rest.split(self.budget.held_out // 2, self.seed)
        if self.budget.images < len(learnt):
            _, learnt = learnt.split(self.budget.images, self.seed)
        return learnt, choice, test


class Setup:
    """Text models and pictures that all runs of a seed share.

    real, emoji: folders of a pretrained Mixture of Experts and of emoji; None: there are none
    """

    def __init__(
        self, budget: Budget, seed: int, stages: Stages, real: Path | None, emoji: Path | None
    ):
        self.budget, self.seed, self.stages = budget, seed, stages
        self.real, self.emoji = real, emoji
        self.text_settings = dataclasses.replace(budget.text, seed=seed)

    def data(self, name: str) -> PictureSplits:
        return self._digits if name == "digits" else self._emoji

    @cached_property
    def _digits(self) -> PictureSplits:
        return Pictures(digits(), self.budget, self.budget.digit_codes, self.seed)

    @cached_property
    def _emoji(self) -> PictureSplits:
        pictures = emoji(self.emoji, self.budget.emoji_size)
        return Pictures(pictures, self.budget, self.budget.emoji_codes, self.seed)

    # --- text

    def _pretrained(self, settings: TextModelSettings, name: str) -> Path:
        return self.stages.run(
            f"{name}-{self.seed}", dataclasses.asdict(settings),
            lambda workspace: pretrain(settings, workspace),
        ).folder  # fmt: skip

    def _converted(self, name: str) -> Path:
        experts, top_k = map(int, name.split("x"))
        settings = dataclasses.replace(
            self.text_settings, experts=0, intermediate_size=self.budget.dense_neurons
        )
        parent = self._pretrained(settings, "dense")

        def build(workspace: Workspace) -> dict[str, Any]:
            dense, tokenizer = load_text_model(parent, settings.device)
            blocks = text_blocks(tokenizer, documentation()["train"], 128, 128)
            generator = torch.Generator().manual_seed(self.seed)
            batches = blocks[torch.randperm(len(blocks), generator=generator)].split(8)
            moe = dense_to_moe(
                dense, experts, top_k, "clustered", calibration=batches[:2], seed=self.seed
            )
            if top_k < experts:
                heal(
                    moe, dense, batches, steps=self.budget.heal_steps, train="router+experts",
                    lr=1e-3, seed=self.seed,
                )  # fmt: skip
            moe.save_pretrained(workspace.folder / "model")
            tokenizer.save_pretrained(workspace.folder / "model")
            return {}

        inputs = dataclasses.asdict(settings) | {"heal": self.budget.heal_steps}
        return self.stages.run(f"{name}-{self.seed}", inputs, build).folder

    def folder(self, base: str) -> Path:
        """Return the folder of a base, which is trained or converted if need be."""
        is_olmoe = base == "olmoe"
        return self._pretrained(self.text_settings, base) if is_olmoe else self._converted(base)

    def load(self, run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if run.base == "real":
            tokenizer = AutoTokenizer.from_pretrained(self.real)
            return load_causal_lm(self.real, run.dtype, "cpu"), tokenizer
        return load_text_model(self.folder(run.base), "cpu")

    def blocks(self, tokenizer: PreTrainedTokenizerBase, base: str) -> torch.Tensor:
        """Return held-out text; a real base reads less, as its logits are forty times as many."""
        count = self.budget.real_text_blocks if base == "real" else self.budget.text_blocks
        return text_blocks(tokenizer, documentation()["test"], 128, 128)[:count]


# --- one run


class FeedForwardCopy(nn.Module):
    """A gated feed-forward network for image tokens, beside a layer's frozen experts.

    It starts from the first neurons of the first experts, with its output weights at zero, so that
    training starts at the base model as LoRA's does.
    """

    def __init__(self, experts: nn.Module, neurons: int):
        super().__init__()
        gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
        self.gate = nn.Parameter(gate.flatten(0, 1)[:neurons].clone())
        self.up = nn.Parameter(up.flatten(0, 1)[:neurons].clone())
        self.down = nn.Parameter(torch.zeros(gate.shape[-1], len(self.gate)))
        self.is_image: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = F.silu(F.linear(hidden_states, self.gate)) * F.linear(hidden_states, self.up)
        update = F.linear(inner, self.down)
        return torch.where(self.is_image[..., None], update, 0)


def attach_copies(model: PreTrainedModel, neurons: int, first_image_id: int) -> None:
    """Give each layer a feed-forward network that every later forward applies to image tokens."""
    copies = []
    for layer in model.model.layers:
        layer.mlp.image_copy = copy = FeedForwardCopy(layer.mlp.experts, neurons)
        copies.append(copy)
        layer.mlp.register_forward_hook(
            lambda module, args, output: output + module.image_copy(args[0])
        )

    def tell(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        for copy in copies:
            copy.is_image = ids >= first_image_id

    model.register_forward_pre_hook(tell, with_kwargs=True)


def prepare(setup: Setup, run: Run, model: PreTrainedModel, tokenizer) -> Painter:
    """Add image tokens to the model, and make trainable what the method trains."""
    data = setup.data(run.data)
    captions, num_codes = data.train.pictures.names, data.num_codes
    if run.method == "full":
        torch.manual_seed(setup.seed)
        first = model.config.vocab_size
        size = imaging.ImageVocabulary.size(num_codes)
        model.requires_grad_(True).resize_token_embeddings(first + size)
        return Painter(model, tokenizer, range(first, first + size), captions)
    config = ModalityLoraConfig(
        r=run.r, lora_alpha=2 * run.r, target_modules=run.targets, layers_to_transform=run.layers
    )
    painter = Painter.create(
        model, tokenizer, config, num_codes, captions, seed=setup.seed,
        **row_start(run, data.tokenizer, data.train),
    )  # fmt: skip
    if run.init_where != "both":
        other = "head" if run.init_where == "embedding" else "embedding"
        restart_rows(model, other, setup.seed)
    if run.method == "all_tokens":
        painter.patched.modality_of = torch.ones_like  # text too is the modality
    if run.method in ("rows", "copy", "added_experts"):
        for name, parameter in painter.patched.named_trainable_parameters():
            parameter.requires_grad_("modality_lora" not in name)
    if run.method == "copy":
        attach_copies(model, run.copy_neurons, painter.vocabulary.first_id)
    if run.method == "added_experts":
        add_experts(model, run.added_experts, painter.batches(data.train.head(64), 16), setup.seed)
    if run.lora_init != "zero":
        blocks = setup.blocks(tokenizer, run.base)
        start_adapters(painter, blocks, data.train, run.lora_init, setup.seed)
    return painter


def add_experts(
    model: PreTrainedModel, numbers: tuple[int, ...], batches: list[dict[str, torch.Tensor]],
    seed: int,
) -> None:  # fmt: skip
    extender = ExpertExtender(model)
    extender.score_layers(batches, SCORING_STEPS, progress=False)
    extender.extend(experts_per_layer=dict(enumerate(numbers)), seed=seed)


def held_out(data: PictureSplits, run: Run) -> tuple[TokenizedPictures, TokenizedPictures]:
    """Return pictures to choose by and to report; fewer for a real base, which is slow."""
    if run.base != "real":
        return data.choice, data.test
    return data.choice.head(data.budget.batch), data.test.head(data.budget.real_pictures)


def optimizer_of(model: PreTrainedModel, run: Run, lr: float) -> torch.optim.Optimizer | None:
    """Return an optimizer with two learning rates for a run that has them, else None."""
    if not isinstance(run, OwnRateRun):
        return None
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rows = [parameter for name, parameter in trained if ROWS in name]
    others = [parameter for name, parameter in trained if ROWS not in name]
    groups = [{"params": rows, "lr": run.row_lr}, {"params": others, "lr": lr}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)


def measure_run(setup: Setup, run: Run, lr: float, workspace: Workspace) -> dict[str, Any]:
    budget, data = setup.budget, setup.data(run.data)
    model, tokenizer = setup.load(run)
    blocks = setup.blocks(tokenizer, run.base)
    logits = partial(text_logits, model, blocks, model.config.vocab_size, TEXT_BATCH)
    unpatched = logits()
    painter = prepare(setup, run, model, tokenizer)
    before = logits()
    look_now = partial(
        look, painter, blocks, data.test.head(100), text_batch=TEXT_BATCH, image_batch=IMAGE_BATCH,
        seed=data.seed,
    )  # fmt: skip
    result = {"look_before": look_now()} if run.look else {}
    learnt = data.train if run.pictures is None else data.train.head(run.pictures)
    choice, test = (painter.batches(part, IMAGE_BATCH) for part in held_out(data, run))
    steps = run.steps or budget.steps
    batch = budget.real_batch if run.base == "real" else budget.batch
    # The copy is no part of an adapter, and its checkpoints hold the whole model.
    trained = model if run.method == "copy" else painter.patched or model
    history = train(
        trained, painter.dataset(learnt, caption_dropout=0.1),
        lambda model: mean_nll(model, choice[:1]), workspace,
        collator=painter.collator, optimizer=optimizer_of(model, run, lr),
        **training_arguments(steps, batch, lr, warmup_steps=steps // 20, seed=setup.seed),
    )  # fmt: skip
    model.eval()
    result |= record_training(model, history) | {
        "largest_gradient_norm": max(norm for _, norm in history["grad_norm"]),
        "choice_nll": mean_nll(model, choice),
        "test_nll": mean_nll(model, test),
        "text": compare_text(unpatched, before, logits(), blocks),
    }
    if run.samples:
        result["samples"] = draw(data, painter)
    if run.look:
        result["look_after"] = look_now()
        result["gallery"] = gallery(data, painter)
    return result


def draw_each(data: PictureSplits, painter: Painter, each: int, guidance: float) -> torch.Tensor:
    """Draw ``each`` pictures of every caption, as codes."""
    labels = [label for label in range(len(painter.caption_ids)) for _ in range(each)]
    return draw_codes(
        painter, labels, data.tokenizer.tokens_per_image, guidance, batch=IMAGE_BATCH,
        seed=data.seed,
    )  # fmt: skip


def gallery(data: PictureSplits, painter: Painter) -> dict[str, Any]:
    """Draw two pictures a caption at each guidance, beside the nearest training pictures."""
    judge, real = data.judge, data.train.codes
    drawn = {}
    for guidance in GUIDANCE:
        codes = draw_each(data, painter, 2, guidance)
        nearest = real[imaging.nearest_indices(judge.decode(codes), judge.real)]
        read = judge.reader.read(codes).tolist()
        drawn[f"{guidance:g}"] = {
            "codes": codes.tolist(),
            "nearest": nearest.tolist(),
            "read": read,
        }
    held_out = [
        data.test.codes[torch.from_numpy(data.test.labels == label)][:2]
        for label in range(len(painter.caption_ids))
    ]
    return {
        "guidance": drawn,
        "real": torch.cat(held_out).tolist(),
        "codebook": [[round(x, 3) for x in row] for row in data.tokenizer.codebook.tolist()],
        "captions": list(data.train.pictures.names),
    }


def draw(data: PictureSplits, painter: Painter) -> dict[str, Any]:
    each = data.budget.samples_per_caption
    codes = draw_each(data, painter, each, guidance=1.0)
    asked = torch.arange(len(painter.caption_ids)).repeat_interleave(each)
    measured = data.judge.measure(codes, asked)
    del measured["read"], measured["nearest"]
    return measured
