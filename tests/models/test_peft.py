"""PEFT as an independent oracle: the same low-rank weights, without a mask.

PEFT adapts stacked experts by ``LoraConfig(target_parameters=...)``. With every token in the
modality our model is PEFT's, in outputs and in gradients of the adapters; with none, the base.
"""

import dataclasses
import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from support.model_zoo import FAMILIES, FAMILY, VOCAB, make_model, randomise, token_ids, unchanged
from support.saved_adapters import ADAPTER, EARLIER_ADAPTER, give_earlier_names

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.models import peft_format
from moe_kernels.models.parts import find_experts
from moe_kernels.testing import assert_close, make_routing, relative_rms

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
R, ALPHA = 3, 4.5


def make_peft(family, *, attention=True, dtype=torch.float64, **settings):
    """Make PEFT's model with random adapters."""
    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=list(ATTENTION) if attention else [],
        target_parameters=list(EXPERTS),
    )
    peft = get_peft_model(make_model(family, dtype=dtype, **settings), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return peft.eval()


def image_logits(model):
    """Return the logits of text tokens, all of them in the modality."""
    ids = token_ids(2, 12)
    with torch.no_grad():
        return model(ids, modality_ids=torch.ones_like(ids)).logits


def text_logits(model):
    with torch.no_grad():
        return model.eval()(token_ids(2, 12)).logits


def load_peft(family, folder):
    return PeftModel.from_pretrained(make_model(family, dtype=torch.float64), folder)


def make_patched(family, *, attention=True, dtype=torch.float64, **kwargs):
    targets = ("experts", "attention") if attention else ("experts",)
    config = ModalityLoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets, **kwargs)
    return patch_model(make_model(family, dtype=dtype), config)


@pytest.fixture
def pair(request, tmp_path):
    """Make both models with the same weights, transferred by PEFT's own file."""
    peft, patched = make_peft(request.param), make_patched(request.param)
    peft.save_pretrained(tmp_path)
    peft_format.load_peft_adapter(patched, "image", tmp_path)
    return peft, patched


BOTH = pytest.mark.parametrize("pair", FAMILIES, indirect=True)


def in_peft_layout(patched, tensor_of):
    """Map names in PEFT's model to ``tensor_of(parameter)`` of ours, by the file that we write."""
    tensors = {}
    for slot in peft_format._slots(patched):
        for field in ("lora_A", "lora_B"):
            tensor = tensor_of(getattr(slot.lora, field))[0]
            if slot.num_experts is not None:
                tensor = getattr(peft_format, f"experts_{field[-1]}_to_peft")(tensor)
            tensors[f"{slot.name}.{field}.default.weight"] = tensor
    return tensors


