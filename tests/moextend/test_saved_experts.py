"""Projectors and joined sequences; added experts and projectors on disk."""

import json

import pytest
import torch
from support.added_experts import extended, logits, mixed
from support.families import make_family
from support.model_zoo import (
    FAMILY,
    assert_same_snapshot,
    make_model,
    randomise,
    snapshot,
    token_ids,
    unchanged,
)
from support.patched_models import patched_model
from support.registered_ops import same
from support.saved_adapters import CONFIG, read, rewrite
from torch import nn
from transformers import Trainer, TrainingArguments

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.modalities import join_features_and_text
from moe_kernels.models.parameters import named_adapter_parameters
from moe_kernels.models.peft_format import save_peft_adapter
from moe_kernels.moextend import ExpertExtender, ModalityProjector
from moe_kernels.testing import relative_rms

# --- projector


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_projector_by_hand(layers):
    projector = ModalityProjector(5, 8, 6, layers, dtype=torch.float64)
    features = torch.randn(2, 3, 5)
    expected = features.double()
    for place, linear in enumerate(projector.layers[::2]):
        if place:
            expected = nn.functional.gelu(expected)
        expected = expected @ linear.weight.T + linear.bias
    assert relative_rms(projector(features), expected) < 1e-12
    assert len(projector.layers) == 2 * layers - 1
    again = ModalityProjector(out_features=8, **projector.settings())
    assert [p.shape for p in again.parameters()] == [p.shape for p in projector.parameters()]


def test_alignment():
    """Only the projector learns, through the frozen model."""
    model = make_model("mixtral", dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    extender = ExpertExtender(model)
    projector = extender.add_projector(6)
    assert extender.projector() is projector
    assert {p.dtype for p in projector.parameters()} == {torch.float32}
    trainable = list(extender.patched.trainable_parameters())
    assert len(trainable) == 4
    features, ids = torch.randn(2, 4, 6), token_ids(2, 8)
    optimiser = torch.optim.Adam(trainable, lr=0.02)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = model(**join_features_and_text(model, projector(features), ids)).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in before.items():
        assert torch.equal(dict(model.named_parameters())[name], parameter)
    extender.extend("all", init=0)
    assert not any(p.requires_grad for p in projector.parameters())


def test_projector_refusals():
    extender = ExpertExtender(make_model("mixtral"))
    with pytest.raises(ValueError, match="no projector for 'image'"):
        extender.projector()
    with pytest.raises(ValueError, match="not for 'sound'"):
        extender.add_projector(4, modality="sound")
    with pytest.raises(ValueError, match="at least one layer"):
        extender.add_projector(0)
    projector = extender.add_projector(4)
    with pytest.raises(ValueError, match="already"):
        extender.add_projector(4)
    with pytest.raises(ValueError, match=r"features must be \(\.\.\., 4\)"):
        projector(torch.randn(2, 3))


# --- sequences


@pytest.mark.parametrize("side", ["left", "right"])
def test_features_among_text(side):
    """Features follow a begin token in two sequences of different lengths and padding."""
    model = make_model("olmoe")
    ExpertExtender(model, ("sound", "image"))
    features = torch.randn(2, 3, 32)
    ids = torch.tensor([[0, 0, 1, 5, 6], [1, 7, 8, 0, 0]])
    joined = join_features_and_text(
        model, features, ids, attention_mask=(ids != 0).long(), at=1, padding_side=side,
        feature_mask=torch.tensor([[1, 1, 1], [1, 0, 1]]),
    )  # fmt: skip
    table = model.get_input_embeddings().weight
    for row, (text, parts) in enumerate([([1, 5, 6], [0, 1, 2]), ([1, 7, 8], [0, 2])]):
        embeddings = [table[text[0]], *features[row, parts], table[text[1]], table[text[2]]]
        length = len(embeddings)
        at = slice(8 - length, 8) if side == "left" else slice(0, length)
        assert joined["attention_mask"][row].sum() == length
        assert joined["attention_mask"][row, at].all()
        assert torch.equal(joined["inputs_embeds"][row, at], torch.stack(embeddings))
        modality = [0, *[2] * len(parts), 0, 0]
        assert joined["modality_ids"][row, at].tolist() == modality
        first = -100 if side == "left" else text[0]  # padding would predict it
        labels = [first, *[-100] * len(parts), *text[1:]]
        assert joined["labels"][row, at].tolist() == labels
        rest = joined["attention_mask"][row] == 0
        assert (joined["modality_ids"][row, rest] == -1).all()
        assert (joined["labels"][row, rest] == -100).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_padding_of_features_has_no_say(value):
    model = make_model("olmoe")
    ExpertExtender(model, ("image",)).extend("all", init="mean")
    features = torch.randn(2, 3, 32)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])

    def results(padding):
        filled = features.masked_fill(mask[..., None] == 0, padding).requires_grad_()
        loss = model(**join_features_and_text(model, filled, ids, feature_mask=mask)).loss
        return loss, torch.autograd.grad(loss, filled)[0]

    ids = token_ids(2, 6)
    for actual, expected in zip(results(value), results(1.0), strict=True):
        assert torch.equal(actual, expected)


