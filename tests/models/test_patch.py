"""Patching Hugging Face models: equality with the base, and exact undo."""

import copy

import pytest
import torch
from support.model_zoo import (
    FAMILIES,
    FAMILY,
    OTHERS,
    VOCAB,
    assert_same_snapshot,
    make_model,
    make_other,
    randomise,
    refused,
    snapshot,
    token_ids,
    unchanged,
)
from support.patched_models import assert_saved, check_compiles, merge, patched_model
from transformers import MixtralForCausalLM

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.models import patch as patch_module
from moe_kernels.models.handle import get_patched
from moe_kernels.models.parts import find_experts
from moe_kernels.moextend import ExpertExtender
from moe_kernels.testing import TOLERANCES, assert_close, make_routing, relative_rms

# Factor by which a model exceeds the rounding of its layers.
LOOSE = 10


def close(actual, expected, name, *, factor=LOOSE):
    error, limit = relative_rms(actual, expected), TOLERANCES[actual.dtype] * factor
    assert error <= limit, f"{name}: relative RMS error {error:.2e} is above {limit:.1e}"


def padding_mask(side, batch=3, length=12):
    """Return a mask (B, S) whose b-th sequence has 3 b padding positions on one side."""
    position = torch.arange(length) if side == "left" else torch.arange(length).flip(0)
    return (position >= 3 * torch.arange(batch)[:, None]).long()


def run(model, ids, mask, **kwargs):
    """Return logits, loss over real rows and the gradient of the embeddings."""
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100  # predicted by a padding row
    out = model(inputs_embeds=embeds, attention_mask=mask, labels=labels, **kwargs)
    (grad,) = torch.autograd.grad(out.loss, embeds)
    return out.logits.detach(), out.loss.detach(), grad


def text_and_base(model, side):
    """Return (name, value as text of the patched model, value of the base) for real rows."""
    ids, mask = token_ids(3, 12), padding_mask(side)
    expected = run(model, ids, mask)
    randomise(patch_model(model))
    actual = run(model, ids, mask, modality_ids=torch.zeros_like(ids))
    names, rows = ("logits", "loss", "gradient of the embeddings"), (mask.bool(), ..., mask.bool())
    return [(n, a[r], e[r]) for n, a, e, r in zip(names, actual, expected, rows, strict=True)]


# --- against the unpatched model


@FAMILY
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_text_is_the_base(family, experts, side):
    for name, actual, expected in text_and_base(make_model(family, experts=experts), side):
        close(actual, expected, name)


@FAMILY
def test_text_is_the_base_in_float64(family):
    # Norms, the router's softmax and the loss compute in float32 in a float64 model too.
    for name, ours, theirs in text_and_base(make_model(family, dtype=torch.float64), "left"):
        assert relative_rms(ours, theirs) < 1e-7, name


@FAMILY
def test_the_modality_follows_from_the_token_ids(family):
    model, _ = patched_model(family, num_tokens=5)
    ids = token_ids(2, 10, vocab=VOCAB + 5)
    ids[0, 3:6] = VOCAB + 1
    with torch.no_grad():
        derived = model(ids).logits
        given = model(ids, modality_ids=(ids >= VOCAB).int()).logits
        text = model(ids, modality_ids=torch.zeros_like(ids)).logits
    assert torch.equal(derived, given)
    assert not torch.equal(derived[:, -1], text[:, -1])


@FAMILY
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_dispatched(family, side):
    """The experts write zeros for padding, also with a cache, where the mask has more columns."""
    model = make_model(family)
    randomise(patch_model(model))
    experts, zeros = find_experts(model.model.layers[0]), []
    experts.register_forward_hook(lambda m, args, out: zeros.append((out == 0).all(-1)))
    ids, mask = token_ids(3, 12), padding_mask(side)
    kwargs = {"attention_mask": mask}
    with torch.no_grad():
        model(ids, **kwargs)
        model(ids, **kwargs, modality_ids=torch.ones_like(ids))
        model(inputs_embeds=model.get_input_embeddings()(ids), modality_ids=0 * ids, **kwargs)
        cache = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
        model(ids[:, 8:], past_key_values=cache, **kwargs)
        full = torch.zeros(3, 1, 12, 12)
        model(ids, attention_mask=full)
    padding = mask == 0
    expected = [padding] * 3 + [padding[:, :8], padding[:, 8:], torch.zeros_like(padding)]
    assert all(torch.equal(z.view(e.shape), e) for z, e in zip(zeros, expected, strict=True))


