"""PEFT's adapters of experts, bound to a modality: text keeps its bits, images are adapted."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from support.added_experts import extended
from support.model_zoo import FAMILY, VOCAB, make_model, token_ids, unchanged
from support.peft_models import EXPERTS, experts_of, fill_adapters, lora_config
from support.saved_adapters import ADAPTER, EARLIER_ADAPTER, WEIGHTS, give_earlier_names
from torch.distributed.fsdp import StateDictType

from moe_kernels import (
    ModalityLoraConfig,
    accelerate_peft,
    add_modality_tokens,
    get_accelerated,
    patch_model,
)
from moe_kernels.models.handle import get_patched
from moe_kernels.moextend import ExpertExtender
from moe_kernels.testing import relative_rms

IMAGE = 6
FILE = "adapter_model.safetensors"
CONFIG = ModalityLoraConfig(target_modules=())
TEXT = token_ids(2, 12)
MIXED = TEXT.clone()
MIXED[:, 6:] = VOCAB + MIXED[:, 6:] % IMAGE
ROWS = ("model.embed_tokens.added_rows.image", "lm_head.added_rows.image")


def make_wrapped(family="mixtral", *, num_tokens=IMAGE, config=CONFIG, model=None, **settings):
    """Return a patched model in PEFT's, with random adapters, and its handle."""
    base = make_model(family, **model or {})
    patched = patch_model(base, config)
    if num_tokens:
        add_modality_tokens(base, "image", num_tokens)
    return fill_adapters(get_peft_model(base, lora_config(**settings))), patched


def make(family="mixtral", **settings):
    peft, patched = make_wrapped(family, **settings)
    accelerate_peft(peft, modality="image")
    return peft, patched


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model, steps=3):
    model.train()
    optimiser = torch.optim.SGD(trained(model).values(), lr=1.0)
    for _ in range(steps):
        model(MIXED, labels=MIXED).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@torch.no_grad()
def text_logits(model, ids=TEXT, **inputs):
    return model.eval()(ids, **inputs).logits[..., :VOCAB].clone()


# --- what is promised


@FAMILY
def test_training_changes_images_and_no_bit_of_text(family):
    peft, patched = make(family)
    before, prefix = text_logits(peft), text_logits(peft, MIXED)
    train(peft)
    assert torch.equal(text_logits(peft), before)
    after = text_logits(peft, MIXED)
    assert torch.equal(after[:, :6], prefix[:, :6])
    assert relative_rms(after[:, 6:], prefix[:, 6:]) > 0.1
    with patched.adapters_disabled():
        assert torch.equal(text_logits(peft), before)
    with peft.disable_adapter():
        assert torch.equal(text_logits(peft), before)
        assert torch.equal(text_logits(peft, MIXED)[:, :6], prefix[:, :6])
    for wrapper in (experts_of(peft), experts_of(peft).base_layer):  # a half of them
        wrapper.enable_adapters(False)
        assert torch.equal(text_logits(peft), before)
        assert relative_rms(text_logits(peft, MIXED), after) > 1e-3
        wrapper.enable_adapters(True)
    base = make_model(family)
    assert relative_rms(before, base(TEXT).logits) < 1e-5


def test_given_modalities_of_tokens():
    """All tokens in the modality are PEFT's model, none the base, and padding is not computed."""
    peft, _ = make(num_tokens=0, model={"dtype": torch.float64})
    theirs = fill_adapters(
        get_peft_model(make_model("mixtral", dtype=torch.float64), lora_config())
    )
    ones = torch.ones_like(TEXT)
    expected = text_logits(theirs)
    assert relative_rms(text_logits(peft, modality_ids=ones), expected) < 1e-9
    base = make_model("mixtral", dtype=torch.float64)
    assert relative_rms(text_logits(peft, modality_ids=0 * ones), base(TEXT).logits) < 1e-9
    half = ones.clone()
    half[:, 3:] = 0
    mixed = text_logits(peft, modality_ids=half)
    assert relative_rms(mixed[:, :3], expected[:, :3]) < 1e-9
    experts = experts_of(peft).get_base_layer()
    context, x = experts.__dict__["_modality_context"], torch.randn(3, 32).double()
    with context.running(torch.tensor([[1, 0, -1]])):
        out = experts_of(peft)(x, torch.zeros(3, 2).long(), torch.ones(3, 2).double())
    assert out[2].count_nonzero() == 0
    assert out[:2].count_nonzero() == 64


