"""Low-rank pairs of a patched model that start from its layers' inputs."""

import pytest
import torch
from support.mixed_batches import IMAGE, mixed_batches
from support.model_zoo import FAMILY, LARGE, VOCAB, make_model, randomise, token_ids, unchanged

from moe_kernels import ModalityLoraConfig, add_modality_tokens, initialise_lora, patch_model
from moe_kernels.init.lora import align, through, truncated_map
from moe_kernels.testing import assert_close

pytest.importorskip("ot", reason="POT is not installed (the extra 'ot')")


def patched_model(family="olmoe", model_settings=None, **config):
    model = make_model(family, **model_settings or {})
    patched = patch_model(model, ModalityLoraConfig(r=4, lora_alpha=6, **config))
    for modality in patched.config.modalities:
        add_modality_tokens(model, modality, len(IMAGE))
    return model, patched


def batches(count=2, length=16):
    """Return batches whose rows are half text, then half image; the first row is padded."""
    return mixed_batches(count, num_text=length // 2, num_image=length // 2)


def inputs_of(model, module, modality):
    """Return all rows that enter a module at image (1) or text (0) tokens, in order."""
    rows = []
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    kinds = []
    for batch in batches():
        with torch.no_grad():
            model(**batch)
        kind = (batch["input_ids"] >= VOCAB).long()
        kinds.append(torch.where(batch["attention_mask"] == 0, -1, kind).flatten())
    handle.remove()
    return torch.cat(rows)[torch.cat(kinds) == modality]


def weight_of(layer, name):
    if name == "gate_up_proj":
        return layer.mlp.experts.gate_up_proj
    if name == "gate":
        return layer.mlp.gate.weight
    return layer.self_attn.get_submodule(name).weight


@FAMILY
def test_every_pair_is_that_of_its_layer(family):
    """Every pair is recomputed from inputs that the test records with a hook of its own."""
    model, _ = patched_model(family, target_modules=("experts", "attention", "router"))
    layer = model.model.layers[0]
    readers = {
        "q_proj": layer.self_attn.q_proj,
        "k_proj": layer.self_attn.q_proj,
        "v_proj": layer.self_attn.q_proj,
        "o_proj": layer.self_attn.o_proj,
        "gate_up_proj": layer.mlp.experts,
        "gate": layer.mlp.gate,
    }
    inputs = {name: [inputs_of(model, m, kind) for kind in (1, 0)] for name, m in readers.items()}
    untouched = layer.modality_lora["down_proj"].lora_A.clone()
    reports = initialise_lora(model, batches(), max_tokens=1000)
    for name, (image, text) in inputs.items():
        lora = layer.modality_lora[name]
        aligned, coupling = align(image, text)
        down, up = truncated_map(image, aligned, 4, ridge=1e-3)
        assert_close(lora.lora_A[0], down.expand_as(lora.lora_A[0]), name=name)
        assert_close(lora.lora_B[0], through(weight_of(layer, name), up) / 1.5, name=name)
        report = reports[f"model.layers.0.modality_lora.{name}"]
        assert report.gw_value == pytest.approx(coupling.value)
        assert report.distance_after < report.distance_before
    down_proj = layer.modality_lora["down_proj"]
    assert torch.equal(down_proj.lora_A, untouched) and not down_proj.lora_B.any()


def test_text_keeps_its_bits_and_images_change():
    model, patched = patched_model()
    batch = batches(1)[0]
    text = {"input_ids": token_ids(2, 20)}
    with torch.no_grad():
        before = [model(**text).logits, model(**batch).logits]
        initialise_lora(model, batches())
        after = [model(**text).logits, model(**batch).logits]
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1][:, :8], before[1][:, :8])
    assert not torch.isclose(after[1][:, 8:], before[1][:, 8:]).all()
    assert all(parameter.isfinite().all() for parameter in patched.trainable_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [64, 200])
