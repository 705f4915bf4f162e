"""Padding in every form of attention mask, with every cache, on either side: never computed."""

import pytest
import torch
from support.model_zoo import VOCAB, make_model, token_ids
from support.patched_models import patched_model
from transformers import DynamicCache, Qwen2MoeConfig, StaticCache
from transformers.masking_utils import create_masks_for_generate

from moe_kernels.analysis import RoutingRecorder
from moe_kernels.models.context import ModalityContext
from moe_kernels.models.padding import find_real

S, WINDOW = 12, 5
SIDE = pytest.mark.parametrize("side", ["left", "right"])
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])
SLIDING = {
    "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
}  # fmt: skip


def padded(side, batch=2):
    """Return ids and a mask (B, S), of which the last row has four tokens of padding."""
    mask = torch.ones(batch, S, dtype=torch.int64)
    mask[-1, slice(4) if side == "left" else slice(S - 4, S)] = 0
    return token_ids(batch, S, vocab=VOCAB + 5).masked_fill(mask == 0, 0), mask


def config_of(attention, **settings):
    config = Qwen2MoeConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        **settings,
    )  # fmt: skip
    config._attn_implementation = attention
    return config


def filled(cache, config, seen):
    """Return the cache after ``seen`` tokens."""
    states = torch.zeros(2, 2, seen, 8)
    for layer in range(config.num_hidden_layers if seen else 0):
        cache.update(states, states, layer)
    return cache


@SIDE
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("kind", [StaticCache, DynamicCache], ids=["static", "dynamic"])
@pytest.mark.parametrize("settings", [{}, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("seen", [0, 3, 7])
def test_masks_of_transformers(attention, kind, settings, side, seen):
    """The masks that generate() makes say which tokens of this call are padding."""
    config = config_of(attention, **settings)
    cache = kind(config=config, **({"max_cache_len": S + 6} if kind is StaticCache else {}))
    cache = filled(cache, config, seen)
    mask = padded(side)[1]
    own = S - seen
    with torch.compiler.set_stance("force_eager"):  # flex attention compiles its masks
        made = create_masks_for_generate(config, torch.zeros(2, own, 32), mask, cache)
    for each in [made, *(made.values() if isinstance(made, dict) else ())]:
        assert torch.equal(find_real(each, own, cache).expand(2, own), mask[:, seen:] != 0)


@pytest.mark.parametrize("seen", [0, 4])
def test_a_mask_of_the_whole_cache(seen):
    """A 2-D mask may have columns of tokens that are to come."""
    config = config_of("sdpa")
    cache = filled(StaticCache(config=config, max_cache_len=S), config, seen)
    mask = padded("left")[1]
    assert torch.equal(find_real(mask, 3, cache), mask[:, seen : seen + 3] != 0)


def test_masks_that_do_not_say():
    assert find_real(None, S) is None
    assert find_real(torch.ones(2, 1, S, 1), S) is None
    assert find_real({}, S) is None
    assert find_real(torch.tril(torch.ones(1, 1, S, S)).bool(), S).all()


def test_additive_masks_of_any_size():
    causal = torch.tril(torch.ones(1, 1, S, S)).bool()
    for value in (-torch.inf, torch.finfo(torch.float32).min, -1e4):
        mask = torch.zeros(1, 1, S, S).masked_fill(~causal, value)
        mask[..., :2] = value
        assert find_real(mask, S).tolist() == [[False] * 2 + [True] * (S - 2)]


def test_a_mask_that_is_too_short_is_refused():
    model, _ = patched_model()
    with pytest.raises(ValueError, match="attention_mask has 1 columns for 12 tokens"):
        model(token_ids(2, S), attention_mask=torch.ones(2, 1))


def layer_ids(monkeypatch, model, side, **keywords):
    """Return the ids that layers got while generating, and the generated ids."""
    got, start = [], ModalityContext.start

    def record(self, ids, *others):
        got.append(ids.clone())
        start(self, ids, *others)

    monkeypatch.setattr(ModalityContext, "start", record)
    ids, mask = padded(side)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    settings |= {"suppress_tokens": [], "disable_compile": True}
    out = model.generate(ids, attention_mask=mask, **settings | keywords)
    monkeypatch.undo()
    layers = model.config.num_hidden_layers
    return torch.cat(got[::layers], 1), out


@SIDE
@ATTENTION
@pytest.mark.parametrize("settings", [{}, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("chunks", [{}, {"prefill_chunk_size": 5}], ids=["whole", "chunks"])
def test_generation_with_a_static_cache(monkeypatch, attention, settings, chunks, side):
    model, _ = patched_model("qwen2_moe", attention=attention, num_tokens=5, **settings)
    expected = layer_ids(monkeypatch, model, side)
    found = layer_ids(monkeypatch, model, side, cache_implementation="static", **chunks)
    assert (expected[0] == -1).sum() == 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@SIDE
@ATTENTION
def test_the_recorder_does_not_count_padding(attention, side):
    """Nor of a model that is not patched, with a mask of four dimensions."""
    model = make_model("mixtral", attention=attention)
    ids, mask = padded(side)
    ids = ids.clamp(max=VOCAB - 1)
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model.generate(
            ids, attention_mask=mask, max_new_tokens=1, cache_implementation="static",
            disable_compile=True,
        )  # fmt: skip
    assert (recorder.statistics().rows == mask.sum()).all()
