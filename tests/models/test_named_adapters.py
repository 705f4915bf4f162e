"""Adapters by name: each call, and each sequence of a batch, has that which it asks for."""

import copy
import threading

import pytest
import torch
from support.devices import ON_GPU
from support.model_zoo import (
    FAMILY,
    VOCAB,
    assert_same_snapshot,
    make_model,
    randomise,
    snapshot,
    token_ids,
    unchanged,
)

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.analysis import RoutingRecorder
from moe_kernels.models.handle import get_patched
from moe_kernels.models.named_adapters import parameters_of
from moe_kernels.models.peft_format import load_peft_adapter, save_peft_adapter
from moe_kernels.moextend import ExpertExtender
from moe_kernels.testing import relative_rms, working_backends

ADDED = 4
NAMES = ("default", "sketch", "base", "photo")
TARGETS = ("experts", "attention", "router")
IDS = token_ids(len(NAMES), 11, vocab=VOCAB + ADDED, seed=3)
GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": []}


def make_patched(family="mixtral", modalities=("image",), **settings):
    """Return a model with three adapters of random values, and its handle."""
    model = make_model(family)
    config = ModalityLoraConfig(r=2, modalities=modalities, target_modules=TARGETS, **settings)
    patched = patch_model(model, config)
    for modality in modalities:
        add_modality_tokens(model, modality, ADDED // len(modalities))
    randomise(patched)
    for seed, name in enumerate(("sketch", "photo")):
        patched.add_adapter(name)
        fill(patched, name, seed)
    return model, patched


@torch.no_grad()
def fill(patched, name, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters_of(patched, name):
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model, ids=IDS, **options):
    return model(ids, **options).logits


# --- forwards


@FAMILY
@pytest.mark.parametrize("modalities", [("image",), ("image", "sound")], ids=len)
def test_each_sequence_of_a_batch_has_its_adapter(family, modalities):
    model, _ = make_patched(family, modalities)
    alone = {name: logits(model, adapter=name) for name in NAMES}
    for first, second in zip(NAMES, NAMES[1:], strict=False):
        assert not torch.equal(alone[first], alone[second])
    for names in (NAMES, NAMES[::-1], ("base", "photo") * 2, ("sketch",) * 4, ("base",) * 4):
        mixed = logits(model, adapter=list(names))
        for row, name in enumerate(names):
            assert relative_rms(mixed[row], alone[name][row]) < 1e-5, (names, name)


@pytest.mark.parametrize("backend", working_backends())
def test_one_batch_is_computed_alike_on_every_backend(backend):
    model, _ = make_patched(backend=backend)
    alone = {name: logits(model, adapter=name) for name in NAMES}
    mixed = logits(model, adapter=NAMES)
    for row, name in enumerate(NAMES):
        assert relative_rms(mixed[row], alone[name][row]) < 1e-5, name


@pytest.mark.parametrize("backend", working_backends())
def test_text_keeps_its_bits_under_any_mixture(backend):
    """NaN in one adapter reaches neither text nor sequences of another adapter."""
    model, patched = make_patched(backend=backend)
    text = token_ids(4, 11, seed=1)
    expected = logits(model, text, adapter="base")[..., :VOCAB]
    for parameter in parameters_of(patched, "photo"):
        parameter.data.fill_(torch.nan)
    half = torch.where(torch.arange(4)[:, None] % 2 == 0, text, IDS)
    for names in ("photo", "default", NAMES, ("photo", "sketch") * 2):
        assert torch.equal(logits(model, text, adapter=names)[..., :VOCAB], expected)
        found = logits(model, half, adapter=names)[::2, :, :VOCAB]
        if backend == "triton" and not ON_GPU:  # products of its interpreter depend on the place
            assert relative_rms(found, expected[::2]) < 1e-5
        else:
            assert torch.equal(found, expected[::2])
    alone = logits(model, adapter="sketch")[1]
    assert relative_rms(logits(model, adapter=NAMES)[1], alone) < 1e-5


def test_contexts_nest_and_are_of_this_thread():
    model, patched = make_patched()
    alone = {name: logits(model, adapter=name) for name in NAMES}
    with patched.adapter("sketch"):
        assert torch.equal(logits(model), alone["sketch"])
        with patched.adapter("photo"):
            assert torch.equal(logits(model), alone["photo"])
            assert torch.equal(logits(model, adapter="default"), alone["default"])
            with patched.adapter("base"):
                assert torch.equal(logits(model), alone["base"])
                assert not patched.adapters_enabled
                assert torch.equal(logits(model, adapter="photo"), alone["photo"])
                with patched.adapter("sketch"):
                    assert torch.equal(logits(model), alone["sketch"])
                with pytest.raises(RuntimeError, match="for all threads"):
                    patched.set_adapter("photo")
        assert torch.equal(logits(model), alone["sketch"])
        found = []
        thread = threading.Thread(target=lambda: found.append(logits(model)))
        thread.start()
        thread.join()
        assert torch.equal(found[0], alone["default"])
    assert torch.equal(logits(model), alone["default"])


def test_where_adapters_are_disabled_no_name_brings_them_back():
    model, patched = make_patched()
    expected = logits_of_rows(patched, "photo")
    with patched.adapters_disabled(), patched.adapter("photo"):
        assert torch.equal(logits(model), expected)
    with patched.adapter("base"), patched.adapters_disabled():
        assert torch.equal(logits(model, adapter="photo"), expected)


def logits_of_rows(patched, name):
    """Return logits without low-rank updates, with the added rows of an adapter."""
    twin = copy.deepcopy(patched.model)
    handle = get_patched(twin)
    handle.set_adapter(name)
    with handle.adapters_disabled():
        return logits(twin)


def test_threads_with_different_adapters_at_once():
    model, patched = make_patched()
    alone = {name: logits(model, adapter=name) for name in NAMES}
    mixed, found = logits(model, adapter=NAMES), []

    def work(name):
        for _ in range(10):
            if name is None:
                found.append(torch.equal(logits(model, adapter=NAMES), mixed))
            else:
                with patched.adapter(name):
                    found.append(torch.equal(logits(model), alone[name]))

    threads = [threading.Thread(target=work, args=[name]) for name in ("sketch", "photo", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30 and all(found)


@pytest.mark.parametrize(
    "more", [{}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}], ids=str
)
def test_generation_carries_the_adapters_of_prompts(more):
    model, patched = make_patched()
    mask = torch.ones_like(IDS)
    mask[::2, :3] = 0
    settings = {**GREEDY, "attention_mask": mask, **more}
    mixed = model.generate(IDS, adapter=list(NAMES), **settings)
    times = more.get("num_return_sequences", 1)
    for row, name in enumerate(NAMES):
        alone = model.generate(IDS, adapter=name, **settings)
        rows = slice(row * times, (row + 1) * times)
        assert torch.equal(mixed[rows], alone[rows]), name
        if name != "base":
            with patched.adapter(name):
                assert torch.equal(model.generate(IDS, **settings), alone)
    assert (mixed[:, IDS.shape[1] :] >= VOCAB).any()


def test_a_forward_within_generation_has_the_adapters_that_it_names():
    model, _ = make_patched()
    expected, found = logits(model, adapter=["photo", "sketch", "photo", "sketch"]), []

    def process(ids, scores):
        found.append(logits(model, adapter=["photo", "sketch", "photo", "sketch"]))
        return scores

    settings = {**GREEDY, "logits_processor": [process]}
    model.generate(IDS, adapter=["sketch", "photo", "sketch", "photo"], **settings)
    assert len(found) == 5 and all(torch.equal(each, expected) for each in found)


def test_a_forward_within_generation_that_names_none_is_refused():
    """Classifier-free guidance calls the model by itself, without what says the adapters."""
    model, _ = make_patched()
    settings = {**GREEDY, "guidance_scale": 2.0}
    with pytest.raises(ValueError, match="does not say which sequence has which"):
        model.generate(IDS, adapter=list(NAMES), **settings)
    model.generate(IDS, adapter=["photo"] * 4, **settings)
    model.generate(IDS, adapter=["base"] * 4, **settings)


@pytest.mark.parametrize("adapter", [None, "base", list(NAMES)], ids=str)
def test_a_generation_ends_with_the_adapter_that_it_began_with(adapter):
    model, patched = make_patched()
    expected = model.generate(IDS, adapter=adapter, **GREEDY)

    def switch(ids, scores):
        thread = threading.Thread(target=patched.set_adapter, args=["photo"])
        thread.start()
        thread.join()
        return scores

    found = model.generate(IDS, adapter=adapter, logits_processor=[switch], **GREEDY)
    assert patched.active_adapter == "photo"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_a_mixed_batch_are_those_of_its_parts(checkpointed):
    model, patched = make_patched()
    for name in patched.adapter_names:
        for parameter in parameters_of(patched, name):
            parameter.requires_grad_(True)
    model.train()
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    named = dict(patched.named_trainable_parameters())

    def gradients(rows, adapter):
        loss = model(IDS[rows], adapter=adapter, use_cache=False).logits.square().sum()
        found = torch.autograd.grad(loss, [*named.values()], allow_unused=True)
        pairs = zip(named.values(), found, strict=True)
        return [torch.zeros_like(p) if grad is None else grad for p, grad in pairs]

    mixed = gradients(slice(None), NAMES)
    parts = [gradients(slice(row, row + 1), name) for row, name in enumerate(NAMES)]
    for name, whole, *each in zip(named, mixed, *parts, strict=True):
        assert relative_rms(whole, sum(each)) < 1e-3, name


@pytest.mark.slow  # compiles two graphs
def test_compiled_forwards():
    model, patched = make_patched(backend="reference")
    expected = [logits(model, adapter=each) for each in (NAMES, "photo", "base")]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS, adapter=NAMES, use_cache=False).logits, expected[0])
        assert torch.equal(compiled(IDS, adapter="photo", use_cache=False).logits, expected[1])
        with patched.adapter("photo"):
            assert torch.equal(compiled(IDS, use_cache=False).logits, expected[1])
        with patched.adapter("base"):
            assert torch.equal(compiled(IDS, use_cache=False).logits, expected[2])


