"""A text model that draws: its data, and measurements of its text and its drawings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels import ModalityLoraConfig, PatchedModel, add_modality_tokens, patch_model
from moe_kernels.analysis import RoutingRecorder, RoutingStatistics, modality_by_token_id
from moe_kernels.imaging import (
    CaptionedImages,
    ImageCollator,
    ImageTokenizer,
    ImageVocabulary,
    caption_ids,
    count_distinct,
    mean_pairwise_distance,
    nearest_distances,
    nearest_indices,
    padding_id,
)
from moe_kernels.programs.shared.pictures import TokenizedPictures
from moe_kernels.programs.shared.reader import fit_reader, read_right
from moe_kernels.programs.shared.training import in_batches, mean_nll


class Painter:
    """A text model with image tokens, patched or not, and the ids of its captions."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_ids: range,
        captions: Sequence[str], patched: PatchedModel | None = None,
    ):  # fmt: skip
        self.model, self.patched = model, patched
        self.vocabulary = ImageVocabulary.from_token_ids(token_ids)
        self.collator = ImageCollator(padding_id(tokenizer))
        self.caption_ids = [caption_ids(tokenizer, text) for text in captions]
        self.empty_caption = caption_ids(tokenizer, "")

    @classmethod
    def create(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        config: ModalityLoraConfig, num_codes: int, captions: Sequence[str], *, seed: int,
        **init: Any,
    ) -> Painter:  # fmt: skip
        """Patch the model and add image tokens; init: keywords of ``add_modality_tokens``."""
        torch.manual_seed(seed)
        patched = patch_model(model, config)
        token_ids = add_modality_tokens(model, "image", ImageVocabulary.size(num_codes), **init)
        return cls(model, tokenizer, token_ids, captions, patched)

    def dataset(
        self, pictures: TokenizedPictures, caption_dropout: float = 0.0, seed: int = 0
    ) -> CaptionedImages:
        captions = [self.caption_ids[label] for label in pictures.labels]
        return CaptionedImages(
            captions, pictures.codes, self.vocabulary, caption_dropout=caption_dropout,
            empty_caption=self.empty_caption, seed=seed,
        )  # fmt: skip

    def batches(self, pictures: TokenizedPictures, size: int) -> list[dict[str, torch.Tensor]]:
        return [self.collator(some) for some in in_batches(list(self.dataset(pictures)), size)]


@torch.no_grad()
def text_logits(
    model: PreTrainedModel, blocks: torch.Tensor, vocab_size: int, batch: int = 32
) -> torch.Tensor:
    """Return (blocks, block, V) logits of text tokens, always at the same batch shape."""
    batches = blocks.to(model.device).split(batch)
    return torch.cat([model(input_ids=ids).logits[..., :vocab_size].cpu() for ids in batches])


def text_nll(logits: torch.Tensor, blocks: torch.Tensor) -> float:
    return float(
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), blocks[:, 1:].flatten()
        )
    )


def compare_text(
    unpatched: torch.Tensor, before: torch.Tensor, after: torch.Tensor, blocks: torch.Tensor
) -> dict[str, Any]:
    """Compare text by (blocks, block, V) logits in three states of the model."""
    rounding = (after - unpatched).float().abs().amax(-1)
    return {
        "held_out_tokens": blocks.numel(),
        "nll_unpatched": text_nll(unpatched, blocks),
        "nll_before_training": text_nll(before, blocks),
        "nll_after_training": text_nll(after, blocks),
        "max_abs_logit_difference_by_training": float((after - before).float().abs().max()),
        "logits_changed_by_training": int((after != before).sum()),
        "same_bits_before_and_after_training": torch.equal(before, after),
        # The unpatched model rounds differently; a router at a tie may choose another expert.
        "max_abs_logit_difference_to_unpatched": float(rounding.max()),
        "median_logit_difference_to_unpatched": float(rounding.median()),
    }


def measure_model(
    model: PreTrainedModel, patch: Callable[[PreTrainedModel], Painter], adapter: Path,
    blocks: torch.Tensor, held_out: TokenizedPictures, trained: np.ndarray, *, text_batch: int,
    image_batch: int,
) -> tuple[Painter, dict[str, Any]]:  # fmt: skip
    """Measure a model in three states: unpatched, patched but untrained, with the adapter.

    Returns the model in its last state, too.

    Args:
        blocks: (blocks, block) token ids of held-out text
        trained: numbers of the captions that have training pictures
    """
    vocab_size = model.config.vocab_size
    unpatched = text_logits(model, blocks, vocab_size, text_batch)
    painter = patch(model)
    images = painter.batches(held_out, image_batch)
    before = text_logits(model, blocks, vocab_size, text_batch)
    nll_start = mean_nll(model, images)
    painter.patched.load_adapter(adapter)
    after = text_logits(model, blocks, vocab_size, text_batch)
    nll_end = mean_nll(model, images)
    groups = held_out.by_captions(trained)
    by_captions = {
        name: mean_nll(model, painter.batches(some, image_batch)) for name, some in groups.items()
    }
    with painter.patched.adapters_disabled():
        nll_off = mean_nll(model, images)
    trained, total = painter.patched.count_parameters()
    return painter, {
        "parameters": {"trained": trained, "total": total, "share": trained / total},
        "text": compare_text(unpatched, before, after, blocks),
        "image": {
            "held_out_images": len(held_out),
            "nll_start": nll_start,
            "nll_end": nll_end,
            "nll_end_by_captions": by_captions,
            "images_by_captions": {name: len(some) for name, some in groups.items()},
            "nll_adapters_off": nll_off,
        },
    }