def test_what_is_joined_reaches_the_model():
    """Joined inputs equal the embeddings of one sequence of tokens; given labels are kept."""
    model = make_model("mixtral", dtype=torch.float64)
    extender = ExpertExtender(model)
    image = add_modality_tokens(model, "image", 4)
    extender.extend("all", init=0)
    randomise(extender.patched)
    ids = torch.cat([token_ids(2, 3) % 4 + image[0], token_ids(2, 5)], dim=1)
    labels = ids[:, 3:].clone()
    labels[:, 0] = -100
    embeddings = model.get_input_embeddings()(ids[:, :3])
    joined = join_features_and_text(model, embeddings, ids[:, 3:], labels=labels)
    whole = torch.cat([torch.full_like(ids[:, :3], -100), labels], dim=1)
    with torch.no_grad():
        expected, actual = model(ids, labels=whole), model(**joined)
    assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.loss, expected.loss)


def test_text_before_and_after_joining_keeps_its_bits():
    """A text prefix keeps its bits, whatever features follow and whatever was learnt."""
    extender = extended("mixtral")
    model, ids = extender.model, token_ids(2, 12)
    kept = []
    for scale in (0.1, 3.0):
        randomise(extender.patched, scale=scale)
        joined = join_features_and_text(model, torch.randn(2, 5, 32), ids, at=7)
        del joined["labels"]
        kept.append(logits(model, joined)[:, :7])
    assert torch.equal(*kept)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"features": torch.randn(2, 3, 31)}, r"features must be \(B, N, 32\)"),
        ({"features": torch.randn(3, 3, 32)}, "features must be"),
        ({"modality": "sound"}, "not for 'sound'"),
        ({"at": 9}, r"at must be in 0\.\.8"),
        ({"padding_side": "both"}, "padding_side"),
        ({"attention_mask": torch.ones(2, 7)}, "attention_mask must be"),
        ({"feature_mask": torch.ones(2, 7)}, "feature_mask must be"),
        ({"labels": torch.ones(2, 7)}, "labels must be"),
    ],
)
def test_what_cannot_be_joined(change, match):
    model = make_model("mixtral")
    arguments = {"features": torch.randn(2, 3, 32), "input_ids": token_ids(2, 8)} | change
    with pytest.raises(ValueError, match="not patched"):
        join_features_and_text(model, **arguments)
    ExpertExtender(model)
    with pytest.raises(ValueError, match=match):
        join_features_and_text(model, **arguments)


# --- on disk


def everything(family="mixtral"):
    """Make a model with adapters, tokens, two extensions and a projector."""
    model = make_model(family)
    config = ModalityLoraConfig(
        r=2, target_modules=("experts", "attention", "router"), modalities=("image", "task")
    )
    patched = patch_model(model, config)
    add_modality_tokens(model, "image", 3)
    extender = ExpertExtender(model)
    extender.extend([0], 2, init=0, modality="image", calibration="multiplicative")
    extender.add_projector(5, modality="image", hidden_features=7)
    extender.extend([0], 1, init="mean", modality="task")
    randomise(patched)
    return patched


