"""What patching refuses, and what a patched model refuses: by name, with nothing changed."""

import pytest
import torch
from model_zoo import (
    VOCAB,
    assert_same_snapshot,
    fill,
    make_model,
    refused,
    snapshot,
    token_ids,
)
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralModel,
)

from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.models.experts import find_experts
from moe_kernels.models.methods import get_patched


def test_not_a_transformers_model():
    refused(nn.Linear(2, 2), TypeError, "transformers model, got Linear")


def test_a_dense_model():
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    refused(LlamaForCausalLM(config), ValueError, "LlamaForCausalLM.*no layer has stacked experts")


def test_a_model_without_a_head():
    config = BertConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="BertModel.*no language-model head"):
        patch_model(BertModel(config))
    with pytest.raises(ValueError, match="MixtralModel.*no language-model head"):
        patch_model(MixtralModel(make_model("mixtral").config))


def test_every_reason_of_an_unsupported_layout():
    config = GptOssConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_local_experts=2,
        layer_types=["full_attention"], pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    refused(model, ValueError, "GptOssForCausalLM is not supported: layer 0")
    for reason in ("biases", "transposed", "interleaved", "gating function"):
        refused(model, ValueError, reason)


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (lambda experts: setattr(experts, "act_fn", nn.GELU()), "activation GELU"),
        (lambda experts: setattr(experts, "_is_expert_parallel", True), "expert parallelism"),
        (lambda experts: setattr(experts, "has_post_expert_norm", True), "norm after each expert"),
        (lambda experts: delattr(experts, "has_gate"), "no attribute 'has_gate'"),
        (lambda experts: delattr(experts, "down_proj"), "no stacked down_proj"),
    ],
)
def test_an_experts_layout_that_does_not_fit(break_it, match):
    model = make_model("mixtral")
    break_it(find_experts(model.model.layers[1]))
    refused(model, ValueError, f"layer 1: .*{match}")


def test_quantised_weights():
    model = make_model("mixtral")
    experts = find_experts(model.model.layers[0])
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.int8), requires_grad=False)
    refused(model, ValueError, r"quantised expert weights \(torch.int8\)")
    model = make_model("mixtral")
    model.is_quantized = True
    refused(model, ValueError, "is quantised: load it in bfloat16")


def test_weights_of_a_tensor_subclass():
    class Packed(torch.Tensor):
        pass

    model = make_model("mixtral")
    experts = find_experts(model.model.layers[0])
    experts.down_proj = nn.Parameter(experts.down_proj.data.as_subclass(Packed))
    refused(model, ValueError, "expert weights of class Packed")


def test_an_attention_projection_that_is_not_linear():
    class Linear4bit(nn.Linear):
        pass

    model = make_model("mixtral")
    model.model.layers[1].self_attn.k_proj = Linear4bit(32, 16)
    refused(model, ValueError, "layer 1: self_attn.k_proj is Linear4bit, not nn.Linear")
    patch_model(model, ModalityLoraConfig(target_modules=("experts",))).unpatch()


def test_forwards_that_somebody_else_replaced():
    """As accelerate does for device maps and mixed precision: ours would bypass theirs."""
    model = make_model("mixtral")
    for module, match in (
        (model, "its forward was replaced"),
        (model.lm_head, "Linear has a forward of its own"),
        (model.model.layers[0].self_attn.q_proj, "q_proj has a forward of its own"),
    ):
        module.forward = module.forward
        refused(model, ValueError, match)
        if "q_proj" in match:  # not ours to touch, then
            patch_model(model, ModalityLoraConfig(target_modules=("experts",))).unpatch()
        del module.forward


def test_a_token_table_of_another_class():
    class Scaled(nn.Embedding):
        pass

    model = make_model("mixtral")
    model.set_input_embeddings(Scaled(VOCAB, 32))
    refused(model, ValueError, "a Scaled where nn.Embedding is needed")


def test_patching_twice():
    model = make_model("mixtral")
    patch_model(model)
    refused(model, ValueError, "MixtralForCausalLM is already patched: unpatch")


