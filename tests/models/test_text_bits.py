"""Text logits keep their bits, whatever is learnt and whatever else is in the batch.

The guarantee of docs/design.md 5.1 at the level of models: at the same (B, S), padding and cache
the text logits of a patched model do not change. Hidden size 512 is large enough to see a GEMM
whose row count is a routed count.
"""

import pytest
import torch
from support.model_zoo import LARGE, VOCAB, fill, make_model, randomise, token_ids
from support.registered_ops import same

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.testing import working_backends

WORKING = working_backends()
NUM_IMAGE_TOKENS = 16

BACKENDS = pytest.mark.parametrize("backend", WORKING)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LENGTHS = pytest.mark.parametrize("length", [64, 200])
SEEDS = pytest.mark.parametrize("seed", range(2))


def make_patched(backend, dtype, seed, family="mixtral"):
    own = {"intermediate_size": 256} if family == "mixtral" else {"moe_intermediate_size": 256}
    experts = {"num_local_experts": 8} if family == "mixtral" else {"num_experts": 8}
    model = make_model(family, seed=seed, dtype=dtype, **LARGE, **own, **experts)
    patched = patch_model(model, ModalityLoraConfig(backend=backend))
    add_modality_tokens(model, "image", NUM_IMAGE_TOKENS)
    randomise(patched, scale=0.05, seed=seed)
    return model, patched


def text_logits(model, ids):
    with torch.no_grad():
        return model(ids).logits[..., :VOCAB]


def image_ids(batch, length, seed):
    return token_ids(batch, length, seed=seed, vocab=NUM_IMAGE_TOKENS) + VOCAB


@BACKENDS
@DTYPES
@LENGTHS
@SEEDS
def test_any_adapters_and_added_rows(backend, dtype, length, seed):
    model, patched = make_patched(backend, dtype, seed)
    ids = token_ids(2, length, seed=seed)
    expected = text_logits(model, ids)
    assert expected.std() > 0.1
    for change in (
        lambda: randomise(patched, scale=1.0, seed=seed + 9),
        lambda: randomise(patched, scale=1e18, seed=seed + 9),
        lambda: fill(patched, float("nan")),
    ):
        change()
        assert torch.equal(text_logits(model, ids), expected)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("threads", [1, 2])
def test_any_adapters_at_a_number_of_threads(backend, dtype, threads, thread_count):
    thread_count(threads)
    model, patched = make_patched(backend, dtype, 0)
    ids = token_ids(2, 64)
    expected = text_logits(model, ids)
    picture = image_ids(2, 64, 0)
    before = text_logits(model, picture)
    for scale in (0.1, 1.0):
        randomise(patched, scale=scale, seed=9)
        assert torch.equal(text_logits(model, ids), expected)
        assert not torch.equal(text_logits(model, picture), before)


@BACKENDS
@DTYPES
def test_adding_tokens(backend, dtype):
    model = make_model("mixtral", dtype=dtype, intermediate_size=256, **LARGE)
    patched = patch_model(model, ModalityLoraConfig(backend=backend, modalities=("image", "sound")))
    ids = token_ids(2, 64)
    expected = text_logits(model, ids)
    for modality, count in (("image", 13), ("sound", 600)):
        add_modality_tokens(model, modality, count)
        assert torch.equal(text_logits(model, ids), expected)
    randomise(patched, scale=1.0)
    assert torch.equal(text_logits(model, ids), expected)


@BACKENDS
@DTYPES
@LENGTHS
@SEEDS
def test_a_text_prefix_whatever_follows(backend, dtype, length, seed):
    model, _ = make_patched(backend, dtype, seed)
    ids = token_ids(2, length, seed=seed)
    cuts = (length // 3, length // 2)
    expected = text_logits(model, ids)
    other_text = token_ids(2, length, seed=seed + 50)
    picture = image_ids(2, length, seed)
    for follows in (other_text, picture, torch.where(other_text % 2 == 0, picture, other_text)):
        changed = ids.clone()
        for row, cut in enumerate(cuts):
            changed[row, cut:] = follows[row, cut:]
        logits = text_logits(model, changed)
        for row, cut in enumerate(cuts):
            assert torch.equal(logits[row, :cut], expected[row, :cut])
            assert not torch.equal(logits[row, cut:], expected[row, cut:])


@BACKENDS
@DTYPES
@LENGTHS
@SEEDS
def test_text_beside_pictures(backend, dtype, length, seed):
    """Text sequences in a batch with pictures keep their bits with adapters of any value."""
    model, patched = make_patched(backend, dtype, seed)
    ids = token_ids(3, length, seed=seed)
    expected = text_logits(model, ids)[::2]
    ids[1] = image_ids(1, length, seed)
    assert torch.equal(text_logits(model, ids)[::2], expected)
    fill(patched, float("nan"))
    logits = text_logits(model, ids)
    assert torch.equal(logits[::2], expected)
    assert logits[1].isnan().any()


@BACKENDS
@DTYPES
def test_padding_beside_pictures(backend, dtype):
    model, patched = make_patched(backend, dtype, 0)
    ids = token_ids(3, 64)
    mask = (torch.arange(64) >= torch.tensor([[9], [20], [0]])).long()

    def logits():
        with torch.no_grad():
            out = model(ids, attention_mask=mask).logits[..., :VOCAB]
        return out[0, 9:], out[2]

    expected = logits()
    ids[1] = image_ids(1, 64, 0)
    fill(patched, float("nan"))
    assert same(logits(), expected)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_learning(backend, dtype, family):
    """Text keeps its bits through optimiser steps on pictures with captions."""
    model, patched = make_patched(backend, dtype, 0, family)
    ids = token_ids(2, 64)
    expected = text_logits(model, ids)
    before = [p.detach().clone() for p in patched.trainable_parameters()]
    optimiser = torch.optim.AdamW(patched.trainable_parameters(), lr=0.002)
    batch = torch.cat([token_ids(2, 20, seed=3), image_ids(2, 44, 3)], dim=1)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = list(patched.trainable_parameters())
    assert all(not torch.equal(a, b) for a, b in zip(trained, before, strict=True))
    assert torch.equal(text_logits(model, ids), expected)
    with patched.adapters_disabled():
        assert torch.equal(text_logits(model, ids), expected)


@BACKENDS
@DTYPES
def test_with_a_cache(backend, dtype):
    """A text prompt and its next tokens, decoded beside a picture, keep their bits."""
    model, patched = make_patched(backend, dtype, 0)
    ids = token_ids(2, 70)

    def decode(ids):
        logits = []
        with torch.no_grad():
            out = model(ids[:, :64], use_cache=True)
            logits.append(out.logits[0, :, :VOCAB])
            for step in range(64, 70):
                out = model(ids[:, step : step + 1], past_key_values=out.past_key_values)
                logits.append(out.logits[0, :, :VOCAB])
        return torch.cat(logits)

    expected = decode(ids)
    ids[1] = image_ids(1, 70, 0)
    randomise(patched, scale=2.0, seed=8)
    assert torch.equal(decode(ids), expected)