@FAMILY
def test_fresh_adapters_are_the_base(family):
    model = make_model(family)
    ids = token_ids(2, 16)
    with torch.no_grad():
        expected = model(ids).logits
        patch_model(model)
        close(model(ids, modality_ids=torch.ones_like(ids)).logits, expected, "logits")


@FAMILY
def test_adapters_off_are_the_base(family):
    model, patched = patched_model(family)
    ids = token_ids(2, 16)
    image = torch.ones_like(ids)
    with torch.no_grad():
        text = model(ids).logits
        on = model(ids, modality_ids=image).logits
        with patched.adapters_disabled():
            off = model(ids, modality_ids=image).logits
        again = model(ids, modality_ids=image).logits
    assert torch.equal(off, text)
    assert torch.equal(on, again)
    assert relative_rms(on, text) > 0.1


@FAMILY
@pytest.mark.parametrize(
    "targets", [("experts",), ("attention",), ("router",), ("experts", "attention", "router")]
)
def test_all_tokens_in_the_modality_are_the_merged_weights(family, targets):
    config = ModalityLoraConfig(r=4, lora_alpha=6, target_modules=targets)
    model, patched = patched_model(family, config)
    merged = merge(model, patched)
    ids, mask = token_ids(3, 12), padding_mask("left")
    expected = run(merged, ids, mask)
    actual = run(model, ids, mask, modality_ids=torch.ones_like(ids))
    real = mask.bool()
    close(actual[0][real], expected[0][real], "logits")
    close(actual[2][real], expected[2][real], "gradient of the embeddings")
    assert relative_rms(run(model, ids, mask, modality_ids=0 * ids)[0], expected[0]) > 0.05


@FAMILY
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_experts_module(family, experts):
    """In the experts alone, text rows have transformers' values and gradients."""
    model = make_model(family, experts=experts)
    module = find_experts(model.model.layers[0])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 32, generator=generator, requires_grad=True)
    ids, weights = make_routing(37, 2, 4, generator=generator)
    weights.requires_grad_()
    upstream = torch.randn(37, 32, generator=generator)

    def call():
        out = module(x, ids, weights)
        return [out.detach(), *torch.autograd.grad(out, [x, weights], upstream)]

    expected = call()
    randomise(patch_model(model))
    module.__dict__["_modality_context"].start(torch.zeros(1, 37, dtype=torch.long))
    for name, ours, theirs in zip(("out", "dx", "dw"), call(), expected, strict=True):
        assert_close(ours, theirs, name=name)


def test_an_experts_module_without_adapters_takes_the_base_path():
    """The registered implementation also works in a model that is not patched."""
    model = make_model("mixtral").requires_grad_(False)
    ids = token_ids(2, 8)
    expected = model(ids).logits
    model.set_experts_implementation("moe_kernels")
    close(model(ids).logits, expected, "logits")


def test_a_balance_loss_and_long_vocabulary(family="mixtral"):
    """output_router_logits adds the auxiliary loss as before, over V+n logits."""
    model = make_model(family)
    ids = token_ids(2, 8)
    expected = model(ids, labels=ids, output_router_logits=True)
    patch_model(model)
    actual = model(ids, labels=ids, output_router_logits=True)
    close(actual.aux_loss, expected.aux_loss, "balance loss")
    close(actual.loss, expected.loss, "loss")


