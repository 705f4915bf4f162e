"""Low-rank updates of the routers: image rows choose other experts, text rows keep their bits."""

import copy
import dataclasses

import pytest
import torch
from support.added_experts import mixed, routed
from support.families import make_family
from support.model_zoo import (
    FAMILY,
    LARGE,
    VOCAB,
    assert_same_snapshot,
    fill,
    make_model,
    randomise,
    refused,
    snapshot,
    token_ids,
    unchanged,
)
from support.patched_models import assert_saved, check_generation, merge, patched_model
from support.registered_ops import same
from torch import nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.models import routers
from moe_kernels.models.context import ModalityContext
from moe_kernels.models.handle import get_patched
from moe_kernels.models.parts import find_parts, parts_of
from moe_kernels.models.routers import (
    Groups,
    Routing,
    RoutingFinder,
    attach,
    find_routing,
    problem,
    route,
)
from moe_kernels.moextend import ExpertExtender
from moe_kernels.testing import assert_close, relative_rms, working_backends

BACKENDS = pytest.mark.parametrize("backend", working_backends())
ALONE, ALL = ("router",), ("experts", "attention", "router")


def make_patched(family="mixtral", targets=ALONE, **options):
    config = ModalityLoraConfig(r=4, lora_alpha=6, target_modules=targets)
    return patched_model(family, config, **options)[1]


# --- what a router's class does after its logits


EXPECTED = {
    "mixtral": Routing(2, True, True),
    "olmoe": Routing(2, False, False),
    "qwen3_moe": Routing(2, True, False),
    "qwen2_moe": Routing(2, False, False),
}


@FAMILY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_routing_is_found_by_trying(family, dtype):
    model = make_model(family, dtype=dtype)
    router = parts_of(model.model.layers[0]).router
    with unchanged(model):
        assert find_routing(router) == EXPECTED[family]
    rows = torch.randn(50, 32).to(dtype)
    logits, *expected = router(rows)
    for ours, theirs in zip(route(logits, EXPECTED[family]), expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "qwen2_moe"])
def test_a_switch_of_the_configuration(family, normalise):
    model = make_model(family, norm_topk_prob=normalise, num_experts_per_tok=3)
    expected = Routing(3, normalise, False)
    assert find_routing(parts_of(model.model.layers[0]).router) == expected


