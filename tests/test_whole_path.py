"""The path from a dense model to one that draws: text keeps its bits, at a revealing size."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.conversion import dense_to_moe, heal
from moe_kernels.imaging import (
    CaptionedImages,
    ImageCollator,
    ImageVocabulary,
    PatchTokenizer,
    generate_image_codes,
)
from moe_kernels.models import initialise_lora

VOCAB, CODES = 64, 8


def random_ids(batch, length, seed):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def converted():
    """Return a dense model of H 512, converted to four experts and healed for two steps."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=512, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=8, num_key_value_heads=4, pad_token_id=0, bos_token_id=1,
            eos_token_id=None, initializer_range=0.05, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    batches = [random_ids(4, 32, seed) for seed in range(3)]
    moe = dense_to_moe(dense, 4, 2, "clustered", calibration=batches)
    heal(moe, dense, batches, steps=2, progress=False)
    return moe.eval()


@pytest.fixture(scope="module")
def pictures():
    """Return a tokenizer fitted to random 8x8 pictures, and their codes."""
    images = torch.rand(24, 8, 8, generator=torch.Generator().manual_seed(0))
    tokenizer = PatchTokenizer.fit(images.numpy(), num_codes=CODES, patch_size=4)
    return tokenizer, tokenizer.encode(images)


@torch.no_grad()
def text_logits(model, length):
    return model(input_ids=random_ids(2, length, seed=length)).logits[..., :VOCAB]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora_init", ["zero", "gromov_wasserstein"])
def test_text_keeps_its_bits_from_the_dense_model_to_drawing(converted, pictures, dtype, lora_init):
    pytest.importorskip("ot")
    tokenizer, codes = pictures
    model = copy.deepcopy(converted).to(dtype)
    targets = ("experts", "attention", "router")
    patched = patch_model(model, ModalityLoraConfig(r=4, target_modules=targets))
    features = {"features": tokenizer.codebook, "num_delimiters": 2}
    ids = add_modality_tokens(
        model, "image", ImageVocabulary.size(CODES), init="gromov_wasserstein", **features
    )
    vocabulary = ImageVocabulary.from_token_ids(ids)
    before = {length: text_logits(model, length) for length in (64, 200)}

    dataset = CaptionedImages([[2, 3, 4]] * len(codes), codes, vocabulary, caption_dropout=0.3)
    batch = ImageCollator(pad_token_id=0)([dataset[index] for index in range(8)])
    if lora_init != "zero":
        rows = {name: batch[name] for name in ("input_ids", "attention_mask")}
        initialise_lora(model, [rows, {"input_ids": random_ids(2, 32, 9)}], lora_init=lora_init)
    optimizer = torch.optim.AdamW(patched.trainable_parameters(), lr=0.1)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(bool(p.isfinite().all()) for p in patched.trainable_parameters())

    with torch.no_grad():
        image = model(**batch).logits
        with patched.adapters_disabled():
            without = model(**batch).logits
    assert not torch.equal(image, without), "the adapters do nothing"
    drawn = generate_image_codes(
        model, [[2, 3, 4]] * 2, vocabulary, 4, pad_token_id=0, guidance_scale=2.0, seed=0
    )
    assert drawn.shape == (2, 4)
    for length, logits in before.items():
        assert torch.equal(text_logits(model, length), logits), length
