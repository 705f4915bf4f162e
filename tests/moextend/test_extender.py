"""Added experts: the rows that may choose them, their outputs, and unchanged bits of text."""

import copy
import json

import numpy as np
import pytest
import torch
from support.added_experts import extended, kinds, logits, mixed, routed
from support.model_zoo import (
    FAMILY,
    LARGE,
    VOCAB,
    assert_same_snapshot,
    fill,
    make_model,
    randomise,
    snapshot,
    token_ids,
    unchanged,
)
from support.patched_models import assert_saved, check_generation, greedy, patched_model
from support.registered_ops import same
from torch import nn
from torch.nn import functional as F

from moe_kernels import ModalityLoraConfig, add_modality_tokens, ops, patch_model
from moe_kernels.models.added_experts import added_experts
from moe_kernels.models.handle import get_patched
from moe_kernels.models.parts import parts_of
from moe_kernels.models.routers import find_routing, route
from moe_kernels.moextend import ExpertExtender, ExtensionConfig
from moe_kernels.testing import assert_close, relative_rms, working_backends

BACKENDS = pytest.mark.parametrize("backend", working_backends())
CALIBRATIONS = pytest.mark.parametrize("calibration", ["additive", "multiplicative", None])


# --- routing


@FAMILY
@CALIBRATIONS
def test_routing_row_by_row(family, calibration):
    """Text and padding rows are routed by their E logits, image rows by E+X."""
    extender = extended(family, experts_per_layer=2, calibration=calibration)
    randomise(extender.patched)
    model, inputs = extender.model, mixed()
    text, image = kinds(inputs)
    wide, scores, indices, rows = routed(model, **inputs)
    router, (added,) = parts_of(model.model.layers[0]).router, added_experts(model.model.layers[0])
    routing = router.__dict__["_routing"]
    own = F.linear(rows, router.weight)
    assert torch.equal(wide[:, :4], own)
    assert torch.equal(wide[~image, 4:], torch.full((int((~image).sum()), 2), -torch.inf))
    assert_close(wide[image, 4:], (rows @ added.router_columns.T)[image])
    for actual, expected in zip((scores, indices), route(own, routing), strict=True):
        assert torch.equal(actual[~image], expected[~image])
    expected = by_hand(wide[image].double(), routing, added.calibration)
    assert torch.equal(indices[image], expected[1])
    assert_close(scores[image], expected[0])
    assert (indices[image] >= 4).any() and (indices[text] < 4).all()


def by_hand(wide, routing, calibration):
    """Compute B3 of docs/methods_specification.md one row at a time."""
    all_scores, all_indices = [], []
    for row in wide:
        p = row.exp() / row.exp().sum()
        chosen = p.argsort(descending=True)[: routing.top_k]
        if calibration is not None:
            A, B = calibration.calibration_A.double(), calibration.calibration_B.double()
        weights = p[chosen]
        if calibration is not None and calibration.form == "additive":
            weights = (p + B @ F.gelu(A @ p))[chosen]
        if routing.normalise:
            weights = weights / weights.sum()
        if calibration is not None and calibration.form == "multiplicative":
            s = torch.zeros_like(p)
            s[chosen] = weights
            weights = weights * (1 + B @ F.gelu(A @ s))[chosen]
        all_scores.append(weights)
        all_indices.append(chosen)
    return torch.stack(all_scores).detach(), torch.stack(all_indices)


@CALIBRATIONS
def test_a_calibration_starts_as_the_identity(calibration):
    plain = extended("olmoe", calibration=None, init="mean")
    other = extended("olmoe", calibration=calibration, init="mean")
    assert same(routed(plain.model, **mixed()), routed(other.model, **mixed()))


@FAMILY
def test_the_layer_by_hand(family):
    """Image rows have the outputs of a model with the experts in its own stacks."""
    extender = extended(family, calibration=None, model={"dtype": torch.float64})
    randomise(extender.patched, scale=0.2)
    model = extender.model
    twin = make_model(family, num_hidden_layers=2, dtype=torch.float64, **wider(family))
    state = {n: p.clone() for n, p in model.state_dict().items() if "modality_" not in n}
    for index, layer in enumerate(model.model.layers):
        for added in added_experts(layer):
            for name, own in (
                ("mlp.experts.gate_up_proj", added.gate_up_proj),
                ("mlp.experts.down_proj", added.down_proj),
                ("mlp.gate.weight", added.router_columns),
            ):
                key = f"model.layers.{index}.{name}"
                state[key] = torch.cat([state[key], own.detach()])
    twin.load_state_dict(state)
    ids = token_ids(2, 20)
    expected = logits(twin, {"input_ids": ids})
    actual = logits(model, {"input_ids": ids, "modality_ids": torch.ones_like(ids)})
    assert relative_rms(actual, expected) < 1e-5
    assert relative_rms(logits(model, {"input_ids": ids}), expected) > 0.01