@FAMILY
def test_the_same_bits_back(family, tmp_path):
    """The file alone restores every bit on the plain pretrained model."""
    patched = everything(family)
    state, inputs = snapshot(patched.model), [mixed(), mixed(modality=2)]
    expected = [logits(patched.model, each) for each in inputs]
    patched.save_adapter(tmp_path)
    fresh = patch_model(make_model(family), ModalityLoraConfig.from_adapter(tmp_path))
    fresh.load_adapter(tmp_path)
    assert same([logits(fresh.model, each) for each in inputs], expected)
    assert_same_snapshot(snapshot(fresh.model), state)
    assert fresh.extensions == patched.extensions
    assert [n for n, _ in fresh.named_trainable_parameters()] == [
        n for n, _ in patched.named_trainable_parameters()
    ]
    # A model that has everything already loads it too, and can be extended further.
    randomise(patched, seed=9)
    patched.load_adapter(tmp_path)
    assert torch.equal(logits(patched.model, inputs[0]), expected[0])
    extender = ExpertExtender(fresh.model)
    assert extender.projector("image").settings()["hidden_features"] == 7
    extender.extend([0], init=4, modality="image")
    fresh.save_adapter(tmp_path / "more")
    last = patch_model(make_model(family), ModalityLoraConfig.from_adapter(tmp_path / "more"))
    last.load_adapter(tmp_path / "more")
    assert torch.equal(logits(last.model, inputs[0]), logits(fresh.model, inputs[0]))


@pytest.mark.parametrize("already_present", [False, True])
def test_what_was_frozen_is_frozen_again(already_present, tmp_path):
    """Frozen parameters stay frozen, whether loading makes or finds them."""
    patched = everything()
    for name, parameter in named_adapter_parameters(patched.model):
        if "modality_lora.q_proj" in name or "added_rows" in name:
            parameter.requires_grad_(False)
    state = snapshot(patched.model)
    patched.save_adapter(tmp_path)
    if already_present:
        other = everything()
        for name, parameter in named_adapter_parameters(other.model):
            parameter.requires_grad_(not state["requires_grad"][name])
    else:
        other = patch_model(make_model("mixtral"), ModalityLoraConfig.from_adapter(tmp_path))
    other.load_adapter(tmp_path)
    assert_same_snapshot(snapshot(other.model), state)
    # Files of earlier versions lack this entry.
    rewrite(tmp_path, lambda header: header.pop("frozen"))
    for parameter in list(other.trainable_parameters())[::2]:
        parameter.requires_grad_(False)
    state = snapshot(other.model)
    other.load_adapter(tmp_path)
    assert_same_snapshot(snapshot(other.model), state)


