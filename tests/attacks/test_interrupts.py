"""Ctrl-C at any line: a function changes a model wholly or not at all."""

import contextlib
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.dense_zoo import make_dense
from support.interrupts import LIBRARY, interrupt, lines_of
from support.mixed_batches import IMAGE, mixed_batches
from support.model_zoo import VOCAB, make_model, randomise, token_ids
from support.peft_models import lora_config
from support.states import differences, state_of
from support.text_tokenizer import make_sized_tokenizer, make_tokenizer

from moe_kernels import (
    ModalityLoraConfig,
    accelerate_peft,
    add_modality_tokens,
    initialise_lora,
    patch_model,
)
from moe_kernels.analysis import RoutingRecorder, expert_redundancy
from moe_kernels.conversion import dense_to_moe, perplexity, refit
from moe_kernels.modalities import ModalityCollator, add_placeholders, joining_placeholders
from moe_kernels.models.handle import get_patched
from moe_kernels.models.peft_format import load_peft_adapter, save_peft_adapter
from moe_kernels.models.undo import all_or_nothing
from moe_kernels.moextend import ExpertExtender

ALL = ModalityLoraConfig(r=2, lora_alpha=4, target_modules=("experts", "attention", "router"))


@dataclass
class Case:
    """A model, a call that changes it, and a tokenizer that the call may change too."""

    model: Any
    call: Callable[[], object]
    tokenizer: Any = None

    def state(self) -> dict:
        return state_of(self.model, self.tokenizer)


def patching() -> Case:
    model = make_model("qwen2_moe").train()
    return Case(model, lambda: patch_model(model, ALL))


def unpatching() -> Case:
    model = extended_model()
    return Case(model, lambda: get_patched(model).unpatch())


def adding_tokens() -> Case:
    model, tokenizer = make_model("mixtral"), make_tokenizer()
    patch_model(model, ALL)
    return Case(
        model, lambda: add_modality_tokens(model, "image", 3, tokenizer=tokenizer), tokenizer
    )


def adding_tokens_again() -> Case:
    model, tokenizer = make_model("mixtral", tie_word_embeddings=True), make_tokenizer()
    patch_model(model, ModalityLoraConfig(r=2, modalities=("image", "sound")))
    add_modality_tokens(model, "sound", 2, tokenizer=tokenizer)
    return Case(
        model, lambda: add_modality_tokens(model, "image", 3, tokenizer=tokenizer), tokenizer
    )


def extending() -> Case:
    extender = ExpertExtender(make_model("qwen3_moe"))
    return Case(extender.model, lambda: extender.extend("all", init=0))


def extending_again() -> Case:
    model = extended_model()
    return Case(model, lambda: ExpertExtender(model).extend([0], 2, init="random"))


def making_an_extender() -> Case:
    model = make_model("olmoe")
    return Case(model, lambda: ExpertExtender(model, backend="reference"))


def adding_a_projector() -> Case:
    extender = ExpertExtender(make_model("mixtral"))
    return Case(extender.model, lambda: extender.add_projector(5))


def adding_placeholders() -> Case:
    model, tokenizer = make_model("mixtral"), make_sized_tokenizer(VOCAB)
    patch_model(model, ALL)
    return Case(model, lambda: add_placeholders(model, tokenizer), tokenizer)


def starting_adapters() -> Case:
    pytest.importorskip("ot", reason="POT is not installed (the extra 'ot')")
    model = make_model("olmoe", num_hidden_layers=1)
    patch_model(model, ModalityLoraConfig(r=2))
    add_modality_tokens(model, "image", len(IMAGE))
    batches = mixed_batches(1, num_text=8, num_image=8)
    return Case(model, lambda: initialise_lora(model, batches, max_tokens=4))


def refitting() -> Case:
    dense = make_dense("mistral", num_hidden_layers=1)
    moe = dense_to_moe(dense, 4, 2)
    return Case(moe, lambda: refit(moe, dense, [token_ids(2, 6)], progress=False))