def test_gradients_of_adapters_come_from_the_modality_alone():
    peft, _ = make(model={"dtype": torch.float64})
    ids = (torch.arange(24).view(2, 12) % 2).long()
    peft(TEXT, modality_ids=ids).logits[ids == 0].sum().backward()
    expected = {n: p.grad.clone() for n, p in trained(peft).items() if "lora_" in n}
    assert all(grad.isfinite().all() for grad in expected.values())
    peft.zero_grad()
    peft(TEXT).logits.sum().backward()
    assert all(p.grad.count_nonzero() == 0 for n, p in trained(peft).items() if "lora_" in n)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    plain, _ = make()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, checkpointed):
        model.train()(MIXED, labels=MIXED).loss.backward()
    for (name, ours), other in zip(
        trained(checkpointed).items(), trained(plain).values(), strict=True
    ):
        assert ours.grad.norm() > 0
        assert torch.equal(ours.grad, other.grad), name


def test_several_adapters_by_sequence():
    peft, _ = make()
    peft.add_adapter("other", lora_config(r=2))
    fill_adapters(peft, seed=5).eval()
    mixed = text_logits(peft, MIXED, adapter_names=["other", "default"])
    for row, name in enumerate(("other", "default")):
        peft.set_adapter(name)
        assert relative_rms(mixed[row], text_logits(peft, MIXED[row : row + 1])[0]) < 1e-5


def test_generates_images_and_text():
    peft, _ = make()
    peft.eval()
    inputs = {"input_ids": MIXED[:, :8], "attention_mask": torch.ones(2, 8).long()}
    settings = {"max_new_tokens": 4, "do_sample": False}
    free = peft.generate(**inputs, suppress_tokens=[], **settings)
    uncached = peft.generate(**inputs, suppress_tokens=[], use_cache=False, **settings)
    assert torch.equal(free, uncached)
    assert (peft.generate(**inputs, **settings)[:, 8:] < VOCAB).all()


def test_a_deepcopy():
    peft, _ = make()
    expected = text_logits(peft, MIXED)
    copied = copy.deepcopy(peft)
    train(peft)
    assert torch.equal(text_logits(copied, MIXED), expected)
    assert get_patched(copied.get_base_model()) is not get_patched(peft.get_base_model())
    get_accelerated(copied).undo()
    assert not any("added_rows" in name for name in trained(copied))
    assert not {"save_pretrained", "load_adapter"} & vars(copied).keys()
    assert any("added_rows" in name for name in trained(peft))
    accelerate_peft(copied, modality="image")
    assert torch.equal(text_logits(copied, MIXED), expected)


def test_adapters_by_name_do_not_go_with_them():
    peft, patched = make()
    with pytest.raises(ValueError, match="PEFT has adapted the model too, and its adapters are"):
        patched.add_adapter("second")
    base = make_model("mixtral")
    named = patch_model(base, ModalityLoraConfig(target_modules=()))
    named.add_adapter("second")
    wrapped = fill_adapters(get_peft_model(base, lora_config()))
    with pytest.raises(ValueError, match="accelerate_peft with a modality goes with one adapter"):
        accelerate_peft(wrapped, modality="image")


# --- rows of added tokens


def test_added_rows_train_again():
    peft, patched = make_wrapped()
    assert not list(patched.trainable_parameters())  # PEFT has frozen them
    handle = accelerate_peft(peft, modality="image")
    assert [name for name, _ in patched.named_trainable_parameters()] == list(ROWS)
    before = [row.detach().clone() for row in patched.trainable_parameters()]
    train(peft)
    for old, new in zip(before, patched.trainable_parameters(), strict=True):
        assert not torch.equal(old, new)
    with pytest.warns(UserWarning, match=r"after undo\(\) PEFT's save_pretrained leaves out"):
        handle.undo()
    assert not list(patched.trainable_parameters())


