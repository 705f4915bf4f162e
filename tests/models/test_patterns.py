"""Rank and alpha by layer and module, and adapters in some layers only, by PEFT's rules."""

import copy
import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from support.model_zoo import FAMILY, VOCAB, make_model, randomise, token_ids, unchanged
from support.saved_adapters import rewrite

from moe_kernels import ModalityLoraConfig, add_modality_tokens, initialise_lora, patch_model
from moe_kernels.models import peft_format
from moe_kernels.models.config import look_up
from moe_kernels.testing import relative_rms

ALL = ("experts", "attention", "router")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

# Layers and modules that overlap: the first key that fits counts.
RANKS = {
    r"model\.layers\.0\.self_attn\.q_proj": 1,
    r"layers\.0\.self_attn\..*": 2,
    "experts.gate_up_proj": 5,
    r"0\.mlp\..*": 6,
    "o_proj": 7,
}
ALPHAS = {r"layers\.0\..*_proj": 2, ".*": 3.5}


def make_patched(family="mixtral", *, dtype=torch.float64, **settings):
    settings = {"r": 3, "lora_alpha": 4.5, "target_modules": ALL} | settings
    return patch_model(make_model(family, dtype=dtype), ModalityLoraConfig(**settings))


def image_logits(patched, modality=1):
    ids = token_ids(3, 20)
    with torch.no_grad():
        return patched.model(ids, modality_ids=torch.full_like(ids, modality)).logits


def ranks(patched):
    found = patched.projections
    return {projection.name: projection.lora.r for projection in found}


# --- the rule


def test_the_rule_is_peft_s():
    """Patterns give PEFT's values for random keys in random orders."""
    names = [
        f"model.layers.{layer}.{module}"
        for layer in (0, 1, 10)
        for module in ("self_attn.q_proj", "mlp.experts.down_proj", "mlp.gate")
    ]
    parts = ["model", r"layers\.1", "1", r".*\.", r"\.", "self_attn", "q_proj", "gate", "^", ".*"]
    parts += ["[01]", "(gate|q_proj)", "down_proj", "proj", "mlp", "|", r"\.10\."]
    generator, fitting = random.Random(0), 0
    for _ in range(3000):
        count = generator.randint(1, 4)
        keys = ["".join(generator.choices(parts, k=generator.randint(1, 5))) for _ in range(count)]
        pattern = {key: generator.random() for key in keys}
        for name in names:
            expected = pattern.get(get_pattern_key(pattern.keys(), name), -1)
            assert look_up(pattern, name, -1) == expected, (keys, name)
            fitting += expected != -1
    assert fitting > 1000


def test_ranks_and_alphas_of_a_model():
    patched = make_patched("mixtral", rank_pattern=RANKS, alpha_pattern=ALPHAS)
    layers = [
        {key: (lora.r, lora.lora_alpha) for key, lora in layer.modality_lora.items()}
        for layer in patched.model.model.layers
    ]
    assert layers == [
        {
            "gate_up_proj": (5, 2), "down_proj": (6, 2), "q_proj": (1, 2), "k_proj": (2, 2),
            "v_proj": (2, 2), "o_proj": (2, 2), "gate": (6, 3.5),
        },
        {
            "gate_up_proj": (5, 3.5), "down_proj": (3, 3.5), "q_proj": (3, 3.5),
            "k_proj": (3, 3.5), "v_proj": (3, 3.5), "o_proj": (7, 3.5), "gate": (3, 3.5),
        },
    ]  # fmt: skip
    for layer in patched.model.model.layers:
        for lora in layer.modality_lora.values():
            assert lora.lora_A.shape[-2] == lora.lora_B.shape[-1] == lora.r
            assert lora.scaling.tolist() == pytest.approx([lora.lora_alpha / lora.r])


@FAMILY
def test_peft_gives_the_same_ranks(family):
    """PEFT makes the same ranks and scalings from the same patterns, router excluded."""
    theirs = get_peft_model(
        make_model(family),
        LoraConfig(
            r=3,
            lora_alpha=4.5,
            target_modules=list(ATTENTION),
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            rank_pattern=RANKS,
            alpha_pattern=ALPHAS,
        ),
    )
    patched = make_patched(family, target_modules=ALL[:2], rank_pattern=RANKS, alpha_pattern=ALPHAS)
    for slot in peft_format._slots(patched):
        module = theirs.get_submodule(slot.name)
        assert module.r["default"] == slot.lora.r, slot.name
        assert module.scaling["default"] == pytest.approx(slot.lora.scaling.item()), slot.name


# --- some layers


