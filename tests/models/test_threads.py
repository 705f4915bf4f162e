"""Several threads on one patched model: each gets what it would get alone."""

import asyncio
import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.added_experts import extended
from support.model_zoo import FAMILY, VOCAB, randomise, token_ids
from support.patched_models import patched_model

from moe_kernels import ModalityLoraConfig
from moe_kernels.models.context import ModalityContext

ROUNDS = 12
TEXT, PICTURES = ({"input_ids": token_ids(1, 12, seed=seed)} for seed in (0, 1))
GIVEN = PICTURES | {"modality_ids": torch.ones(1, 12, dtype=torch.int64)}


def in_threads(*calls):
    """Run the calls ROUNDS times, each in a thread of its own; return the results of each."""
    results, start = [[] for _ in calls], threading.Barrier(len(calls))

    def work(call, found):
        start.wait()
        with torch.no_grad():
            found += [call() for _ in range(ROUNDS)]

    pairs = zip(calls, results, strict=True)
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def assert_alone_and_together(*calls):
    """Fail unless each call gives in threads what it gives alone, and no two give the same."""
    with torch.no_grad():
        alone = [call() for call in calls]
    assert not any(torch.equal(a, b) for a, b in zip(alone, alone[1:], strict=False))
    for expected, found in zip(alone, in_threads(*calls), strict=True):
        assert len(found) == ROUNDS  # a thread that raised has fewer
        assert all(torch.equal(each, expected) for each in found)


def logits(model, inputs, context=contextlib.nullcontext):
    def call():
        with context():
            return model(**inputs, use_cache=False).logits

    return call


@FAMILY
@pytest.mark.parametrize("targets", [("experts",), ("attention",), ("experts", "router")], ids=str)
def test_text_and_pictures(family, targets):
    model, _ = patched_model(family, ModalityLoraConfig(r=4, target_modules=targets))
    assert_alone_and_together(logits(model, TEXT), logits(model, GIVEN))


@FAMILY
def test_ids_that_the_tokens_give(family):
    """Text and pictures in one batch, whose modality follows from the tokens."""
    model, patched = patched_model(family, ModalityLoraConfig(r=4), num_tokens=8)
    mixed = {"input_ids": token_ids(1, 12, vocab=VOCAB + 8, seed=2)}
    assert (mixed["input_ids"] >= VOCAB).any()
    calls = [logits(model, mixed), logits(model, TEXT), logits(model, mixed, patched.text_only)]
    assert_alone_and_together(*calls)


def test_a_forward_within_a_forward():
    """A hook calls the model, with other ids, while another thread runs it too."""
    model, _ = patched_model("olmoe", ModalityLoraConfig(r=4))
    plain, inner = logits(model, GIVEN), logits(model, TEXT)
    within = threading.local()

    def call(module, args):
        if getattr(within, "outer", False):
            within.outer = False
            within.found = inner()

    def outer():
        within.outer = True
        return torch.cat([plain(), within.found])

    with model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(call):
        with torch.no_grad():
            assert torch.equal(outer(), torch.cat([plain(), inner()]))
        assert_alone_and_together(outer, plain, inner)


@FAMILY
@pytest.mark.parametrize("calibration", ["additive", "multiplicative"])
def test_added_experts(family, calibration):
    extender = extended(family, calibration=calibration)
    randomise(extender.patched)
    model = extender.model
    off = logits(model, GIVEN, extender.disabled)
    assert_alone_and_together(logits(model, TEXT), logits(model, GIVEN), off)


def test_adapters_are_disabled_in_one_thread_alone():
    model, patched = patched_model("olmoe", ModalityLoraConfig(r=4))
    off = logits(model, GIVEN, patched.adapters_disabled)
    assert_alone_and_together(logits(model, GIVEN), off)


def test_added_tokens_are_left_out_in_one_thread_alone():
    model, patched = patched_model("olmoe", num_tokens=8)
    calls = [logits(model, TEXT, patched.text_only), logits(model, TEXT)]
    assert_alone_and_together(*calls)
    assert calls[0]().shape[-1] == calls[1]().shape[-1] - 8