@pytest.mark.slow
def test_entering_contexts_again_compiles_nothing_anew():
    model, patched = make_patched(backend="reference")
    compiled = []
    torch._dynamo.reset()
    forward = torch.compile(model, backend=lambda graph, _: compiled.append(graph) or graph)
    with torch.no_grad():
        for times in range(6):
            if times == 2:  # the first forward sets what the second one sees
                before = len(compiled)
            with patched.adapter("base"), patched.adapter("photo"):
                found = forward(IDS, use_cache=False).logits
    assert len(compiled) == before and torch.equal(found, logits(model, adapter="photo"))


def test_routing_is_recorded_by_modality_whatever_the_adapter():
    model, _ = make_patched()
    counts = []
    for names in (NAMES, *([name] * 4 for name in NAMES)):
        with RoutingRecorder(model) as recorder:
            logits(model, adapter=list(names))
        counts.append(recorder.statistics().rows)
    assert all(torch.equal(each, counts[0]) for each in counts[1:])


# --- which adapter trains


def test_the_active_adapter_trains_alone():
    model, patched = make_patched()

    def trained():
        owners = {
            name: {p.requires_grad for p in parameters_of(patched, name)}
            for name in patched.adapter_names
        }
        return [name for name, flags in owners.items() if flags == {True}]

    assert patched.active_adapter == "default" and trained() == ["default"]
    frozen = {n: p.clone() for n, p in model.named_parameters() if "@photo" not in n}
    patched.set_adapter("photo")
    assert trained() == ["photo"]
    optimizer = torch.optim.SGD(patched.parameter_groups(lr=0.1, rows_lr=0.2))
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before), name
    with patched.adapter("sketch"), pytest.raises(RuntimeError, match="for all threads"):
        patched.set_adapter("default")
    patched.set_adapter("default")
    assert trained() == ["default"]


