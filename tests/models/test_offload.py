"""Models whose weights accelerate keeps on the CPU or a disk, before patching or after it.

Without a GPU they run on the CPU too. All must have the bits of the model that is whole.
"""

import copy
import inspect
import itertools
from unittest import mock

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from support.families import make_family
from support.model_zoo import make_model, randomise, token_ids
from support.packed_experts import pack_experts, pack_in_nf4
from support.saved_adapters import WEIGHTS
from torch import nn
from transformers import AutoModelForCausalLM

from moe_kernels import ModalityLoraConfig, add_modality_tokens, initialise_lora, patch_model
from moe_kernels.imaging.generation import _check_weights
from moe_kernels.imaging.processors import _UnconditionalBranch
from moe_kernels.models import offload as offloading
from moe_kernels.models.handle import get_patched
from moe_kernels.models.tokens import JoinedHead
from moe_kernels.moextend import ExpertExtender

IDS = token_ids(2, 7)
CALL = {"input_ids": IDS, "modality_ids": torch.arange(7).expand(2, 7) % 2, "use_cache": False}
TARGETS = ("experts", "attention", "router")
PLACES = ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
SOME = dict.fromkeys(PLACES, "cpu") | {"model.layers.0": "disk"}


def dispatched(model, folder):
    accelerate.dispatch_model(model, SOME, main_device="cpu", offload_dir=folder)


OFFLOADS = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, "cpu"),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, "cpu"),
    "dispatch_model": dispatched,
    "buffers": lambda model, folder: accelerate.disk_offload(model, folder, "cpu", True),
}
slow = pytest.mark.slow
ORDER = pytest.mark.parametrize(
    "after",
    [pytest.param(False, id="offloaded first"), pytest.param(True, id="patched", marks=slow)],
)


def every_order():
    """Return arguments of a test; those beside two of them take seconds together."""
    cases = itertools.product(list(OFFLOADS)[:3], (False, True), (False, True))
    quick = (("disk_offload", False, False), ("cpu_offload", True, True))
    return [pytest.param(*case, marks=[] if case in quick else [slow]) for case in cases]


def prepared(folder, offload=None, after=False, make=make_model, family="mixtral", **settings):
    """Return a patched model with image tokens, offloaded before or after that, and its handle."""
    model = make(family, **settings)
    if offload and not after:
        OFFLOADS[offload](model, folder / "weights")
    torch.manual_seed(0)
    patched = patch_model(model, ModalityLoraConfig(r=2, target_modules=TARGETS))
    add_modality_tokens(model, "image", 3)
    randomise(patched)
    if offload and after:
        OFFLOADS[offload](model, folder / "weights")
    return model, patched


def same(found, expected):
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def trained(model, patched):
    """Train and return losses, logits of text alone before and after, and generated ids."""
    optimiser = torch.optim.AdamW(patched.trainable_parameters(), lr=1e-2)
    text = [model(IDS, use_cache=False).logits[..., : patched.base_vocabulary]]
    for _ in range(2):
        loss = model(**CALL, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    text.append(model(IDS, use_cache=False).logits[..., : patched.base_vocabulary])
    assert torch.equal(*text)
    generated = model.generate(IDS, max_new_tokens=3, do_sample=False, suppress_tokens=[])
    return loss, model(**CALL).logits, generated, *text


@pytest.mark.parametrize(("offload", "tied", "after"), every_order())
def test_everything_has_the_bits_of_the_whole_model(offload, tied, after, tmp_path):
    whole, expected = prepared(tmp_path, tie_word_embeddings=tied)
    model, patched = prepared(tmp_path, offload, after, tie_word_embeddings=tied)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in patched.trainable_parameters())
    assert len(list(patched.trainable_parameters())) == len(list(expected.trainable_parameters()))
    assert same(trained(model, patched), trained(whole, expected))
    for handle, name in ((patched, "here"), (expected, "whole")):
        handle.save_adapter(tmp_path / name)
    saved = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("here", "whole")]
    assert saved[0] == saved[1]  # its header has the fingerprint of the base
    patched.load_adapter(tmp_path / "whole")
    assert torch.equal(model(**CALL).logits, whole(**CALL).logits)
    plain = make_model("mixtral", tie_word_embeddings=tied)
    assert torch.equal(patched.unpatch()(IDS).logits, plain(IDS).logits)
    remove_hook_from_submodules(model)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    reloaded = patch_model(model, ModalityLoraConfig.from_adapter(tmp_path / "here"))
    reloaded.load_adapter(tmp_path / "here")
    assert torch.equal(model(**CALL).logits, whole(**CALL).logits)
    again = patch_model(reloaded.unpatch(), ModalityLoraConfig.from_adapter(tmp_path / "here"))
    again.load_adapter(tmp_path / "here")  # its rows are those of a head that is tied, or not