def wider(family):
    return {"num_local_experts" if family == "mixtral" else "num_experts": 5}


def test_copies_tie_with_their_source_without_a_gate():
    """At step 0 without a gate, as published, a copy evicts the true second expert."""
    extender = extended("mixtral", modality_gate=False, calibration=None)
    inputs = mixed()
    real = sum(kinds(inputs)).bool()
    model = extender.model
    _, _, indices, _ = routed(model, **inputs)
    with extender.disabled():
        before = routed(model, **inputs)[2]
    first = before[:, 0] == 0  # expert 0 was copied
    assert (first & real).any()
    assert torch.equal(indices[first].sort(-1).values, torch.tensor([0, 4]).expand(first.sum(), 2))
    never = (before != 0).all(-1)
    assert torch.equal(indices[never], before[never])


# --- text bits


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("length", "family", "own"),
    [
        (200, "mixtral", {"intermediate_size": 64, "num_local_experts": 8}),
        (64, "olmoe", {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 3}),
    ],
)
def test_text_keeps_its_bits(backend, dtype, length, family, own):
    """Text keeps the bits from before the extension after steps, with large weights and NaN."""
    model = make_model(family, dtype=dtype, **LARGE, num_hidden_layers=1, **own)
    ids = token_ids(2, length)
    extender = ExpertExtender(model, backend=backend)
    modality_ids = torch.zeros_like(ids)

    def text():
        inputs = {"input_ids": ids, "modality_ids": modality_ids, "output_router_logits": True}
        with torch.no_grad():
            out = model(**inputs)
        return out.logits[0], out.router_logits[0][:length]

    expected = text()
    extender.extend("all", 3, init=0)
    assert same(text(), expected)
    modality_ids[1] = 1
    optimiser = torch.optim.SGD(extender.patched.trainable_parameters(), lr=10.0)
    for _ in range(2):
        optimiser.zero_grad()
        model(ids, labels=ids, modality_ids=modality_ids).loss.backward()
        optimiser.step()
    for change in (
        lambda: None,
        lambda: randomise(extender.patched, scale=100.0),
        lambda: fill(extender.patched, float("inf")),
        lambda: fill(extender.patched, float("nan")),
    ):
        change()
        assert same(text(), expected)
    with torch.no_grad():
        assert model(ids, modality_ids=modality_ids).logits[1].isnan().any()


def of_three_kinds(model):
    """Return logits of a text, an image and a task sequence.

    They are padded on either side, and decoded with a cache.
    """
    ids, padding = token_ids(3, 24), 5
    modality_ids = torch.arange(3)[:, None].expand_as(ids)
    found = []
    for real in (slice(padding, None), slice(None, -padding)):
        mask = torch.zeros_like(ids)
        mask[:, real] = 1
        inputs = {"input_ids": ids, "modality_ids": modality_ids, "attention_mask": mask}
        found.append(logits(model, inputs)[:, real])
        if real.start:
            settings = {"max_new_tokens": 3, "do_sample": False}
            out = model.generate(
                **inputs, **settings, output_logits=True, return_dict_in_generate=True
            )
            found.append(torch.stack(out.logits, dim=1))
    return found


@FAMILY
@CALIBRATIONS
@pytest.mark.parametrize("low_rank", [False, True])
def test_each_kind_keeps_its_bits_beside_the_others(family, calibration, low_rank):
    """Extensions of two modalities, in equal and different layers, keep each other's bits."""
    targets = ("experts", "attention", "router") if low_rank else ()
    modalities = {"modalities": ("image", "task"), "sequence_modalities": ("task",)}
    config = ModalityLoraConfig(r=4, target_modules=targets, **modalities)
    model, patched = patched_model(family, config, hidden_size=128, num_hidden_layers=3)
    steps = [of_three_kinds(model)]
    extender = ExpertExtender(model)
    options = {"calibration": calibration, "freeze_earlier": False}
    extender.extend("all", 2, init=0, modality="image", **options)
    extender.extend([0], 1, init="mean", modality="task", **options)

    def spoil_the_task():
        for parameter in added_experts(model.model.layers[0])[1].parameters():
            nn.init.constant_(parameter, float("nan"))

    for change, kept in (
        (lambda: randomise(patched, seed=3), [True, False, False]),
        (spoil_the_task, [True, True, False]),
        (lambda: fill(patched, float("nan")), [True, False, False]),
    ):
        change()
        steps.append(of_three_kinds(model))
        for each in zip(*steps[-2:], strict=True):
            assert [torch.equal(*rows) for rows in zip(*each, strict=True)] == kept