@pytest.mark.parametrize("model_type", OTHERS)
def test_the_experts_of_other_families(model_type, tmp_path):
    """The layout decides, not the class: a short check of other models with the interface."""
    model, ids = make_other(model_type), token_ids(2, 10)
    with unchanged(model):
        expected = model(ids).logits
        patched = patch_model(model, ModalityLoraConfig(target_modules=("experts",)))
        add_modality_tokens(model, "image", 5)
        randomise(patched)
        close(model(ids).logits[..., :VOCAB], expected, "logits")
        image = model(ids, modality_ids=torch.ones_like(ids)).logits[..., :VOCAB]
        assert relative_rms(image, expected) > 0.1
        assert_saved(patched, tmp_path)
        patched.unpatch()


def test_latent_attention_is_adapted_by_its_own_names():
    model, ids = make_other("deepseek_v3"), token_ids(2, 10)
    with unchanged(model):
        expected = model(ids).logits
        patched = patch_model(model, ModalityLoraConfig(r=2, target_modules=("attention",)))
        names = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
        assert [projection.key for projection in patched.projections] == names * 2
        randomise(patched)
        close(model(ids).logits, expected, "logits")
        image = model(ids, modality_ids=torch.ones_like(ids))
        close(image.logits, merge(model, patched)(ids).logits, "logits with merged updates")
        patched.unpatch()


def test_fused_attention_is_refused_by_name():
    match = "layer 0: self_attn is MiniMaxLightningAttention with qkv_proj, out_proj, output_gate, "
    refused(make_other("minimax"), ValueError, match + '.*leave "attention" out of target_modules')


@pytest.mark.parametrize("model_type", ["jamba", "qwen3_next"])
def test_layers_without_attention(model_type):
    """Adapters go to layers with attention; text keeps its bits beside and before images."""
    model, ids = make_other(model_type), token_ids(3, 10)
    patched = patch_model(model, ModalityLoraConfig(r=2))
    assert {p.layer for p in patched.projections if p.key == "q_proj"} == {model.model.layers[1]}
    randomise(patched)
    image = torch.zeros_like(ids)
    image[1, 4:] = image[2] = 1
    with torch.no_grad():
        expected, mixed = model(ids).logits, model(ids, modality_ids=image).logits
    assert torch.equal(mixed[0], expected[0]) and torch.equal(mixed[1, :4], expected[1, :4])
    assert not torch.isclose(mixed[1:, 4:], expected[1:, 4:]).all(-1).any()


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["none", "reentrant", "not"])
@pytest.mark.parametrize("model_type", ["jamba", "qwen3_next", "minimax"])
def test_layers_without_attention_are_recomputed_with_their_ids(model_type, reentrant):
    """Two forwards before one backward; the mask of a layer may not be that of the last forward."""
    model, ids = make_other(model_type).train(), token_ids(2, 10)
    patched = patch_model(model, ModalityLoraConfig(r=2, target_modules=("experts",)))
    randomise(patched)
    parameters = list(patched.trainable_parameters())

    def loss():
        return sum(model(ids, modality_ids=(ids + i) % 2, labels=ids).loss for i in (0, 1))

    expected = torch.autograd.grad(loss(), parameters)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    functions = [layer.__dict__.get("_gradient_checkpointing_func") for layer in model.model.layers]
    loss().backward()
    for parameter, each in zip(parameters, expected, strict=True):
        close(parameter.grad, each, "gradient")
    patched.unpatch()
    for layer, function in zip(model.model.layers, functions, strict=True):
        assert layer.__dict__.get("_gradient_checkpointing_func") is function


# --- undo


@FAMILY
def test_unpatch_is_exact(family):
    model = make_model(family).train()
    model.get_input_embeddings().weight.requires_grad_(False)  # a flag that is not the default
    config, config_object = copy.deepcopy(model.config), model.config
    ids = token_ids(2, 16)
    expected = model(ids).logits
    for _ in range(2):
        with unchanged(model):
            patched = patch_model(model)
            add_modality_tokens(model, "image", 5)
            randomise(patched)
            loss = model(token_ids(2, 16, vocab=VOCAB + 5), labels=ids).loss
            loss.backward()
            assert patched.unpatch() is model
        assert model.config is config_object
        assert model.config == config
        assert all(module.config is config_object for module in find_configs(model))
        assert torch.equal(model(ids).logits, expected)
        assert all(p.grad is None for p in model.parameters())


