"""A patched model with image tokens, and batches of text and image tokens for it."""

import torch
from support.model_zoo import PAD, VOCAB, make_model, randomise, token_ids

from moe_kernels import add_modality_tokens, patch_model

IMAGE = range(VOCAB, VOCAB + 10)


def patched_model(family="olmoe", **options):
    """Return a model with image tokens and random adapters, and its handle."""
    model = make_model(family, **options)
    patched = patch_model(model)
    assert add_modality_tokens(model, "image", len(IMAGE)) == IMAGE
    randomise(patched)
    return model, patched


def mixed_batch(seed=0, *, num_text=5, num_image=4):
    """Return three rows of text then image tokens; the first row is padded on the left."""
    ids = token_ids(3, num_text + num_image, seed=seed)
    ids[:, num_text:] = token_ids(3, num_image, seed=seed + 50, vocab=len(IMAGE)) + IMAGE.start
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def mixed_batches(count=3, **sizes):
    return [mixed_batch(seed, **sizes) for seed in range(count)]