@BOTH
def test_every_token_in_the_modality(pair):
    """Logits and the gradients of all adapters agree."""
    peft, patched = pair
    ids = token_ids(3, 20)
    theirs = peft(ids, labels=ids)
    theirs.loss.backward()
    ours = patched.model(ids, labels=ids, modality_ids=torch.ones_like(ids))
    ours.loss.backward()
    # Norms, the router's softmax and the loss compute in float32 in a float64 model too.
    assert relative_rms(ours.logits, theirs.logits) < 1e-6
    grads = in_peft_layout(patched, lambda parameter: parameter.grad)
    expected = {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert grad.norm() > 0
        assert relative_rms(grad, expected[name]) < 1e-6, name


@BOTH
def test_no_token_in_the_modality(pair):
    peft, patched = pair
    ids = token_ids(3, 20)
    with torch.no_grad():
        ours = patched.model(ids).logits
        with peft.disable_adapter():
            assert relative_rms(ours, peft(ids).logits) < 1e-6
        assert relative_rms(ours, peft(ids).logits) > 0.1


@BOTH
def test_a_random_mask_is_a_choice_of_the_two(pair):
    """Each row of the experts module has PEFT's output or the base's; gradients likewise."""
    peft, patched = pair
    theirs = peft.get_submodule("base_model.model.model.layers.0.mlp.experts")
    ours = find_experts(patched.model.model.layers[0])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    ids, weights = make_routing(50, 2, 4, generator=generator)
    weights = weights.double().requires_grad_()
    mask = torch.randint(0, 2, (1, 50), generator=generator)
    upstream = torch.randn(50, 32, generator=generator, dtype=torch.float64)
    rows = mask[0].bool()[:, None]

    adapted = theirs(x, ids, weights)
    with peft.disable_adapter():
        plain = theirs(x, ids, weights)
    expected = torch.where(rows, adapted, plain)
    ours.__dict__["_modality_context"].start(mask)
    actual = ours(x, ids, weights)
    assert_close(actual, expected)
    grads = torch.autograd.grad(actual, [x, weights], upstream, retain_graph=True)
    for ours_, theirs_ in zip(
        grads, torch.autograd.grad(expected, [x, weights], upstream, retain_graph=True), strict=True
    ):
        assert_close(ours_, theirs_)

    actual.backward(upstream)
    expected.backward(upstream)
    grads = in_peft_layout(patched, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    checked = 0
    for name, parameter in peft.named_parameters():
        if "layers.0.mlp.experts" in name and "lora_" in name:
            assert_close(grads[name], parameter.grad, name=name)
            checked += 1
    assert checked == 4


@FAMILY
def test_our_file_loads_in_peft(family, tmp_path):
    patched = make_patched(family)
    randomise(patched)
    peft_format.save_peft_adapter(patched, "image", tmp_path)
    peft = load_peft(family, tmp_path).eval()
    ids = token_ids(3, 20)
    with torch.no_grad():
        ours = patched.model(ids, modality_ids=torch.ones_like(ids)).logits
        assert relative_rms(ours, peft(ids).logits) < 1e-6
        merged = peft.merge_and_unload()
        assert relative_rms(ours, merged(ids).logits) < 1e-6

    # A model that PEFT merged and unloaded is plain again and can be patched.
    patch_model(merged)


@FAMILY
def test_the_files_are_the_same_bits_both_ways(family, tmp_path):
    """PEFT's file loaded and saved by us has the same bits."""
    peft = make_peft(family, dtype=torch.float32)
    peft.save_pretrained(tmp_path / "theirs")
    patched = make_patched(family, dtype=torch.float32)
    peft_format.load_peft_adapter(patched, "image", tmp_path / "theirs")
    peft_format.save_peft_adapter(patched, "image", tmp_path / "ours")
    theirs, ours = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_experts_alone(tmp_path):
    peft, patched = make_peft("mixtral", attention=False), make_patched("mixtral", attention=False)
    peft.save_pretrained(tmp_path / "theirs")
    peft_format.load_peft_adapter(patched, "image", tmp_path / "theirs")
    ours = image_logits(patched.model)
    assert relative_rms(ours, text_logits(peft)) < 1e-6
    peft_format.save_peft_adapter(patched, "image", tmp_path / "ours")
    assert relative_rms(text_logits(load_peft("mixtral", tmp_path / "ours")), ours) < 1e-6


def test_ranks_by_projection_and_a_shared_A(tmp_path):
    """A shared A is written once for each expert, since PEFT cannot share it."""
    patterns = {
        "rank_pattern": {"down_proj": 2, "q_proj": 1},
        "alpha_pattern": {"down_proj": 6, "q_proj": 0.5},
    }
    patched = make_patched("olmoe", shared_A=True, **patterns)
    randomise(patched)
    peft_format.save_peft_adapter(patched, "image", tmp_path)
    ours = image_logits(patched.model)
    assert relative_rms(ours, text_logits(load_peft("olmoe", tmp_path))) < 1e-6
    unshared = make_patched("olmoe", **patterns)
    peft_format.load_peft_adapter(unshared, "image", tmp_path)
    assert relative_rms(image_logits(unshared.model), ours) < 1e-6


def test_one_of_two_modalities(tmp_path):
    make_peft("mixtral").save_pretrained(tmp_path)
    patched = make_patched("mixtral", modalities=("image", "sound"))
    randomise(patched)
    before = [p.detach().clone() for p in patched.trainable_parameters()]
    peft_format.load_peft_adapter(patched, "sound", tmp_path)
    for old, new in zip(before, patched.trainable_parameters(), strict=True):
        assert torch.equal(new[0], old[0])
        assert not torch.equal(new[1], old[1])


def test_the_layout_of_B_has_the_expert_fastest():
    """B is read with the expert fastest, which four other projects got wrong."""
    lora_B = torch.arange(2 * 3 * 5.0).view(2, 3, 5)  # (E, out, r)
    flat = peft_format.experts_B_to_peft(lora_B)
    assert flat.shape == (3, 10)
    for e in range(2):
        for r in range(5):
            assert torch.equal(flat[:, r * 2 + e], lora_B[e, :, r])
    assert torch.equal(peft_format.experts_B_from_peft(flat, 2), lora_B)
    lora_A = torch.arange(2 * 5 * 3.0).view(2, 5, 3)  # (E, r, in)
    flat = peft_format.experts_A_to_peft(lora_A)
    assert torch.equal(flat[5 + 2], lora_A[1, 2])
    assert torch.equal(peft_format.experts_A_from_peft(flat, 2), lora_A)


# --- bad input


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"r": 8}, r"gate_up_proj: the adapter has \(r, lora_alpha\) = \(8, 4.5\)"),
        ({"lora_alpha": 1}, r"= \(3, 1\), the model \(3, 4.5\)"),
        ({"use_rslora": True}, "use_rslora=True is not supported"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights='pissa' is not supported.*PEFT converts",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        *(
            ({option: {"a": 1}}, f"{option}=.* is not supported")
            for option in sorted(peft_format.OFF)
        ),
        (
            {"option_of_2030": 0.5},
            r"option_of_2030=0.5 is unknown to this version of moe_kernels \(the file is by PEFT",
        ),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        (
            {"rank_pattern": {r"layers\.1\..*q_proj": 9}},
            r"layers.1.self_attn.q_proj: the adapter has \(r, lora_alpha\) = \(9, 4.5\)",
        ),
        (
            {"alpha_pattern": {"o_proj": 9}},
            r"layers.0.*o_proj: .* = \(3, 9\), the model \(3, 4.5\)",
        ),
        ({"rank_pattern": {"(": 9}}, "rank_pattern: '\\(' is not a regular expression"),
    ],
)
def test_options_that_we_do_not_have(changes, match, tmp_path):
    make_peft("mixtral").save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    patched = make_patched("mixtral")
    match = f"^{re.escape(str(tmp_path / 'adapter_config.json'))}: .*{match}"
    with unchanged(patched.model), pytest.raises(ValueError, match=match):
        peft_format.load_peft_adapter(patched, "image", tmp_path)