@pytest.mark.parametrize(("family", "epsilon"), [("deepseek_v3", 1e-20), ("laguna", 0.0)])
def test_what_a_class_adds_to_the_sum_of_its_scores(family, epsilon):
    """Sigmoids far below zero are as small as that, and zeros are the last."""
    router = parts_of(make_family(family).model.layers[-1]).router
    found = find_routing(router)
    assert (found.normalise, found.epsilon) == (True, epsilon)
    nn.init.constant_(router.weight, 1 / 32)
    for value in (-6.0, -12.0, -48.0, -90.0, -120.0):
        logits, *expected = router(torch.full((1, 32), value))
        actual = route(logits, found, bias=router.e_score_correction_bias)
        torch.testing.assert_close(actual, tuple(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_a_router_has_the_same_routing_in_every_precision(family):
    """A cast to bfloat16 hides what softmax is taken of."""
    found = {
        find_routing(parts_of(make_family(family, dtype=dtype).model.layers[0]).router)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert [(each.score, each.normalise) for each in found] == [("softmax_after", False)]


def test_a_choice_of_other_experts_is_tried_once(monkeypatch):
    """Else a refusal tries every score, scale and cast with every choice: over 1000 of them."""
    model, parts = groups("deepseek_v3", **GROUPED)
    replace_class_forward(parts.router, last_experts)
    tried = []
    monkeypatch.setattr(routers, "route", lambda *a, **k: tried.append(a) or route(*a, **k))
    with pytest.raises(ValueError, match="does not choose and weigh experts by softmax"):
        find_routing(parts.router)
    assert 20 < len(tried) < 200


def last_experts(self, hidden_states):
    logits, scores, indices = super(type(self), self).forward(hidden_states)
    return logits, scores, 7 - indices


def test_hooks_on_a_router_do_not_see_the_trial():
    router, seen = parts_of(make_model("olmoe").model.layers[0]).router, []
    router.register_forward_hook(lambda *args: seen.append(args))
    find_routing(router)
    assert not seen


def test_without_values():
    """Routers on the meta device, where memory is estimated, can be understood too."""
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, hidden_size=64))
        patched = patch_model(model, ModalityLoraConfig(r=4, target_modules=ALL))
    shapes = {n.split("lora.")[-1]: tuple(p.shape) for n, p in patched.named_trainable_parameters()}
    assert shapes["gate.lora_A"] == (1, 4, 64) and shapes["gate.lora_B"] == (1, 8, 4)


# --- refusals


OTHERS = {
    "deepseek_v4": "DeepseekV4HashRouter takes input_ids beside rows",
    "gemma4": "Gemma4TextRouter does not compute the logits of a linear layer",
    "inkling": r"InklingTopkRouter has no one weight \(4, 32\), a row for each expert, but weight "
    r"\(5, 32\)",
    "phimoe": "PhimoeTopKRouter does not choose and weigh experts by softmax or sigmoid, a bias",
    "zaya": r"ZayaRouter has no one weight \(4, 32\), a row for each expert, but down_proj.weight",
}


@pytest.mark.parametrize("family", OTHERS)
def test_routers_of_other_families(family):
    """Unsupported routers are refused by what was found; the experts alone can be adapted."""
    model = make_family(family)
    config = ModalityLoraConfig(target_modules=("experts", "router"))
    match = rf'layer \d: ({OTHERS[family]}).*leave "router" out of target_modules'
    refused(model, ValueError, match, config)
    patch_model(model, ModalityLoraConfig(target_modules=("experts",))).unpatch()


def replace_class_forward(router, forward):
    router.__class__ = type(type(router).__name__, (type(router),), {"forward": forward})


def jitter(self, hidden_states):
    if self.training:
        hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(0.9, 1.1)
    return super(type(self), self).forward(hidden_states)


def scaled(self, hidden_states):
    logits, scores, indices = super(type(self), self).forward(hidden_states)
    return logits, scores * 1.5, indices


def two_results(self, hidden_states):
    return super(type(self), self).forward(hidden_states)[:2]


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (jitter, "does not compute the logits of a linear layer"),
        (scaled, "does not choose and weigh experts by softmax or sigmoid, a bias"),
        (two_results, r"does not return \(logits, scores, indices\)"),
    ],
)
def test_a_router_that_does_something_else(forward, match):
    model = make_model("mixtral")
    replace_class_forward(parts_of(model.model.layers[1]).router, forward)
    config = ModalityLoraConfig(target_modules=ALONE)
    refused(model, ValueError, f"layer 1: MixtralTopKRouter {match}", config)
    patch_model(model).unpatch()
    patch_model(model, ModalityLoraConfig(target_modules=ALL, layers_to_transform=(0,))).unpatch()


def test_a_router_that_is_not_as_it_was():
    config = ModalityLoraConfig(target_modules=ALONE)
    model = make_model("mixtral")
    router = parts_of(model.model.layers[0]).router
    router.forward = lambda *args: type(router).forward(router, *args)
    refused(model, ValueError, "MixtralTopKRouter has a forward of its own", config)
    del router.forward
    router.weight = nn.Parameter(router.weight.double())
    refused(model, ValueError, "a router in torch.float64 beside experts in torch.float32", config)
    model.model.layers[0].mlp.gate = nn.Identity()
    match = r"layer 0: Identity has no one weight \(4, 32\), a row for each expert, but none"
    refused(model, ValueError, match, config)
    del model.model.layers[0].mlp.gate
    match = "layer 0: no gate or router beside the experts of MixtralSparseMoeBlock"
    refused(model, ValueError, match, config)