def test_undo_freezes_rows_that_came_later():
    peft, patched = make_wrapped(num_tokens=0)
    handle = accelerate_peft(peft, modality="image")
    add_modality_tokens(patched.model, "image", IMAGE)
    assert [name for name, _ in patched.named_trainable_parameters()] == list(ROWS)
    handle.undo()
    assert not list(patched.trainable_parameters())
    patched.model.get_parameter(ROWS[0]).requires_grad_(True)
    accelerate_peft(peft, modality="image").undo()
    assert [name for name, _ in patched.named_trainable_parameters()] == [ROWS[0]]  # as before


def test_adapters_that_come_later_leave_rows_trainable(tmp_path):
    peft, patched = make()
    peft.save_pretrained(tmp_path)
    peft.add_adapter("other", lora_config())
    peft.set_adapter("other")
    peft.load_adapter(tmp_path, "third", is_trainable=True)
    peft.load_adapter(tmp_path, "default", is_trainable=True)
    assert [name for name, _ in patched.named_trainable_parameters()] == list(ROWS)


def test_a_second_file_with_other_rows(tmp_path):
    """Rows are shared: those of the file would replace what the first adapter was trained with."""
    other, _ = make()
    train(other, steps=1)
    other.save_pretrained(tmp_path / "rows")
    other.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    peft, patched = make()
    expected = text_logits(peft, MIXED)
    with unchanged(patched.model), pytest.raises(ValueError, match="has other rows of adde"):
        peft.load_adapter(tmp_path / "rows", "other")
    with pytest.raises(KeyError, match="added_rows.image"):  # PEFT's, before it changes anything
        hotswap_adapter(peft, tmp_path / "rows", "default")
    assert list(peft.peft_config) == ["default"]
    assert torch.equal(text_logits(peft, MIXED), expected)
    peft.load_adapter(tmp_path / "without", "other")
    assert torch.equal(text_logits(peft, MIXED), expected)
    peft.load_adapter(tmp_path / "rows", "default")  # as Trainer resumes
    assert torch.equal(text_logits(peft, MIXED), text_logits(other, MIXED))


def test_files_of_peft_have_the_rows(tmp_path):
    peft, patched = make()
    train(peft)
    expected = text_logits(peft, MIXED)
    peft.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, row in patched.named_trainable_parameters():
        assert torch.equal(saved[f"base_model.model.{name}"], row)
    base = make_model("mixtral")
    patch_model(base, CONFIG)
    add_modality_tokens(base, "image", IMAGE)
    model = PeftModel.from_pretrained(base, tmp_path)
    handle = accelerate_peft(model, modality="image")
    assert torch.equal(text_logits(model, MIXED), expected)
    assert not trained(model)  # neither adapters nor rows: is_trainable was not asked for
    handle.undo()
    model.set_requires_grad("default")
    accelerate_peft(model, modality="image")
    assert set(ROWS) < {name.removeprefix("base_model.model.") for name in trained(model)}


def test_the_tables_of_the_base_are_in_no_file(tmp_path):
    """Tables of a base in bfloat16 would replace those of one in float32, and change text."""
    peft, _ = make(model={"dtype": torch.bfloat16})
    peft.save_pretrained(tmp_path)
    added = {name for name in load_file(tmp_path / FILE) if "lora_" not in name}
    assert added == {f"base_model.model.{name}" for name in ROWS}
    peft.save_pretrained(tmp_path / "given", state_dict=peft.state_dict())
    assert load_file(tmp_path / "given" / FILE).keys() == load_file(tmp_path / FILE).keys()
    peft.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "whole" / FILE)
    assert "base_model.model.lm_head.weight" in peft.state_dict()
    base = make_model("mixtral")
    patch_model(base, CONFIG)
    add_modality_tokens(base, "image", IMAGE)
    model = PeftModel.from_pretrained(base, tmp_path)
    accelerate_peft(model, modality="image")
    assert torch.equal(text_logits(model), text_logits(make()[0]))


def test_files_of_both_libraries_do_not_replace_each_other(tmp_path):
    peft, patched = make()
    peft.add_adapter("other", lora_config())
    peft.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileNotFoundError, match=f"no adapter in {tmp_path}: {WEIGHTS} is missing"):
        patched.load_adapter(tmp_path)
    for folder in (tmp_path, tmp_path / "other"):
        patched.save_adapter(folder)
        before |= {folder / name: (folder / name).read_bytes() for name in ADAPTER}
    peft.save_pretrained(tmp_path)
    assert all(path.read_bytes() == content for path, content in before.items())
    patched.load_adapter(tmp_path)