def test_the_switch_itself_is_for_all_threads():
    model, patched = patched_model("olmoe", ModalityLoraConfig(r=4))
    with torch.no_grad(), patched.adapters_disabled():
        expected = logits(model, GIVEN)()
    patched.adapters_enabled = False
    (found,) = in_threads(logits(model, GIVEN))
    assert torch.equal(found[0], expected) and not patched.adapters_enabled


def test_two_models():
    calls = [logits(patched_model("olmoe", ModalityLoraConfig(r=r))[0], GIVEN) for r in (2, 4)]
    assert_alone_and_together(*calls)


def test_training_in_two_threads():
    """A checkpointed layer is recomputed with the ids of its own forward."""
    model, patched = patched_model("olmoe", ModalityLoraConfig(r=4))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    weight = next(patched.trainable_parameters())
    masks = [GIVEN["modality_ids"], (token_ids(1, 12) % 2).long()]

    def gradient(mask):
        with torch.enable_grad():
            loss = model(**PICTURES | {"modality_ids": mask, "labels": TEXT["input_ids"]}).loss
            return torch.autograd.grad(loss, weight, allow_unused=True)[0]

    assert_alone_and_together(*[lambda mask=mask: gradient(mask) for mask in masks])


SWITCHES = pytest.mark.parametrize("switch", ["text_only", "adapters_disabled"])


@SWITCHES
def test_a_coroutine_has_switches_of_its_own(switch):
    """One waits within a context, while another computes."""
    model, patched = patched_model("olmoe", ModalityLoraConfig(r=4), num_tokens=8)
    context = getattr(patched, switch)
    plain, switched = logits(model, GIVEN), logits(model, GIVEN, context)

    async def waiting(entered, done):
        with context():
            entered.set()
            await done.wait()
            return plain()

    async def other(entered, done):
        await entered.wait()
        found = plain()
        done.set()
        return found

    async def both():
        entered, done = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(waiting(entered, done), other(entered, done))

    with torch.no_grad():
        within, outside = asyncio.run(both())
        assert torch.equal(within, switched()) and torch.equal(outside, plain())


@SWITCHES
def test_a_coroutine_has_the_switches_of_its_creator(switch):
    model, patched = patched_model("olmoe", ModalityLoraConfig(r=4), num_tokens=8)
    context = getattr(patched, switch)

    async def call():
        return logits(model, GIVEN)()

    async def create():
        with context():
            return await asyncio.gather(call(), call())

    with torch.no_grad():
        for found in asyncio.run(create()):
            assert torch.equal(found, logits(model, GIVEN, context)())


@pytest.mark.slow  # it compiles
def test_compiled_models_see_the_switches():
    model, patched = patched_model("olmoe", ModalityLoraConfig(r=4))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for context in (contextlib.nullcontext, patched.adapters_disabled) * 2:
            expected = logits(model, GIVEN, context)()
            assert torch.equal(logits(compiled, GIVEN, context)(), expected)


def test_a_context_that_ends_in_another_thread():
    """Web servers continue a generator in whichever thread is free."""
    model, patched = patched_model("olmoe", ModalityLoraConfig(r=4))
    compute = logits(model, GIVEN)

    def answers():
        with patched.adapters_disabled():
            yield
            yield

    with torch.no_grad(), ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        expected = first.submit(torch.no_grad()(compute)).result()
        generator = answers()
        first.submit(next, generator).result()
        second.submit(next, generator).result()
        with pytest.raises(RuntimeError, match="entered in one thread or task and left in another"):
            second.submit(next, generator, None).result()
        assert torch.equal(first.submit(torch.no_grad()(compute)).result(), expected)


def test_the_switch_is_not_set_within_the_context():
    _, patched = patched_model("olmoe")
    with patched.adapters_disabled(), pytest.raises(RuntimeError, match="for all threads"):
        patched.adapters_enabled = True
    assert patched.adapters_enabled


def test_a_copy_has_no_call_of_its_own():
    context = ModalityContext("cpu")
    context.start(torch.ones(1, 2, dtype=torch.int64))
    copied = copy.deepcopy(context)
    assert copied.call is None and copied.backend == "cpu"
    assert copied.switches.uses_adapters() and copied.switches.uses_added_experts()