# --- the update


def test_off_by_default():
    patched = patch_model(make_model("mixtral"))
    assert not any(".gate." in name for name, _ in patched.named_trainable_parameters())
    assert "forward" not in parts_of(patched.model.model.layers[0]).router.__dict__


@FAMILY
def test_logits_scores_and_indices(family):
    """Text and padding rows have the bits of W h; rows of the modality add s B A h."""
    patched = make_patched(family)
    model, inputs = patched.model, mixed()
    logits, scores, indices, rows = routed(model, **inputs)
    lora, router = (
        model.model.layers[0].modality_lora["gate"],
        parts_of(model.model.layers[0]).router,
    )
    base = F.linear(rows, router.weight)
    update = 1.5 * (rows.double() @ lora.lora_A[0].double().T) @ lora.lora_B[0].double().T
    real = inputs["attention_mask"].flatten() == 1
    image = (inputs["modality_ids"].flatten() == 1) & real
    assert torch.equal(logits[~image], base[~image])
    assert_close(logits[image], (base.double() + update)[image])
    # Scores and indices are those that the class computes from these logits.
    for ours, theirs in zip((scores, indices), of_logits(router, logits), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert not torch.equal(indices[image], of_logits(router, base)[1][image])


def of_logits(router, logits):
    """Return the class's scores and indices of given logits: its weight is the identity."""
    twin = copy.copy(router)
    identity = nn.Parameter(torch.eye(logits.shape[1], dtype=logits.dtype))
    twin.__dict__["_parameters"] = {"weight": identity}
    twin.hidden_dim = logits.shape[1]
    return type(router).forward(twin, logits)[1:]


@FAMILY
def test_all_tokens_in_the_modality_are_the_merged_router(family):
    """Logits, loss and gradients of adapters agree with merged weights in float64."""
    patched = make_patched(family, dtype=torch.float64)
    merged = merge(patched.model, patched).requires_grad_(True)
    ids = token_ids(3, 20)
    expected = merged(ids, labels=ids)
    expected.loss.backward()
    actual = patched.model(ids, labels=ids, modality_ids=torch.ones_like(ids))
    actual.loss.backward()
    assert relative_rms(actual.logits, expected.logits) < 1e-6
    for ours, theirs in zip(patched.model.model.layers, merged.model.layers, strict=True):
        if "gate" in ours.modality_lora:
            lora, grad = ours.modality_lora["gate"], parts_of(theirs).router.weight.grad
            expected_grad = 1.5 * lora.lora_B[0].detach().T @ grad
            assert relative_rms(lora.lora_A.grad[0], expected_grad) < 1e-5 and expected_grad.any()
            assert relative_rms(lora.lora_B.grad[0], 1.5 * grad @ lora.lora_A[0].detach().T) < 1e-5


@FAMILY
def test_image_rows_change_experts(family):
    """Training moves image rows to their least chosen expert, and leaves text as it is."""
    model = make_model(family)
    patched = patch_model(model, ModalityLoraConfig(r=4, target_modules=ALL))
    image = add_modality_tokens(model, "image", 8)
    ids = token_ids(4, 16)
    ids[:, 8:] = image[0] + ids[:, 8:] % 8
    rows = (torch.arange(16) >= 8).repeat(4)
    text, before = routed(model, input_ids=ids[:, :8]), routed(model, input_ids=ids)
    rarest = before[2][rows].flatten().bincount(minlength=4).argmin()
    optimiser = torch.optim.Adam(patched.trainable_parameters(), lr=0.02)
    for _ in range(10):
        logits = model(ids, output_router_logits=True).router_logits[0].view(4, 16, -1)[:, 8:]
        loss = F.cross_entropy(logits.flatten(0, 1), rarest.expand(32))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = routed(model, input_ids=ids)
    share = [(seen[2][rows] == rarest).any(-1).float().mean() for seen in (before, after)]
    assert share[0] < 0.6 and share[1] > 0.9
    assert same(routed(model, input_ids=ids[:, :8]), text)


@FAMILY
def test_the_balance_loss_sees_the_adapted_logits(family):
    """transformers' balance loss uses the adapted logits, and reaches the router's adapter."""
    patched = make_patched(family)
    model, ids = patched.model, token_ids(2, 10)
    settings = {"labels": ids, "output_router_logits": True}
    out = model(ids, modality_ids=torch.ones_like(ids), **settings)
    image = {"input_ids": ids, "modality_ids": torch.ones_like(ids)}
    assert torch.equal(out.router_logits[0], routed(model, **image)[0])
    plain = model(ids, **settings)
    assert not torch.equal(out.router_logits[0], plain.router_logits[0])
    assert out.aux_loss != plain.aux_loss
    out.aux_loss.backward()
    for parameter in patched.trainable_parameters():
        assert parameter.grad.any()
    for parameter in patched.trainable_parameters():
        parameter.grad = None
    plain.aux_loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in patched.trainable_parameters())