def find_configs(model):
    return [module for module in model.modules() if hasattr(module, "config")]


@FAMILY
def test_another_instance_is_untouched(family):
    other, ids = make_model(family), token_ids(2, 16)
    expected = other(ids).logits
    with unchanged(other):
        model, _ = patched_model(family, num_tokens=5)
        model(token_ids(2, 16, vocab=VOCAB + 5))
    assert torch.equal(other(ids).logits, expected)
    assert type(other).forward is type(model).forward


def test_models_that_share_a_configuration(family="olmoe"):
    """Patching one model must change neither experts nor vocabulary of the other."""
    model = make_model(family)
    other = type(model)(model.config).eval()
    with unchanged(other):
        patched = patch_model(model)
        add_modality_tokens(model, "image", 5)
    patched.unpatch()
    assert model.config is other.config


@FAMILY
def test_a_deepcopy_is_independent(family):
    model, patched = patched_model(family, num_tokens=5)
    ids = token_ids(2, 16, vocab=VOCAB + 5)
    text, image = torch.zeros_like(ids), torch.ones_like(ids)
    with torch.no_grad():
        as_text = model(ids, modality_ids=text).logits
        as_image = model(ids, modality_ids=image).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids, modality_ids=text).logits, as_text)
        # The copy's forward did not set the original's masks, nor the original's the copy's.
        assert torch.equal(model(ids, modality_ids=image).logits, as_image)
        handle = get_patched(twin)
        assert handle.model is twin
        randomise(handle, seed=5)
        assert not torch.equal(twin(ids, modality_ids=image).logits, as_image)
        with handle.adapters_disabled():
            assert torch.equal(model(ids, modality_ids=image).logits, as_image)
        handle.unpatch()
        assert torch.equal(model(ids, modality_ids=image).logits, as_image)
        plain = twin(token_ids(2, 16)).logits
    patched.unpatch()
    assert torch.equal(model(token_ids(2, 16)).logits, plain)
    assert_same_snapshot(snapshot(twin), snapshot(model))


def test_a_handle_works_once():
    model = make_model("mixtral")
    old = patch_model(model)
    old.unpatch()
    new = patch_model(model)
    for call in (old.unpatch, lambda: old.save_adapter("x"), lambda: old.load_adapter("x")):
        with unchanged(model), pytest.raises(ValueError, match="unpatched"):
            call()
    new.unpatch()


def test_a_patch_that_stops_half_way_is_undone(monkeypatch):
    model = make_model("mixtral")
    make_lora, calls = patch_module._make_lora, []

    def out_of_memory(*args):
        calls.append(args)
        if len(calls) == 9:
            raise MemoryError("no memory for an adapter")
        return make_lora(*args)

    monkeypatch.setattr(patch_module, "_make_lora", out_of_memory)
    with unchanged(model):
        with unchanged(model), pytest.raises(MemoryError):
            patch_model(model)
        monkeypatch.undo()
        patch_model(model).unpatch()


# --- what trains


@FAMILY
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_saves_our_parameters_as_they_are(family, tied, tmp_path):
    """A parameter that transformers renames as an expert's on saving would be lost on resume."""
    _, patched = patched_model(family, num_tokens=5, tie_word_embeddings=tied)
    assert_saved(patched, tmp_path)


@FAMILY
def test_only_adapters_and_added_rows_train(family):
    model = make_model(family)
    patched = patch_model(model)
    add_modality_tokens(model, "image", 5)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in patched.named_trainable_parameters()}
    assert all("modality_lora" in name or "added_rows" in name for name in names)
    randomise(patched)
    ids = token_ids(2, 64, vocab=VOCAB + 5)
    model(ids, labels=ids).loss.backward()
    for name, parameter in patched.named_trainable_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