def test_an_adapter_under_the_names_of_peft_is_not_replaced(tmp_path):
    """Earlier versions wrote under these names."""
    peft, patched = make()
    peft.add_adapter("other", lora_config())
    patched.save_adapter(tmp_path / "other")
    give_earlier_names(tmp_path / "other", ADAPTER, EARLIER_ADAPTER)
    rows = (tmp_path / "other" / FILE).read_bytes()
    for settings in ({}, {"save_embedding_layers": False}, {"selected_adapters": ["other"]}):
        with pytest.raises(ValueError, match="has an adapter of moe_kernels under the names of an"):
            peft.save_pretrained(tmp_path, **settings)
    assert (tmp_path / "other" / FILE).read_bytes() == rows
    assert not (tmp_path / FILE).exists()
    peft.save_pretrained(tmp_path, selected_adapters=["default"])
    patched.save_adapter(tmp_path / "other")
    peft.save_pretrained(tmp_path)


def test_sharded_checkpoints_would_leave_out_the_rows(monkeypatch):
    """accelerate asks PEFT alone for what is in them, where it shards and at each checkpoint."""
    peft, _ = make()
    plugin = SimpleNamespace(state_dict_type=StateDictType.SHARDED_STATE_DICT)
    state = SimpleNamespace(fsdp_plugin=plugin)
    monkeypatch.setattr("accelerate.state.is_initialized", lambda: True)
    monkeypatch.setattr("accelerate.state.AcceleratorState", lambda: state)
    for get_state in (peft.state_dict, lambda: get_peft_model_state_dict(peft)):
        with pytest.raises(RuntimeError, match="SHARDED_STATE_DICT hold PEFT's adapters without"):
            get_state()
    plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    assert peft.state_dict()
    plugin.state_dict_type = StateDictType.SHARDED_STATE_DICT
    get_accelerated(peft).undo()
    assert peft.state_dict()


def test_rows_that_are_added_after_the_call_are_saved(tmp_path):
    peft, patched = make(num_tokens=0)
    add_modality_tokens(patched.model, "image", IMAGE)
    peft.save_pretrained(tmp_path)
    assert any("added_rows" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_a_module_within_peft_model_says_that_it_saves_no_rows():
    peft, _ = make_wrapped()
    with pytest.warns(UserWarning, match="this is no PeftModel but a module within"):
        accelerate_peft(peft.get_base_model(), modality="image")


def test_rows_in_a_file_of_their_own(tmp_path):
    """PEFT's file is small without the tables, and save_adapter's has the rows, in any order."""
    peft, patched = make()
    train(peft)
    expected = text_logits(peft, MIXED)
    peft.save_pretrained(tmp_path, save_embedding_layers=False)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    patched.save_adapter(tmp_path / "rows")
    assert set(load_file(tmp_path / "rows" / WEIGHTS)) == set(ROWS)
    for rows_first in (True, False):
        base = make_model("mixtral")
        loaded = patch_model(base, ModalityLoraConfig.from_adapter(tmp_path / "rows"))
        if rows_first:
            loaded.load_adapter(tmp_path / "rows")
        model = PeftModel.from_pretrained(base, tmp_path)
        accelerate_peft(model, modality="image")
        if not rows_first:
            loaded.load_adapter(tmp_path / "rows")
        assert torch.equal(text_logits(model, MIXED), expected)


def test_a_modality_without_tokens_is_reported():
    peft, _ = make(num_tokens=0)
    peft.train()
    with pytest.warns(UserWarning, match="no token of modality 'image', so that its adapters get"):
        peft(TEXT)


# --- refusals


def test_the_modality_must_be_named():
    peft, _ = make_wrapped()
    with pytest.raises(ValueError, match=r"would act on all of its tokens: name the modality"):
        accelerate_peft(peft)
    with pytest.raises(ValueError, match="patched for .*'image'.*not for 'sound'"):
        accelerate_peft(peft, modality="sound")


def test_peft_alone_would_act_on_text():
    peft, _ = make_wrapped()
    match = r"ParamWrapper after patch_model.*accelerate_peft\(model, modality=...\)"
    with pytest.raises(RuntimeError, match=match):
        peft(TEXT)
    handle = accelerate_peft(peft, modality="image")
    expected = text_logits(peft, MIXED)
    handle.undo()
    with pytest.raises(RuntimeError, match=match):
        peft(TEXT)
    accelerate_peft(peft, modality="image")
    assert torch.equal(text_logits(peft, MIXED), expected)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_modules": ["q_proj"]}, "2 adapters of PEFT, such as .*q_proj, act on tokens of"),
        ({"target_parameters": [*EXPERTS, "mlp.gate.weight"]}, "such as .*gate, act on tokens of"),
        ({"trainable_token_indices": [3]}, "such as .*embed_tokens.*, act on tokens of every"),
        ({"modules_to_save": ["lm_head"]}, "such as .*lm_head.*, act on tokens of every"),
    ],
    ids=["attention", "router", "tokens", "head"],
)
def test_adapters_that_know_no_modality(settings, match):
    peft, _ = make_wrapped(**settings)
    with pytest.raises(ValueError, match=match):
        accelerate_peft(peft, modality="image")


