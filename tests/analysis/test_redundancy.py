"""Redundancy of experts, against the definitions of CKA and against experts run one by one."""

import json

import pytest
import torch
from support.mixed_batches import IMAGE, mixed_batches, patched_model
from support.model_zoo import FAMILY, VOCAB, hooks_of, make_model, randomise, token_ids
from torch.nn import functional as F

from moe_kernels.analysis import (
    ExpertRedundancy,
    expert_redundancy,
    linear_cka,
    modality_by_token_id,
    plot_redundancy,
)
from moe_kernels.analysis import redundancy as module
from moe_kernels.models.added_experts import added_experts
from moe_kernels.moextend import ExpertExtender
from moe_kernels.testing import assert_close


def noise(rows, columns, seed=0, offset=3.0):
    """Return float32 features that are far from centred."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) + offset * torch.arange(columns)


# --- CKA


def feature_space_cka(x, y):
    """Return CKA by equation 5 of Kornblith et al."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def unbiased_hsic(k, el):
    """Return the estimate of HSIC by equation 5 of Song et al. 2012."""
    n = len(k)
    k, el = (m - torch.diag(m.diagonal()) for m in (k, el))
    one = torch.ones(n, dtype=k.dtype)
    total = torch.trace(k @ el) + (one @ k @ one) * (one @ el @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (one @ k @ el @ one)) / (n * (n - 3))


@pytest.mark.parametrize("shape", [(30, 4, 7), (9, 40, 25)], ids=["tall", "wide"])
def test_cka_is_that_of_feature_space(shape):
    rows, first, second = shape
    x = noise(rows, first)
    y = torch.cat([x @ noise(first, second - 2, 1), noise(rows, 2, 2)], 1)
    assert linear_cka(x, y) == pytest.approx(feature_space_cka(x, y), rel=1e-9)
    assert 0.01 < linear_cka(x, y) < 1


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_of_a_known_pair(debiased):
    """One column on each side: CKA is the squared correlation, or a ratio of unbiased estimates."""
    x = torch.tensor([[1.0], [2.0], [4.0], [5.0], [8.0]])
    y = torch.tensor([[2.0], [1.0], [4.0], [7.0], [6.0]])
    if debiased:
        k, el = (z.double() @ z.double().T for z in (x, y))
        expected = unbiased_hsic(k, el) / (unbiased_hsic(k, k) * unbiased_hsic(el, el)).sqrt()
    else:
        expected = torch.corrcoef(torch.cat([x, y], 1).T.double())[0, 1] ** 2
    assert linear_cka(x, y, debiased=debiased) == pytest.approx(float(expected), rel=1e-9)


def test_cka_of_constructed_spectra():
    """CKA is <s^2, t^2> / (|s^2| |t^2|) for equal directions u_i with singular values s_i, t_i."""
    centred = noise(12, 3).double() - noise(12, 3).double().mean(0)
    u = torch.linalg.qr(centred).Q
    s, t = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([3.0, 0.5, 1.0]).double()
    expected = F.cosine_similarity(s**2, t**2, dim=0)
    assert linear_cka(u * s, u * t) == pytest.approx(float(expected), rel=1e-9)
    assert linear_cka(u[:, :1], u[:, 1:2]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("debiased", [False, True])
def test_what_cka_does_not_see(debiased):
    x, y = noise(20, 6).double(), noise(20, 9, 1).double()
    y[:, :3] += x[:, :3]
    value = linear_cka(x, y, debiased=debiased)
    rotation = torch.linalg.qr(noise(6, 6, 2).double()).Q
    assert linear_cka(x, x @ rotation * 7 - 4, debiased=debiased) == pytest.approx(1)
    assert linear_cka(0.01 * x @ rotation + 5, y, debiased=debiased) == pytest.approx(value)
    assert linear_cka(y, x, debiased=debiased) == pytest.approx(value)
    stretched = x * torch.arange(1, 7)
    assert abs(linear_cka(stretched, y, debiased=debiased) - value) > 1e-3


def test_few_rows_raise_cka_and_not_the_debiased_one():
    values = {debiased: [] for debiased in (False, True)}
    for seed in range(20):
        x, y = noise(32, 96, 2 * seed), noise(32, 96, 2 * seed + 1)
        for debiased, found in values.items():
            found.append(linear_cka(x, y, debiased=debiased))
    biased, debiased = (torch.tensor(found) for found in values.values())
    assert abs(biased.mean() - 96 / (96 + 32)) < 0.03
    assert abs(debiased.mean()) < 0.02 and debiased.min() < 0


def test_cka_refuses_what_it_cannot_compare():
    x = noise(5, 2)
    with pytest.raises(ValueError, match="same number of rows"):
        linear_cka(x, x[:4])
    with pytest.raises(ValueError, match="at least 4"):
        linear_cka(x[:3], x[:3], debiased=True)
    with pytest.raises(ValueError, match=r"\(rows, features\)"):
        linear_cka(x, x.flatten())
    with pytest.raises(TypeError, match="floating"):
        linear_cka(x.long(), x)
    with pytest.raises(ValueError, match="x has values that are not finite"):
        linear_cka(x / 0, x)
    for same in (torch.full((5, 3), 0.1), torch.zeros(5, 3)):
        with pytest.raises(ValueError, match="all rows of y are the same"):
            linear_cka(x, same)


# --- the experts of models


def moe_layers(model):
    return {
        f"model.layers.{i}.mlp": layer.mlp
        for i, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "experts")
    }