def test_groups_of_parameters_for_an_optimizer():
    """Rows have their own rate and no decay, whatever modalities are called."""
    names = ("added_rows", "image")
    model, patched = patched_model("mixtral", ModalityLoraConfig(r=4, modalities=names))
    ExpertExtender(model).add_projector(in_features=5, modality="added_rows")
    with pytest.raises(ValueError, match=r"none that train: call add_modality_tokens"):
        patched.parameter_groups(1e-3, rows_lr=1e-2)
    (alone,) = patched.parameter_groups(1e-3)
    assert len(alone["params"]) == len(list(patched.trainable_parameters()))
    add_modality_tokens(model, "image", 3)
    for rate in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rows_lr must be a finite number from 0 on"):
            patched.parameter_groups(1e-3, rows_lr=rate)
    optimizer = torch.optim.AdamW(patched.parameter_groups(1e-3, rows_lr=1e-2), weight_decay=0.1)
    adapters, rows = optimizer.param_groups
    assert adapters["params"] == alone["params"]
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert {*rows["params"]} == {each.added_rows["image"] for each in (table, head)}
    assert [(each["lr"], each["weight_decay"]) for each in (adapters, rows)] == [
        (1e-3, 0.1), (1e-2, 0.0),
    ]  # fmt: skip
    assert {g["lr"] for g in patched.parameter_groups(1e-3)} == {1e-3}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing that was added to the model trains"):
        patched.parameter_groups(1e-3)


def test_the_handle_says_what_was_added(capsys):
    model = make_model("mixtral")
    base = sum(parameter.numel() for parameter in model.parameters())
    config = ModalityLoraConfig(r=4, rank_pattern={"down_proj": 2}, layers_to_transform=(1,))
    patched = patch_model(model, config)
    add_modality_tokens(model, "image", 3)
    ExpertExtender(model).extend([0], 2, init=0)
    trained = sum(parameter.numel() for parameter in patched.trainable_parameters())
    assert patched.count_parameters() == (trained, base + trained)
    patched.print_trainable_parameters()
    share = 100 * trained / (base + trained)
    assert capsys.readouterr().out == (
        f"trainable params: {trained:,} || all params: {base + trained:,} || "
        f"trainable%: {share:.4f}\n"
    )
    said = repr(patched)
    for part in (
        "MixtralForCausalLM", "modalities: image", "targets: experts, attention", "ranks: 2, 4",
        "layers: 1 of 2 adapted, 2 with experts", "(chosen)", f"image 3 ({VOCAB}..{VOCAB + 2})",
        "adapters: default (active)",
        "extensions: 2 experts in 1 layers for",
    ):  # fmt: skip
        assert part in said
    patched.unpatch()
    assert repr(patched) == "PatchedModel(MixtralForCausalLM, unpatched)"


@FAMILY
def test_an_all_text_batch_has_a_loss_that_requires_grad(family):
    model = make_model(family)
    patched = patch_model(model)
    ids = token_ids(2, 16)
    loss = model(ids, labels=ids).loss
    assert loss.requires_grad
    loss.backward()
    for name, parameter in patched.named_trainable_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


def test_two_modalities():
    """Each modality has its own adapters, which only its rows use."""
    config = ModalityLoraConfig(r=4, modalities=("image", "sound"))
    model, patched = patched_model("mixtral", config)
    ids = token_ids(1, 12)
    masks = [torch.full_like(ids, m) for m in range(3)]
    with torch.no_grad():
        text, image, sound = (model(ids, modality_ids=m).logits for m in masks)
        for name, parameter in patched.named_trainable_parameters():
            assert parameter.shape[0] == 2, name
            parameter[1] *= 2
        assert torch.equal(model(ids, modality_ids=masks[0]).logits, text)
        assert torch.equal(model(ids, modality_ids=masks[1]).logits, image)
        assert not torch.equal(model(ids, modality_ids=masks[2]).logits, sound)