@pytest.mark.parametrize("offload", [None, "cpu_offload"])
def test_a_head_that_was_untied_by_a_copy_has_rows_of_its_own(offload, tmp_path):
    """Without hooks, or where the configuration says so, equal values are not those of a tie."""

    def untied(family):
        model = make_model(family, tie_word_embeddings=True)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = offload is None
        return model

    handles = [prepared(tmp_path, offload, make=untied)[1] for _ in range(2)]
    names = dict(handles[0].named_trainable_parameters())
    assert "lm_head.added_rows.image" in names
    if offload is None:
        for patched in handles:
            patched.model.lm_head.weight.data.add_(0.1)
    handles[0].save_adapter(tmp_path)
    handles[1].load_adapter(tmp_path)


@ORDER
@pytest.mark.parametrize("reentrant", [pytest.param(None, marks=slow), True, False])
def test_gradients_have_the_bits_of_the_whole_model(reentrant, after, tmp_path):
    found = []
    for offload in (None, "disk_offload"):
        model, patched = prepared(tmp_path, offload, after)
        if reentrant is not None:
            model.train().activation_checkpointing_enable({"use_reentrant": reentrant})
        model(**CALL, labels=IDS).loss.backward()
        found.append([parameter.grad for parameter in patched.trainable_parameters()])
    assert same(*found)


def test_autograd_keeps_no_weights_of_experts(tmp_path):
    model, _ = prepared(tmp_path, "disk_offload")
    stacks = {tuple(p.shape) for p in model.model.layers[0].mlp.experts.parameters()}
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        loss = model(**CALL, labels=IDS).loss
    assert kept
    assert not stacks & {tuple(tensor.shape) for tensor in kept}
    loss.backward()


@ORDER
def test_experts_are_scored_and_added_as_to_the_whole_model(after, tmp_path):
    first = prepared(tmp_path)[1].base_vocabulary
    batch = {"input_ids": torch.cat([IDS, IDS[:, :3] * 0 + torch.arange(first, first + 3)], 1)}
    found = []
    for offload in (None, "disk_offload"):
        model, patched = prepared(tmp_path, offload, after)
        extender = ExpertExtender(model)
        scores = extender.score_layers([batch], 2, progress=False)
        extender.extend("all", 1, init="most_selected")
        extender.extend([0], 1, init="mean")
        projector = extender.add_projector(5)
        assert not any(parameter.is_meta for parameter in projector.parameters())
        model(**CALL, labels=IDS).loss.backward()
        added = [p for n, p in patched.named_trainable_parameters() if "extension" in n]
        found.append([scores.after, *added, *(p.grad for p in added)])
    assert same(*found)


@slow
@pytest.mark.parametrize("after", [False, True])
def test_pairs_are_started_as_those_of_the_whole_model(after, tmp_path):
    pytest.importorskip("ot")
    found = []
    for offload in (None, "disk_offload"):
        model, patched = prepared(tmp_path, offload, after)
        for name, parameter in patched.named_trainable_parameters():
            if name.endswith("lora_B"):
                parameter.data.zero_()
        initialise_lora(model, [CALL], max_tokens=6)
        found.append(list(patched.trainable_parameters()))
    assert same(*found)


@pytest.mark.parametrize("places", [SOME, {"": "disk"}], ids=["some", "all"])
@slow
def test_a_checkpoint_that_is_read_by_a_device_map(places, tmp_path):
    make_model("mixtral").save_pretrained(tmp_path)
    options = {"device_map": places, "offload_folder": tmp_path / "weights"}
    found = []
    for each in ({}, options):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **each).eval()
        torch.manual_seed(0)
        patched = patch_model(model, ModalityLoraConfig(r=2, target_modules=TARGETS))
        add_modality_tokens(model, "image", 3)
        found.append(trained(model, patched))
    assert same(*found)
    with pytest.warns(UserWarning, match="writes the base model"):
        model.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(again(IDS).logits, make_model("mixtral")(IDS).logits)