def test_text_keeps_its_bits_in_a_large_model(dtype, length):
    """Text keeps its bits, alone and beside images, at a size that exposes GEMMs of routed rows."""
    settings = LARGE | {"dtype": dtype, "num_hidden_layers": 1, "num_experts": 8}
    targets = ("experts", "attention", "router")
    model, patched = patched_model(model_settings=settings, target_modules=targets)
    text = {"input_ids": token_ids(3, length, seed=7)}
    (beside,) = batches(1, length)
    with torch.no_grad():
        before = [model(**text).logits, model(**beside).logits[1:]]
        initialise_lora(model, batches(1, 32), max_tokens=24)
        after = [model(**text).logits, model(**beside).logits[1:]]
    assert all(p.any() for n, p in patched.named_trainable_parameters() if "q_proj" in n)
    assert torch.equal(after[0], before[0])
    half = length // 2
    assert torch.equal(after[1][:, :half], before[1][:, :half])
    assert not torch.isclose(after[1][:, half:], before[1][:, half:]).all()


def test_options_reach_their_place():
    """Rank patterns, a shared A and the second of two modalities are all honoured."""
    model, _ = patched_model(
        modalities=("sound", "image"), shared_A=True, rank_pattern={"gate_up_proj": 2}
    )
    layer = model.model.layers[1]
    model.train()
    for batch in (sets := batches()):
        batch["input_ids"][:, 8:] += len(IMAGE)  # ids of the second modality
    lora = layer.modality_lora["gate_up_proj"]
    before = lora.lora_A.clone()
    reports = initialise_lora(model, sets, modality="image")
    assert model.training and not layer.self_attn.q_proj._forward_pre_hooks
    assert len(reports) == 2 * 5
    assert torch.equal(lora.lora_A[0], before[0]) and not torch.equal(lora.lora_A[1], before[1])
    assert lora.lora_A.shape[:3] == (2, 1, 2)
    assert lora.lora_B[1].any() and not lora.lora_B[0].any()


def test_a_small_sample_is_drawn_by_the_seed():
    def gates(seed, **options):
        model, _ = patched_model()
        initialise_lora(model, batches(), max_tokens=12, seed=seed, **options)
        return model.model.layers[1].modality_lora["q_proj"].lora_B.detach()

    assert torch.equal(gates(1), gates(1))
    assert not torch.equal(gates(1), gates(2))
    assert not torch.equal(gates(1), gates(1, lora_init="permuted"))
    assert not torch.equal(gates(1), gates(1, metric="euclidean"))


@pytest.mark.parametrize("family", ["mixtral"])
def test_half_precision(family):
    model = make_model(family, dtype=torch.bfloat16)
    patched = patch_model(model)
    add_modality_tokens(model, "image", len(IMAGE))
    initialise_lora(model, batches())
    for name, parameter in patched.named_trainable_parameters():
        assert parameter.dtype == torch.float32 and parameter.isfinite().all(), name


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"modality": "sound"}, "not for 'sound'"),
        ({"lora_init": "zeros"}, "unknown lora_init 'zeros'"),
        ({"max_tokens": 1}, "max_tokens must be at least 2"),
        ({"ridge": 0.0}, "ridge must be above 0"),
        ({"batches": []}, "have 0 tokens of the modality"),
        ({"batches": [{"input_ids": torch.full((1, 9), 3)}]}, "have 0 tokens of the modality"),
        ({"batches": [{"input_ids": torch.full((1, 9), VOCAB)}]}, "have 0 tokens of text"),
        ({"solver": "none"}, "unknown solver"),
        ({"max_memory": 10}, "the limit is 0.00"),
    ],
)
def test_bad_arguments_change_nothing(changes, match):
    model, _ = patched_model()
    arguments = {"batches": batches()} | changes
    with unchanged(model), pytest.raises(ValueError, match=match):
        initialise_lora(model, **arguments)


def test_an_alpha_of_zero():
    model = make_model("olmoe")
    patch_model(model, ModalityLoraConfig(alpha_pattern={"o_proj": 0}))
    with pytest.raises(ValueError, match="o_proj has lora_alpha 0"):
        initialise_lora(model, batches())


def test_trained_adapters_are_not_overwritten():
    model, patched = patched_model()
    randomise(patched)
    with pytest.raises(
        ValueError, match="'image' are not at their start: lora_B of model.layers.0"
    ):
        initialise_lora(model, batches())
    patched.unpatch()
    with pytest.raises(ValueError, match="is not patched"):
        initialise_lora(model, batches())
