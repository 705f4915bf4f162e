"""One training of one small model, and everything that redundancy.py wants to know of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _pictures import digits
from _runs import Place, Stages, mean_nll, train
from _text_model import TextModelSettings, load_text_model, pretrain
from _text_to_image import (
    CaptionReader,
    Painter,
    TokenizedPictures,
    compare_text,
    measure_samples,
    record_routing,
    text_logits,
)
from _texts import documentation, text_blocks
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels import ModalityLoraConfig
from moe_kernels.analysis import expert_redundancy
from moe_kernels.conversion import dense_to_moe, heal
from moe_kernels.imaging import (
    ImageVocabulary,
    PatchTokenizer,
    generate_image_codes,
    nearest_indices,
)
from moe_kernels.models import initialise_lora

TEXT_BATCH, IMAGE_BATCH = 32, 100
GUIDANCE = (1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Run:
    """What is trained. Equal runs of different groups are one run.

    base: "olmoe"; or "ExK", the dense parent as E experts of which K serve a token, healed
    method: "plora" (low-rank updates on image tokens), "all_tokens" (the same on every token),
        "full" (everything trains), "rows" (added rows alone), "copy" (a feed-forward network for
        image tokens beside each layer's experts, started from their first neurons)
    copy_neurons: width of the copy
    pictures: how many to learn from; None: all
    """

    base: str = "olmoe"
    method: str = "plora"
    targets: tuple[str, ...] = ("experts", "attention")
    r: int = 16
    layers: tuple[int, ...] | None = None
    init: str = "normal"
    solver: str = "semirelaxed"
    lora_init: str = "zero"
    copy_neurons: int = 0
    pictures: int | None = None
    samples: bool = False
    look: bool = False

    @property
    def trains(self) -> str:
        """Runs that share a learning rate."""
        method = self.method.replace("_", " ")
        return f"{method}, {' and '.join(self.targets)}" if method == "plora" else method


@dataclass(frozen=True)
class Budget:
    """How long everything trains; the same for all runs of a sweep."""

    text: TextModelSettings = TextModelSettings()
    dense_neurons: int = 1024
    heal_steps: int = 150
    images: int = 5000
    held_out: int = 600
    num_codes: int = 64
    steps: int = 300
    batch: int = 16
    samples_per_caption: int = 10


class Ground:
    """What all runs of a seed stand on: text models, pictures, and a classifier that reads them."""

    def __init__(self, budget: Budget, seed: int, stages: Stages):
        self.budget, self.seed, self.stages = budget, seed, stages
        self.text_settings = dataclasses.replace(budget.text, seed=seed)

    # --- pictures

    @cached_property
    def _split(self):
        """Held-out pictures decide the learning rate (choice) or are reported (test)."""
        pictures, rest = digits().split(self.budget.held_out, self.seed)
        choice, test = rest.split(self.budget.held_out // 2, self.seed)
        if self.budget.images < len(pictures):
            _, pictures = pictures.split(self.budget.images, self.seed)
        return pictures, choice, test

    @cached_property
    def tokenizer(self) -> PatchTokenizer:
        return PatchTokenizer.fit(
            self._split[0].images, num_codes=self.budget.num_codes, patch_size=4, seed=self.seed
        )

    @cached_property
    def train(self) -> TokenizedPictures:
        return TokenizedPictures.encode(self.tokenizer, self._split[0])

    @cached_property
    def choice(self) -> TokenizedPictures:
        return TokenizedPictures.encode(self.tokenizer, self._split[1])

    @cached_property
    def test(self) -> TokenizedPictures:
        return TokenizedPictures.encode(self.tokenizer, self._split[2])

    @cached_property
    def reader(self) -> CaptionReader:
        return CaptionReader.fit(self.train, self.tokenizer.decode)

    # --- text

    def _pretrained(self, settings: TextModelSettings, name: str) -> Path:
        return self.stages.run(
            f"{name}-{self.seed}", dataclasses.asdict(settings),
            lambda place: pretrain(settings, place),
        )  # fmt: skip

    def _converted(self, name: str) -> Path:
        experts, top_k = map(int, name.split("x"))
        settings = dataclasses.replace(
            self.text_settings, experts=0, intermediate_size=self.budget.dense_neurons
        )
        parent = self._pretrained(settings, "dense")

        def build(place: Place) -> dict[str, Any]:
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
            moe.save_pretrained(place.folder / "model")
            tokenizer.save_pretrained(place.folder / "model")
            return {}

        inputs = dataclasses.asdict(settings) | {"heal": self.budget.heal_steps}
        return self.stages.run(f"{name}-{self.seed}", inputs, build)

    def folder(self, base: str) -> Path:
        """Of a base, made if it is not there."""
        is_olmoe = base == "olmoe"
        return self._pretrained(self.text_settings, base) if is_olmoe else self._converted(base)

    def load(self, base: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_text_model(self.folder(base), "cpu")

    def blocks(self, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        return text_blocks(tokenizer, documentation()["test"], 128, 128)[:64]


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
    """Image tokens of every later forward go through a copy of their own in each layer, too."""
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


def prepare(ground: Ground, run: Run, model: PreTrainedModel, tokenizer) -> Painter:
    """The model with image tokens, and what the method trains set to train."""
    budget, captions = ground.budget, ground.train.pictures.names
    if run.method == "full":
        torch.manual_seed(ground.seed)
        first = model.config.vocab_size
        size = ImageVocabulary.size(budget.num_codes)
        model.resize_token_embeddings(first + size)
        return Painter.of(model, tokenizer, range(first, first + size), captions)
    config = ModalityLoraConfig(
        r=run.r, lora_alpha=2 * run.r, target_modules=run.targets, layers_to_transform=run.layers
    )
    init = {"init": run.init}
    if run.init in ("gromov_wasserstein", "permuted"):
        usage = ground.tokenizer.codebook_usage(ground.train.codes)
        init |= {"features": ground.tokenizer.codebook, "num_delimiters": 2}
        init |= {"frequencies": usage, "solver": run.solver}
    painter = Painter.create(
        model, tokenizer, config, budget.num_codes, captions, seed=ground.seed, **init
    )
    if run.method == "all_tokens":
        model.token_modality.fill_(1)
    if run.method in ("rows", "copy"):
        for name, parameter in painter.patched.named_trainable_parameters():
            parameter.requires_grad_("modality_lora" not in name)
    if run.method == "copy":
        attach_copies(model, run.copy_neurons, painter.vocabulary.first_id)
    if run.lora_init != "zero":
        text = [{"input_ids": ids} for ids in ground.blocks(tokenizer)[:8].split(4)]
        pictures = painter.batches(ground.train.head(16), 4)
        rows = [{k: v for k, v in batch.items() if k != "labels"} for batch in pictures]
        initialise_lora(model, text + rows, lora_init=run.lora_init, seed=ground.seed)
    return painter


def trained_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def measure_run(ground: Ground, run: Run, lr: float, place: Place) -> dict[str, Any]:
    budget, seed = ground.budget, ground.seed
    model, tokenizer = ground.load(run.base)
    vocab_size, blocks = model.config.vocab_size, ground.blocks(tokenizer)
    unpatched = text_logits(model, blocks, vocab_size, TEXT_BATCH)
    painter = prepare(ground, run, model, tokenizer)
    before = text_logits(model, blocks, vocab_size, TEXT_BATCH)
    result = {"look_before": look(ground, painter, blocks)} if run.look else {}
    learnt = ground.train if run.pictures is None else ground.train.head(run.pictures)
    choice, test = (painter.batches(part, IMAGE_BATCH) for part in (ground.choice, ground.test))
    history = train(
        painter.patched or model, painter.dataset(learnt, caption_dropout=0.1),
        lambda model: mean_nll(model, choice[:1]), place,
        collator=painter.collator, max_steps=budget.steps, logging_steps=1,
        per_device_train_batch_size=budget.batch, learning_rate=lr, weight_decay=0.01,
        warmup_steps=budget.steps // 20, seed=seed, use_cpu=True, save_steps=10**9,
    )  # fmt: skip
    model.eval()
    after = text_logits(model, blocks, vocab_size, TEXT_BATCH)
    result |= {
        "trained_parameters": trained_parameters(model),
        "loss": [round(loss, 4) for _, loss in history["loss"]],
        "largest_gradient_norm": max(norm for _, norm in history["grad_norm"]),
        "choice_nll": mean_nll(model, choice),
        "test_nll": mean_nll(model, test),
        "text": compare_text(unpatched, before, after, blocks),
        "samples_per_second": history["samples_per_second"],
    }
    if run.samples:
        result["samples"] = draw(ground, painter)
    if run.look:
        result["look_after"] = look(ground, painter, blocks)
        result["gallery"] = gallery(ground, painter)
    return result


def draw_codes(ground: Ground, painter: Painter, each: int, guidance: float) -> torch.Tensor:
    """``each`` pictures of every caption, as codes."""
    return generate_image_codes(
        painter.model, [ids for ids in painter.caption_ids for _ in range(each)],
        painter.vocabulary, ground.tokenizer.tokens_per_image, guidance_scale=guidance,
        pad_token_id=painter.collator.pad_token_id, empty_caption=painter.empty_caption,
        batch_size=IMAGE_BATCH, seed=ground.seed,
    )  # fmt: skip


def gallery(ground: Ground, painter: Painter) -> dict[str, Any]:
    """Two pictures a caption at each guidance, as codes beside those of the nearest real one."""
    decode, real = ground.tokenizer.decode, ground.train.codes
    drawn = {}
    for guidance in GUIDANCE:
        codes = draw_codes(ground, painter, 2, guidance)
        nearest = real[nearest_indices(decode(codes), decode(real))]
        read = ground.reader.read(codes).tolist()
        drawn[f"{guidance:g}"] = {
            "codes": codes.tolist(),
            "nearest": nearest.tolist(),
            "read": read,
        }
    held_out = [
        ground.test.codes[torch.from_numpy(ground.test.labels == label)][:2]
        for label in range(len(painter.caption_ids))
    ]
    return {
        "guidance": drawn,
        "real": torch.cat(held_out).tolist(),
        "codebook": [[round(x, 3) for x in row] for row in ground.tokenizer.codebook.tolist()],
        "captions": list(ground.train.pictures.names),
    }


def draw(ground: Ground, painter: Painter) -> dict[str, Any]:
    each = ground.budget.samples_per_caption
    codes = draw_codes(ground, painter, each, guidance=1.0)
    asked = torch.arange(len(painter.caption_ids)).repeat_interleave(each)
    measured = measure_samples(
        codes, asked, ground.train, ground.test, ground.tokenizer.decode, ground.reader
    )
    del measured["read"]
    return measured


def look(ground: Ground, painter: Painter, blocks: torch.Tensor) -> dict[str, Any]:
    """Routing, and how alike experts are on text and on pictures."""
    few = ground.test.head(100)
    pictures = [
        {name: tensor for name, tensor in batch.items() if name != "labels"}
        for batch in painter.batches(few, 50)
    ]
    text = [{"input_ids": ids} for ids in blocks[:16].split(8)]
    rows = {"text": text, "image": pictures}
    return {
        "routing": record_routing(painter, blocks, few, TEXT_BATCH, IMAGE_BATCH).to_dict(),
        "redundancy": {
            modality: expert_redundancy(
                painter.model, batches, modality=modality, seed=ground.seed
            ).to_dict()
            for modality, batches in rows.items()
        },
    }