# --- text bits


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [64, 200])
@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("mixtral", {"intermediate_size": 128, "num_local_experts": 16}),
        ("qwen3_moe", {"moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 4}),
    ],
)
def test_text_keeps_its_bits(backend, dtype, length, family, own):
    """Text keeps its bits after steps and with huge or NaN weights, beside or before a picture."""
    model = make_model(family, dtype=dtype, **LARGE, num_hidden_layers=1, **own)
    config = ModalityLoraConfig(r=4, target_modules=ALL, backend=backend)
    patched = patch_model(model, config)
    add_modality_tokens(model, "image", 16)
    ids = token_ids(2, length)

    def text(ids, count=length):
        with torch.no_grad():
            out = model(ids, output_router_logits=True)
        return out.logits[0, :count, :VOCAB], out.router_logits[0][:count]

    expected = text(ids)
    ids[1] = VOCAB + ids[1] % 16
    optimiser = torch.optim.SGD(patched.trainable_parameters(), lr=10.0)
    for _ in range(2):
        optimiser.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimiser.step()
    gate = model.model.layers[0].modality_lora["gate"]
    assert gate.lora_A.grad.any() and gate.lora_B.any()
    # A product of so few text rows alone would use another kernel.
    few = ids.clone()
    few[0, 3:] = VOCAB + few[0, 3:] % 16
    assert same(text(few, 3), [e[:3] for e in expected])
    for change in (
        lambda: None,
        lambda: randomise(patched, scale=1e18, seed=7),
        lambda: fill(patched, float("inf")),
        lambda: fill(patched, float("nan")),
    ):
        change()
        assert same(text(ids), expected)


# --- the ways a model is used


def losses_and_grads(patched, inputs):
    model = patched.model.train()
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in patched.trainable_parameters())]