@pytest.mark.parametrize("places", ["cpu", {"": "cpu"}, "auto"], ids=str)
def test_a_device_map_of_one_device_is_none(places, tmp_path):
    make_model("mixtral").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    patch_model(model, ModalityLoraConfig(target_modules=TARGETS))
    model(**CALL)


@pytest.mark.parametrize(
    "family",
    ["hunyuan_v1_moe", *(pytest.param(each, marks=slow) for each in ("deepseek_v3", "gpt_oss"))],
)
def test_routers_with_a_layer_or_a_bias_and_experts_with_biases(family, tmp_path):
    """accelerate brings nothing to a linear layer that a router of ours does not call."""
    found = []
    for offload in (None, "buffers"):
        model, patched = prepared(tmp_path, offload, make=make_family, family=family)
        model(**CALL, labels=IDS).loss.backward()
        ExpertExtender(model).extend([1], 1, init="mean")
        found.append([*(p.grad for p in patched.trainable_parameters() if p.grad is not None)])
        found[-1].append(model(**CALL).logits)
    assert same(*found)


@ORDER
def test_packed_experts(after, tmp_path):
    """accelerate brings their codes where a weight is computed from these."""
    found = []
    for offload in (None, "disk_offload"):
        model, patched = prepared(
            tmp_path, offload, after, make=lambda family: pack_experts(make_model(family))
        )
        patched.save_adapter(tmp_path / str(offload))
        model(**CALL, labels=IDS).loss.backward()
        found.append([parameter.grad for parameter in patched.trainable_parameters()])
    assert same(*found)
    saved = [(tmp_path / each / WEIGHTS).read_bytes() for each in ("None", "disk_offload")]
    assert saved[0] == saved[1]


@pytest.mark.parametrize("after", [pytest.param(False, marks=slow), True])
def test_hooks_are_taken_off_a_model_that_trains(after, tmp_path):
    """Parameters that train stay the objects that the optimiser has, with their values."""
    model, patched = prepared(tmp_path)
    offload = OFFLOADS["disk_offload"]
    if after:
        before = list(patched.trainable_parameters())
        offload(model, tmp_path / "weights")
    else:
        model, patched = prepared(tmp_path, "disk_offload")
        before = list(patched.trainable_parameters())
    optimiser = torch.optim.AdamW(before, lr=1e-2)
    model(**CALL, labels=IDS).loss.backward()
    optimiser.step()
    expected = model(**CALL).logits
    remove_hook_from_submodules(model)
    assert all(a is b for a, b in zip(before, patched.trainable_parameters(), strict=True))
    assert torch.equal(model(**CALL).logits, expected)
    patched.unpatch()
    assert torch.equal(model(IDS).logits, make_model("mixtral")(IDS).logits)


@ORDER
def test_the_forward_that_others_see_takes_modality_ids(after, tmp_path):
    """transformers reads its signature, for generate and for the columns of a dataset."""
    model, patched = prepared(tmp_path, "cpu_offload", after)
    assert "modality_ids" in inspect.signature(model.forward).parameters
    ids = CALL["modality_ids"]
    model.generate(IDS, modality_ids=ids, attention_mask=torch.ones_like(IDS), max_new_tokens=2)
    patched.unpatch()
    assert inspect.signature(model.forward) == inspect.signature(make_model("mixtral").forward)


@ORDER
def test_a_deepcopy_has_its_own(after, tmp_path):
    model, patched = prepared(tmp_path, "disk_offload", after)
    expected = model(**CALL).logits
    copied = copy.deepcopy(model)
    for parameter in patched.trainable_parameters():
        parameter.data.zero_()
    assert torch.equal(copied(**CALL).logits, expected)
    get_patched(copied).unpatch()
    assert torch.equal(copied(IDS).logits, make_model("mixtral")(IDS).logits)


def test_pictures_are_drawn_on_the_device_that_computes(tmp_path):
    model, _ = prepared(tmp_path, "cpu_offload")
    _check_weights(model)
    assert _UnconditionalBranch(model, [1, 2]).prompt.device.type == "cpu"