# --- training


@FAMILY
@CALIBRATIONS
def test_gradients_where_they_should_be(family, calibration):
    extender = extended(family, calibration=calibration)
    randomise(extender.patched)
    model, inputs = extender.model, mixed()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trainable = dict(extender.patched.named_trainable_parameters())
    assert {name.rsplit(".", 1)[1] for name in trainable} == (
        {"gate_up_proj", "down_proj", "router_columns"}
        | ({"calibration_A", "calibration_B"} if calibration else set())
    )
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in trainable)
        assert (parameter.grad is not None and parameter.grad.any()) == (name in trainable), name


def test_text_alone_gives_no_gradient_but_a_loss_that_has_one():
    extender = extended("olmoe")
    ids = token_ids(2, 12)
    extender.model(ids, labels=ids).loss.backward()
    for parameter in extender.patched.trainable_parameters():
        assert parameter.grad is None or not parameter.grad.any()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_text_keeps_its_bits(backend, dtype):
    sizes = LARGE | {"num_hidden_layers": 1, "intermediate_size": 64, "num_local_experts": 8}
    check_the_gradient_of_text(make_model("mixtral", dtype=dtype, **sizes), 64, backend, "additive")


@FAMILY
@CALIBRATIONS
def test_the_gradient_of_text_in_every_family(family, calibration):
    check_the_gradient_of_text(make_model(family), 12, None, calibration)


def check_the_gradient_of_text(model, length, backend, calibration):
    """Check that text's gradient keeps its bits even if added experts are NaN (0 * NaN is NaN)."""
    extender = ExpertExtender(model, ("image", "task"), backend=backend)
    ids = token_ids(2, length)
    embeddings = model.get_input_embeddings()(ids).detach()

    def gradient(modality_ids):
        leaf = embeddings.clone().requires_grad_()
        labels = ids.masked_fill(modality_ids != 0, -100)
        model(inputs_embeds=leaf, modality_ids=modality_ids, labels=labels).loss.backward()
        return leaf.grad

    text = torch.zeros_like(ids)
    mixed_ids = torch.stack([text[0], text[0] + 1])
    expected = gradient(text), gradient(mixed_ids)[0]
    assert all(grad.any() for grad in expected)
    extender.extend([0], 2, init=0, modality="image", calibration=calibration)
    extender.extend([0], 1, init=1, modality="task", freeze_earlier=False, calibration=calibration)
    for change in (
        lambda: randomise(extender.patched, scale=100.0),
        lambda: fill(extender.patched, 1e38),
        lambda: fill(extender.patched, float("inf")),
        lambda: fill(extender.patched, float("nan")),
    ):
        change()
        assert torch.equal(gradient(text), expected[0])
        assert torch.equal(gradient(mixed_ids)[0], expected[1])


@FAMILY
def test_rows_learn_to_use_the_added_expert(family):
    """Training sends more rows to the added expert; disabling it loses what was learnt."""
    extender = extended(family, calibration="additive", init="random")
    model, inputs = extender.model, mixed(4, 16)
    inputs["attention_mask"][:] = 1
    text, image = kinds(inputs)
    before = routed(model, **inputs)[2]
    labels = inputs["input_ids"].masked_fill(inputs["modality_ids"] == 0, -100)

    def loss():
        return model(**inputs, labels=labels).loss

    first = loss().item()
    optimiser = torch.optim.Adam(extender.patched.trainable_parameters(), lr=0.03)
    for _ in range(12):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    with torch.no_grad():
        last = loss().item()
        with extender.disabled():
            without = loss().item()
    assert last < first - 0.5 and last < without - 0.5
    after = routed(model, **inputs)[2]
    assert (after[image] == 4).sum() > (before[image] == 4).sum()
    assert torch.equal(after[text], before[text])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing(reentrant):
    """Two forwards before one backward: each recompute uses the mask of its own forward."""
    extender = extended("olmoe")
    randomise(extender.patched)
    model, inputs = extender.model.train(), mixed()
    other = inputs | {"modality_ids": 1 - inputs["modality_ids"]}

    def gradients():
        model.zero_grad()
        sum(model(**i, labels=i["input_ids"]).loss for i in (inputs, other)).backward()
        return [p.grad.clone() for p in extender.patched.trainable_parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert relative_rms(ours, theirs) < 1e-5


def test_half_precision():
    """Parameters are float32 on a bfloat16 base; a copy that is cast equals its source."""
    extender = extended("mixtral", model={"dtype": torch.bfloat16})
    parameters = list(extender.patched.trainable_parameters())
    assert {p.dtype for p in parameters} == {torch.float32}
    layer = extender.model.model.layers[0]
    (added,) = added_experts(layer)
    assert torch.equal(added.gate_up_proj[0].bfloat16(), layer.mlp.experts.gate_up_proj[0])
    inputs = mixed()
    extender.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert {p.grad.dtype for p in parameters} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        extender.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.isfinite().all() for p in parameters)