def test_what_is_frozen_by_hand_stays_so_when_it_is_active_again(tmp_path):
    model, patched = make_patched()
    rows = model.model.embed_tokens.added_rows["image"]
    rows.requires_grad_(False)
    trained = [name for name, _ in patched.named_trainable_parameters()]
    patched.add_adapter("like", like="default")
    patched.set_adapter("like")
    assert [name for name, _ in patched.named_trainable_parameters()] == [
        f"{name}@like" for name in trained
    ]
    patched.save_adapter(tmp_path, adapter="default")  # which is not active
    patched.set_adapter("default")
    assert [name for name, _ in patched.named_trainable_parameters()] == trained
    again = patch_model(make_model("mixtral"), patched.config)
    again.load_adapter(tmp_path)
    assert {name for name, _ in again.named_trainable_parameters()} == set(trained)
    patched.load_adapter(tmp_path, adapter="photo")
    patched.set_adapter("photo")
    assert not model.model.embed_tokens.added_rows["image@photo"].requires_grad


def test_a_new_adapter_has_no_effect_and_the_rows_of_the_active_one():
    model, patched = make_patched()
    expected = logits(model, adapter="base")
    patched.add_adapter("fresh")
    assert torch.equal(logits(model, adapter="fresh"), expected)
    patched.set_adapter("photo")
    patched.add_adapter("fresher")
    assert torch.equal(logits(model, adapter="fresher"), logits(model, adapter="base"))


