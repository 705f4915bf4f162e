"""Layer scores: the counts, the tuning, and that the model does not change."""

import itertools
import json

import pytest
import torch
from support.added_experts import extended, mixed
from support.model_zoo import FAMILY, make_model, randomise, token_ids, unchanged
from support.patched_models import patched_model

from moe_kernels import ModalityLoraConfig, add_modality_tokens
from moe_kernels.models.parts import parts_of
from moe_kernels.moextend import ExpertExtender, LayerScores, plot_layer_scores


def batches(count=3):
    return [mixed(2, 16, seed=10 * seed) for seed in range(count)]


def count_by_hand(model, data, *, everything=False, experts=4):
    """Count how often each router's top-k names an expert, row by row."""
    found = {}
    for index, layer in enumerate(model.model.layers):
        router = parts_of(layer).router
        if router is None:
            continue
        for inputs in data:
            rows = []
            hook = router.register_forward_pre_hook(lambda m, args, rows=rows: rows.append(args[0]))
            with torch.no_grad():
                model(**inputs)
            hook.remove()
            flat = rows[0].reshape(-1, rows[0].shape[-1])
            for row, modality, real in zip(
                flat, inputs["modality_ids"].flatten(), inputs["attention_mask"].flatten(),
                strict=True,
            ):  # fmt: skip
                if real and (modality == 1 or everything):
                    ranked = (router.weight @ row).argsort(descending=True)[: router.top_k]
                    for expert in ranked.tolist():
                        found.setdefault(index, [0] * experts)[expert] += 1
    return found


@FAMILY
@pytest.mark.parametrize("count", ["modality", "all"])
def test_counts_against_brute_force(family, count):
    model = make_model(family)
    scores = ExpertExtender(model).score_layers(batches(), 3, count=count, progress=False)
    expected = count_by_hand(model, batches(), everything=count == "all")
    assert dict(zip(scores.layers, scores.before.tolist(), strict=True)) == expected
    assert scores.num_experts == (4,) * len(scores.layers)
    # The published script counts the two least likely experts, which differ from these.
    assert scores.most_selected(0)[0] == max(range(4), key=expected[0].__getitem__)


@FAMILY
def test_after_is_a_tuned_copy(family):
    """The counts after tuning are those of a copy whose router weights AdamW trained."""
    data = batches()
    scores = ExpertExtender(make_model(family)).score_layers(data, 5, lr=0.05, progress=False)
    model = make_model(family)
    extender = ExpertExtender(model)
    weights = [parts_of(model.model.layers[index]).router.weight for index in extender.layers]
    for weight in weights:
        weight.requires_grad_(True)
    optimiser = torch.optim.AdamW(weights, lr=0.05, weight_decay=0.0)
    for inputs in itertools.islice(itertools.cycle(data), 5):
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        optimiser.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimiser.step()
    expected = count_by_hand(model, data)
    # Weight and change are added at another place, so close choices may differ.
    for after, layer in zip(scores.after, scores.layers, strict=True):
        assert (after - torch.tensor(expected[layer])).abs().sum() <= 2
    assert not torch.equal(scores.after, scores.before) and (scores.d > 0).all()


@pytest.mark.parametrize("kind", ["plain", "all adapters", "extended"])
def test_nothing_of_the_model_changes(kind):
    model = make_model("olmoe")
    if kind == "all adapters":
        targets = ("experts", "attention", "router")
        model, _ = patched_model("olmoe", ModalityLoraConfig(r=2, target_modules=targets))
    extender = ExpertExtender(model)
    if kind == "extended":
        extender.extend(None, {0: 1, 1: 2}, init=0)
        randomise(extender.patched)
    model.train()
    model.model.layers[0].eval()
    with unchanged(model):
        scores = extender.score_layers(batches(), 4, lr=0.1, progress=False)
    assert model.training and not model.model.layers[0].training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert extender.scores is scores and (scores.d > 0).all()
    if kind == "extended":
        assert scores.num_experts == (5, 6) and scores.before[0, 5] == 0
        assert scores.before[0, 4] > 0


def test_a_stop_half_way_leaves_the_model_as_it_was():
    extender = ExpertExtender(make_model("mixtral"))
    data = [mixed(), mixed() | {"labels": torch.full((2, 12), -100)}]  # a loss of NaN
    with unchanged(extender.model), pytest.raises(RuntimeError, match="the loss became nan"):
        extender.score_layers(data, 2, progress=False)
    assert extender.scores is None


