"""Behaviour of transformers that moe_kernels relies on: a release that changes it fails here."""

import inspect

import pytest
import torch
from support.model_zoo import FAMILY, make_model, token_ids
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.integrations import moe
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_kernels.models.experts import expert_problems
from moe_kernels.models.parts import find_experts

E, H, INTER, K = 4, 32, 24, 2


@pytest.fixture
def model(family):
    return make_model(family)


def parameters_of(function):
    return list(inspect.signature(function).parameters)


# --- the experts


@FAMILY
def test_attributes_of_the_experts(model):
    experts = find_experts(model.model.layers[0])
    supported = {
        "has_gate": True,
        "is_concatenated": True,
        "is_transposed": False,
        "has_bias": False,
    }
    assert {name: getattr(experts, name) for name in supported} == supported
    for name in ("has_post_expert_norm", "_is_expert_parallel"):  # the oldest versions lack them
        assert getattr(experts, name, False) is False
    assert type(experts)._apply_gate is moe._default_apply_gate
    assert expert_problems(experts) == []


@FAMILY
def test_parameters_of_the_experts(model):
    experts = find_experts(model.model.layers[0])
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
    assert shapes == {"gate_up_proj": (E, 2 * INTER, H), "down_proj": (E, H, INTER)}
    assert list(shapes) == ["gate_up_proj", "down_proj"]  # the order in which PEFT nests them


@FAMILY
def test_forward_of_the_experts(model):
    experts = find_experts(model.model.layers[0])
    arguments = ["hidden_states", "top_k_index", "top_k_weights"]
    assert parameters_of(experts.forward) == arguments
    assert parameters_of(moe.grouped_mm_experts_forward) == ["self", *arguments]


@FAMILY
def test_gate_rows_come_first_and_rows_are_weighted_after_down_proj(model):
    experts = find_experts(model.model.layers[0])
    x = torch.randn(1, H)
    ids, weights = torch.tensor([[2, 2]]), torch.tensor([[0.75, 0.5]])
    gate, up = (x @ experts.gate_up_proj[2].T).chunk(2, dim=-1)
    expected = 1.25 * (nn.functional.silu(gate) * up) @ experts.down_proj[2].T
    torch.testing.assert_close(experts(x, ids, weights), expected)


@FAMILY
def test_the_default_gate(model):
    experts = find_experts(model.model.layers[0])
    gate, up = torch.randn(3, INTER), torch.randn(3, INTER)
    expected = nn.functional.silu(gate) * up
    torch.testing.assert_close(experts._apply_gate(torch.cat([gate, up], -1)), expected)


# --- the registry


@FAMILY
def test_a_registered_function_gets_the_module_and_what_the_router_chose(model):
    """The arguments are (T, H), (T, K) int64 and (T, K), with T = B * S; the result is used."""
    calls = []

    def probe(self, hidden_states, top_k_index, top_k_weights):
        calls.append((self, hidden_states, top_k_index, top_k_weights))
        return torch.zeros_like(hidden_states)

    moe.ALL_EXPERTS_FUNCTIONS.register("canary", probe)
    ids = token_ids(2, 5)
    with torch.no_grad():
        eager = model(ids).logits
        model.config._experts_implementation = "canary"
        assert not torch.equal(model(ids).logits, eager)
    experts = find_experts(model.model.layers[0])
    assert calls[0][0] is experts and experts.config is model.config
    for _, hidden_states, top_k_index, top_k_weights in calls:
        assert hidden_states.shape == (10, H)
        assert top_k_index.shape == top_k_weights.shape == (10, K)
        assert top_k_index.dtype == torch.int64
        assert top_k_index.min() >= 0 and top_k_index.max() < E
        assert top_k_weights.is_floating_point() and (top_k_weights > 0).all()