@FAMILY
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing(family, reentrant):
    patched, inputs = make_patched(family, ALL), mixed()
    expected = losses_and_grads(patched, inputs)
    assert all(grad.any() for grad in expected)
    patched.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for ours, theirs in zip(losses_and_grads(patched, inputs), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_two_forwards_before_one_backward():
    """Each recompute uses the mask of its own forward."""
    patched, inputs = make_patched("olmoe", ALL), mixed()
    other = inputs | {"modality_ids": 1 - inputs["modality_ids"]}
    apart = [losses_and_grads(patched, i)[1:] for i in (inputs, other)]
    model = patched.model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    (sum(model(**i, labels=i["input_ids"]).loss for i in (inputs, other))).backward()
    for parameter, *two in zip(patched.trainable_parameters(), *apart, strict=True):
        assert relative_rms(parameter.grad, sum(two)) < 1e-5


@FAMILY
def test_generation_with_a_cache(family):
    patched = make_patched(family, ALL, dtype=torch.float64, num_tokens=40, scale=0.5)
    check_generation(patched.model, 40)


@FAMILY
def test_adapters_off(family):
    patched, ids = make_patched(family), token_ids(2, 12)
    image = {"input_ids": ids, "modality_ids": torch.ones_like(ids)}
    text, on = routed(patched.model, input_ids=ids), routed(patched.model, **image)
    with patched.adapters_disabled():
        off = routed(patched.model, **image)
    assert torch.equal(off[0], text[0]) and not torch.equal(on[0], text[0])


@FAMILY
def test_half_precision(family):
    """Adapters are float32; scores and logits have the dtypes of the class."""
    model = make_model(family, dtype=torch.bfloat16)
    ids = token_ids(2, 8)
    plain = routed(model, input_ids=ids)
    patched = patch_model(model, ModalityLoraConfig(r=4, target_modules=ALONE))
    randomise(patched)
    assert {p.dtype for p in patched.trainable_parameters()} == {torch.float32}
    text = routed(model, input_ids=ids)
    image = routed(model, input_ids=ids, modality_ids=torch.ones_like(ids))
    assert [t.dtype for t in image] == [t.dtype for t in plain]
    assert torch.equal(text[0], plain[0]) and torch.equal(text[2], plain[2])
    model(ids, labels=ids, modality_ids=torch.ones_like(ids)).loss.backward()
    assert {p.grad.dtype for p in patched.trainable_parameters()} == {torch.float32}


def test_autocast():
    patched, inputs = make_patched("olmoe", ALL), mixed()
    expected = losses_and_grads(patched, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = losses_and_grads(patched, inputs)
    assert relative_rms(actual[0], expected[0]) < 0.05
    assert all(grad.isfinite().all() and grad.any() for grad in actual[1:])


@FAMILY
def test_saved_loaded_copied_and_undone(family, tmp_path):
    model = make_model(family)
    before, ids = snapshot(model), token_ids(2, 12)
    plain = routed(model, input_ids=ids)
    config = ModalityLoraConfig(r=4, target_modules=ALL)
    patched = patch_model(model, config)
    add_modality_tokens(model, "image", 3)
    randomise(patched)
    image = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(ids, modality_ids=image).logits
    patched.save_adapter(tmp_path / "adapter")
    fresh = patch_model(make_model(family), ModalityLoraConfig.from_adapter(tmp_path / "adapter"))
    fresh.load_adapter(tmp_path / "adapter")
    twin = copy.deepcopy(model)
    randomise(patched, seed=9)
    with torch.no_grad():
        for other in (fresh.model, twin):
            assert torch.equal(other(ids, modality_ids=image).logits, expected)
        assert not torch.equal(model(ids, modality_ids=image).logits, expected)
    get_patched(twin).unpatch()
    assert_saved(patched, tmp_path / "model")
    patched.unpatch()
    assert_same_snapshot(snapshot(model), before)
    assert_same_snapshot(snapshot(twin), before)
    assert same(routed(model, input_ids=ids), plain)


# --- sigmoid, corrections, groups and softmax after the choice


def groups(family, **settings):
    """Return a model and a layer whose router corrects its choice, and limits it to groups."""
    model = make_family(family, n_routed_experts=8, num_experts_per_tok=3, **settings)
    parts = parts_of(model.model.layers[1])
    if (bias := getattr(parts.router, "e_score_correction_bias", None)) is not None:
        nn.init.normal_(bias, std=0.3)
    nn.init.normal_(parts.router.weight, std=0.5)
    return model, parts


GROUPED = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
LIMITED = {
    "deepseek_v3": (GROUPED, Groups(4, 2, True, -torch.inf), "sigmoid"),
    "glm4_moe": (GROUPED, Groups(4, 2, True, -torch.inf), "sigmoid"),
    "deepseek_v2": (
        GROUPED | {"topk_method": "group_limited_greedy"}, Groups(4, 2, False, 0.0), "softmax",
    ),
    "mistral4": (GROUPED, Groups(4, 2, True, 0.0), "softmax"),
}  # fmt: skip


def zeros_outside(self, hidden_states):
    """Route as earlier versions of DeepSeek-V3: experts of other groups have zero, not -inf."""
    logits = F.linear(hidden_states.float(), self.weight.float())
    scores = logits.sigmoid()
    choice = scores + self.e_score_correction_bias
    grouped = choice.view(len(choice), self.num_group, -1)
    groups = grouped.topk(2, dim=-1)[0].sum(-1).topk(self.topk_group, dim=-1)[1]
    inside = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, groups, True)
    choice = grouped.masked_fill(~inside[..., None], 0.0).flatten(1)
    indices = choice.topk(self.top_k, dim=-1, sorted=False)[1]
    chosen = scores.gather(1, indices)
    chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, chosen * self.routed_scaling_factor, indices


def test_zeros_for_experts_of_other_groups():
    """A correction below zero lets a token choose an expert outside of its groups."""
    model, parts = groups("deepseek_v3", **GROUPED)
    replace_class_forward(parts.router, zeros_outside)
    nn.init.normal_(parts.router.e_score_correction_bias, mean=-1.0)
    found = find_routing(parts.router)
    assert found.groups == Groups(4, 2, True, 0.0)
    logits, *expected = parts.router(2 * torch.randn(200, 32))
    bias = parts.router.e_score_correction_bias
    for ours, theirs in zip(route(logits, found, bias=bias), expected, strict=True):
        assert torch.equal(ours, theirs)
    limited = dataclasses.replace(found, groups=Groups(4, 2, True, -torch.inf))
    assert not torch.equal(route(logits, limited, bias=bias)[1], expected[1])


@pytest.mark.parametrize("family", LIMITED)
def test_groups_and_corrections_are_found(family):
    settings, expected, score = LIMITED[family]
    model, parts = groups(family, **settings)
    with unchanged(model):
        found = find_routing(parts.router)
    assert (found.score, found.scale, found.biased) == (score, 2.5, score == "sigmoid")
    # Softmax is never below zero: where K fits into the groups, zeros act as -inf does.
    left_out = expected.left_out if score == "sigmoid" else -torch.inf
    assert found.groups == dataclasses.replace(expected, left_out=left_out)
    rows = 2 * torch.randn(200, 32)
    logits, *theirs = parts.router(rows)
    bias = parts.router.e_score_correction_bias if found.biased else None
    for ours, each in zip(route(logits, found, bias=bias), theirs, strict=True):
        assert ours.dtype == each.dtype and torch.equal(ours, each)


@pytest.mark.parametrize("family", LIMITED)
def test_groups_and_corrections_beside_added_experts(family):
    """Text keeps its bits; an added expert is in no group, and images may choose it."""
    model, parts = groups(family, **LIMITED[family][0])
    ids = token_ids(2, 24)
    extender = ExpertExtender(model)
    before = model(ids).logits
    extender.extend([1], 2, init=0)
    randomise(extender.patched, scale=1.0)
    chosen = []
    parts.router.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    assert torch.equal(model(ids).logits, before) and chosen[-1].max() < 8
    image = torch.zeros_like(ids)
    image[1] = 1
    logits = model(ids, modality_ids=image).logits
    assert torch.equal(logits[0], before[0])
    of_image = chosen[-1].reshape(2, 24, 3)[1]
    assert (of_image >= 8).any() and (of_image < 8).any()
    assert all(len(set(row)) == 3 for row in of_image.tolist())


def test_a_correction_that_is_read_anew():
    """It is a buffer that training of the base moves, and checkpoints replace."""
    model, parts = groups("deepseek_v3", n_group=1, topk_group=1)
    patch_model(model, ModalityLoraConfig(target_modules=ALONE))
    rows = torch.randn(50, 32)
    context = parts.router.__dict__["_modality_context"]
    for _ in range(2):
        nn.init.normal_(parts.router.e_score_correction_bias, std=1.0)
        expected = type(parts.router).forward(parts.router, rows)
        with context.running(torch.zeros(1, 50, dtype=torch.int64)):
            found = parts.router(rows)
        assert all(map(torch.equal, found, expected))


def router_of(family):
    """Return a family's tiny model, and the last of its layers' routers with its block."""
    model = make_family(family)
    parts = [each for each in find_parts(model) if each.experts is not None][-1]
    block = next(m for m in parts.layer.modules() if parts.experts in m.children())
    return model, parts.router, block


FOUND = {
    "afmoe": ("sigmoid", "widened", True),
    "ernie4_5_moe": ("softmax", "exact", True),
    "flint": ("sigmoid", "exact", False),
    "hunyuan_v1_moe": ("softmax", "own", False),
    "hy_v3": ("sigmoid", "float32", True),
    "kolibri1": ("sigmoid_after", "float32", True),
    "lfm2_moe": ("sigmoid", "own", True),
    "minimax_m2": ("sigmoid", "own", True),
}


@pytest.mark.parametrize("family", FOUND)
def test_steps_of_other_routers(family):
    """A bias of the block, a linear layer within the router, and a choice by logits."""
    model, router, block = router_of(family)
    name = "expert_bias" if hasattr(block, "expert_bias") else "e_score_correction_bias"
    bias = (getattr(block, name),) if hasattr(block, name) else ()
    rows = 2 * torch.randn(1, 50, 32)
    with unchanged(model):
        found = find_routing(router)
    assert (found.score, found.logits, found.biased) == FOUND[family]
    patch_model(model, ModalityLoraConfig(target_modules=ALONE))
    context = router.__dict__["_modality_context"]
    for _ in range(2):
        for each in bias:
            nn.init.normal_(each, std=1.0)  # it is read anew, not kept
        given = rows if family == "afmoe" else rows[0]
        expected = type(router).forward(router, given, *bias)
        with context.running(torch.zeros(1, 50, dtype=torch.int64)):
            actual = router(given, *bias)
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["ernie4_5_moe", "flint", "kolibri1"])
def test_float32_within_autocast(family):
    """Some classes turn autocast off, and others leave float32 to it."""
    model, router, _ = router_of(family)
    patched, rows = patch_model(model, ModalityLoraConfig(target_modules=())), torch.randn(50, 32)
    found = find_routing(router)
    with torch.autocast("cpu", torch.bfloat16):
        assert find_routing(router) == found
        attach(router, ModalityContext(None, patched.switches), None, found)
        actual, expected = router(rows)[0], type(router).forward(router, rows)[0]
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)