@FAMILY
def test_within_autocast_the_routers_learn_too(family):
    """Routers learn within autocast, although it caches 16-bit copies of what trains."""
    extender = ExpertExtender(make_model(family))
    expected = extender.score_layers(batches(), 5, lr=0.05, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        actual = extender.score_layers(batches(), 5, lr=0.05, progress=False)
    assert (actual.d > 0).all()
    # Rounding the logits to 16 bits changes close choices.
    total = expected.after.sum()
    assert (actual.after - expected.after).abs().sum() < 0.1 * total
    assert (expected.before - expected.after).abs().sum() > 0.1 * total


def test_within_no_grad_and_inference_mode():
    extender = ExpertExtender(make_model("mixtral"))
    with unchanged(extender.model), torch.no_grad():
        assert (extender.score_layers(batches(), 3, lr=0.05, progress=False).d > 0).all()
    refusal = pytest.raises(RuntimeError, match="outside of torch.inference")
    with unchanged(extender.model), torch.inference_mode(), refusal:
        extender.score_layers(batches(), 3, progress=False)


def test_scores_by_hand():
    before = torch.tensor([[6, 2, 2], [5, 5, 0], [1, 1, 8]])
    after = torch.tensor([[2, 2, 6], [4, 6, 0], [2, 2, 16]])
    scores = LayerScores((0, 2, 5), before, after, (3, 2, 3))
    # Shares 0.6 0.2 0.2 and 0.2 0.2 0.6: differences 0.4 0 -0.4, of mean 0.
    assert scores.d.tolist() == pytest.approx(
        [(0.32 / 2) ** 0.5, (0.02 / 1) ** 0.5, 0.0], abs=1e-12
    )
    assert scores.order == (0, 2, 5)
    assert scores.most_selected(0) == [0, 1, 2] and scores.most_selected(0, tuned=True) == [2, 0, 1]
    assert scores.most_selected(2) == [0, 1]
    again = LayerScores.from_dict(json.loads(json.dumps(scores.to_dict())))
    assert again.layers == scores.layers and again.num_experts == scores.num_experts
    assert torch.equal(again.before, before) and torch.equal(again.after, after)
    assert again.modality is None and again.count is None
    with pytest.raises(ValueError, match="counts must be"):
        LayerScores((0, 1), before, after, (3, 3))
    with pytest.raises(ValueError, match='count must be "modality" or "all", got \'rows\''):
        LayerScores((0, 2, 5), before, after, (3, 2, 3), count="rows")


@pytest.mark.parametrize("number", [0, 1])
def test_no_scores_that_are_not_numbers(number):
    """One expert has no standard deviation, and no selections have no shares."""
    before = torch.tensor([[5, 1], [3, 0]])
    with pytest.raises(ValueError, match=f"layer 2 has no score: num_experts is {number}"):
        LayerScores((0, 2), before, before, (2, number))
    for place in (0, 1):
        counts = [before.clone(), before.clone()]
        counts[place][1] = 0
        with pytest.raises(ValueError, match="layer 2 has no score: no selection"):
            LayerScores((0, 2), *counts, (2, 2))


def test_a_layer_of_one_expert_is_not_scored():
    extender = ExpertExtender(make_model("qwen2_moe", num_experts=1, num_experts_per_tok=1))
    with pytest.raises(ValueError, match="layer 0 has no score: num_experts is 1"):
        extender.score_layers([mixed()], 1, progress=False)


def test_extending_by_scores():
    """The upper half is extended; each new expert copies another of the most selected."""
    extender = ExpertExtender(make_model("olmoe", num_hidden_layers=5))
    scores = extender.score_layers(batches(), 3, lr=0.05, progress=False)
    config = extender.extend(experts_per_layer=2)
    top = sorted(scores.order[:2])
    assert list(config.experts) == top and config.init == "most_selected"
    assert config.sources == {layer: tuple(scores.most_selected(layer)[:2]) for layer in top}
    for layer in top:
        block = extender.model.model.layers[layer]
        (added,) = block.modality_extension.values()
        for place, source in enumerate(config.sources[layer]):
            assert torch.equal(added.gate_up_proj[place], block.mlp.experts.gate_up_proj[source])
            assert torch.equal(added.router_columns[place], block.mlp.gate.weight[source])
    other = ExpertExtender(make_model("olmoe"))
    with pytest.raises(ValueError, match="scores are of layers"):
        other.extend(scores=scores)
    tuned = other.extend(
        [1], init="most_selected_tuned", scores=other.score_layers(batches(), 3, progress=False)
    )
    assert tuned.sources[1] == (other.scores.most_selected(1, tuned=True)[0],)


@pytest.mark.parametrize("saved", [False, True])
def test_scores_know_what_they_are_of(saved):
    """Scores of one modality are refused for another, unless they are not used."""
    extender = ExpertExtender(make_model("olmoe"), ("image", "task"))
    data = [mixed(2, 16), mixed(2, 16, modality=2)]
    scores = extender.score_layers(data, 2, modality="image", count="all", progress=False)
    assert scores.modality == "image" and scores.count == "all"
    assert extender.score_layers(data, 1, modality="image", progress=False).count == "modality"
    given = {}
    if saved:
        values = json.loads(json.dumps(scores.to_dict()))
        scores = given["scores"] = LayerScores.from_dict(values)
        assert (scores.modality, scores.count) == ("image", "all")
        extender.scores = None
    for options in (
        {}, {"layers": "top-half", "init": 0}, {"layers": [0]}, {"modality_gate": False},
        {"layers": [0], "init": "most_selected_tuned"},
    ):  # fmt: skip
        match = "the scores are of modality 'image'.* for 'task'"
        with unchanged(extender.model), pytest.raises(ValueError, match=match):
            extender.extend(modality="task", **options, **given)
    assert extender.extend([0], init=1, modality="task", **given).modality == "task"
    assert extender.extend(modality="image", **given).modality == "image"
    if saved:
        del values["modality"], values["count"]
        extender.extend(modality="task", scores=LayerScores.from_dict(values))


def test_scores_for_experts_that_all_rows_may_choose():
    extender = ExpertExtender(make_model("olmoe"), ("image", "task"))
    extender.score_layers([mixed()], 1, modality="image", progress=False)
    with pytest.raises(ValueError, match="not for 'sound'"):
        extender.extend(modality="sound", modality_gate=False)
    assert extender.extend(modality_gate=False).modality is None


def test_a_plot(tmp_path):
    scores = extended("olmoe").score_layers(batches(1), 1, progress=False)
    figure = plot_layer_scores(scores, tmp_path / "scores.png", chosen=[1])
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    heat, bars = figure.axes[:2]
    assert heat.images[0].get_array().shape == (2, 5)
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(scores.d.tolist())
    colours = [bar.get_facecolor() for bar in bars.patches]
    assert colours[0] != colours[1]


# --- batches


def test_batches_of_embeddings_and_of_added_tokens():
    model = make_model("mixtral")
    extender = ExpertExtender(model)
    ids = token_ids(2, 8)
    embeddings = model.get_input_embeddings()(ids)
    given = {"inputs_embeds": embeddings, "modality_ids": torch.ones_like(ids), "labels": ids}
    assert extender.score_layers([given], 1, progress=False).before.sum() == 2 * 16 * 2
    image = add_modality_tokens(model, "image", 4)
    found = extender.score_layers([{"input_ids": ids % 4 + image[0]}], 1, progress=False)
    assert found.before.sum() == 2 * 16 * 2


def seen_labels(extender, batch):
    found = []
    hook = extender.model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs.get("labels")), with_kwargs=True
    )
    scores = extender.score_layers([batch], 1, progress=False)
    hook.remove()
    assert found[0] is None and found[2] is None  # counting passes no labels
    return found[1], scores


