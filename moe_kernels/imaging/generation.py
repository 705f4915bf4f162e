"""Sampling pictures from a model: the token constraint, and a helper on ``model.generate``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from moe_kernels.imaging.sequence import ImageCollator, ImageVocabulary, image_prompt


class ImageTokensProcessor(LogitsProcessor):
    """After a begin-of-image codes only, for exactly ``tokens_per_image`` positions, then the end.

    Everywhere else no image token. Each sequence of a batch follows its own last begin-of-image.
    ``generate`` must be called with ``suppress_tokens=[]``: ``add_modality_tokens`` suppresses the
    added tokens by default, and a score that is -inf already cannot be brought back.
    """

    def __init__(self, vocabulary: ImageVocabulary, tokens_per_image: int):
        if tokens_per_image < 1:
            raise ValueError(f"tokens_per_image must be at least 1; got {tokens_per_image}")
        self.vocabulary = vocabulary
        self.tokens_per_image = tokens_per_image

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
        length = input_ids.shape[1]
        positions = torch.arange(1, length + 1, device=input_ids.device)
        # begin is 0 where a row has none; "since" then means nothing.
        begin = (positions * (input_ids == vocabulary.begin_id)).amax(1, keepdim=True)
        since = length - begin
        inside = (begin > 0) & (since < self.tokens_per_image)
        at_end = (begin > 0) & (since == self.tokens_per_image)
        allowed = torch.where(
            inside, is_code, torch.where(at_end, ids == vocabulary.end_id, ~is_image)
        )
        return scores.masked_fill(~allowed, float("-inf"))


@torch.no_grad()
def generate_images(
    model: PreTrainedModel,
    captions: Sequence[Sequence[int]],
    vocabulary: ImageVocabulary,
    tokens_per_image: int,
    *,
    pad_token_id: int,
    temperature: float = 1.0,
    batch_size: int = 128,
    seed: int | None = None,
) -> torch.Tensor:
    """One picture for each caption, sampled from the whole codebook with the key-value cache.

    Args:
        model: patched, with the vocabulary's tokens added.
        captions: the token ids of each caption.
        vocabulary: where the image's tokens are.
        tokens_per_image: how many codes a picture has.
        pad_token_id: fills up shorter captions on the left.
        temperature: of the softmax that is sampled from.
        batch_size: pictures drawn at a time.
        seed: leaves the global generators as they were; None draws from them.

    Returns:
        Codes, (N, tokens_per_image) int64, on the CPU.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")
    devices = [model.device] if model.device.type != "cpu" else []
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(
            devices, enabled=seed is not None, device_type=model.device.type
        ):
            if seed is not None:
                torch.manual_seed(seed)
            batches = [
                _generate_batch(
                    model,
                    captions[start : start + batch_size],
                    vocabulary,
                    tokens_per_image,
                    pad_token_id,
                    temperature,
                )
                for start in range(0, len(captions), batch_size)
            ]
    finally:
        model.train(was_training)
    return torch.cat(batches) if batches else torch.empty(0, tokens_per_image, dtype=torch.long)


def _generate_batch(
    model, captions, vocabulary, tokens_per_image, pad_token_id, temperature
) -> torch.Tensor:
    prompts = [
        {"input_ids": torch.tensor(image_prompt(caption, vocabulary))} for caption in captions
    ]
    batch = {
        name: tensor.to(model.device)
        for name, tensor in ImageCollator(pad_token_id)(prompts).items()
    }
    output = model.generate(
        **batch,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens_per_image,
        pad_token_id=pad_token_id,
        suppress_tokens=[],
        logits_processor=LogitsProcessorList([ImageTokensProcessor(vocabulary, tokens_per_image)]),
    )
    return vocabulary.codes_of(output[:, -tokens_per_image:].cpu())