@FAMILY
def test_the_other_layers_are_the_base(family):
    """The output is that of adapters everywhere with the other layers' at zero."""
    every, some = make_patched(family), make_patched(family, layers_to_transform=[0])
    assert some.config.layers_to_transform == (0,)
    assert {name.split(".")[2] for name in ranks(some)} == {"0"}
    assert all(".layers.0." in name for name, _ in some.named_trainable_parameters())
    randomise(every)
    with torch.no_grad():
        for name, parameter in every.named_trainable_parameters():
            if ".layers.1." in name:
                parameter.zero_()
        own = dict(every.named_trainable_parameters())
        for name, parameter in some.named_trainable_parameters():
            parameter.copy_(own[name])
    assert relative_rms(image_logits(some), image_logits(every)) < 1e-12
    text = image_logits(some, 0)
    assert relative_rms(image_logits(some), text) > 0.05
    randomise(some, scale=9.0, seed=5)
    assert torch.equal(image_logits(some, 0), text)


def test_no_work_in_the_other_layers():
    patched = make_patched(layers_to_transform=(1,))
    for module in patched.model.model.layers[0].modules():
        assert "forward" not in module.__dict__ and not module.__dict__.get("_modality_lora")
    with torch.no_grad():
        ids = token_ids(1, 6)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
        out = []
        experts = patched.model.model.layers[0].mlp.experts
        experts.register_forward_hook(lambda m, args, result: out.append(result))
        patched.model(ids, attention_mask=mask)
    assert (out[0][:2] == 0).all() and (out[0][2:] != 0).any()  # padding is not dispatched there


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layers", [(0,), (1,)])
def test_some_layers_under_checkpointing(layers, reentrant):
    patched = make_patched("olmoe", layers_to_transform=layers)
    randomise(patched)
    model, ids = patched.model.train(), token_ids(2, 12)
    inputs = {"input_ids": ids, "labels": ids, "modality_ids": ids % 2}

    def grads():
        return torch.autograd.grad(model(**inputs).loss, list(patched.trainable_parameters()))

    expected = grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.zero_grad()
    model(**inputs).loss.backward()
    for parameter, expected_grad in zip(patched.trainable_parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, expected_grad) and expected_grad.any()


def test_everything_is_undone():
    model = make_model("qwen2_moe")
    config = ModalityLoraConfig(
        r=3, target_modules=ALL, layers_to_transform=(0,), rank_pattern=RANKS
    )
    with unchanged(model):
        patched = patch_model(model, config)
        add_modality_tokens(model, "image", 3)
        randomise(patched)
        copy.deepcopy(model)(token_ids(1, 5), modality_ids=torch.ones(1, 5, dtype=torch.long))
        patched.unpatch()


def test_a_start_from_layer_inputs():
    """initialise_lora handles different ranks and layers without adapters."""
    pytest.importorskip("ot", reason="POT is not installed (the extra 'ot')")
    patched = make_patched(
        "mixtral", dtype=torch.float32, layers_to_transform=(1,),
        rank_pattern={"q_proj": 1, r"1\.mlp\.gate": 2},
    )  # fmt: skip
    add_modality_tokens(patched.model, "image", 10)
    ids = token_ids(3, 16)
    ids[:, 8:] = VOCAB + ids[:, 8:] % 10
    reports = initialise_lora(patched.model, [{"input_ids": ids}])
    keys = ("gate_up_proj", *ATTENTION, "gate")
    assert set(reports) == {f"model.layers.1.modality_lora.{key}" for key in keys}
    for key, lora in patched.model.model.layers[1].modality_lora.items():
        assert lora.lora_B.any() == (key != "down_proj"), key


# --- adapters on disk


def saved_adapter(folder, **settings):
    patched = make_patched(dtype=torch.float32, **settings)
    randomise(patched)
    patched.save_adapter(folder)
    return patched


def test_on_disk_and_back(tmp_path):
    patched = saved_adapter(
        tmp_path, rank_pattern=RANKS, alpha_pattern=ALPHAS | {"gate": 1}, layers_to_transform=(0,)
    )
    config = ModalityLoraConfig.from_adapter(tmp_path)
    assert config == patched.config
    assert list(config.rank_pattern) == list(RANKS)  # the order, too
    fresh = patch_model(make_model("mixtral"), config)
    fresh.load_adapter(tmp_path)
    assert torch.equal(image_logits(fresh), image_logits(patched))


@pytest.mark.parametrize(
    ("ours", "match"),
    [
        ({"layers_to_transform": None}, r"layers_to_transform: \[1\] != None"),
        ({"layers_to_transform": (0, 1)}, r"layers_to_transform: \[1\] != \[0, 1\]"),
        ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern: {.*} != {'q_proj': 1}"),
        ({"alpha_pattern": {".*q_proj": 2, "q_proj": 1}}, "alpha_pattern: {'q_proj': 1, "),
        ({"target_modules": ALL[:2]}, "target_modules"),
    ],
)
def test_an_adapter_of_other_layers_or_patterns(ours, match, tmp_path):
    """The order of the keys counts too, since it can change an alpha."""
    theirs = {"alpha_pattern": {"q_proj": 1, ".*q_proj": 2}, "layers_to_transform": (1,)}
    saved_adapter(tmp_path, **theirs)
    patched = make_patched(dtype=torch.float32, **theirs | ours)
    with unchanged(patched.model), pytest.raises(ValueError, match=match):
        patched.load_adapter(tmp_path)