def test_every_option_of_peft_has_been_looked_at():
    """A new one fails here: sort it into READ, HARMLESS or OFF."""
    options = {field.name for field in dataclasses.fields(LoraConfig)}
    assert options - peft_format.READ - peft_format.HARMLESS - peft_format.OFF == set()


@pytest.mark.parametrize("start", [True, False, "gaussian", "Gaussian", "eva", "mica"])
def test_starts_that_leave_the_base_alone_are_read(start, tmp_path):
    make_peft("mixtral").save_pretrained(tmp_path)
    edit(tmp_path, init_lora_weights=start, option_that_is_off=None)
    peft_format.load_peft_adapter(make_patched("mixtral"), "image", tmp_path)


def test_another_set_of_projections(tmp_path):
    make_peft("mixtral").save_pretrained(tmp_path / "all")
    make_peft("mixtral", attention=False).save_pretrained(tmp_path / "experts")
    for attention, folder, match in (
        (False, "all", "16 tensors that fit no projection"),
        (True, "experts", "the adapter lacks .*q_proj.lora_A"),
    ):
        patched = make_patched("mixtral", attention=attention)
        match = f"{folder}/adapter_model.safetensors: .*{match}"
        with unchanged(patched.model), pytest.raises(ValueError, match=match):
            peft_format.load_peft_adapter(patched, "image", tmp_path / folder)


def test_an_adapter_of_another_model(tmp_path):
    make_peft("mixtral", dtype=torch.float32, num_local_experts=6).save_pretrained(tmp_path)
    patched = make_patched("mixtral")
    with (
        unchanged(patched.model),
        pytest.raises(ValueError, match=r"adapter_model.safetensors: .*experts.* does not fit"),
    ):
        peft_format.load_peft_adapter(patched, "image", tmp_path)


def test_a_folder_with_our_own_files(tmp_path):
    patched = make_patched("mixtral")
    patched.save_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match="no adapter of PEFT in .*: adapter_model.safe"):
        peft_format.load_peft_adapter(patched, "image", tmp_path)
    give_earlier_names(tmp_path, ADAPTER, EARLIER_ADAPTER)
    with pytest.raises(ValueError, match="has an adapter of moe_kernels under the names of an"):
        peft_format.save_peft_adapter(patched, "image", tmp_path)
    patched.load_adapter(tmp_path)
    patched.save_adapter(tmp_path)
    peft_format.save_peft_adapter(patched, "image", tmp_path)
    patched.load_adapter(tmp_path)
    peft_format.load_peft_adapter(patched, "image", tmp_path)


def test_what_peft_cannot_hold(tmp_path):
    patched = make_patched("mixtral")
    with pytest.raises(ValueError, match="patched for .*'image'.*not for 'sound'"):
        peft_format.save_peft_adapter(patched, "sound", tmp_path)
    add_modality_tokens(patched.model, "image", 3)
    with pytest.raises(ValueError, match="do not hold added tokens, the model has {'image': 3}"):
        peft_format.save_peft_adapter(patched, "image", tmp_path)
    assert not list(tmp_path.iterdir())
    make_peft("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="shared_A: PEFT's experts have one lora_A"):
        shared = make_patched("mixtral", shared_A=True)
        peft_format.load_peft_adapter(shared, "image", tmp_path)


def test_a_peft_model_is_refused():
    """A wrapped or injected model is refused: PEFT's wrappers would run on every token."""
    peft = make_peft("mixtral")
    for model in (peft, peft.base_model.model):
        with pytest.raises(TypeError, match="carries PEFT adapters: merge or unload them first"):
            patch_model(model)
    model = make_model("mixtral")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(TypeError, match="carries PEFT adapters"):
        patch_model(model)
    plain = peft.unload()
    patch_model(plain)
    assert plain(token_ids(1, 4)).logits.shape == (1, 4, VOCAB)
