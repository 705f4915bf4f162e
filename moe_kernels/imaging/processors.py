"""LogitsProcessors for ``generate``: which tokens may follow, and classifier-free guidance."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from moe_kernels.imaging.sequence import ImageCollator, ImageVocabulary, image_prompt


class ImageTokensProcessor(LogitsProcessor):
    """Inside a picture codes only, exactly ``tokens_per_image`` of them, then the end; else text.

    Each sequence of a batch follows its own last begin-of-image. ``generate`` must be called with
    ``suppress_tokens=[]``: ``add_modality_tokens`` suppresses the added tokens by default, and a
    score that is -inf already cannot be brought back (ValueError on the CPU; on a GPU asking would
    make it wait at every token).

    Args:
        vocabulary: where the image's tokens are.
        tokens_per_image: how many codes a picture has.
        max_images: a sequence that has fewer begin-of-image tokens than this, those of its prompt
            included, may start another picture wherever text may stand; 0: only the prompt does.
    """

    def __init__(self, vocabulary: ImageVocabulary, tokens_per_image: int, max_images: int = 0):
        _check_tokens_per_image(tokens_per_image)
        if max_images < 0:
            raise ValueError(f"max_images must be at least 0; got {max_images}")
        self.vocabulary = vocabulary
        self.tokens_per_image = tokens_per_image
        self.max_images = max_images

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: (B, S); scores: (B, V + added) -> -inf wherever a token may not follow"""
        vocabulary = self.vocabulary
        if scores.shape[-1] < vocabulary.token_ids.stop:
            raise ValueError(
                f"the model scores {scores.shape[-1]} tokens, "
                f"the image's ids are {vocabulary.token_ids}"
            )
        ids = torch.arange(scores.shape[-1], device=scores.device)
        is_code = (ids >= vocabulary.code_ids.start) & (ids < vocabulary.code_ids.stop)
        is_image = (ids >= vocabulary.token_ids.start) & (ids < vocabulary.token_ids.stop)
        images = (input_ids == vocabulary.begin_id).sum(1, keepdim=True)
        may_begin = (images < self.max_images) & (ids == vocabulary.begin_id)
        count = codes_so_far(input_ids, vocabulary)[:, None]
        allowed = torch.where(count < 0, ~is_image | may_begin, is_code)
        allowed = torch.where(count >= self.tokens_per_image, ids == vocabulary.end_id, allowed)
        impossible = (scores.isneginf() | ~allowed).all(-1)
        if scores.device.type == "cpu" and bool(impossible.any()):
            raise ValueError(
                "no token that may follow has a score: call generate(..., suppress_tokens=[]), "
                "since added tokens are suppressed by default"
            )
        return scores.masked_fill(~allowed, float("-inf"))


class ImageGuidanceProcessor(LogitsProcessor):
    """Classifier-free guidance inside pictures: logits = uncond + w (cond - uncond).

    The unconditional branch reads ``empty_caption``, begin-of-image and the codes so far, whatever
    text and pictures stand before, and keeps a key-value cache of its own. Its tokens' modality
    follows from their ids. Scores outside pictures are left as they are, and at w = 1 all of them,
    without a second forward.

    For any ``generate`` call with the model: batches with padding, several pictures in a text,
    ``num_return_sequences``, sampling. Where sequences change places (beams) the cache is filled
    anew. transformers' own ``guidance_scale`` does one picture a prompt too, but has one
    unconditional prompt for the whole sequence, cannot expand batches, and takes the unconditional
    log-softmax in the model's dtype.

    Args:
        model: the one that generates.
        vocabulary: where the image's tokens are.
        tokens_per_image: how many codes a picture has.
        guidance_scale: w.
        empty_caption: token ids, as ``CaptionedImages`` was given in training.

    Source: Ho and Salimans, arXiv 2207.12598; in this form for tokens, Gafni et al., 2203.13131.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: ImageVocabulary,
        tokens_per_image: int,
        guidance_scale: float,
        *,
        empty_caption: Sequence[int] = (),
    ):
        _check_tokens_per_image(tokens_per_image)
        if not (guidance_scale >= 0 and math.isfinite(guidance_scale)):
            raise ValueError(
                f"guidance_scale must be at least 0, and 1 is none; got {guidance_scale}"
            )
        self.model = model
        self.vocabulary = vocabulary
        self.tokens_per_image = tokens_per_image
        self.guidance_scale = guidance_scale
        self.prompt = image_prompt(empty_caption, vocabulary)
        self._branch: _UnconditionalBranch | None = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: (B, S); scores: (B, V + added) -> guided where a code comes next"""
        if self.guidance_scale == 1:
            return scores
        count = codes_so_far(input_ids, self.vocabulary)
        inside = (count >= 0) & (count < self.tokens_per_image)
        if not inside.any():
            self._branch = None
            return scores
        if self._branch is None or not self._branch.goes_on_with(input_ids):
            self._branch = _UnconditionalBranch(self.model, self.prompt)
        base = self._branch.logits(input_ids, count, inside).to(scores)
        guided = base + self.guidance_scale * (scores - base)
        # What is forbidden already stays so, also at w = 0.
        return torch.where(inside[:, None] & ~scores.isneginf(), guided, scores)