def test_an_adapter_that_was_added_in_inference_mode_trains():
    model, patched = make_patched()
    with torch.inference_mode():
        patched.add_adapter("late")
    patched.set_adapter("late")
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in parameters_of(patched, "late"))


def test_deleting_leaves_the_others_and_unpatch_the_base():
    model, patched = make_patched()
    expected = {name: logits(model, adapter=name) for name in ("default", "photo")}
    patched.delete_adapter("sketch")
    assert patched.adapter_names == ["default", "photo"]
    assert not any("@sketch" in name for name, _ in model.named_parameters())
    for name, each in expected.items():
        assert torch.equal(logits(model, adapter=name), each)
    with pytest.raises(ValueError, match="no adapter 'sketch'; it has default, photo"):
        logits(model, adapter="sketch")
    patched.unpatch()
    assert_same_snapshot(snapshot(model), snapshot(make_model("mixtral")))


def test_tokens_that_come_later_train_in_the_active_adapter_alone():
    model = make_model("mixtral")
    patched = patch_model(model, ModalityLoraConfig(r=2))
    patched.add_adapter("second")
    patched.set_adapter("second")
    add_modality_tokens(model, "image", ADDED)
    rows = model.model.embed_tokens.added_rows
    for name, trained, other in (("second", "image@second", "image"), ("default", "image", None)):
        patched.set_adapter(name)
        other = other or "image@second"
        assert rows[trained].requires_grad and not rows[other].requires_grad


def test_values_are_checked_when_another_adapter_trains():
    model, patched = make_patched()
    model.train()(IDS, labels=IDS)
    for parameter in parameters_of(patched, "photo"):
        parameter.data.fill_(torch.nan)
    patched.set_adapter("photo")
    with pytest.raises(RuntimeError, match="@photo is not finite"):
        model(IDS, labels=IDS)


# --- files


def test_each_is_saved_and_loaded_on_its_own(tmp_path):
    model, patched = make_patched()
    for name in patched.adapter_names:
        patched.save_adapter(tmp_path / name, adapter=name)
    again = patch_model(make_model("mixtral"), ModalityLoraConfig.from_adapter(tmp_path / "sketch"))
    again.load_adapter(tmp_path / "sketch")
    assert torch.equal(logits(again.model), logits(model, adapter="sketch"))
    again.load_adapter(tmp_path / "photo", adapter="other")
    again.load_adapter(tmp_path / "default", adapter="third")
    assert again.adapter_names == ["default", "other", "third"]
    pairs = {"default": "sketch", "other": "photo", "third": "default", "base": "base"}
    mixed = logits(again.model, adapter=[*pairs])
    for row, (here, there) in enumerate(pairs.items()):
        if there != "base":
            assert relative_rms(mixed[row], logits(model, adapter=there)[row]) < 1e-5, here
    again.load_adapter(tmp_path / "default", adapter="other")  # over its values
    assert torch.equal(logits(again.model, adapter="other"), logits(model))
    assert [n for n, _ in again.named_trainable_parameters() if "@" in n] == []