@FAMILY
def test_what_the_router_returns(model):
    """Logits (T, E), then weights and ids (T, K) of the largest ones."""
    x = torch.randn(7, H)
    logits, weights, ids = model.model.layers[0].mlp.gate(x)[:3]
    assert (logits.shape, weights.shape, ids.shape) == ((7, E), (7, K), (7, K))
    assert torch.equal(ids.sort(-1).values, logits.topk(K).indices.sort(-1).values)
    ratio = logits.softmax(-1).gather(-1, ids) / weights
    torch.testing.assert_close(ratio, ratio[:, :1].expand(-1, K))  # rescaled, or as they are


def test_the_registry_knows_our_name():
    assert "moe_kernels" in moe.ALL_EXPERTS_FUNCTIONS
    for name in ("set_experts_implementation", "get_input_embeddings", "get_output_embeddings"):
        assert callable(getattr(PreTrainedModel, name))


@FAMILY
def test_generate_swaps_grouped_mm_only(model):
    """During decode transformers may choose another implementation; ours must stay."""
    seen = []

    def probe(self, hidden_states, top_k_index, top_k_weights):
        seen.append(hidden_states.shape[0])
        return torch.zeros_like(hidden_states)

    moe.ALL_EXPERTS_FUNCTIONS.register("canary", probe)
    model.set_experts_implementation("canary")
    model.generate(token_ids(2, 5), max_new_tokens=3, do_sample=False)
    assert seen[0] == 10 and seen[-1] == 2
    assert model.config._experts_implementation == "canary"


# --- how keywords travel


@FAMILY
def test_a_keyword_reaches_self_attn_before_the_experts_run(model):
    """Every recompute calls the layer with the same keyword."""
    events = []
    layer = model.model.layers[0]

    def take(module, args, kwargs):
        events.append(kwargs.pop("modality_ids"))
        return args, kwargs

    layer.self_attn.register_forward_pre_hook(take, with_kwargs=True)
    for other in model.model.layers[1:]:
        other.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"modality_ids": None}), with_kwargs=True
        )
    find_experts(layer).register_forward_pre_hook(lambda *_: events.append("experts"))
    model(token_ids(2, 5), modality_ids="the ids")
    assert events == ["the ids", "experts"]
    assert any(
        p.kind is inspect.Parameter.VAR_KEYWORD
        for p in inspect.signature(type(model).forward).parameters.values()
    )


@FAMILY
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_a_layer_calls_self_attn_with_its_own_keywords(model, reentrant):
    """Two forwards before one backward: each recompute gets the keywords of its own forward."""
    events = []

    def take(module, args, kwargs):
        events.append(kwargs.pop("modality_ids"))
        return args, kwargs

    for layer in model.model.layers:
        assert isinstance(layer, GradientCheckpointingLayer)
        assert layer.gradient_checkpointing is False
        layer.self_attn.register_forward_pre_hook(take, with_kwargs=True)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())
    ids = token_ids(1, 5)
    loss = sum(model(ids, labels=ids, modality_ids=name).loss for name in ("first", "second"))
    forward, layers = list(events), len(model.model.layers)
    assert forward == ["first"] * layers + ["second"] * layers
    events.clear()
    loss.backward()
    assert sorted(events) == sorted(forward)


# --- where modules are, and what generate() hands over


@FAMILY
def test_where_modules_are(model):
    assert model.base_model_prefix == "model"
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert type(getattr(layer.self_attn, name)) is nn.Linear
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert type(model.get_output_embeddings()) is nn.Linear
    assert model.vocab_size == model.model.vocab_size == model.config.vocab_size


def test_what_generate_hands_over():
    """generate() passes all keywords at every step, and says which step is the first."""
    assert "is_first_iteration" in parameters_of(GenerationMixin.prepare_inputs_for_generation)


@FAMILY
def test_prepared_inputs_keep_keywords(model):
    ids = token_ids(2, 5)
    inputs = model.prepare_inputs_for_generation(ids, modality_ids="the ids", use_cache=False)
    assert inputs["modality_ids"] == "the ids" and torch.equal(inputs["input_ids"], ids)