def test_ranks_by_projection_and_a_shared_A():
    config = ModalityLoraConfig(
        r=4, rank_pattern={"down_proj": 2, "q_proj": 3}, alpha_pattern={"q_proj": 3}, shared_A=True
    )
    model, patched = patched_model("mixtral", config)
    lora = model.model.layers[0].modality_lora
    assert lora["gate_up_proj"].lora_A.shape == (1, 1, 4, 32)
    assert lora["gate_up_proj"].lora_B.shape == (1, 4, 48, 4)
    assert lora["down_proj"].lora_A.shape == (1, 1, 2, 24)
    assert lora["q_proj"].lora_A.shape == (1, 3, 32)
    assert lora["q_proj"].scaling.tolist() == [1.0]
    ids = token_ids(1, 12)
    with torch.no_grad():
        expected = merge(model, patched)(ids).logits
        close(model(ids, modality_ids=torch.ones_like(ids)).logits, expected, "logits")


def test_dtypes_of_the_adapters():
    for dtype, expected_dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        model = make_model("mixtral", dtype=dtype)
        patched = patch_model(model, ModalityLoraConfig(r=3, lora_alpha=10))
        assert {p.dtype for p in patched.trainable_parameters()} == {expected_dtype}
        ids = token_ids(2, 8)
        out = model(ids, modality_ids=torch.ones_like(ids), labels=ids)
        assert out.logits.dtype == dtype
        out.loss.backward()
        assert {p.grad.dtype for p in patched.trainable_parameters()} == {expected_dtype}


def test_moving_the_model_keeps_the_scaling_exact():
    model = make_model("mixtral")
    patch_model(model, ModalityLoraConfig(r=3, lora_alpha=10))
    for move in (model.bfloat16, model.float, model.half, model.double):
        move()
        for layer in model.model.layers:
            for lora in layer.modality_lora.values():
                assert lora.scaling.tolist() == pytest.approx([10 / 3], rel=1e-7)


def test_a_subclass_that_a_script_defines():
    class Own(MixtralForCausalLM):
        pass

    model = Own(make_model("mixtral").config).eval()
    ids = token_ids(2, 8)
    expected = model(ids).logits
    patch_model(model)
    close(model(ids).logits, expected, "logits")


# --- bad input


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["none", "reentrant", "not"])
def test_adapters_off_hold_for_the_backward_of_their_forward(checkpointing):
    """Backward runs after the context; its recompute must still run without adapters."""
    model, patched = patched_model("olmoe", num_tokens=8)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    ids = VOCAB + token_ids(2, 9, vocab=8)
    with patched.adapters_disabled():
        loss = model(ids, labels=ids).loss
    loss.backward()
    rows = model.get_input_embeddings().added_rows["image"].grad.norm().item()
    for name, parameter in patched.named_trainable_parameters():
        if "modality_lora" in name:
            assert parameter.grad is None or not parameter.grad.any(), name
    fill_adapters_with_zeros(patched)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    expected = model.get_input_embeddings().added_rows["image"].grad.norm().item()
    assert rows == pytest.approx(expected, rel=1e-5)


def fill_adapters_with_zeros(patched):
    with torch.no_grad():
        for name, parameter in patched.named_trainable_parameters():
            if "modality_lora" in name:
                parameter.zero_()


def test_positional_arguments_are_bound_as_the_class_binds_them():
    model = make_model("olmoe")
    patch_model(model)
    ids = token_ids(1, 5)
    assert torch.equal(model(ids, torch.ones_like(ids)).logits, model(input_ids=ids).logits)
    with pytest.raises(TypeError, match="multiple values"):
        model(ids, input_ids=ids)
    with pytest.raises(TypeError, match="too many"):
        model(ids, *[None] * 20)


@pytest.mark.parametrize(  # qwen2_moe has a dense layer, a shared expert and biases, too
    "family",
    [pytest.param(f, marks=[] if f == "qwen2_moe" else pytest.mark.slow) for f in FAMILIES],
)
def test_a_patched_model_compiles_into_one_graph(family):
    check_compiles(family, None)


@pytest.mark.slow
def test_a_model_with_added_experts_compiles_into_one_graph():
    check_compiles("mixtral", None, extended=True)