# --- several extensions, and what else a model can have


@FAMILY
def test_a_second_extension_leaves_the_first_as_it_is(family):
    extender = extended(family, layers=[0], experts_per_layer=2, calibration="multiplicative")
    randomise(extender.patched)
    first = dict(extender.patched.named_trainable_parameters())
    before = {name: p.detach().clone() for name, p in first.items()}
    model, inputs = extender.model, mixed()
    expected = logits(model, inputs)
    extender.extend([0], 1, init=5, calibration="additive")  # a copy of an added expert
    one, two = added_experts(model.model.layers[0])
    assert torch.equal(two.down_proj[0], one.down_proj[1])
    assert two.calibration.calibration_A.shape == (16, 7)
    assert not torch.equal(logits(model, inputs), expected)
    trainable = dict(extender.patched.named_trainable_parameters())
    assert trainable and not set(trainable) & set(first)
    randomise(extender.patched)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in first.items():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    assert all(p.grad.any() for p in trainable.values())
    assert (routed(model, **inputs)[2] == 6).any()
    extender.extend([0], init=0, freeze_earlier=False)
    assert set(trainable) < set(dict(extender.patched.named_trainable_parameters()))


def joined_gradients(monkeypatch):
    """Record the op's gradients of a layer's added experts, all extensions joined."""
    found, moe_mlp = [], ops.moe_mlp

    def spy(*args, **kwargs):
        for name in kwargs.keys() & {"extra_gate_up_proj", "extra_down_proj"}:
            kwargs[name].register_hook(lambda grad: found.append(grad.clone()))
        return moe_mlp(*args, **kwargs)

    monkeypatch.setattr(ops, "moe_mlp", spy)
    return found


@BACKENDS
@pytest.mark.parametrize("freeze", [True, False])
def test_no_gradient_of_a_frozen_extension_is_computed(backend, freeze, monkeypatch):
    """The op computes no gradient of frozen experts, though all extensions are one tensor."""
    extender = ExpertExtender(make_model("mixtral"), backend=backend)
    extender.extend([0], 2, init=0)
    extender.extend([0], 1, init=1, freeze_earlier=freeze)
    for each in added_experts(extender.model.model.layers[0]):
        nn.init.normal_(each.router_columns)
    inputs = mixed(4, 32)
    assert torch.isin(torch.arange(4, 7), routed(extender.model, **inputs)[2]).all()
    found = joined_gradients(monkeypatch)
    extender.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert len(found) == 2
    for grad in found:
        assert grad.shape[0] == 3 and grad[2].any()
        assert all(grad[i].any() != freeze for i in range(2))


def test_what_a_second_extension_freezes_is_named():
    extender = ExpertExtender(make_model("mixtral"), ("image", "audio"))
    first = extender.add_projector(4, modality="image")
    with pytest.warns(UserWarning, match="alone: the projector of 'image'. freeze_earlier=False"):
        extender.extend("all", init=0, modality="image")
    second = extender.add_projector(4, modality="audio")
    message = (
        r"alone: the experts of 'image' in layers 0, 1 \(extension 1\), the projector of 'audio'"
    )
    with pytest.warns(UserWarning, match=message):
        extender.extend([1], init=0, modality="audio")
    assert not any(p.requires_grad for each in (first, second) for p in each.parameters())
    for layer in extender.model.model.layers:
        earlier, *later = added_experts(layer)
        assert not any(p.requires_grad for p in earlier.parameters())
        assert all(p.requires_grad for each in later for p in each.parameters())