# --- refused


def preloading(model):
    accelerate.cpu_offload(model, "cpu", preload_module_classes=["MixtralDecoderLayer"])


def on_several(model):
    accelerate.cpu_offload(model, "cpu")
    model.lm_head._hf_hook.execution_device = "cuda:1"


def preloading_one_layer(model):
    layer = model.model.layers[0]
    accelerate.cpu_offload(layer, "cpu", preload_module_classes=["MixtralDecoderLayer"])


PRELOADED = r"brings model.layers.0 with all.*take the hooks off.*without preload_module_classes"
REFUSED = {
    "preloaded": (preloading, PRELOADED),
    "one layer preloaded": (preloading_one_layer, PRELOADED),
    "with_hook": (
        lambda model: accelerate.cpu_offload_with_hook(model, "cpu"),
        r"MixtralForCausalLM has accelerate's CpuOffload.*take the hooks off",
    ),
    "several devices": (on_several, r"several devices \(cpu, cuda:1\).*device_map={'': device}"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_leave_out_adapters_is_refused_before_patching(kind):
    offload, match = REFUSED[kind]
    model = make_model("mixtral")
    offload(model)
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"MixtralForCausalLM is not supported: .*{match}"):
        patch_model(model)
    assert {path: module.__dict__ for path, module in model.named_modules()} == before


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_leave_out_adapters_is_refused_after_patching(kind, tmp_path):
    offload, match = REFUSED[kind]
    model, patched = prepared(tmp_path)
    expected = model(**CALL).logits
    patched.save_adapter(tmp_path / "adapter")
    offload(model)
    for attempt in (
        lambda: model(**CALL),
        lambda: patched.save_adapter(tmp_path / "other"),
        lambda: patched.load_adapter(tmp_path / "adapter"),
        patched.unpatch,
    ):
        with pytest.raises(RuntimeError, match=f"after patch_model, .*{match}"):
            attempt()
    assert not (tmp_path / "other").exists()
    if kind == "several devices":
        model.lm_head._hf_hook.execution_device = "cpu"
    remove_hook_from_submodules(model)
    assert torch.equal(model(**CALL).logits, expected)
    patched.unpatch()


def test_a_forward_looks_at_all_modules_only_after_a_new_hook(tmp_path):
    model, _ = prepared(tmp_path)
    with mock.patch.object(offloading, "problem", wraps=offloading.problem) as search:
        for index, layer in enumerate(model.model.layers, 1):
            accelerate.cpu_offload(layer.mlp, "cpu")
            for _ in range(2):
                model(**CALL)
            assert search.call_count == index


def test_experts_that_bitsandbytes_has_packed_are_refused(tmp_path):
    """tests/scale/test_quantised.py packs by the library itself."""
    match = "has offloaded model.layers.0.mlp.experts.*bitsandbytes has packed.*take the hooks off"
    for after in (False, True):
        with pytest.raises((ValueError, RuntimeError), match=match):
            model, _ = prepared(
                tmp_path, "cpu_offload", after, make=lambda family: pack_in_nf4(make_model(family))
            )
            assert after
            model(**CALL)


def test_what_was_moved_in_an_unknown_way_is_refused(tmp_path):
    model, patched = prepared(tmp_path, "cpu_offload")
    lora = model.model.layers[1].modality_lora.q_proj
    lora.lora_A = torch.nn.Parameter(lora.lora_A.to("meta"))
    with pytest.raises(RuntimeError, match=r"layers.1.modality_lora.q_proj to the device meta"):
        patched.save_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="lora_A must be on cpu, got meta"):
        model(**CALL)


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_transformers_does_not_find_the_weights_for_a_save(offload, tmp_path):
    model, _ = prepared(tmp_path, offload)
    with pytest.raises(RuntimeError, match="save_pretrained finds no weights that cpu_offload"):
        model.save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_fused_head_does_not_read_an_offloaded_one(tmp_path):
    model, _ = prepared(tmp_path, "cpu_offload")
    with pytest.raises(RuntimeError, match="accelerate has offloaded it: keep lm_head out"):
        _ = JoinedHead(model.lm_head).weight
