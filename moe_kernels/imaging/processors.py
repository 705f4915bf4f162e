"""LogitsProcessors for ``generate``: allowed next tokens, and classifier-free guidance."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from moe_kernels import arguments
from moe_kernels.imaging.sequence import ImageCollator, ImageVocabulary, image_prompt
from moe_kernels.models.offload import device_of_model

_LARGEST_GUIDANCE = 10_000  # far larger scales make scores infinite


class ImageTokensProcessor(LogitsProcessor):
    """Allows codes only inside a picture, then its end token, and text only outside pictures.

    A picture gets exactly ``tokens_per_image`` codes. Every sequence of a batch is constrained by
    its own last begin-of-image. Call ``generate`` with ``suppress_tokens=[]``:
    ``add_modality_tokens`` suppresses the added tokens by default, and a score of -inf cannot be
    undone here. On the CPU this is a ValueError, and so are scores that are NaN; on a GPU it is not
    checked, since the check would wait for the device at every token.

    Args:
        vocabulary: ids of the image tokens.
        tokens_per_image: number of codes in a picture.
        max_images: a sequence may start pictures in its text until it has this many begin-of-image
            tokens, including those of the prompt. 0: only the prompt starts a picture.
    """

    def __init__(self, vocabulary: ImageVocabulary, tokens_per_image: int, max_images: int = 0):
        _check_tokens_per_image(tokens_per_image)
        if max_images < 0:
            raise ValueError(f"max_images must be at least 0; got {max_images}")
        self.vocabulary = vocabulary
        self.tokens_per_image = tokens_per_image
        self.max_images = max_images

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the scores of forbidden tokens to -inf. input_ids: (B, S); scores: (B, V + added)."""
        vocabulary = self.vocabulary
        if scores.shape[-1] < vocabulary.token_ids.stop:
            raise ValueError(
                f"the model scores {scores.shape[-1]} tokens, but the image tokens have ids "
                f"{vocabulary.token_ids.start}..{vocabulary.token_ids.stop - 1}: pass the "
                "vocabulary of this model"
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
        if scores.device.type == "cpu" and bool(scores.isnan().any()):
            raise ValueError(
                "the model's scores are NaN: its weights are not finite, or too large for its dtype"
            )
        if scores.device.type == "cpu" and bool(impossible.any()):
            raise ValueError(
                "all tokens that may follow have a score of -inf: call "
                "generate(..., suppress_tokens=[]), since added tokens are suppressed by default"
            )
        return scores.masked_fill(~allowed, float("-inf"))


class ImageGuidanceProcessor(LogitsProcessor):
    """Classifier-free guidance inside pictures: logits = uncond + w (cond - uncond).

    The unconditional branch reads ``empty_caption``, begin-of-image and the codes so far, without
    the preceding text and pictures. It keeps its own key-value cache, and the modality of its
    tokens follows from their ids. Scores outside pictures are unchanged. With w = 1 all scores are
    unchanged, and there is no second forward.

    It works with every ``generate`` call of the model: batches with padding, several pictures in a
    text, ``num_return_sequences``, sampling. If sequences are reordered (beams), the cache is
    filled again. transformers' ``guidance_scale`` also guides one picture per prompt, but it has
    one unconditional prompt for the whole sequence, cannot expand batches, and computes the
    unconditional log-softmax in the model's dtype.

    Args:
        model: the model that generates.
        vocabulary: ids of the image tokens.
        tokens_per_image: number of codes in a picture.
        guidance_scale: w.
        empty_caption: token ids, the same that ``CaptionedImages`` had in training.

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
        (guidance_scale,) = arguments.floats(guidance_scale=guidance_scale)
        if not 0 <= guidance_scale <= _LARGEST_GUIDANCE:
            raise ValueError(
                f"guidance_scale must be finite and at least 0 (1 means no guidance), and at most "
                f"{_LARGEST_GUIDANCE:,}; got {guidance_scale}"
            )
        self.model = model
        self.vocabulary = vocabulary
        self.tokens_per_image = tokens_per_image
        self.guidance_scale = guidance_scale
        self.prompt = image_prompt(empty_caption, vocabulary)
        self._branch: _UnconditionalBranch | None = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Guide the scores of rows whose next token is a code.

        input_ids: (B, S); scores: (B, V + added)
        """
        if self.guidance_scale == 1:
            return scores
        count = codes_so_far(input_ids, self.vocabulary)
        inside = (count >= 0) & (count < self.tokens_per_image)
        if not inside.any():
            self._branch = None
            return scores
        if self._branch is None or not self._branch.continues_with(input_ids):
            self._branch = _UnconditionalBranch(self.model, self.prompt)
        base = self._branch.logits(input_ids, count, inside).to(scores)
        guided = base + self.guidance_scale * (scores - base)
        # Forbidden tokens stay forbidden, also at w = 0.
        return torch.where(inside[:, None] & ~scores.isneginf(), guided, scores)


class _UnconditionalBranch:
    """Runs the model on (empty caption, begin, codes so far) of each row, with its own cache.

    Rows may start pictures at different steps. A row that starts one masks everything that the
    cache holds for it. The new tokens of a step differ in number, so they are padded on the left.
    """

    def __init__(self, model: PreTrainedModel, prompt: Sequence[int]):
        self.model = model
        self.prompt = torch.tensor(prompt, device=device_of_model(model))
        self.cache = DynamicCache()
        self.seen: torch.Tensor | None = None  # (B, S) input_ids of the last step
        self.mask: torch.Tensor | None = None  # (B, columns of the cache)

    def continues_with(self, input_ids: torch.Tensor) -> bool:
        """Return True if every row extends its row of the last step."""
        seen = self.seen
        return (
            seen.shape[0] == input_ids.shape[0]
            and seen.shape[1] < input_ids.shape[1]
            and torch.equal(input_ids[:, : seen.shape[1]], seen)
        )

    def logits(
        self, input_ids: torch.Tensor, count: torch.Tensor, inside: torch.Tensor
    ) -> torch.Tensor:
        """Return the unconditional logits of each row's next token, (B, V + added).

        input_ids: (B, S); count: (B,) codes in the open picture; inside: (B,) bool
        """
        num_seen = 0 if self.seen is None else self.seen.shape[1]
        starts = inside & (input_ids.shape[1] - count > num_seen)
        # Rows outside pictures read their own tokens. Their logits are not used, but a row that
        # attends to nothing may become NaN.
        first_new = num_seen or input_ids.shape[1] - 1
        new = [
            torch.cat([self.prompt, row[len(row) - codes :]]) if start else row[first_new:]
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
    """Return the number of codes in each row's open picture, or -1 outside pictures.

    (B, S) -> (B,)
    """
    length = input_ids.shape[1]
    positions = torch.arange(1, length + 1, device=input_ids.device)
    # Positions count from 1, so 0 means that the row has no such token.
    begin = (positions * (input_ids == vocabulary.begin_id)).amax(1)
    end = (positions * (input_ids == vocabulary.end_id)).amax(1)
    return torch.where(begin > end, length - begin, -1)


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model: it has the settings and the signature."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _cache_keyword(model: PreTrainedModel) -> str:
    """Return the name of forward's cache argument: past_key_values before transformers 5.24."""
    parameters = inspect.signature(unwrapped(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _check_tokens_per_image(tokens_per_image: int) -> None:
    if tokens_per_image < 1:
        raise ValueError(f"tokens_per_image must be at least 1; got {tokens_per_image}")