def extended_model():
    """Return a model to which everything was added."""
    extender = ExpertExtender(
        make_model("mixtral", num_hidden_layers=1), sequence_modalities=("image",)
    )
    add_modality_tokens(extender.model, "image", 3)
    extender.extend("all", init=0)
    extender.add_projector(5)
    return extender.model


def forward(model):
    with torch.no_grad():
        return model(input_ids=token_ids(1, 6, vocab=VOCAB + 3))


def disabling_adapters() -> Case:
    model = extended_model()

    def call():
        with get_patched(model).adapters_disabled():
            forward(model)

    return Case(model, call)


def disabling_experts() -> Case:
    model = extended_model()

    def call():
        with ExpertExtender(model).disabled():
            forward(model)

    return Case(model, call)


def joining() -> Case:
    model = extended_model()
    batch = ModalityCollator({"image": 90}, 0)(
        [{"input_ids": [3, 90, 4], "features": {"image": [torch.ones(2, 5)]}}]
    )

    def call():
        with joining_placeholders(model, {"image": 90}), torch.no_grad():
            model(**batch)

    return Case(model, call)


def recording() -> Case:
    model = extended_model()

    def call():
        with RoutingRecorder(model):
            forward(model)

    return Case(model, call)


def comparing_experts() -> Case:
    model = extended_model().train()
    model.model.norm.eval()
    batches = [{"input_ids": token_ids(1, 6)}]
    return Case(model, lambda: expert_redundancy(model, batches, max_tokens=4))


def measuring_disturbance() -> Case:
    model = extended_model().train()
    batches = [{"input_ids": token_ids(1, 6)}]
    return Case(model, lambda: ExpertExtender(model).disturbance(batches))


def scoring_layers() -> Case:
    model = extended_model().train()
    batches = [{"input_ids": torch.arange(VOCAB - 3, VOCAB + 3)[None]}]
    return Case(model, lambda: ExpertExtender(model).score_layers(batches, 1, progress=False))


def measuring_perplexity() -> Case:
    model = make_model("mixtral").train()
    return Case(model, lambda: perplexity(model, [token_ids(1, 6)]))


def saved_adapter(folder):
    """Save an adapter of everything that can be added; some of its parameters are frozen."""
    model = extended_model()
    randomise(get_patched(model))
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.requires_grad_(False)
    get_patched(model).save_adapter(folder)


def loading(folder) -> Case:
    saved_adapter(folder)
    model = make_model("mixtral", num_hidden_layers=1)
    patched = patch_model(model, ModalityLoraConfig.from_adapter(folder))
    return Case(model, lambda: patched.load_adapter(folder))


def loading_again(folder) -> Case:
    saved_adapter(folder)
    model = extended_model()
    randomise(get_patched(model), seed=3)
    return Case(model, lambda: get_patched(model).load_adapter(folder))


def two_adapters():
    """Make a model of one layer with two adapters and tokens, and return its handle."""
    patched = patch_model(make_model("mixtral", num_hidden_layers=1), ALL)
    add_modality_tokens(patched.model, "image", 3)
    randomise(patched)
    patched.add_adapter("second", like="default")
    return patched


def adding_an_adapter() -> Case:
    patched = two_adapters()
    return Case(patched.model, lambda: patched.add_adapter("third"))


def deleting_an_adapter() -> Case:
    patched = two_adapters()
    return Case(patched.model, lambda: patched.delete_adapter("second"))


def changing_the_adapter() -> Case:
    patched = two_adapters()
    return Case(patched.model, lambda: patched.set_adapter("second"))


def choosing_an_adapter() -> Case:
    patched = two_adapters()
    ids = token_ids(2, 6)

    def call():
        with patched.adapter("second"):
            patched.model(ids)
        patched.model(ids, adapter=["second", "base"])
        patched.model.generate(ids, adapter=["second", "base"], max_new_tokens=1, do_sample=False)

    return Case(patched.model, call)


def making_a_reference() -> Case:
    patched = two_adapters()
    return Case(patched.model, patched.reference_model)


