"""A checkpointed layer is recomputed as its forward was, whoever wraps it, and after contexts."""

import functools

import pytest
import torch
from support.added_experts import extended
from support.model_zoo import randomise, token_ids
from support.patched_models import patched_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint as recompute

from moe_kernels import ModalityLoraConfig

IDS = token_ids(2, 12)
INPUTS = {"input_ids": IDS, "modality_ids": IDS % 2, "labels": IDS, "use_cache": False}


def wrapped(model, implementation, layers):
    """Let torch's wrapper checkpoint some layers."""
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=implementation)
    chosen = [model.model.layers[i] for i in layers]
    apply_activation_checkpointing(model, wrapper, check_fn=lambda module: module in chosen)


CHECKPOINTING = pytest.mark.parametrize(
    "checkpoint",
    [
        lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
        lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
        lambda model: wrapped(model, CheckpointImpl.REENTRANT, (0, 1)),
        lambda model: wrapped(model, CheckpointImpl.NO_REENTRANT, (0, 1)),
        lambda model: wrapped(model, CheckpointImpl.REENTRANT, (0,)),
    ],
    ids=["reentrant", "not", "wrapper", "wrapper-not", "wrapper-of-one"],
)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_context_does_not_reach_the_recompute_of_a_whole_forward(reentrant):
    model, patched = patched_model("olmoe", num_tokens=4)

    def compute(start):
        return model(IDS, use_cache=False).logits[..., :8].square().mean() + start

    def loss():
        return recompute(compute, torch.zeros((), requires_grad=True), use_reentrant=reentrant)

    loss().backward()
    with torch.no_grad(), patched.text_only():
        model.eval()(IDS)
    loss().backward()
    model.train()
    for context in (patched.adapters_disabled, patched.text_only):
        with context():
            inside = loss()
        with pytest.raises(RuntimeError, match="around a forward of the whole model does not go"):
            inside.backward()


def gradients(model, patched, context):
    """Return the gradients of a forward within a context and a backward after it."""
    with context():
        loss = model(**INPUTS).loss
    loss.backward()
    return [p.grad for p in patched.trainable_parameters()]


def assert_same(found, expected):
    assert any(each is not None and each.any() for each in expected)
    for mine, theirs in zip(found, expected, strict=True):
        # An expert that no token chose has no gradient, or one of zeros.
        mine, theirs = (0.0 if each is None else each for each in (mine, theirs))
        torch.testing.assert_close(mine + torch.zeros(1), theirs + torch.zeros(1))


@CHECKPOINTING
@pytest.mark.parametrize("modality", ["image", None], ids=["gate", "no-gate"])
def test_added_experts_are_disabled_in_the_recompute_too(checkpoint, modality):
    def make():
        extender = extended("olmoe", modality=modality)
        extender.model.get_input_embeddings().weight.requires_grad_()
        randomise(extender.patched)
        return extender

    def found(extender):
        model = extender.model.train()
        results = gradients(model, extender.patched, extender.disabled)
        return [*results, model.get_input_embeddings().weight.grad]

    expected, extender = found(make()), make()
    checkpoint(extender.model)
    assert_same(found(extender), expected)


@CHECKPOINTING
def test_adapters_are_disabled_in_the_recompute_too(checkpoint):
    def found(checkpoint=lambda model: None):
        config = ModalityLoraConfig(r=2, target_modules=("experts", "attention", "router"))
        model, patched = patched_model("olmoe", config, num_tokens=4)
        checkpoint(model)
        return gradients(model.train(), patched, patched.adapters_disabled)

    assert_same(found(checkpoint), found())


@CHECKPOINTING
def test_adapters_train_without_an_input_that_does(checkpoint):
    """Reentrant checkpointing gives the adapters of its layers no gradient otherwise."""

    def found(checkpoint=lambda model: None):
        model, patched = patched_model("olmoe", ModalityLoraConfig(r=2))
        checkpoint(model)
        return [p.grad is not None for p in trained(model.train(), patched)]

    def trained(model, patched):
        model(**INPUTS).loss.backward()
        return patched.trainable_parameters()

    assert found(checkpoint) == found()