def test_the_least_that_scores_are_divided_by():
    """ERNIE divides by moe_norm_min at least: a correction may choose experts of no weight."""
    model, router, _ = router_of("ernie4_5_moe")
    router.norm_min = 0.9
    found = find_routing(router)
    assert found.floor == 0.9
    logits, *expected = router(0.1 * torch.randn(50, 32))
    bias = router.moe_statics.e_score_correction_bias.flatten()
    for ours, theirs in zip(route(logits, found, bias=bias), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_changes_of_the_linear_layer_in_a_router():
    """Its own forward, or its hooks, would not run."""
    model, router, _ = router_of("hunyuan_v1_moe")
    config = ModalityLoraConfig(target_modules=ALONE)
    hook = router.wg.register_forward_hook(lambda *args: None)
    match = "HunYuanMoEV1Gate.wg has hooks, which would not run: take them away first"
    refused(model, ValueError, match, config)
    hook.remove()
    router.wg.forward = lambda x: nn.functional.linear(x, router.wg.weight)
    refused(model, ValueError, "HunYuanMoEV1Gate.wg has a forward of its own", config)
    del router.wg.forward
    router.wg.weight.ds_id, router.wg.weight.ds_shape = 0, router.wg.weight.shape
    assert "ZeRO-3 gathers late: use FSDP2" in problem(find_parts(model)[-1], RoutingFinder())