def inputs_of(model, batches, select):
    """Return by layer all inputs at the rows that ``select(ids, mask)`` selects."""
    seen = {name: [] for name in moe_layers(model)}
    hooks = [
        block.gate.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach())
        )
        for name, block in moe_layers(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    keep = [select(batch["input_ids"], batch["attention_mask"]).flatten() for batch in batches]
    return {
        name: torch.cat([rows.flatten(0, -2)[at] for rows, at in zip(found, keep, strict=True)])
        for name, found in seen.items()
    }


def expert_by_hand(layer, expert, x, modality=None):
    """Return E_e(x) with adapters merged into the weights, in float64."""
    stacks = (layer.mlp.experts, *added_experts(layer))
    weights = []
    for name in ("gate_up_proj", "down_proj"):
        weight = torch.cat([getattr(stack, name) for stack in stacks])[expert].double()
        if modality is not None and expert < 4:
            lora = layer.modality_lora[name]
            update = lora.lora_B[modality - 1, expert] @ lora.lora_A[modality - 1, expert]
            weight = weight + lora.scaling[modality - 1] * update.double()
        weights.append(weight)
    gate, up = (x.double() @ weights[0].T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ weights[1].T


def similarity_by_hand(model, inputs, metric, modality=None):
    matrices = []
    for name, x in inputs.items():
        layer = model.model.layers[int(name.split(".")[2])]
        experts = range(4 + sum(added.num_added for added in added_experts(layer)))
        outputs = [expert_by_hand(layer, e, x, modality).detach() for e in experts]
        compare = {
            "cka": lambda a, b: linear_cka(a, b, debiased=True),
            "cosine": lambda a, b: float(F.cosine_similarity(a, b).mean()),
        }[metric]
        matrices.append(torch.tensor([[compare(a, b) for b in outputs] for a in outputs]).double())
    return matrices


def is_text(ids, mask):
    return (ids < VOCAB) & (mask == 1)


def is_image(ids, mask):
    return ids >= VOCAB


def assert_similar(actual, expected):
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, dtype=torch.float32)


@pytest.mark.parametrize("metric", module.METRICS)
@FAMILY
def test_plain_models_on_text(family, metric):
    model = make_model(family, vocab_size=IMAGE.stop)
    modality_of = modality_by_token_id({"image": IMAGE})
    batches = mixed_batches()
    found = expert_redundancy(model, batches, metric=metric, modality_of=modality_of)
    inputs = inputs_of(model, batches, is_text)
    assert found.layers == tuple(inputs) and found.rows == 3 * 12
    assert (found.metric, found.modality) == (metric, "text")
    assert_similar(found.similarity, similarity_by_hand(model, inputs, metric))
    assert found.mean().abs().max() < 0.9
    for matrix in found.similarity:
        assert torch.equal(matrix, matrix.T)
        assert_close(matrix.diagonal(), torch.ones(4).double())


@pytest.mark.parametrize("metric", module.METRICS)
def test_rows_of_a_modality_see_the_adapted_experts(metric):
    model, patched = patched_model()
    batches = mixed_batches()

    def measure(modality, **options):
        return expert_redundancy(
            model, batches, modality=modality, metric=metric, **options
        ).similarity

    inputs = inputs_of(model, batches, is_image)
    adapted = similarity_by_hand(model, inputs, metric, modality=1)
    base = similarity_by_hand(model, inputs, metric)
    assert_similar(measure("image"), adapted)
    assert_similar(measure("image", adapted=False), base)
    assert (adapted[0] - base[0]).abs().max() > 0.01
    text = similarity_by_hand(model, inputs_of(model, batches, is_text), metric)
    assert_similar(measure("text"), text)
    with patched.adapters_disabled():
        off = inputs_of(model, batches, is_image)
        assert (off["model.layers.1.mlp"] - inputs["model.layers.1.mlp"]).abs().max() > 0.01
        assert_similar(measure("image"), similarity_by_hand(model, off, metric))


@pytest.mark.parametrize("metric", module.METRICS)
@pytest.mark.parametrize("gate", [True, False])
def test_added_experts_are_compared_too(metric, gate):
    """Two extensions add a different number to each layer; ``disabled()`` leaves the base's."""
    model, patched = patched_model()
    extender = ExpertExtender(model)
    extender.extend(None, {0: 2}, init="random", modality_gate=gate)
    extender.extend(None, {0: 1, 1: 1}, init=0, modality_gate=gate, freeze_earlier=False)
    randomise(patched)
    batches = mixed_batches()
    for modality, select, number in (("text", is_text, None), ("image", is_image, 1)):
        found = expert_redundancy(model, batches, modality=modality, metric=metric).similarity
        assert [len(matrix) for matrix in found] == [7, 5]
        inputs = inputs_of(model, batches, select)
        assert_similar(found, similarity_by_hand(model, inputs, metric, number))
    with extender.disabled():
        off = expert_redundancy(model, batches, metric=metric).similarity
        inputs = inputs_of(model, batches, is_text)
    expected = similarity_by_hand(model, inputs, metric)
    assert_similar(off, [matrix[:4, :4] for matrix in expected])


def test_an_unpatched_and_a_patched_model_agree_on_text():
    batches = mixed_batches()
    for batch in batches:
        batch["input_ids"] = batch["input_ids"].clamp(max=VOCAB - 1)
    plain = expert_redundancy(make_model("mixtral"), batches)
    patched = expert_redundancy(patched_model("mixtral")[0], batches)
    assert_similar(patched.similarity, plain.similarity)


def test_sixteen_bits():
    model, _ = patched_model(dtype=torch.bfloat16)
    batches = mixed_batches()
    found = expert_redundancy(model, batches, modality="image").similarity
    inputs = inputs_of(model, batches, is_image)
    for one, other in zip(found, similarity_by_hand(model, inputs, "cka", 1), strict=True):
        assert_close(one, other, dtype=torch.bfloat16)


def test_the_sample_is_of_the_same_tokens_in_every_layer(monkeypatch):
    """The sample has rows of the modality only and does not depend on how rows are batched."""
    model, _ = patched_model()
    batches = mixed_batches(4)
    rows = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    samples = []
    original = module._Sample

    def kept(*args):
        samples.append(original(*args))
        return samples[-1]

    monkeypatch.setattr(module, "_Sample", kept)
    whole = expert_redundancy(model, [rows], modality="image", max_tokens=20)
    parts = expert_redundancy(model, batches, modality="image", max_tokens=20)
    other = expert_redundancy(model, batches, modality="image", max_tokens=20, seed=1)
    assert whole.rows == parts.rows == other.rows == 20
    assert_similar(parts.similarity, whole.similarity)
    assert (other.similarity[0] - parts.similarity[0]).abs().max() > 1e-3
    every = inputs_of(model, [rows], is_image)
    places = []
    for name, inputs in samples[0].inputs.items():
        distances = torch.cdist(inputs.double(), every[name].double())
        assert (distances.min(1).values < 1e-4).all()
        places.append(distances.argmin(1))
    assert torch.equal(*places) and len(set(places[0].tolist())) == 20


def test_the_sample_is_uniform():
    """Sampling keeps 15 of 60 tokens from 6 forwards: each about a quarter of the time."""
    times = torch.zeros(60)
    row_modality = type("", (), {})()
    for seed in range(400):
        sample = module._Sample(row_modality, 0, 15, seed)
        for start in range(0, 60, 10):
            row_modality.current = torch.zeros(10).long()
            sample.add("a", torch.arange(start, start + 10).view(-1, 1), torch.ones(10, 2), None)
        times[sample.inputs["a"].flatten()] += 1
    # Mean 100, standard deviation sqrt(400 / 4 * 3 / 4) = 8.7.
    assert times.sum() == 400 * 15 and times.min() > 65 and times.max() < 135


def test_cosines_in_parts(monkeypatch):
    model = make_model("olmoe")
    batches = [{"input_ids": token_ids(2, 11)}]
    whole = expert_redundancy(model, batches, metric="cosine")
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 4 * 32 * 5)  # five rows
    assert_similar(expert_redundancy(model, batches, metric="cosine").similarity, whole.similarity)