def test_adapters_of_both_are_refused():
    """PEFT's files and checkpoints leave out those of patch_model."""
    peft, _ = make_wrapped(config=ModalityLoraConfig(r=2, target_modules=("attention",)))
    with pytest.raises(ValueError, match="has adapters of patch_model, which PEFT's files and"):
        accelerate_peft(peft, modality="image")


def test_experts_that_are_added_later(tmp_path):
    """PEFT's adapters know no added experts; without these adapters the model takes some."""
    extended().patched.save_adapter(tmp_path)
    peft, patched = make_wrapped(num_tokens=0)
    handle = accelerate_peft(peft, modality="image")
    expected = text_logits(peft, MIXED % VOCAB)
    extender = ExpertExtender(patched.model)
    match = "beside adapters of PEFT, which accelerate_peft computes: adapt experts by patch_model"
    for change in (extender.extend, lambda: patched.load_adapter(tmp_path)):
        with unchanged(patched.model), pytest.raises(ValueError, match=match):
            change()
    assert torch.equal(text_logits(peft, MIXED % VOCAB), expected)
    handle.undo()
    peft.unload()
    extender.extend("all", init=0)
    assert patched.model(TEXT).logits.isfinite().all()


def test_an_adapter_that_comes_later_on_another_module():
    peft, patched = make("qwen2_moe")
    links = patched.links
    peft.add_adapter("other", lora_config(target_parameters=None, target_modules=["down_proj"]))
    with pytest.raises(RuntimeError, match="shared_expert.down_proj was replaced by peft.tuners"):
        peft(TEXT)
    peft, patched = make_wrapped("qwen2_moe")
    before = patched.links
    accelerate_peft(peft, modality="image").undo()
    assert patched.links == before
    assert len(before) < len(links)


def test_a_base_that_trains():
    peft, _ = make_wrapped("qwen2_moe", bias="all")
    with pytest.raises(
        ValueError, match=r"bias of the base trains \(bias=\?\), which would change"
    ):
        accelerate_peft(peft, modality="image")


def test_adapters_that_are_merged():
    peft, _ = make_wrapped()
    peft.merge_adapter()
    with pytest.raises(ValueError, match="merged into weights that text uses too: load the base"):
        accelerate_peft(peft, modality="image")


def test_merging():
    peft, _ = make()
    expected = text_logits(peft, MIXED)
    for merge in (peft.merge_adapter, peft.merge_and_unload, experts_of(peft).merge):
        with pytest.raises(RuntimeError, match="cannot be merged into weights that text uses too"):
            merge()
    assert torch.equal(text_logits(peft, MIXED), expected)


def test_a_model_that_was_unpatched_meanwhile():
    peft, patched = make()
    patched.unpatch()
    with pytest.raises(RuntimeError, match="was unpatched, and the adapters of PEFT that were bou"):
        peft(TEXT)


def test_unload_and_unpatch_give_the_base():
    peft, patched = make()
    train(peft)
    plain = peft.unload()
    patched.unpatch()
    base = make_model("mixtral")
    assert torch.equal(plain(TEXT).logits, base(TEXT).logits)
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in base.named_parameters()}
