"""The rows that a forward sorts once for the linear modules of all layers, and then forgets."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.model_zoo import FAMILY, token_ids
from support.patched_models import patched_model
from support.registered_ops import Calls

from moe_kernels import ModalityLoraConfig
from moe_kernels.models import context

LAYERS = 2
TARGETS = ("experts", "attention", "router")


CHECKPOINTING = pytest.mark.parametrize(
    "checkpointing", [None, True, False], ids=["none", "reentrant", "not"]
)


def make(checkpointing=None):
    config = ModalityLoraConfig(r=4, target_modules=TARGETS)
    model, patched = patched_model("olmoe", config)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        model.train()
    return model, patched


def batches():
    """Return ids and two masks that differ."""
    ids = token_ids(2, 12)
    first = (ids % 3 == 0).long()
    return ids, (first, 1 - first)


@CHECKPOINTING
def test_a_forward_sorts_its_rows_once(checkpointing):
    """A layer that is recomputed sorts them for itself."""
    model, _ = make(checkpointing)
    ids, (mask, _) = batches()
    with Calls() as calls:
        loss = model(ids, modality_ids=mask, labels=ids).loss
    assert calls.names.count("linear_dispatch") == 1
    assert calls.names.count("lora_linear") == 5 * LAYERS  # q, k, v, o and the router
    with Calls() as calls:
        loss.backward()
    again = 0 if checkpointing is None else LAYERS
    assert calls.names.count("linear_dispatch") == again
    assert calls.names.count("lora_linear_backward") == 5 * LAYERS


@CHECKPOINTING
def test_two_forwards_before_one_backward(checkpointing):
    """Each backward has the rows of its own forward."""
    model, patched = make(checkpointing)
    ids, masks = batches()
    parameters = list(patched.trainable_parameters())

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


def contexts(model):
    return [layer.self_attn.q_proj.__dict__["_modality_context"] for layer in model.model.layers]


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["none", "reentrant", "not"])
def test_nothing_is_kept_after_a_forward(checkpointing):
    """A part that is called by itself must not use the ids, and the rows would stay in memory."""
    model, patched = make(checkpointing)
    ids, (mask, _) = batches()
    loss = model(ids, modality_ids=mask, labels=ids).loss
    assert all(context.call is None for context in contexts(model))
    assert patched.forwards.sorted_rows is not patched.forwards.sorted_rows
    loss.backward()
    assert all(context.call is None for context in contexts(model))


def test_an_interrupt_as_a_forward_begins(monkeypatch):
    """The next forward of the thread must not take it for one that runs."""
    model, _ = make()
    ids, (mask, _) = batches()
    expected = model(ids, modality_ids=mask).logits

    class Interrupted(context.SortedRows):
        made = 0

        def __init__(self):
            super().__init__()
            Interrupted.made += 1
            if Interrupted.made == 2:  # the first stands for those of no forward
                raise KeyboardInterrupt

    def forwards():
        with monkeypatch.context() as patch:
            patch.setattr(context, "SortedRows", Interrupted)
            with pytest.raises(KeyboardInterrupt):
                model(ids, modality_ids=mask)
        return model(ids, modality_ids=mask).logits

    with ThreadPoolExecutor(1) as pool:  # a thread that no forward has run in
        assert torch.equal(pool.submit(forwards).result(), expected)


def test_ids_written_into_the_same_tensor():
    """Rows are sorted for the ids of their forward, not for the tensor that holds these."""
    model, _ = make()
    ids, (mask, other) = batches()
    with torch.no_grad():
        expected = model(ids, modality_ids=other.clone()).logits
        model(ids, modality_ids=mask)
        assert torch.equal(model(ids, modality_ids=mask.copy_(other)).logits, expected)


def test_ids_written_into_the_tensor_of_a_forward_around():
    model, _ = make()
    ids, (mask, other) = batches()
    inner = []

    def call(*args):
        if not inner:
            inner.append(None)
            inner[0] = model(ids, modality_ids=mask.copy_(other)).logits

    with torch.no_grad():
        expected = model(ids, modality_ids=other.clone()).logits
        with model.model.layers[1].mlp.gate.register_forward_pre_hook(call):
            model(ids, modality_ids=mask)
    assert torch.equal(inner[0], expected)


@FAMILY
@pytest.mark.parametrize("part", ["mlp", "mlp.experts", "mlp.gate", "self_attn.q_proj"])
def test_a_part_called_by_itself_is_refused(family, part):
    """It would be computed with the mask of the last forward."""
    model, _ = patched_model(family, ModalityLoraConfig(target_modules=TARGETS))
    ids, (mask, _) = batches()
    model(ids, modality_ids=mask)
    x = [torch.randn(2, 12, 32)] + [torch.zeros(24, 2).long(), torch.ones(24, 2)] * (
        part == "mlp.experts"
    )
    with pytest.raises(RuntimeError, match="this layer got no modality_ids"):
        model.model.layers[0].get_submodule(part)(*x)


def test_nothing_is_kept_after_a_forward_that_failed():
    model, _ = make()
    ids, (mask, _) = batches()

    def fail(*args):
        raise ArithmeticError

    experts = model.model.layers[1].mlp.experts
    with experts.register_forward_pre_hook(fail), pytest.raises(ArithmeticError):
        model(ids, modality_ids=mask)
    assert all(context.call is None for context in contexts(model))


def test_an_exception_in_attention_ends_the_forward_of_its_layer():
    """The experts, whose hook ends it, do not run then."""
    model, _ = make()
    ids, (mask, _) = batches()

    def fail(*args):
        raise ArithmeticError

    layer = model.model.layers[1]
    o_proj = layer.self_attn.o_proj
    with o_proj.register_forward_pre_hook(fail), pytest.raises(ArithmeticError):
        model(ids, modality_ids=mask)
    assert all(context.call is None for context in contexts(model))
    with pytest.raises(RuntimeError, match="this layer got no modality_ids"):
        layer.mlp(torch.randn(2, 12, 32))


def test_what_a_failed_recompute_left_ends_with_the_next_forward():
    model, _ = make(checkpointing=False)
    ids, (mask, _) = batches()
    loss = model(ids, modality_ids=mask, labels=ids).loss

    def fail(*args):
        raise ArithmeticError

    o_proj = model.model.layers[1].self_attn.o_proj
    with o_proj.register_forward_pre_hook(fail), pytest.raises(ArithmeticError):
        loss.backward()
    model(ids, modality_ids=mask)
    assert all(context.call is None for context in contexts(model))


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("place", ["self_attn", "self_attn.o_proj", "mlp.experts"])
def test_a_forward_within_a_forward(place, fails):
    """Each has its own ids, and the outer goes on with its own, also after an exception."""
    model, _ = make()
    ids, (mask, other) = batches()
    module, inner = model.model.layers[1].get_submodule(place), []

    def stop(*args):
        raise ArithmeticError

    def call(*args):
        if inner:
            return
        inner.append(None)
        hook = model.model.layers[1].mlp.gate.register_forward_pre_hook(stop) if fails else None
        with contextlib.suppress(ArithmeticError):
            inner[0] = model(ids, modality_ids=other).logits
        if fails:
            hook.remove()

    with torch.no_grad():
        expected = [model(ids, modality_ids=each).logits for each in (mask, other)]
        with module.register_forward_pre_hook(call):
            assert torch.equal(model(ids, modality_ids=mask).logits, expected[0])
    assert inner[0] is None if fails else torch.equal(inner[0], expected[1])
    assert all(context.call is None for context in contexts(model))


def test_a_module_trains_after_a_forward_in_inference_mode():
    model, _ = make()
    q_proj, (context, _) = model.model.layers[0].self_attn.q_proj, contexts(model)
    x, (_, (mask, _)) = torch.randn(2, 12, 32), batches()
    context.start(mask)
    with torch.inference_mode():
        expected = q_proj(x)
    out = q_proj(x)
    out.sum().backward()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.gate"])
def test_a_wrong_number_of_rows_is_named_in_the_users_words(name):
    model, _ = make()
    _, (mask, _) = batches()
    module = model.model.layers[0].get_submodule(name)
    module.__dict__["_modality_context"].start(mask)
    message = "hidden_states have 22 rows, the modality_ids of this forward 24: pass"
    with pytest.raises(ValueError, match=message):
        module(torch.randn(2, 11, 32))


def test_running_a_part_restores_the_call_before():
    model, _ = make()
    context, (_, (mask, other)) = contexts(model)[0], batches()
    context.start(mask)
    before = context.call
    with pytest.raises(ArithmeticError), context.running(other):
        assert context.modality_ids is other
        raise ArithmeticError
    assert context.call is before


def test_ids_that_are_set_anew_are_sorted_anew():
    model, _ = make()
    ids, masks = batches()
    q_proj = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 12, 32)
    context = q_proj.__dict__["_modality_context"]
    results = []
    for mask in (*masks, masks[0]):
        context.start(mask)
        results.append(q_proj(x))
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])
