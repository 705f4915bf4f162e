"""Helpers of the tests of added experts."""

import torch
from support.model_zoo import make_model, token_ids

from moe_kernels.models.parts import parts_of
from moe_kernels.moextend import ExpertExtender


def mixed(batch=2, length=12, *, seed=0, modality=1):
    """Make inputs: text, rows of a modality, and padding at the start of the first sequence."""
    ids = token_ids(batch, length, seed=seed)
    modality_ids = (token_ids(batch, length, seed=seed + 3) % 2).long() * modality
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "modality_ids": modality_ids, "attention_mask": mask}


def extended(family="mixtral", *, layers="all", init=0, model=None, **options):
    """Make an extender whose new experts copy one expert by default."""
    model = {"num_hidden_layers": 2} | (model or {})
    modalities = options.pop("modalities", ("image",))
    extender = ExpertExtender(make_model(family, **model), modalities)
    extender.extend(layers, init=init, **options)
    return extender


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def routed(model, **inputs):
    """Return (logits, scores, indices) of the first layer's router, and its input."""
    seen = []
    router = parts_of(model.model.layers[0]).router
    hook = router.register_forward_hook(lambda m, args, out: seen.append((*out, args[0])))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[-1]


def kinds(inputs):
    """Return masks of the flat rows of text and of added modalities; padding is in neither."""
    real = inputs["attention_mask"].flatten() == 1
    modality = inputs["modality_ids"].flatten()
    return (modality == 0) & real, (modality > 0) & real