def test_an_expert_without_variance_is_left_out():
    model = make_model("olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2].zero_()
    batches = [{"input_ids": token_ids(2, 11)}]
    found = expert_redundancy(model, batches)
    assert found.similarity[1][2].isnan().all() and not found.similarity[0].isnan().any()
    others = found.similarity[1][[0, 0, 1], [1, 3, 3]]
    assert found.mean()[1].item() == pytest.approx(others.mean().item())
    low, high = found.extremes()
    assert (low[1], high[1]) == (others.min(), others.max())
    again = ExpertRedundancy.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert (again.layers, again.rows, again.metric) == (found.layers, 22, "cka")
    for one, other in zip(again.similarity, found.similarity, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    cosine = expert_redundancy(model, batches, metric="cosine").similarity[1]
    assert cosine[2].tolist() == [0, 0, 0, 0]


def test_applying_an_expert_keeps_the_call_of_the_forward_before():
    model, _ = patched_model()
    model(**mixed_batches()[0])
    experts = model.model.layers[0].mlp.experts
    context = experts.__dict__["_modality_context"]
    before, inputs = context.call, torch.randn(4, model.config.hidden_size)
    with torch.no_grad():
        one, other = (module._Experts(experts, inputs, m).output(0) for m in (0, 1))
    assert context.call is before and not torch.equal(one, other)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails):
    model, _ = patched_model()
    model.train()
    experts = model.model.layers[0].mlp.experts
    context = experts.__dict__["_modality_context"]
    batches = mixed_batches()
    hooks = hooks_of(model)
    if fails:
        with pytest.raises(ValueError, match="is unknown: without input_ids"):
            expert_redundancy(model, [*batches, {}], modality="image")
    else:
        expert_redundancy(model, batches, modality="image")
    assert model.training and all(layer.training for layer in model.model.layers)
    assert context.call is None
    assert hooks_of(model) == hooks


def test_refusals():
    model = make_model("olmoe")
    batches = [{"input_ids": token_ids(1, 3)}]
    with pytest.raises(ValueError, match="unknown metric 'l2'"):
        expert_redundancy(model, batches, metric="l2")
    with pytest.raises(ValueError, match="unknown modality 'image'; the modalities are text"):
        expert_redundancy(model, batches, modality="image")
    with pytest.raises(ValueError, match="have 3 rows of modality 'text', cka needs at least 4"):
        expert_redundancy(model, batches)
    with pytest.raises(ValueError, match="max_tokens of at least 4"):
        expert_redundancy(model, batches, max_tokens=3)
    with pytest.raises(ValueError, match="no router"):
        expert_redundancy(torch.nn.Linear(2, 2), batches)
    block = torch.nn.Module()
    block.gate, block.experts = torch.nn.Linear(2, 2), torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="is a list of modules"):
        expert_redundancy(torch.nn.Sequential(block), batches)