def record_routing(
    painter: Painter, blocks: torch.Tensor, held_out: TokenizedPictures, text_batch: int,
    image_batch: int,
) -> RoutingStatistics:  # fmt: skip
    """Count the experts that text and pictures go to, with the adapters on."""
    model = painter.model
    modality_of = modality_by_token_id({"image": painter.vocabulary.token_ids})
    with torch.no_grad(), RoutingRecorder(model, modality_of) as recorder:
        for ids in blocks.to(model.device).split(text_batch):
            model(input_ids=ids)
        mean_nll(model, painter.batches(held_out, image_batch))
    return recorder.statistics()


class Judge:
    """Measures drawings: whether they show their caption, vary, and are new.

    Real pictures are compared as decoded by the tokenizer, as drawings are.

    reader: tells captions; None if there are too few pictures to learn that from
    """

    def __init__(
        self, train: TokenizedPictures, held_out: TokenizedPictures, tokenizer: ImageTokenizer,
        seed: int = 0,
    ):  # fmt: skip
        self.held_out, self.decode = held_out, (decode := tokenizer.decode)
        self.trained, self.labels = train.pictures.present, torch.from_numpy(train.labels)
        self.real, self.real_held_out = decode(train.codes), decode(held_out.codes)
        to_read = train.pictures.to_read
        learnt = train if to_read is None else TokenizedPictures.encode(tokenizer, to_read)
        self.reader = fit_reader(learnt, decode, seed)

    @cached_property
    def held_out_distances(self) -> torch.Tensor:
        return nearest_distances(self.real_held_out, self.real)

    @cached_property
    def held_out_read(self) -> dict[str, torch.Tensor]:
        return self.reader.read_both(self.held_out)

    def describe_reader(self) -> dict[str, Any] | None:
        """Return what the reader reads right of held-out real pictures, raw and tokenized."""
        if self.reader is None:
            return None
        asked, pictures = torch.from_numpy(self.held_out.labels), self.held_out.pictures
        return {
            kind: read_right(read, asked, pictures, self.trained)
            for kind, read in self.held_out_read.items()
        }

    def measure(self, codes: torch.Tensor, asked: torch.Tensor) -> dict[str, Any]:
        """Measure drawings, (N, tokens) codes of the captions with the numbers ``asked``, (N,)."""
        drawn = self.decode(codes)
        nearest = nearest_indices(drawn, self.real)
        near = {
            # Of pairs, since a copy has a distance of exactly 0.
            "generated": (drawn - self.real[nearest]).flatten(1).norm(dim=1),
            "held_out_real": self.held_out_distances,
        }
        compared = {
            "generated": (drawn, asked),
            "held_out_real": (self.real_held_out, torch.from_numpy(self.held_out.labels)),
        }
        measured = {
            "count": len(codes),
            "distinct": count_distinct(codes),
            "pairwise_distance": {
                name: mean_pairwise_distance(*each) for name, each in compared.items()
            },
            "nearest_training_distance": {name: float(each.mean()) for name, each in near.items()},
            "copies_of_a_training_image": {
                name: int((each == 0).sum()) for name, each in near.items()
            },
            "nearest": nearest.tolist(),
            "nearest_shows_the_caption": self._nearest_shows(nearest, asked),
        }
        return measured if self.reader is None else measured | self._read(codes, asked)

    def _nearest_shows(self, nearest: torch.Tensor, asked: torch.Tensor) -> dict[str, int]:
        """Count drawings whose nearest picture has the caption asked for, where one has it."""
        known = torch.isin(asked, torch.as_tensor(self.trained))
        right = (self.labels[nearest] == asked) & known
        return {"right": int(right.sum()), "count": int(known.sum())}

    def _read(self, codes: torch.Tensor, asked: torch.Tensor) -> dict[str, Any]:
        """Compare the captions that the reader reads with those that were drawn."""
        read, pictures = self.reader.read(codes), self.held_out.pictures
        right = (read == asked).double()
        real = torch.from_numpy(self.held_out.labels)
        return {
            "read_as_their_caption": float(right.mean()),
            "read_by_caption": {
                pictures.names[label]: float(right[asked == label].mean())
                for label in asked.unique()
            },
            "read": read.tolist(),
            "read_right": read_right(read, asked, pictures, self.trained),
            "classifier_held_out_accuracy": {
                kind: float((each == real).double().mean())
                for kind, each in self.held_out_read.items()
            },
        }
