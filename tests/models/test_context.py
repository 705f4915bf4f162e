"""What a layer keeps for one forward: sorted once for all its linear modules, never for longer."""

from collections import Counter

import pytest
import torch
from support.model_zoo import make_model, randomise, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import ModalityLoraConfig, patch_model

LAYERS = 2


class Calls(TorchDispatchMode):
    """Counts calls of the registered ops."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moe_kernels":
            self.counts[func._schema.name.removeprefix("moe_kernels::")] += 1
        return func(*args, **(kwargs or {}))


def make(checkpointing=None):
    model = make_model("olmoe")
    targets = ("experts", "attention", "router")
    patched = patch_model(model, ModalityLoraConfig(r=4, target_modules=targets))
    randomise(patched)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        model.train()
    return model, patched


def batches():
    """Ids and two masks that differ."""
    ids = token_ids(2, 12)
    first = (ids % 3 == 0).long()
    return ids, (first, 1 - first)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["none", "reentrant", "not"])
def test_a_layer_sorts_its_rows_once_a_forward(checkpointing):
    model, _ = make(checkpointing)
    ids, (mask, _) = batches()
    with Calls() as calls:
        loss = model(ids, modality_ids=mask, labels=ids).loss
    assert calls.counts["linear_dispatch"] == LAYERS
    assert calls.counts["lora_linear"] == 5 * LAYERS  # q, k, v, o and the router
    with Calls() as calls:
        loss.backward()
    again = 0 if checkpointing is None else LAYERS
    assert calls.counts["linear_dispatch"] == again
    assert calls.counts["lora_linear_backward"] == 5 * LAYERS


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["none", "reentrant", "not"])
def test_two_forwards_before_one_backward(checkpointing):
    """Each backward has the rows of its own forward."""
    model, patched = make(checkpointing)
    ids, masks = batches()
    parameters = [p for p in patched.trainable_parameters()]

    def gradients(*losses):
        for parameter in parameters:
            parameter.grad = None
        for loss in losses:
            loss.backward()
        return [p.grad.clone() for p in parameters]

    def loss(mask):
        return model(ids, modality_ids=mask, labels=ids).loss

    alone = [gradients(loss(mask)) for mask in masks]
    assert any(not torch.equal(a, b) for a, b in zip(*alone, strict=True))
    together = gradients(*[loss(mask) for mask in masks])
    for found, first, second in zip(together, *alone, strict=True):
        assert torch.equal(found, first + second)


def test_ids_that_are_set_anew_are_sorted_anew():
    model, _ = make()
    ids, masks = batches()
    q_proj = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 12, 32)
    context = q_proj.__dict__["_modality_context"]
    results = []
    for mask in (*masks, masks[0]):
        context.modality_ids = mask
        results.append(q_proj(x))
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])