def test_what_an_adapter_brings_is_not_given_to_the_others(tmp_path):
    _, patched = make_patched()
    patched.save_adapter(tmp_path)
    bare = patch_model(make_model("mixtral"), patched.config)
    with unchanged(bare.model), pytest.raises(ValueError, match="other adapters would get them"):
        bare.load_adapter(tmp_path, adapter="second")
    assert bare.adapter_names == ["default"]


def test_a_trainer_saves_and_resumes_the_active_adapter(tmp_path):
    from transformers import TrainingArguments

    from moe_kernels.training import AdapterTrainer

    rows = [{"input_ids": ids, "labels": ids} for ids in IDS] * 2

    def run(steps, folder, resume=None):
        model, patched = make_patched()
        patched.set_adapter("photo")
        args = TrainingArguments(
            str(folder), max_steps=steps, save_steps=1, learning_rate=1e-2, report_to=[],
            lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        AdapterTrainer(patched, args, train_dataset=rows).train(resume_from_checkpoint=resume)
        return logits(model), logits(model, adapter="sketch")

    whole = run(2, tmp_path / "whole")
    run(1, tmp_path / "parts")
    resumed = run(2, tmp_path / "parts", resume=True)
    assert all(map(torch.equal, whole, resumed))


def test_a_trainer_whose_checkpoints_would_lack_an_adapter_refuses(tmp_path):
    from transformers import TrainingArguments

    from moe_kernels.training import AdapterTrainer

    _, patched = make_patched()
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    trainer = AdapterTrainer(patched, args, train_dataset=[{"input_ids": IDS[0]}])
    for parameter in parameters_of(patched, "photo"):
        parameter.requires_grad_(True)
    with pytest.raises(ValueError, match="@photo trains too .* of the active adapter 'default'"):
        trainer.train()


def test_files_of_peft_are_of_the_active_adapter(tmp_path):
    ids = IDS.clamp(max=VOCAB - 1)
    inputs = {"ids": ids, "modality_ids": torch.ones_like(ids)}
    patched = patch_model(make_model("mixtral"), ModalityLoraConfig(r=2, target_modules=TARGETS))
    model = patched.model
    randomise(patched)
    patched.add_adapter("photo")
    fill(patched, "photo", 5)
    default, photo = (logits(model, **inputs, adapter=name) for name in ("default", "photo"))
    save_peft_adapter(patched, "image", tmp_path / "default")
    patched.set_adapter("photo")
    save_peft_adapter(patched, "image", tmp_path / "photo")
    for name, expected in (("default", default), ("photo", photo)):
        load_peft_adapter(patched, "image", tmp_path / name)
        assert torch.equal(logits(model, **inputs), expected)
        assert torch.equal(logits(model, **inputs, adapter="default"), default)


# --- refusals


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sketch", "has an adapter 'sketch' already"),
        ("base", "stands for no adapter"),
        ("a.b", "must be an identifier"),
        (3, "must be an identifier"),
    ],
)
def test_names_that_are_refused(name, message):
    model, patched = make_patched()
    with unchanged(model), pytest.raises(ValueError, match=message):
        patched.add_adapter(name)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("unknown", "no adapter 'unknown'; it has default, sketch, photo"),
        (["default"] * 3, "3 names for a batch of 4"),
        (["default", "sketch", "base", "x"], "no adapter 'x'"),
    ],
)
def test_calls_that_are_refused(adapter, message):
    model, _ = make_patched()
    with pytest.raises(ValueError, match=message):
        logits(model, adapter=adapter)
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, adapter=adapter, **GREEDY)