def test_an_adapter_of_an_older_version(tmp_path):
    """Settings that the file lacks keep their defaults."""
    settings = {"target_modules": ALL[:2], "rank_pattern": {"down_proj": 2}}
    patched = saved_adapter(tmp_path, **settings)
    rewrite(tmp_path, lambda header: header["lora"].pop("layers_to_transform"))
    assert ModalityLoraConfig.from_adapter(tmp_path) == patched.config
    fresh = make_patched(dtype=torch.float32, **settings)
    fresh.load_adapter(tmp_path)
    assert torch.equal(image_logits(fresh), image_logits(patched))
    some = make_patched(dtype=torch.float32, layers_to_transform=(0,), **settings)
    with pytest.raises(ValueError, match=r"layers_to_transform: None != \[0\]"):
        some.load_adapter(tmp_path)


def test_an_adapter_of_a_newer_version(tmp_path):
    patched = saved_adapter(tmp_path)
    rewrite(tmp_path, lambda header: header["lora"].update(dropout=0.1))
    for read in (lambda: ModalityLoraConfig.from_adapter(tmp_path),
                 lambda: patched.load_adapter(tmp_path)):  # fmt: skip
        with pytest.raises(ValueError, match="does not know the setting dropout"):
            read()


# --- through PEFT's files


@FAMILY
@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": RANKS, "alpha_pattern": ALPHAS},
        {"layers_to_transform": (0,), "rank_pattern": {"gate": 1, "q_proj": 2}},
        {"target_modules": ("router",), "alpha_pattern": {"mlp.gate": 9}},
        {"target_modules": ("router", "attention"), "rank_pattern": {r"0\.mlp\.g.*": 2}},
    ],
    ids=["patterns", "one layer", "the router alone", "router and attention"],
)
def test_peft_runs_what_we_write_and_we_what_it_writes(family, settings, tmp_path):
    """With every token in the modality the outputs agree, and PEFT's file restores our adapter."""
    patched = make_patched(family, **settings)
    randomise(patched)
    expected = image_logits(patched)
    peft_format.save_peft_adapter(patched, "image", tmp_path / "ours")
    peft = PeftModel.from_pretrained(make_model(family, dtype=torch.float64), tmp_path / "ours")
    with torch.no_grad():
        assert relative_rms(peft.eval()(token_ids(3, 20)).logits, expected) < 1e-6
    assert relative_rms(image_logits(patched, 0), expected) > 0.01

    peft.save_pretrained(tmp_path / "theirs")
    fresh = make_patched(family, **settings)
    peft_format.load_peft_adapter(fresh, "image", tmp_path / "theirs")
    assert torch.equal(image_logits(fresh), expected)


def test_peft_s_own_choice_of_layers(tmp_path):
    """PEFT's layers_to_transform applies to linear layers only, not to parameters."""
    config = LoraConfig(
        r=3, lora_alpha=4.5, target_modules=list(ATTENTION), layers_to_transform=[1],
        rank_pattern={r"layers\.1\.self_attn\.k_proj": 2},
    )  # fmt: skip
    peft = get_peft_model(make_model("olmoe", dtype=torch.float64), config).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
    peft.save_pretrained(tmp_path)
    settings = {"target_modules": ("attention",), "rank_pattern": {"k_proj": 2}}
    patched = make_patched("olmoe", layers_to_transform=(1,), **settings)
    peft_format.load_peft_adapter(patched, "image", tmp_path)
    with torch.no_grad():
        assert relative_rms(image_logits(patched), peft(token_ids(3, 20)).logits) < 1e-6
    for layers in ((0, 1), (0,)):
        other = make_patched("olmoe", target_modules=("attention",), layers_to_transform=layers)
        with pytest.raises(ValueError, match=r"layers.1.self_attn.k_proj|lacks .*layers.0"):
            peft_format.load_peft_adapter(other, "image", tmp_path)


def test_overlapping_keys_that_peft_has_sorted(tmp_path):
    """Sorted keys give other ranks than PEFT ran with: refused, not mixed silently."""
    config = LoraConfig(
        r=3, lora_alpha=4.5, target_modules=list(ATTENTION),
        rank_pattern={"q_proj": 2, ".*_proj": 1},
    )  # fmt: skip
    get_peft_model(make_model("olmoe", dtype=torch.float64), config).save_pretrained(tmp_path)
    patched = make_patched("olmoe", target_modules=("attention",), rank_pattern=config.rank_pattern)
    with pytest.raises(ValueError, match=r"q_proj: the adapter has .* \(1, 4.5\), the model \(2"):
        peft_format.load_peft_adapter(patched, "image", tmp_path)