def test_a_trainer_resumes(tmp_path):
    """The checkpoint of transformers' Trainer holds added experts and projectors."""
    ids = token_ids(16, 12)
    data = [{"input_ids": row, "labels": row, "modality_ids": row % 2} for row in ids]
    results = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(3 if resume else 0)
        extender = ExpertExtender(make_model("mixtral"))
        extender.add_projector(5)
        extender.extend(None, {0: 2, 1: 1}, init=0, freeze_earlier=False)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=4, seed=0,
            learning_rate=0.01, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        Trainer(extender.model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        results.append(dict(extender.patched.named_trainable_parameters()))
    start = extended("mixtral", experts_per_layer={0: 2, 1: 1}, layers=None).patched
    for name, parameter in results[0].items():
        assert torch.equal(results[1][name], parameter), name
    for name, parameter in start.named_trainable_parameters():
        assert not torch.equal(results[0][name], parameter), name


def test_what_the_files_say(tmp_path):
    everything().save_adapter(tmp_path)
    header, names = read(tmp_path)
    assert header == json.loads((tmp_path / CONFIG).read_text())
    one, two = header["extensions"]
    assert one["experts"] == {"0": 2} and one["sources"] == {"0": [0, 0]}
    assert one["modality"] == "image"
    assert two["experts"] == {"0": 1} and two["modality"] == "task" and two["init"] == "mean"
    assert header["projectors"]["image"]["in_features"] == 5
    prefix = "model.layers.0.modality_extension"
    assert f"{prefix}.0.router_columns" in names and f"{prefix}.1.gate_up_proj" in names
    assert f"{prefix}.0.calibration.calibration_B" in names
    assert "modality_projectors.image.layers.2.weight" in names
    assert f"{prefix}.0.down_proj" in header["frozen"]
    assert f"{prefix}.1.down_proj" not in header["frozen"]


def test_an_old_adapter_loads_as_before(tmp_path):
    _, patched = patched_model("mixtral", ModalityLoraConfig(r=2))
    patched.save_adapter(tmp_path)

    def as_before(header):
        for key in ("extensions", "projectors", "routing", "frozen"):
            assert not header.pop(key)
        del header["lora"]["sequence_modalities"]

    rewrite(tmp_path, as_before)
    fresh = patch_model(make_model("mixtral"), ModalityLoraConfig.from_adapter(tmp_path))
    fresh.load_adapter(tmp_path)
    assert torch.equal(logits(fresh.model, mixed()), logits(patched.model, mixed()))
    other = extended("mixtral").patched
    with pytest.raises(ValueError, match="another configuration|none !="):
        other.load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers": [0]}, r"other added experts.*\{0: 1, 1: 1\}.*!= .*\{0: 1\}"),
        ({"experts_per_layer": 2}, "other added experts"),
        ({"calibration": None}, "other added experts"),
        ({"modality_gate": False}, "other added experts"),
        ({"projector": 4}, "other projectors.*none != "),
        ({"seed": "another base"}, "other base weights"),
        ({"num_hidden_layers": 3}, "other base weights"),
    ],
)
def test_an_adapter_that_does_not_fit(change, match, tmp_path):
    extended("olmoe").patched.save_adapter(tmp_path)
    base = {"seed": 1} if "seed" in change else {}
    base |= {k: change.pop(k) for k in ("num_hidden_layers",) if k in change}
    change.pop("seed", None)
    size = change.pop("projector", None)
    extender = ExpertExtender(make_model("olmoe", **base))
    if not base:
        extender.extend(change.pop("layers", "all"), init=0, **change)
    if size:
        extender.add_projector(size)
    with unchanged(extender.model), pytest.raises(ValueError, match=match):
        extender.patched.load_adapter(tmp_path)


@pytest.mark.parametrize("already_present", [False, True])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_experts_per_tok": 3}, "layer 0: top_k 2 != 3, layer 1: top_k 2 != 3$"),
        ({"norm_topk_prob": True}, "layer 0: normalise False != True, layer 1:"),
        ({}, None),
    ],
)
def test_a_base_that_routes_otherwise(change, match, already_present, tmp_path):
    """A base that routes differently is refused, though its weights are the same."""
    extended("olmoe").patched.save_adapter(tmp_path)
    extender = ExpertExtender(make_model("olmoe", **change))
    if already_present:
        extender.extend("all", init=0)
    if match is None:
        extender.patched.load_adapter(tmp_path)
        return
    match = f"routes differently.*{match}"
    with unchanged(extender.model), pytest.raises(ValueError, match=match):
        extender.patched.load_adapter(tmp_path)
    assert len(extender.patched.extensions) == already_present
    # Files of earlier versions lack this entry.
    rewrite(tmp_path, lambda header: header.pop("routing"))
    extender.patched.load_adapter(tmp_path)
    assert len(extender.patched.extensions) == 1


def test_a_base_that_chooses_more_experts_than_it_has(tmp_path):
    extended("olmoe").patched.save_adapter(tmp_path)
    extender = ExpertExtender(make_model("olmoe", num_experts_per_tok=9))
    with (
        unchanged(extender.model),
        pytest.raises(ValueError, match="layer 0 cannot be extended: .*chooses 9 experts of 4"),
    ):
        extender.patched.load_adapter(tmp_path)