def test_a_backend_that_is_not_there():
    model = make_model("mixtral")
    config = ModalityLoraConfig(backend="triton")
    refused(model, RuntimeError, "backend 'triton' is not available: .*riton", config)
    refused(model, ValueError, "unknown backend 'tpu'", ModalityLoraConfig(backend="tpu"))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_modules": ("mlp",)}, "target_modules must be of"),
        ({"target_modules": ()}, "at least one"),
        ({"target_modules": "experts"}, "tuple of names"),
        ({"modalities": "image"}, "tuple of names"),
        ({"modalities": ()}, "at least one"),
        ({"modalities": ("image", "image")}, "distinct"),
        ({"modalities": ("an image",)}, "identifiers"),
        ({"r": 0}, "rank"),
        ({"r": 2.5}, "rank"),
        ({"rank_pattern": {"q_proj": 0}}, "rank"),
        ({"rank_pattern": {"up_proj": 4}}, "patterns may name"),
        ({"target_modules": ("experts",), "alpha_pattern": {"q_proj": 4}}, "patterns may name"),
        ({"modalities": ("values",)}, "ParameterDict"),
        ({"modalities": (1,)}, "distinct identifiers"),
        ({"lora_alpha": "x"}, "lora_alpha must be a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
        ({"alpha_pattern": {"q_proj": "a"}}, "lora_alpha must be a finite number"),
        ({"r": True}, "a rank must be an integer"),
    ],
)
def test_a_configuration_that_cannot_be(settings, match):
    with pytest.raises(ValueError, match=match):
        ModalityLoraConfig(**settings)


def bad_calls():
    ids = torch.ones(2, 6, dtype=torch.long)
    embeds = torch.zeros(2, 6, 32)
    return {
        "embeddings without ids": ({"inputs_embeds": embeds}, ValueError, "give modality_ids"),
        "nothing": ({}, ValueError, "give input_ids or inputs_embeds"),
        "wrong shape": (
            {"input_ids": ids, "modality_ids": ids[:, :5]},
            ValueError,
            r"\(B, S\) = \(2, 6\), got \(2, 5\)",
        ),
        "flat": ({"input_ids": ids, "modality_ids": ids.flatten()}, ValueError, r"\(B, S\)"),
        "floats": ({"input_ids": ids, "modality_ids": ids * 1.0}, TypeError, "integers"),
        "bools": ({"input_ids": ids, "modality_ids": ids > 0}, TypeError, "integers"),
        "above M": ({"input_ids": ids, "modality_ids": ids + 1}, ValueError, r"-1\.\.1 .*2\.\.2"),
        "below -1": ({"input_ids": ids, "modality_ids": ids - 3}, ValueError, r"-1\.\.1"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_a_bad_call(case):
    kwargs, error, match = bad_calls()[case]
    model = make_model("olmoe")
    patch_model(model, ModalityLoraConfig(target_modules=("attention",)))
    with pytest.raises(error, match=match):
        model(**kwargs)


def test_calling_the_inner_model():
    model = make_model("qwen3_moe")
    patched = patch_model(model)
    fill(patched, 1.0)
    with pytest.raises(RuntimeError, match="call the patched model itself"):
        model.model(input_ids=token_ids(2, 6))
    model(token_ids(2, 6))
    with pytest.raises(RuntimeError, match="call the patched model itself"):
        model.model(input_ids=token_ids(2, 6))


def test_get_patched_of_a_plain_model():
    with pytest.raises(ValueError, match="MixtralForCausalLM is not patched: call patch_model"):
        get_patched(make_model("mixtral"))


def test_a_patched_table_cannot_be_resized():
    model = make_model("olmoe")
    patched = patch_model(model)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="cannot be resized"):
        model.resize_token_embeddings(VOCAB + 8)
    assert_same_snapshot(snapshot(model), before)
    patched.unpatch().resize_token_embeddings(VOCAB + 8)
    assert model.get_input_embeddings().weight.shape[0] == VOCAB + 8


def test_data_parallel_is_refused():
    model = make_model("olmoe")
    patch_model(model)
    with pytest.raises(RuntimeError, match="nn.DataParallel is not supported"):
        model._replicate_for_data_parallel()