def test_places_of_adapters_are_for_generation_alone():
    model, _ = make_patched()
    with pytest.raises(ValueError, match="name the adapters by adapter="):
        logits(model, adapter_ids=torch.tensor([0, -1, 0, -1]))
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        model.generate(adapter=["photo"], **GREEDY)


def test_ranks_that_share_a_batch_compare_its_adapters_too(monkeypatch):
    model, _ = make_patched()
    seen = {}
    for adapter in ("default", "base"):
        check = lambda _, inputs, ids, name=adapter: seen.update({name: ids})  # noqa: E731
        monkeypatch.setattr("moe_kernels.models.forwards.check_batch", check)
        logits(model, adapter=adapter)
    assert not torch.equal(seen["default"], seen["base"])


def test_the_inner_model_takes_no_names():
    model, patched = make_patched()
    inputs = {"input_ids": IDS, "modality_ids": patched.modality_of(IDS)}
    for adapter in ("photo", list(NAMES)):
        with pytest.raises(ValueError, match="is for the patched model's own forward"):
            model.model(**inputs, adapter=adapter)
    expected = model(IDS, adapter="photo", output_hidden_states=True).hidden_states[-1]
    with patched.adapter("photo"):
        assert torch.equal(model.model(**inputs)[0], expected)


def test_deletions_that_are_refused():
    _, patched = make_patched()
    with pytest.raises(ValueError, match="'default' cannot be deleted"):
        patched.delete_adapter("default")
    patched.set_adapter("photo")
    with pytest.raises(ValueError, match="'photo' cannot be deleted, as it is active"):
        patched.delete_adapter("photo")
    with patched.adapter("sketch"), pytest.raises(RuntimeError, match="outside of it"):
        patched.delete_adapter("sketch")


def test_added_experts_go_with_one_adapter_alone():
    model, patched = make_patched()
    extender = ExpertExtender(model)
    with unchanged(model), pytest.raises(ValueError, match="one adapter alone"):
        extender.extend([0], 1, init=0)
    with unchanged(model), pytest.raises(ValueError, match="one adapter alone"):
        extender.add_projector(5)
    other = patch_model(make_model("mixtral"))
    ExpertExtender(other.model).extend([0], 1, init=0)
    with unchanged(other.model), pytest.raises(ValueError, match="added experts or a projector"):
        other.add_adapter("second")


def test_a_fused_loss_takes_one_adapter_a_batch():
    model, patched = make_patched()
    patched.fused_loss = True
    expected = model.eval()(IDS, labels=IDS, adapter="photo").loss
    found = model.train()(IDS, labels=IDS, adapter="photo").loss
    assert torch.allclose(found, expected, rtol=1e-5)
    with pytest.raises(RuntimeError, match="batches of one adapter"):
        model(IDS, labels=IDS, adapter=NAMES)
    expected = model.eval()(IDS, labels=IDS, adapter="base").loss
    found = model.train()(IDS, labels=IDS, adapter="base").loss
    assert torch.allclose(found, expected, rtol=1e-5)
    assert not torch.allclose(found, model(IDS, labels=IDS, adapter="photo").loss, rtol=1e-2)


# --- references


def test_a_frozen_slot_stays_while_another_trains():
    model, patched = make_patched()
    expected = logits(model)
    patched.add_adapter("reference", like="default")
    optimizer = torch.optim.SGD(patched.trainable_parameters(), lr=0.5)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()
    with patched.adapter("reference"):
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)


def test_a_reference_model_shares_the_base_and_nothing_that_trains():
    model, patched = make_patched()
    patched.set_adapter("photo")
    expected = logits(model)
    reference = patched.reference_model()
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    own = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        assert (parameter is own[name]) == ("lora" not in name and "rows" not in name), name
    assert torch.equal(logits(reference), expected)
    assert {p.requires_grad for p in parameters_of(patched, "photo")} == {True}
    fill(patched, "photo", 9)
    assert torch.equal(logits(reference), expected)
    assert not torch.equal(logits(model), expected)


def test_a_base_that_trains_is_not_shared():
    model, patched = make_patched()
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="model.norm.weight of the base trains"):
        patched.reference_model()
