"""A patched model with image tokens, and batches of text and image tokens for it."""

import torch
from support import patched_models
from support.model_zoo import PAD, VOCAB, token_ids

IMAGE = range(VOCAB, VOCAB + 10)


def patched_model(family="olmoe", **options):
    return patched_models.patched_model(family, num_tokens=len(IMAGE), **options)


def mixed_batch(seed=0, *, num_text=5, num_image=4):
    """Return three rows of text then image tokens; the first row is padded on the left."""
    ids = token_ids(3, num_text + num_image, seed=seed)
    ids[:, num_text:] = token_ids(3, num_image, seed=seed + 50, vocab=len(IMAGE)) + IMAGE.start
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def mixed_batches(count=3, **sizes):
    return [mixed_batch(seed, **sizes) for seed in range(count)]