@pytest.mark.parametrize("freeze", [True, False])
def test_a_choice_to_freeze_is_not_warned_of(freeze, recwarn):
    extender = extended("mixtral")
    extender.extend("all", init=0, freeze_earlier=freeze)
    earlier, _ = added_experts(extender.model.model.layers[0])
    assert all(p.requires_grad != freeze for p in earlier.parameters())
    assert not recwarn.list


def test_each_modality_has_its_own_experts():
    """Image rows keep the bits of their routing when a task gets experts too."""
    extender = extended("qwen3_moe", modalities=("image", "task"), modality="image")
    randomise(extender.patched)
    model, image, task = extender.model, mixed(), mixed(modality=2)
    before = [routed(model, **inputs) for inputs in (image, task)]
    extender.extend("all", 2, init=1, modality="task")
    randomise(extender.patched, seed=5)
    for inputs, (_, scores, indices, _), rerouted in zip((image, task), before, (False, True),
                                                        strict=True):  # fmt: skip
        new = routed(model, **inputs)
        text, own = kinds(inputs)
        assert torch.equal(new[1][text], scores[text]) and torch.equal(new[2][text], indices[text])
        assert torch.equal(new[2][own], indices[own]) != rerouted
        assert torch.equal(new[1][own], scores[own]) != rerouted
        open_ids, closed = ((5, 6), (4,)) if rerouted else ((4,), (5, 6))
        assert torch.isin(new[2][own], torch.tensor(open_ids)).any()
        assert not torch.isin(new[2][own], torch.tensor(closed)).any()
        assert new[0][:, closed].isneginf().all()


@FAMILY
def test_with_low_rank_updates_everywhere(family):
    """With pairs on experts, attention and router, everything trains and text keeps its bits."""
    config = ModalityLoraConfig(r=4, target_modules=("experts", "attention", "router"))
    model, patched = patched_model(family, config, num_tokens=3)
    inputs = mixed()
    text, image = kinds(inputs)
    plain, text_ids = routed(model, **inputs), {"input_ids": inputs["input_ids"]}
    expected = logits(model, text_ids)[..., :VOCAB]
    extender = ExpertExtender(model)
    assert extender.patched is patched
    extender.extend([0], 2, init=0)
    new = routed(model, **inputs)
    assert torch.equal(new[0][:, :4], plain[0])
    randomise(patched, seed=7)
    assert torch.equal(logits(model, text_ids)[..., :VOCAB], expected)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in patched.named_trainable_parameters():
        used = "added_rows" not in name or "lm_head" in name
        assert parameter.grad is not None and (parameter.grad.any() or not used), name
    with patched.adapters_disabled():
        off = routed(model, **inputs)
    assert (off[2] < 4).all()


def test_without_a_gate_a_balance_of_all_rows():
    extender = extended("mixtral", modality_gate=False)
    randomise(extender.patched)
    text, image = kinds(mixed())
    new, _, indices, _ = routed(extender.model, **mixed())
    assert new.isfinite().all()
    assert (indices[text] == 4).any() and (indices[image] == 4).any()
    with pytest.raises(ValueError, match="cannot stand beside one with a gate"):
        extender.extend("all", init=0)


@FAMILY
@pytest.mark.parametrize("gate", [True, False])
def test_the_balance_loss_is_the_bases(family, gate):
    """The balance loss counts E experts by E logits, whatever was added to each layer."""
    model = make_model(family)
    inputs = mixed() | {"output_router_logits": True}
    layers = 2 if family != "qwen2_moe" else 1
    extender = ExpertExtender(model)
    text = inputs | {"modality_ids": inputs["modality_ids"] * 0, "labels": inputs["input_ids"]}
    with torch.no_grad():
        expected = model(**text)
    extender.extend(range(layers), {0: 2, 1: 1} if layers == 2 else 1, init=0, modality_gate=gate)
    out = model(**inputs | {"labels": inputs["input_ids"]})
    assert [t.shape[-1] for t in out.router_logits] == [4] * layers
    assert out.aux_loss > 0
    actual = model(**text)
    assert torch.equal(actual.aux_loss, expected.aux_loss) == (gate or layers == 1)
    if gate:
        assert torch.equal(actual.loss, expected.loss)
    # Only the last layer's: later hidden states reach those of an earlier layer.
    last = added_experts(model.model.layers[layers - 1])[0]
    columns = torch.autograd.grad(out.aux_loss, last.router_columns, allow_unused=True)[0]
    assert columns is None or not columns.any()


# --- generation


