"""Routing statistics: what the recorder counts, and the metrics on counts known by hand."""

import json
import math

import pytest
import torch
from model_zoo import FAMILIES, PAD, VOCAB, make_model, randomise, token_ids

from moe_kernels import add_modality_tokens, patch_model
from moe_kernels.analysis import (
    RoutingRecorder,
    RoutingStatistics,
    modality_by_token_id,
    plot_expert_load,
)

IMAGE = range(VOCAB, VOCAB + 10)
MODALITY_OF = modality_by_token_id({"image": IMAGE})


def patched_model(family="olmoe"):
    model = make_model(family)
    patched = patch_model(model)
    assert add_modality_tokens(model, "image", len(IMAGE)) == IMAGE
    randomise(patched)
    return model


def mixed_batch():
    """Text then image tokens, the first row padded on the left."""
    ids = token_ids(3, 9)
    ids[:, 5:] = token_ids(3, 4, seed=1, vocab=len(IMAGE)) + IMAGE.start
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = PAD, 0
    return ids, mask


def record(model, *, modality_of=MODALITY_OF, **inputs):
    with torch.no_grad(), RoutingRecorder(model, modality_of) as recorder:
        model(**inputs)
    return recorder.statistics()


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_routers(family):
    model = patched_model(family)
    ids, mask = mixed_batch()
    chosen = {}
    for name, module in model.named_modules():
        if hasattr(module, "experts") and hasattr(module, "gate"):
            module.gate.register_forward_hook(
                lambda _, __, output, name=name: chosen.update({name: output})
            )
    statistics = record(model, input_ids=ids, attention_mask=mask)
    assert statistics.layers == tuple(chosen)
    modality = torch.where(mask == 0, -1, (ids >= VOCAB).long()).flatten()
    for layer, (logits, _, indices) in enumerate(chosen.values()):
        for number in (0, 1):
            picked = indices[modality == number].flatten()
            expected = torch.bincount(picked, minlength=logits.shape[-1])
            assert torch.equal(statistics.counts[layer, number], expected)
            entropy = torch.distributions.Categorical(
                logits=logits[modality == number].double()
            ).entropy()
            torch.testing.assert_close(statistics.entropy()[layer, number], entropy.mean())
    assert statistics.rows[0].tolist() == [3 * 5 - 3, 3 * 4]


def test_batches_add_up_and_memory_stays():
    model = patched_model()
    ids, mask = mixed_batch()
    once = record(model, input_ids=ids, attention_mask=mask)
    with torch.no_grad(), RoutingRecorder(model, MODALITY_OF) as recorder:
        for _ in range(3):
            model(input_ids=ids, attention_mask=mask)
    assert torch.equal(recorder.statistics().counts, 3 * once.counts)
    assert torch.equal(recorder.statistics().load(), once.load())


def test_every_source_of_the_modality_agrees():
    model = patched_model()
    ids, mask = mixed_batch()
    expected = record(model, input_ids=ids, attention_mask=mask)
    modality_ids = torch.where(mask == 0, -1, (ids >= VOCAB).long())
    given = record(
        model, modality_of=None, input_ids=ids, attention_mask=mask, modality_ids=modality_ids
    )
    assert torch.equal(given.counts, expected.counts)
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        recorder.observe(modality_ids.flatten())
        model(input_ids=ids, attention_mask=mask)
    assert torch.equal(recorder.statistics().counts, expected.counts)


def test_generation_with_a_cache_is_counted_once_for_each_token():
    model = patched_model()
    ids, mask = mixed_batch()
    with RoutingRecorder(model, MODALITY_OF) as recorder:
        model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    # The last token is drawn, not fed; text only, since added tokens are suppressed.
    assert recorder.statistics().rows[0].tolist() == [12 + 3 * 3, 12]


def test_hooks_leave_with_the_recorder():
    model = patched_model()
    ids, _ = mixed_batch()
    with pytest.raises(RuntimeError, match="inside"), RoutingRecorder(model, MODALITY_OF) as open_:
        with pytest.raises(RuntimeError, match="open already"):
            open_.__enter__()
        raise RuntimeError("inside")
    model(input_ids=ids)
    assert not model._forward_pre_hooks
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        open_.statistics()


def test_an_unknown_modality_and_a_model_without_routers_are_refused():
    model = patched_model()
    ids, _ = mixed_batch()
    with pytest.raises(ValueError, match="is unknown"), RoutingRecorder(model):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="has no name"), RoutingRecorder(model) as recorder:
        recorder.observe(torch.full_like(ids, 2))
        model(input_ids=ids)
    with pytest.raises(ValueError, match="no router"):
        RoutingRecorder(torch.nn.Linear(2, 2))


@pytest.fixture
def statistics():
    """One layer, four experts: text only, image only, both, unused."""
    counts = torch.tensor([[[60, 0, 40, 0], [0, 30, 10, 0]]])
    rows = torch.tensor([[50, 20]])
    return RoutingStatistics(
        ("text", "image"), ("layer",), counts, rows, torch.tensor([[50.0, 0.0]]).double()
    )


def test_metrics_on_counts_known_by_hand(statistics):
    assert statistics.load()[0, 0].tolist() == [0.6, 0, 0.4, 0]
    assert statistics.entropy().tolist() == [[1.0, 0.0]]
    p, q = [0.6, 0.0, 0.4], [0.0, 0.75, 0.25]
    half = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    bits = sum(
        x * math.log2(x / m) / 2
        for side in (p, q)
        for x, m in zip(side, half, strict=True)
        if x > 0
    )
    assert statistics.divergence("text", "image").tolist() == pytest.approx([bits])
    assert statistics.divergence("text", "text").tolist() == [0]
    share = statistics.specialisation("text", "image")[0]
    assert share[:3].tolist() == pytest.approx([0, 1, 0.25 / 0.65]) and share[3].isnan()
    kinds = statistics.expert_kinds("text", "image")
    assert [int(kind) for kind in vars(kinds).values()] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="no modality 'audio'"):
        statistics.divergence("text", "audio")


def test_disjoint_experts_diverge_by_one_bit():
    counts = torch.tensor([[[5, 0], [0, 3]], [[0, 0], [1, 1]]])
    statistics = RoutingStatistics(
        ("text", "image"), ("a", "b"), counts, torch.ones(2, 2).long(), torch.zeros(2, 2).double()
    )
    assert statistics.divergence("text", "image")[0] == 1
    assert statistics.load()[1, 0].tolist() == [0, 0]


def test_statistics_survive_json(statistics):
    again = RoutingStatistics.from_dict(json.loads(json.dumps(statistics.to_dict())))
    assert again.layers == statistics.layers and again.modalities == statistics.modalities
    for name in ("counts", "rows", "entropy_sum"):
        assert torch.equal(getattr(again, name), getattr(statistics, name))
        assert getattr(again, name).dtype == getattr(statistics, name).dtype
    with pytest.raises(ValueError, match="do not fit"):
        RoutingStatistics(("text",), ("layer",), again.counts, again.rows, again.entropy_sum)


def test_plot(statistics, tmp_path):
    figure = plot_expert_load(statistics, tmp_path / "routing.png")
    assert [panel.get_title() for panel in figure.axes[:3]] == [
        "text",
        "image",
        "text against image",
    ]
    assert (tmp_path / "routing.png").stat().st_size > 1000