class _UnconditionalBranch:
    """The model on (empty caption, begin, codes so far) of each row, with its cache.

    Rows start pictures at different steps: a new picture's row masks all that its cache held, and
    what is fed in one step is padded on the left.
    """

    def __init__(self, model: PreTrainedModel, prompt: Sequence[int]):
        self.model = model
        self.prompt = torch.tensor(prompt, device=model.device)
        self.cache = DynamicCache()
        self.seen: torch.Tensor | None = None  # (B, S) input_ids of the last step
        self.mask: torch.Tensor | None = None  # (B, columns of the cache)

    def goes_on_with(self, input_ids: torch.Tensor) -> bool:
        seen = self.seen
        return (
            seen.shape[0] == input_ids.shape[0]
            and seen.shape[1] < input_ids.shape[1]
            and torch.equal(input_ids[:, : seen.shape[1]], seen)
        )

    def logits(
        self, input_ids: torch.Tensor, count: torch.Tensor, inside: torch.Tensor
    ) -> torch.Tensor:
        """input_ids: (B, S), count: (B,) codes of the open picture -> (B, V + added)"""
        known = 0 if self.seen is None else self.seen.shape[1]
        starts = inside & (input_ids.shape[1] - count > known)
        # A row outside pictures goes on with its own tokens: a row that attends to nothing may be
        # NaN, and what is said of this one is not used.
        rest = known or input_ids.shape[1] - 1
        new = [
            torch.cat([self.prompt, row[len(row) - codes :]]) if start else row[rest:]
            for row, codes, start in zip(input_ids, count.tolist(), starts.tolist(), strict=True)
        ]
        batch = ImageCollator(pad_token_id=0)([{"input_ids": ids} for ids in new])
        if self.mask is None:
            self.mask = batch["attention_mask"][:, :0]
        before = self.mask * ~starts[:, None]
        self.mask = torch.cat([before, batch["attention_mask"]], 1)
        positions = before.sum(1, keepdim=True) + batch["attention_mask"].cumsum(1) - 1
        self.seen = input_ids
        outputs = self.model(
            input_ids=batch["input_ids"],
            attention_mask=self.mask,
            position_ids=positions.clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{_cache_keyword(self.model): self.cache},
        )
        return outputs.logits[:, -1]


def codes_so_far(input_ids: torch.Tensor, vocabulary: ImageVocabulary) -> torch.Tensor:
    """(B, S) -> (B,) how many codes the picture has that is open at the end; -1 outside pictures"""
    length = input_ids.shape[1]
    positions = torch.arange(1, length + 1, device=input_ids.device)
    # Both are 0 where a row has none.
    begin = (positions * (input_ids == vocabulary.begin_id)).amax(1)
    end = (positions * (input_ids == vocabulary.end_id)).amax(1)
    return torch.where(begin > end, length - begin, -1)


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model of transformers inside one of PEFT, which has its settings and its signature."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _cache_keyword(model: PreTrainedModel) -> str:
    """The name of forward's cache: it was past_key_values before transformers 5.24."""
    parameters = inspect.signature(unwrapped(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _check_tokens_per_image(tokens_per_image: int) -> None:
    if tokens_per_image < 1:
        raise ValueError(f"tokens_per_image must be at least 1; got {tokens_per_image}")