def test_plot(tmp_path):
    def made(shift, **changed):
        matrix = torch.full((3, 3), 0.2 + shift).double()
        matrix[0, 1] = matrix[1, 0] = 0.5 + shift
        values = ("cka", "image", 9, ("model.layers.0.mlp", "model.layers.2.mlp"), (matrix,) * 2)
        names = ("metric", "modality", "rows", "layers", "similarity")
        return ExpertRedundancy(**dict(zip(names, values, strict=True)) | changed)

    figure = plot_redundancy(made(0.1), made(0.0), tmp_path / "redundancy.png")
    panel = figure.axes[0]
    before, after = (line.get_ydata() for line in panel.lines[:2])
    assert list(before) == pytest.approx([0.4] * 2) and list(after) == pytest.approx([0.3] * 2)
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0", "2"]
    assert (tmp_path / "redundancy.png").read_bytes().startswith(b"\x89PNG")
    assert len(plot_redundancy(made(0.0)).axes[0].collections) == 1
    with pytest.raises(ValueError, match="different modality or metric"):
        plot_redundancy(made(0.0), made(0.0, metric="cosine"))
    elsewhere = made(0.0, layers=("model.layers.0.mlp", "model.layers.1.mlp"))
    with pytest.raises(ValueError, match="one plot needs the same layers"):
        plot_redundancy(made(0.0), elsewhere)