@FAMILY
def test_generation_with_a_cache(family):
    extender = extended(family, model={"dtype": torch.float64})
    add_modality_tokens(extender.model, "image", 40)
    randomise(extender.patched, scale=0.5)
    check_generation(extender.model, 40)


def task_model(**options):
    model = make_model("olmoe", dtype=torch.float64)
    extender = ExpertExtender(model, ("image", "task"), sequence_modalities=("task",))
    extender.extend("all", init=0, modality="task", **options)
    randomise(extender.patched, scale=0.5)
    return extender


@pytest.mark.parametrize("cache", [True, False])
def test_a_task_of_text(cache):
    """Tokens generated in a task's sequence stay in the task; base text keeps its bits."""
    extender = task_model()
    model, ids = extender.model, token_ids(2, 6)
    tasks = torch.tensor([[2], [0]]).expand(2, 6)
    with extender.disabled():
        base = logits(model, {"input_ids": ids})
    out = logits(model, {"input_ids": ids, "modality_ids": tasks})
    assert torch.equal(out[1], base[1]) and not torch.equal(out[0], base[0])
    expected = greedy(model, ids, 5, lambda ids: tasks[:, :1].expand(ids.shape))
    settings = {"max_new_tokens": 5, "do_sample": False, "use_cache": cache}
    settings["attention_mask"] = torch.ones_like(ids)
    actual = model.generate(ids, modality_ids=tasks, **settings)
    assert torch.equal(actual, expected)
    assert not torch.equal(model.generate(ids, **settings)[0], expected[0])


# --- undone and copied


@FAMILY
@pytest.mark.parametrize("gate", [True, False])
def test_copied_saved_and_undone(family, gate, tmp_path):
    model = make_model(family)
    before, inputs = snapshot(model), mixed()
    extender = ExpertExtender(model)
    extender.extend([0], 2, init="mean", modality_gate=gate)
    extender.extend([0], 1, init=0, modality_gate=gate, freeze_earlier=False)
    extender.add_projector(5)
    randomise(extender.patched)
    expected = logits(model, inputs)
    twin = copy.deepcopy(model)
    randomise(extender.patched, seed=9)
    assert torch.equal(logits(twin, inputs), expected)
    assert not torch.equal(logits(model, inputs), expected)
    get_patched(twin).unpatch()
    assert_saved(extender.patched, tmp_path)
    extender.patched.unpatch()
    assert_same_snapshot(snapshot(model), before)
    assert_same_snapshot(snapshot(twin), before)
    with pytest.raises(ValueError, match="unpatched"):
        extender.extend("all", init=0)


# --- starts


@FAMILY
def test_starts(family):
    model = make_model(family)
    extender = ExpertExtender(model)
    layer = model.model.layers[0]
    stacks = (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, layer.mlp.gate.weight)
    for init in ("mean", "random", 2):
        extender.extend([0], 2, init=init)
        added = added_experts(layer)[-1]
        values = (added.gate_up_proj, added.down_proj, added.router_columns)
        for value, stack in zip(values, stacks, strict=True):
            if init == "random":
                assert 0.1 < value.std() < 0.3  # initializer_range is 0.2
                assert not torch.equal(value[0], value[1])
                continue
            source = stack.mean(0) if init == "mean" else stack[2]
            assert_close(value[0], source)
            # Copies of one expert differ a little in their columns, or they would stay equal.
            twins = relative_rms(value[1], value[0])
            assert 0 < twins < 0.1 if value is added.router_columns else twins == 0
    assert torch.equal(layer.mlp.gate.weight, parts_of(layer).router.weight)


def test_a_seed_gives_the_same_start():
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(starts))
        extender = extended("mixtral", init="random", seed=seed)
        starts.append([p.clone() for p in extender.patched.trainable_parameters()])
    assert same(*starts[:2])
    assert not torch.equal(starts[0][0], starts[2][0])


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]), ("interval", [0, 2, 4]), ("first-half", [0, 1]),
        ("second-half", [3, 4]), ([3, 1], [1, 3]), (range(2), [0, 1]), (None, [0, 4]),
    ],
)  # fmt: skip
def test_choosing_layers(layers, expected):
    numbers = {4: 1, 0: 3} if layers is None else 2
    extender = ExpertExtender(make_model("olmoe", num_hidden_layers=5))
    config = extender.extend(layers, numbers, init="random")
    added = {0: 3, 4: 1} if layers is None else dict.fromkeys(expected, 2)
    assert config.experts == added and extender.patched.extensions == [config]
    for index, layer in enumerate(extender.model.model.layers):
        assert sum(e.num_added for e in added_experts(layer)) == added.get(index, 0)