def test_labels_where_there_are_none():
    """Missing labels are the ids without padding, by a 2-D mask or by modality ids."""
    extender, inputs = ExpertExtender(make_model("mixtral")), mixed()
    ids, padding = inputs["input_ids"], inputs["attention_mask"] == 0
    expected_labels = ids.masked_fill(padding, -100)
    labels, expected = seen_labels(extender, inputs)
    assert torch.equal(labels, expected_labels)
    inputs["modality_ids"] = inputs["modality_ids"].masked_fill(padding, -1)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    # A padding row attends to itself, or its softmax would be NaN.
    four = causal & (~padding[:, None, :] | torch.eye(12, dtype=torch.bool))
    labels, scores = seen_labels(extender, inputs | {"attention_mask": four[:, None]})
    assert torch.equal(labels, expected_labels)
    assert (scores.before - expected.before).abs().sum() <= 2  # attention uses another kernel
    del inputs["attention_mask"]
    assert torch.equal(seen_labels(extender, inputs)[0], expected_labels)
    given = torch.full_like(ids, 3)
    assert torch.equal(seen_labels(extender, inputs | {"labels": given})[0], given)


@pytest.mark.parametrize(
    ("data", "options", "error", "match"),
    [
        ([mixed()], {"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
        ([mixed()], {"steps": 2.0}, ValueError, "steps must be"),
        ([mixed()], {"lr": 0.0}, ValueError, "lr must be above 0"),
        ([mixed()], {"count": "text"}, ValueError, 'count must be "modality" or "all"'),
        ([mixed()], {"modality": "sound"}, ValueError, "not for 'sound'"),
        ([], {}, ValueError, "gave no batch"),
        ([torch.zeros(2, 3)], {}, TypeError, "must be a mapping"),
        ([{"labels": torch.ones(2, 3)}], {}, ValueError, r"no ids.*got \['labels'\]"),
        ([{"inputs_embeds": torch.randn(2, 3, 32)}], {}, ValueError, "no ids"),
        (
            [{"inputs_embeds": torch.randn(1, 3, 32), "modality_ids": torch.ones(1, 3).long()}],
            {}, ValueError, "needs labels",
        ),
        ([{"input_ids": token_ids(2, 8)}], {}, ValueError, "no token of 'image' modality"),
    ],
)  # fmt: skip
def test_refusals(data, options, error, match):
    extender = ExpertExtender(make_model("mixtral"))
    with pytest.raises(error, match=match):
        extender.score_layers(data, **{"steps": 1, "progress": False} | options)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_a_router_that_no_loss_reaches(family):
    """A top-1 router with normalised scores is refused, whatever dtype its scores have."""
    normalised = {} if family == "mixtral" else {"norm_topk_prob": True}
    model = make_model(family, num_experts_per_tok=1, **normalised)
    with pytest.raises(ValueError, match="top-1 and normalised"):
        ExpertExtender(model).score_layers([mixed()], 1, progress=False)
