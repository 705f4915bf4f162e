"""Packed experts, which a parametrisation unpacks at each read, or the op tile by tile.

They compute what the unpacked model computes, bit for bit, and nothing keeps the unpacked weights.
"""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
from support.families import make_family
from support.model_zoo import assert_same_snapshot as assert_same
from support.model_zoo import make_model, randomise, refused, snapshot, token_ids
from support.packed_experts import (
    Bnb4bitParametrization,
    FourBits,
    dequantised,
    kept,
    pack_experts,
    pack_in_nf4,
    reads,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.models.parts import all_experts, find_experts
from moe_kernels.moextend import ExpertExtender

NUM_TOKENS = 16
BF16 = {"dtype": torch.bfloat16}


# By how experts are packed: what is read, and what the op unpacks itself.
PACKED = pytest.mark.parametrize("pack", [pack_experts, pack_in_nf4])


def pair(plain, pack=pack_experts):
    """Return the packed model and the one of its unpacked weights."""
    packed = pack(copy.deepcopy(plain))
    return packed, dequantised(packed, plain)


def patch(model, backend=None):
    patched = patch_model(model, ModalityLoraConfig(backend=backend))
    add_modality_tokens(model, "image", NUM_TOKENS)
    randomise(patched)
    return patched


def inputs_of(patched):
    """Return ids of text and image."""
    first = patched.base_vocabulary
    ids = token_ids(2, 12, vocab=NUM_TOKENS)
    ids[:, 6:] += first
    return {"input_ids": ids, "labels": ids}


def step(patched):
    """Return logits, loss and gradients of a training step."""
    model = patched.model.train()
    output = model(**inputs_of(patched))
    output.loss.backward()
    return [output.logits, output.loss, *(p.grad for p in patched.trainable_parameters())]


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


PLAIN = pytest.mark.parametrize(
    "plain",
    [
        lambda: make_model("mixtral", **BF16),
        lambda: make_model("qwen3_moe"),
        lambda: make_family("gpt_oss", dtype=torch.bfloat16),
    ],
    ids=["mixtral", "qwen3_moe", "gpt_oss"],
)


@PACKED
@PLAIN
def test_same_bits_as_the_unpacked_model(plain, pack):
    packed, unpacked = (patch(model) for model in pair(plain(), pack))
    assert packed.count_parameters() == unpacked.count_parameters()
    steps = [step(packed), step(unpacked)]
    assert equal(*steps)
    assert all(each.isfinite().all() and each.any() for each in steps[0][2:])


@PACKED
def test_text_keeps_its_bits_when_adapters_change(pack):
    patched = patch(pack(make_model("mixtral", **BF16)))
    ids = token_ids(2, 12)
    with torch.no_grad():
        before = patched.model(ids).logits[..., : patched.base_vocabulary]
        randomise(patched, scale=1e18, seed=5)
        after = patched.model(ids).logits[..., : patched.base_vocabulary]
    assert torch.equal(after, before)
    assert patched.check_text(ids).changed_by_adapters == 0


def test_each_stack_is_unpacked_once_for_each_use():
    model = pack_experts(make_model("mixtral"))
    stacks = 2 * len(model.model.layers)
    patched = patch(model)
    assert reads(model) == stacks  # by patching, for shapes and dtypes
    output = model(**inputs_of(patched))
    assert reads(model) == 2 * stacks
    output.loss.backward()
    assert reads(model) == 3 * stacks


def in_fp4():
    """Return a model whose quantisation states say that the codes have other values."""
    model = pack_in_nf4(make_model("mixtral"))
    for module in model.modules():
        if isinstance(module, Bnb4bitParametrization):
            module.quant_state.quant_type = "fp4"
    return model


UNPACKED_BY = {  # model, backend, by whom
    "nf4": (lambda: pack_in_nf4(make_model("mixtral")), None, "op"),
    "rounded_in_another_way": (lambda: pack_in_nf4(make_model("mixtral"), 1.001), None, "read"),
    "another_code": (in_fp4, None, "read"),
    "stored_transposed": (lambda: pack_in_nf4(make_family("gpt_oss")), None, "read"),
    "the_reference_unpacks_all": (lambda: pack_in_nf4(make_model("mixtral")), "reference", "read"),
}


@pytest.mark.parametrize("case", UNPACKED_BY)
def test_the_op_unpacks_where_it_can(case):
    make, backend, by = UNPACKED_BY[case]
    model = make()
    patched = patch(model, backend)
    stacks = reads(model)
    assert stacks == 2 * len(model.model.layers)  # by patching, to learn of each
    step(patched)
    assert reads(model) == (stacks if by == "op" else 3 * stacks)
    with torch.no_grad():
        model.eval()(token_ids(1, 1))  # one token has an op of its own
    assert reads(model) == (stacks if by == "op" else 4 * stacks)


@PACKED
@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("experts_extended", [False, True])
def test_no_unpacked_weight_is_kept_for_backward(reentrant, experts_extended, pack):
    plain = make_model("mixtral", **BF16)
    packed, same = pair(plain, pack)
    handles = [patch(model) for model in (packed, same)]
    if experts_extended:
        for patched in handles:
            ExpertExtender(patched.model).extend("all", init=0)
            randomise(patched)
    for patched in handles:
        if reentrant is not None:
            patched.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model = packed.train()
    output = model(**inputs_of(handles[0]))
    assert kept(model) == 0
    output.loss.backward()
    assert kept(model) == 0
    found = [output.logits, output.loss, *(p.grad for p in handles[0].trainable_parameters())]
    assert equal(found, step(handles[1]))


def test_other_hooks_on_saved_tensors_see_all_but_the_weights():
    patched = patch(pack_experts(make_model("mixtral")))
    shape, seen = find_experts(patched.model).gate_up_proj.shape, []

    def copy_it(tensor):
        seen.append(tensor.shape)
        return tensor.detach().clone()

    expected = step(patched)
    patched.model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(copy_it, lambda tensor: tensor):
        assert equal(step(patched), expected)
    assert len(seen) > 100
    assert shape not in seen


@PACKED
def test_save_load_copy_and_unpatch(tmp_path, pack):
    plain = make_model("mixtral", **BF16)
    packed, same = pair(plain, pack)
    before = snapshot(packed)
    patched = patch(packed)
    expected = step(patched)
    patched.save_adapter(tmp_path)
    values = [p.detach().clone() for p in patched.trainable_parameters()]
    randomise(patched, seed=3)
    patched.load_adapter(tmp_path)
    assert equal(patched.trainable_parameters(), values)
    other = patch_model(same)
    other.load_adapter(tmp_path)  # the same base, unpacked
    assert equal(step(other), expected)
    copied = copy.deepcopy(packed)
    with torch.no_grad():
        ids = inputs_of(patched)["input_ids"]
        assert torch.equal(copied(ids).logits, packed(ids).logits)
    patched.unpatch()
    packed.eval()
    assert_same(snapshot(packed), before)


def test_another_packed_base_is_refused(tmp_path):
    patched = patch(pack_experts(make_model("mixtral")))
    patched.save_adapter(tmp_path)
    for module in patched.model.modules():
        if isinstance(module, FourBits):
            module.scales.mul_(1.5)  # the codes stay
    with pytest.raises(ValueError, match="trained on other base weights"):
        patched.load_adapter(tmp_path)


def test_added_experts_copy_the_unpacked_ones():
    found = []
    for model in pair(make_model("mixtral", **BF16)):
        extender = ExpertExtender(model)
        extender.extend("all", init=1)
        found.append(list(extender.patched.trainable_parameters()))
    assert equal(*found)


def test_a_parametrisation_of_packed_values():
    class Codes(nn.Module):
        def forward(self, codes):
            return codes

    model = make_model("mixtral")
    experts = find_experts(model)
    stack = experts.down_proj.detach().to(torch.int8)
    experts.down_proj = nn.Parameter(stack, requires_grad=False)
    parametrize.register_parametrization(experts, "down_proj", Codes(), unsafe=True)
    refused(model, ValueError, r"layer 0: quantised expert weights \(torch.int8\); load them in")


class Noise(nn.Module):
    def forward(self, weight):
        return weight + torch.randn_like(weight) if self.training else weight


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight + weight.flip(0)


class Locked(nn.Module):
    """A parametrisation that cannot be copied as a whole."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, weight):
        with self.lock:
            return weight * 1.0


PARAMETRISED = {
    "Noise": lambda experts, name: parametrize.register_parametrization(experts, name, Noise()),
    "_SpectralNorm": parametrizations.spectral_norm,
    "Symmetric, Noise": lambda experts, name: (
        parametrize.register_parametrization(experts, name, Symmetric()),
        parametrize.register_parametrization(experts, name, Noise()),
    ),
}


@pytest.mark.parametrize("classes", PARAMETRISED)
@pytest.mark.parametrize("training", [False, True])
def test_a_weight_that_changes_between_reads(classes, training):
    match = rf"parametrisation of down_proj \({classes}\) gives another weight at each read"
    later = make_model("mixtral").train(training)
    patch_model(later)
    PARAMETRISED[classes](find_experts(later), "down_proj")
    with pytest.raises(ValueError, match=match):
        later(token_ids(1, 4))
    both = make_model("mixtral").train(training)  # the stored tensors are the same before and after
    parametrize.register_parametrization(find_experts(both), "down_proj", Locked())
    patch_model(both)
    both(token_ids(1, 4))
    if "_SpectralNorm" not in classes:
        PARAMETRISED[classes](find_experts(both), "down_proj")
        with pytest.raises(ValueError, match="Locked.*Noise.* gives another weight at each read"):
            both(token_ids(1, 4))
    model = make_model("mixtral").train(training)
    PARAMETRISED[classes](find_experts(model), "down_proj")
    torch.manual_seed(0)
    refused(model, ValueError, f"layer 0: the {match}")
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), expected)


def test_a_weight_that_is_the_same_at_each_read():
    model = make_model("mixtral")
    with torch.no_grad():
        find_experts(model).down_proj[0, 0, 0] = torch.nan  # is not equal to itself
    parametrize.register_parametrization(find_experts(model), "down_proj", Symmetric())
    patch_model(model)


@PACKED
def test_experts_packed_or_unpacked_after_patching(pack, tmp_path):
    """Adapters load where the base computes the same; what is computed now is the base."""
    plain = make_model("mixtral", **BF16)
    packed, same = pair(plain, pack)
    later, unpacked = copy.deepcopy(plain), copy.deepcopy(packed)
    handles = {n: patch(m) for n, m in (("later", later), ("unpacked", unpacked), ("same", same))}
    pack(later)
    for experts in all_experts(unpacked).values():
        weights = {name: getattr(experts, name).detach() for name in experts.parametrizations}
        del experts.parametrizations
        experts.__class__ = type(experts).__mro__[1]
        for name, weight in weights.items():
            setattr(experts, name, nn.Parameter(weight, requires_grad=False))
    for name, patched in handles.items():
        patched.save_adapter(tmp_path / name)
        for other in handles.values():
            other.load_adapter(tmp_path / name)
    assert equal(step(handles["later"]), step(handles["same"]))


@PACKED
@pytest.mark.parametrize("experts_extended", [False, True])
def test_a_model_that_is_cast_after_patching(pack, experts_extended):
    patched = patch(pack(make_model("mixtral", **BF16)))
    if experts_extended:
        ExpertExtender(patched.model).extend("all", init=0)
    patched.model.half()
    match = (
        "cast to torch.float16 after patch_model, and its packed experts still compute in torch.b"
    )
    with pytest.raises(RuntimeError, match=match):
        patched.model(token_ids(1, 4))
    for parameter in patched.trainable_parameters():
        parameter.data = parameter.data.float()
    assert patched.model(token_ids(1, 4)).logits.dtype == torch.float16


def test_sharded_packed_experts():
    """The scales that unpack them have no part for each rank."""
    match = "gate_up_proj is packed and sharded.*DDP"
    dist.init_process_group("fake", rank=0, world_size=2, store=dist.HashStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        model = pack_experts(make_model("mixtral"))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        with pytest.raises(ValueError, match=match):
            patch_model(model)
        later = pack_experts(make_model("mixtral"))
        patch_model(later)
        for layer in later.model.layers:
            fully_shard(layer, mesh=mesh)
        with pytest.raises(RuntimeError, match=f"sharded after patch_model, and .*{match}"):
            later(token_ids(1, 4))
    finally:
        dist.destroy_process_group()