def test_integers_of_numpy():
    """Integers of numpy behave as Python's, and are saved as such."""
    extender = ExpertExtender(make_model("olmoe"))
    config = extender.extend(
        np.arange(2), np.int64(2), init=np.int32(3), calibration_hidden=np.int64(4)
    )
    sources = {0: (3, 3), 1: (3, 3)}
    expected = ExtensionConfig({0: 2, 1: 2}, "image", "additive", 4, "3", sources)
    assert json.loads(json.dumps(config.to_dict())) == expected.to_dict()
    again = extender.extend(None, {np.int64(1): np.int64(1)}, init=0)
    assert again.experts == {1: 1} and json.dumps(again.to_dict())
    assert extender.score_layers([mixed()], np.int64(1), progress=False).layers == (0, 1)


# --- refusals


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": [0, 2]}, r"layers \[2\] cannot be extended: the model has experts in layers"),
        ({"layers": [-1]}, "at least 0"),
        ({"layers": [0, 0]}, "twice"),
        ({"layers": [0, "1"]}, "a layer must be an index of at least 0, got '1'"),
        ({"layers": [1.0]}, "a layer must be an index of at least 0, got 1.0"),
        ({"layers": 1}, "layers must be a name or indices, got 1"),
        ({"layers": []}, "at least one layer"),
        ({"layers": "upper"}, "unknown layers 'upper'"),
        ({"layers": "top-half"}, "call score_layers first"),
        ({"init": "most_selected"}, "call score_layers first"),
        ({"init": "copy"}, "unknown init 'copy'"),
        ({"init": True}, "unknown init"),
        ({"init": 1.0}, "unknown init 1.0"),
        ({"layers": [True]}, "a layer must be an index of at least 0, got True"),
        ({"layers": [np.float64(1)]}, "a layer must be an index of at least 0"),
        ({"experts_per_layer": True}, "at least one expert, an integer; layer 0: True"),
        ({"calibration_hidden": True}, "calibration_hidden must be at least 1, got True"),
        ({"init": 4}, r"layer 0 has experts 0\.\.3, not 4"),
        ({"experts_per_layer": 0}, "at least one expert"),
        ({"experts_per_layer": 1.5}, "at least one expert"),
        ({"experts_per_layer": {0: 1}, "layers": "all"}, "has layers"),
        ({"experts_per_layer": {7: 1}, "layers": None}, r"layers \[7\] cannot be extended"),
        ({"calibration": "both"}, "unknown calibration 'both'"),
        ({"calibration_hidden": 0}, "calibration_hidden"),
        ({"modality": "sound"}, "not for 'sound'"),
    ],
)
def test_what_cannot_be_extended(options, match):
    model = make_model("mixtral")
    extender = ExpertExtender(model)
    with unchanged(model), pytest.raises(ValueError, match=match):
        extender.extend(**{"layers": "all", "init": 0} | options)
    assert not extender.patched.extensions


def test_a_dense_layer():
    extender = ExpertExtender(make_model("qwen2_moe"))
    assert extender.layers == (0,)
    with pytest.raises(ValueError, match=r"layers \[1\] cannot be extended"):
        extender.extend([1], init=0)


def test_models_that_do_not_fit():
    with pytest.raises(TypeError, match="needs a transformers model"):
        ExpertExtender(nn.Linear(2, 2))
    model = make_model("mixtral")
    patch_model(model, ModalityLoraConfig(r=2, modalities=("image", "sound")))
    with pytest.raises(ValueError, match=r"modalities=\('image', 'sound'\), not \('image',\)"):
        ExpertExtender(model, ("image",))
    with pytest.raises(ValueError, match="backend=None, not 'reference'"):
        ExpertExtender(model, backend="reference")
    with pytest.raises(ValueError, match=r"sequence_modalities=\(\), not \('sound',\)"):
        ExpertExtender(model, sequence_modalities=("sound",))
    with pytest.raises(ValueError, match="choose one by modality="):
        ExpertExtender(model).extend("all", init=0)
    with pytest.raises(ValueError, match="call extend first"):
        ExpertExtender(model).disturbance([mixed()])


