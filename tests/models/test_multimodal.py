"""Multimodal models: their text model is patched, and their own image tokens are a modality."""

import pytest
import torch
from support.families import VOCAB, make_family
from support.model_zoo import assert_same_snapshot, make_model, randomise, refused, snapshot
from support.model_zoo import token_ids as draw
from support.patched_models import merge
from torch import nn

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.models.experts import IMPLEMENTATION
from moe_kernels.testing import relative_rms

IMAGE = 60  # the placeholder that the model's processor writes for each part of an image
CONFIG = ModalityLoraConfig(r=2, token_ids={"image": (IMAGE,)})


def make(experts="eager"):
    """Return a model and two prompts with an image of 2 x 2 placeholders, the same picture."""
    model = make_family("qwen3_vl_moe")
    model.config.image_token_id = IMAGE
    model.set_experts_implementation(experts)
    ids = draw(2, 12, vocab=50)
    ids[:, 4:8] = IMAGE
    vision = model.config.vision_config
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    picture = torch.randn(32, values, generator=torch.Generator().manual_seed(0))
    return model, {
        "input_ids": ids,
        "pixel_values": picture,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


@torch.no_grad()
def logits(model, inputs, **others):
    return model(**inputs, **others).logits


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_the_text_model_is_patched(experts):
    model, inputs = make(experts)
    expected, before = logits(model, inputs), snapshot(model)
    configs = {
        name: module.config for name, module in model.named_modules() if hasattr(module, "config")
    }
    patched = patch_model(model, CONFIG)
    for parts in patched.parts:
        assert parts.experts.config._experts_implementation == IMPLEMENTATION
        assert parts.experts.config is model.config.text_config
    assert relative_rms(logits(model, inputs), expected) < 1e-5
    randomise(patched)
    adapted = logits(model, inputs)
    assert torch.equal(
        adapted[:, :4], logits(model, inputs, modality_ids=0 * inputs["input_ids"])[:, :4]
    )
    assert not torch.isclose(adapted[:, 4:], expected[:, 4:], atol=1e-3).all(-1).any()
    patched.unpatch()
    assert torch.equal(logits(model, inputs), expected)
    assert_same_snapshot(snapshot(model), before)
    assert all(model.get_submodule(name).config is each for name, each in configs.items())


def test_adapters_act_on_image_tokens_alone():
    """All rows of an image, merged: the same as the low-rank updates in the weights."""
    model, inputs = make()
    patched = patch_model(model, CONFIG)
    randomise(patched)
    image = (inputs["input_ids"] == IMAGE).long()
    assert torch.equal(patched.modality_of(inputs["input_ids"]), image)
    assert torch.equal(logits(model, inputs), logits(model, inputs, modality_ids=image))
    everywhere = logits(model, inputs, modality_ids=torch.ones_like(image))
    assert relative_rms(everywhere, logits(merge(model, patched), inputs)) < 1e-5


def test_image_tokens_train_and_generate():
    model, inputs = make()
    patched = patch_model(model, CONFIG)
    add_modality_tokens(model, "image", 3)
    assert model.config.text_config.vocab_size == VOCAB + 3
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    expected = inputs["input_ids"]
    for _ in range(3):
        kinds = (expected == IMAGE).int()
        step = logits(model, inputs | {"input_ids": expected, "mm_token_type_ids": kinds})
        expected = torch.cat([expected, step[:, -1:, :VOCAB].argmax(-1)], 1)
    assert torch.equal(tokens, expected)
    model.train()
    model.gradient_checkpointing_enable()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = [p for n, p in patched.named_trainable_parameters() if n.endswith("lora_B")]
    assert trained and all(p.grad.any() for p in trained)


def test_declared_tokens_are_saved(tmp_path):
    model, _ = make()
    patched = patch_model(model, CONFIG)
    patched.save_adapter(tmp_path)
    assert ModalityLoraConfig.from_adapter(tmp_path) == CONFIG
    patched.unpatch()
    other = patch_model(model, ModalityLoraConfig(r=2))
    with pytest.raises(ValueError, match="token_ids"):
        other.load_adapter(tmp_path)


@pytest.mark.parametrize(
    "token_ids", [{"sound": (1,)}, {"image": (-1,)}, {"image": (1.5,)}, {"image": (3, 3)}, (3,)]
)
def test_declared_tokens_that_cannot_be(token_ids):
    with pytest.raises(ValueError, match="token_ids must"):
        ModalityLoraConfig(token_ids=token_ids)


def test_a_declared_token_that_the_model_lacks():
    config = ModalityLoraConfig(token_ids={"image": (7, 1000)})
    refused(
        make_model("mixtral"), ValueError, r"token_ids has \[1000\]: .* has tokens 0..47", config
    )


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 3.0 * super().forward(ids)


def test_rows_are_scaled_as_those_of_text():
    model, ids = make_model("mixtral"), draw(2, 8)
    table = Scaled(48, 32, padding_idx=0)
    model.set_input_embeddings(table)
    patched = patch_model(model)
    before = logits(model, {"input_ids": ids})
    added = add_modality_tokens(model, "image", 3)
    assert torch.equal(logits(model, {"input_ids": ids})[..., :48], before)
    with torch.no_grad():
        table.added_rows["image"][1] = table.weight[5]
    found = table(torch.tensor([5, added[1]]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], 3.0 * table.weight[5])
    table(torch.tensor([added[0], 5])).sum().backward()
    assert table.added_rows["image"].grad[0].eq(3.0).all()
    patched.unpatch()


def test_a_second_table_of_tokens():
    model = make_model("mixtral")
    model.model.beside = nn.Embedding(48, 4)
    patch_model(model)
    match = "tokens cannot be added: MixtralModel.beside has a row for each token too"
    with pytest.raises(ValueError, match=match):
        add_modality_tokens(model, "image", 3)


def test_logits_that_are_cut():
    """Inkling's checkpoints pad their vocabulary, and the model cuts the padding off."""
    model = make_family("inkling")
    model.config.unpadded_vocab_size = VOCAB
    patch_model(model)
    match = "tokens cannot be added: the model cuts its logits to config.unpadded_vocab_size"
    with pytest.raises(ValueError, match=match):
        add_modality_tokens(model, "image", 3)