@pytest.mark.parametrize("what", ["lost", "shape", "layer"])
def test_a_file_that_is_not_whole(what, tmp_path):
    """The whole file is checked before anything is added to the model."""
    extended("olmoe").patched.save_adapter(tmp_path)
    name = "model.layers.1.modality_extension.0.down_proj"

    def shorten(tensors):
        tensors[name] = tensors[name][..., :-1].clone()

    change_header, change_tensors = {
        "lost": (None, lambda tensors: tensors.pop(name)),
        "shape": (None, shorten),
        "layer": (lambda h: h["extensions"][0].update(experts={"0": 1, "7": 1}), None),
    }[what]
    rewrite(tmp_path, change_header, change_tensors)
    patched = patch_model(make_model("olmoe"), ModalityLoraConfig.from_adapter(tmp_path))
    match = {"lost": "lacks 1 tensors", "shape": "has shape", "layer": r"layers \[7\]"}[what]
    with unchanged(patched.model), pytest.raises(ValueError, match=match):
        patched.load_adapter(tmp_path)
    assert not patched.extensions


def test_peft_cannot_hold_added_experts(tmp_path):
    patched = patch_model(make_model("mixtral"), ModalityLoraConfig(r=2))
    ExpertExtender(patched.model).extend("all", init=0)
    with pytest.raises(ValueError, match="do not hold added experts"):
        save_peft_adapter(patched, "image", tmp_path)


# --- experts and routers with biases


@pytest.mark.parametrize("init", [2, "mean", "random"])
def test_biases_start_as_those_of_what_is_copied(init):
    extender = ExpertExtender(make_family("gpt_oss"))
    extender.extend([0], 2, init=init)
    extender.extend([0], 1, init=4 if init == 2 else init)  # copies a copy
    parts = extender.patched.moe_layers[0]
    base = {
        "gate_up_bias": parts.experts.gate_up_proj_bias,
        "down_bias": parts.experts.down_proj_bias,
        "router_bias": parts.router.bias,
    }
    rows = {2: lambda bias: bias[2], "mean": lambda bias: bias.mean(0), "random": torch.zeros_like}
    for module in parts.layer.modality_extension.values():
        for name, bias in base.items():
            added = getattr(module, name)
            expected = rows[init](bias[0] if init == "random" else bias)
            assert not added.requires_grad and torch.equal(added, expected.expand_as(added))


def test_an_added_expert_with_biases_computes_as_its_source():
    """Its biases are in both projections and its logit, and none of them trains."""
    extender = ExpertExtender(make_family("gpt_oss"), backend="reference")
    extender.extend([0], 1, init=2, calibration=None)
    parts = extender.patched.moe_layers[0]
    rows, context = torch.randn(6, 32), parts.router.__dict__["_modality_context"]

    def on_images(module, *args):
        with context.running(torch.ones(1, 6, dtype=torch.int64)):
            return module(rows, *args)

    def chosen(expert):
        return on_images(parts.experts, torch.full((6, 1), expert), torch.ones(6, 1))

    logits = on_images(parts.router)[0]
    assert relative_rms(logits[:, 4], logits[:, 2]) < 1e-6
    assert relative_rms(chosen(4), chosen(2)) < 1e-6
    parts.layer.modality_extension.requires_grad_(True)  # the kernels take biases as constants
    chosen(4).sum().backward()
    module = parts.layer.modality_extension["0"]
    assert module.down_proj.grad.any() and module.down_bias.grad is None


def test_biases_of_added_experts_are_saved(tmp_path):
    extender, ids = ExpertExtender(make_family("gpt_oss")), token_ids(2, 12)
    extender.extend("all", 2, init=0)
    randomise(extender.patched)
    for name, parameter in named_adapter_parameters(extender.model):
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    image = torch.ones_like(ids)
    with torch.no_grad():
        expected = extender.model(ids, modality_ids=image).logits
    extender.patched.save_adapter(tmp_path)
    loaded = patch_model(make_family("gpt_oss"), ModalityLoraConfig.from_adapter(tmp_path))
    loaded.load_adapter(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids, modality_ids=image).logits, expected)
    added = [p for n, p in named_adapter_parameters(loaded.model) if n.endswith("bias")]
    assert len(added) == 6 and not any(p.requires_grad for p in added)