@pytest.mark.parametrize("again", [False, True])
def test_a_model_that_is_not_patched_any_more(again):
    """A handle of an unpatched model is refused, even if the model was patched anew."""
    model = make_model("mixtral")
    extender = ExpertExtender(model)
    extender.patched.unpatch()
    if again:
        ExpertExtender(model, ("task",))
    for call in (
        lambda: extender.extend("all", init=0),
        lambda: extender.score_layers([mixed()], 1, progress=False),
        lambda: extender.add_projector(4),
        lambda: extender.disturbance([mixed()]),
        lambda: extender.disabled().__enter__(),
    ):
        with unchanged(model), pytest.raises(ValueError, match="this handle was unpatched"):
            call()


def test_a_router_that_is_not_supported():
    model = make_model("mixtral")
    extender = ExpertExtender(model)
    router = parts_of(model.model.layers[1]).router
    router.top_k = 9
    with pytest.raises(ValueError, match="layer 1 cannot be extended: .*chooses 9 experts of 4"):
        extender.extend("all", init=0)
    assert "forward" not in parts_of(model.model.layers[0]).router.__dict__
    with pytest.raises(ValueError, match="layer 1 cannot be scored: .*chooses 9 experts of 4"):
        extender.score_layers([mixed()], 1, progress=False)
    with pytest.raises(ValueError, match="chooses 9 experts of 4"):
        find_routing(router)


# --- disturbance


def test_disturbance_at_step_0():
    text = [{"input_ids": token_ids(2, 16, seed=s)} for s in range(2)]
    image = {"input_ids": token_ids(2, 16), "modality_ids": torch.ones(2, 16, dtype=torch.long)}
    gated = extended("mixtral").disturbance([*text, image])
    assert gated["text"].rows == 64 and gated["image"].rows == 32
    assert gated["text"].output_change == gated["text"].changed_rows == 0
    assert gated["text"].rerouted_rows == 0 and gated["text"].rerouted_by_layer == (0, 0)
    assert gated["image"].output_change > 0.01 and 0 < gated["image"].rerouted_rows <= 1
    published = extended("mixtral", modality_gate=False)
    found = published.disturbance(text)
    assert found["text"].output_change > 0.01 and found["text"].rerouted_rows > 0
    assert found["image"].rows == 0
    assert found["text"].to_dict()["rerouted_by_layer"] == list(found["text"].rerouted_by_layer)

    # One batch, computed by hand.
    model = published.model
    with published.disabled():
        before, expected = routed(model, **text[0]), logits(model, text[0])
    after, actual = routed(model, **text[0]), logits(model, text[0])
    one = published.disturbance(text[:1])["text"]
    assert one.output_change == pytest.approx(relative_rms(actual, expected), rel=1e-5)
    changed = [set(a) != set(b) for a, b in zip(after[2].tolist(), before[2].tolist(), strict=True)]
    assert one.rerouted_by_layer[0] == pytest.approx(sum(changed) / len(changed))


@pytest.mark.parametrize("gate", [True, False])
def test_disturbance_where_nothing_added_can_be_chosen(gate):
    """Disabled experts leave nothing to compare; those without a gate stay on."""
    extender = extended("mixtral", modality_gate=gate)
    image = {"input_ids": token_ids(2, 16), "modality_ids": torch.ones(2, 16, dtype=torch.long)}
    with extender.disabled(), pytest.raises(ValueError, match="no row can choose"):
        extender.disturbance([image])
    with extender.patched.adapters_disabled():
        if gate:
            with pytest.raises(ValueError, match="no row can choose"):
                extender.disturbance([image])
        else:
            assert extender.disturbance([image])["image"].output_change > 0.01
    assert extender.disturbance([image])["image"].output_change > 0.01


# --- switched off


def test_disabled_within_itself():
    extender = extended("mixtral", layers=[0])
    model, inputs = extender.model, mixed()
    with extender.disabled():
        base = logits(model, inputs)
    on = logits(model, inputs)
    assert not torch.equal(on, base)
    with extender.disabled():
        with extender.disabled():
            assert torch.equal(logits(model, inputs), base)
        assert torch.equal(logits(model, inputs), base)
        with pytest.raises(KeyError), ExpertExtender(model).disabled():
            raise KeyError
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model, inputs), on)


def test_what_changes_while_all_is_disabled():
    """Experts added while disabled stay off until the end; unpatch() removes everything."""
    model = make_model("mixtral")
    inputs = mixed()
    with unchanged(model):
        extender = ExpertExtender(model)
        expected = logits(model, inputs)
        with extender.disabled():
            extender.extend("all", init=0)
            randomise(extender.patched)
            assert torch.equal(logits(model, inputs), expected)
        assert not torch.equal(logits(model, inputs), expected)
        with extender.disabled():
            extender.patched.unpatch()
