"""Full-size models by their published sizes, on the device meta: nothing is downloaded or held."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moe_kernels import ModalityLoraConfig, PatchedModel, add_modality_tokens, patch_model

MODELS = {
    "OLMoE-1B-7B": OlmoeConfig(intermediate_size=1024),
    "Mixtral-8x7B": MixtralConfig(),
    "Qwen1.5-MoE-A2.7B": Qwen2MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, num_experts=60, num_experts_per_tok=4,
        moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
}  # fmt: skip


def patched_on_meta(
    config: PretrainedConfig, lora: ModalityLoraConfig, num_tokens: int
) -> PatchedModel:
    """Return a patched model in bfloat16 with tokens of the first modality, without values."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        patched = patch_model(model, lora)
        add_modality_tokens(model, lora.modalities[0], num_tokens)
    return patched