def loading_by_name(folder) -> Case:
    patched = two_adapters()
    patched.save_adapter(folder)
    return Case(patched.model, lambda: patched.load_adapter(folder, adapter="third"))


def loading_from_peft(folder) -> Case:
    patched, other = (patch_model(make_model("olmoe"), ALL) for _ in range(2))
    for seed, each in enumerate((patched, other)):
        randomise(each, seed=seed)
    save_peft_adapter(other, "image", folder)
    return Case(patched.model, lambda: load_peft_adapter(patched, "image", folder))


def bound_by_peft():
    base = make_model("mixtral")
    patch_model(base, ModalityLoraConfig(target_modules=()))
    add_modality_tokens(base, "image", 3)
    return get_peft_model(base, lora_config())


def accelerating_peft() -> Case:
    model = bound_by_peft()
    return Case(model, lambda: accelerate_peft(model, modality="image"))


def undoing_peft() -> Case:
    model = bound_by_peft()
    return Case(model, accelerate_peft(model, modality="image").undo)


CHANGES = [
    accelerating_peft, undoing_peft, patching, unpatching, adding_tokens, adding_tokens_again,
    extending, extending_again, making_an_extender, adding_a_projector,
    adding_placeholders, starting_adapters, adding_an_adapter, deleting_an_adapter,
    changing_the_adapter, refitting,
]  # fmt: skip
LOADS = [loading, loading_again, loading_by_name, loading_from_peft]
LOOKS = [
    disabling_adapters, disabling_experts, joining, recording, comparing_experts,
    measuring_disturbance, scoring_layers, measuring_perplexity, choosing_an_adapter,
    making_a_reference,
]  # fmt: skip


def closes_a_recorder(place: str) -> bool:
    """Return whether an interrupt there leaves a recorder's hooks, which only go on counting.

    Nothing can guard the way into the __exit__ of a class.
    """
    file, _, number = place.rpartition(":")
    text = linecache.getline(LIBRARY + file, int(number)).strip()
    return text.startswith(("with RoutingRecorder", "self._hooks.__exit__"))


def test_an_interrupt_of_the_undoing_does_not_stop_it(attack):
    model = make_model("mixtral")
    before = state_of(model)

    def call():
        with contextlib.suppress(RuntimeError), all_or_nothing(model):
            patch_model(model, ALL)
            raise RuntimeError

    call()  # fills caches, as below
    lines = lines_of(call)
    others = [number for number, line in enumerate(lines) if not line.startswith("models/undo.py")]
    undoing = range(others[-1] + 1, len(lines))
    assert len(undoing) > 100
    for number in attack.tries(len(undoing)):
        place = interrupt(call, undoing[number])
        assert not differences(state_of(model), before), place


@pytest.mark.parametrize("make", LOADS, ids=lambda make: make.__name__)
def test_an_interrupted_load_changes_nothing(make, attack, tmp_path):
    attack_each_line(lambda: make(tmp_path), True, attack)


@pytest.mark.parametrize("make", CHANGES + LOOKS, ids=lambda make: make.__name__)
def test_an_interrupt_changes_nothing(make, attack):
    attack_each_line(make, make in CHANGES, attack)


def attack_each_line(make, changes, attack):
    """Interrupt the call of a case at each line; it ``changes`` the model, or only looks at it."""
    make().call()  # fills caches, which the lines of later calls then do not
    finished = make()
    before = finished.state()
    lines = lines_of(finished.call)
    assert bool(differences(finished.state(), before)) == changes
    case, failures = make(), []
    before = case.state()
    for line in attack.tries(len(lines)):
        if closes_a_recorder(lines[line]):
            continue
        try:
            place = interrupt(case.call, line)
            changed = differences(case.state(), before)
        except Exception as error:
            place, changed = lines[line], [repr(error)]
        if changed:
            failures.append(f"{place}: {'; '.join(changed)}"[:300])
            case = make()
            before = case.state()
    assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures)
    case.call()
    assert bool(differences(case.state(), before)) == changes
