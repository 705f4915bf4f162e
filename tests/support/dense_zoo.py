"""Tiny random dense models of every convertible family."""

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB, D_FF = 48, 48
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": D_FF,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
# name -> (class, config class, settings, target class without and with a shared expert)
DENSE = {
    "llama": (
        LlamaForCausalLM, LlamaConfig,
        {"head_dim": 12, "tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE},
        "MixtralForCausalLM", "Qwen2MoeForCausalLM",
    ),
    "mistral": (
        MistralForCausalLM, MistralConfig, {"head_dim": 12, "sliding_window": 4},
        "MixtralForCausalLM", "Qwen2MoeForCausalLM",
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}, "Qwen2MoeForCausalLM", "Qwen2MoeForCausalLM"),
    "qwen2 sliding": (
        Qwen2ForCausalLM, Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "Qwen2MoeForCausalLM", "Qwen2MoeForCausalLM",
    ),
    "qwen3": (
        Qwen3ForCausalLM, Qwen3Config, {"head_dim": 12, "attention_bias": True},
        "Qwen3MoeForCausalLM", None,
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("family", DENSE)
CASES = [(family, shared) for family in DENSE for shared in (0, 16) if (family, shared) != ("qwen3", 16)]  # noqa: E501  # fmt: skip
EVERY_CASE = pytest.mark.parametrize(("family", "shared"), CASES)


def make_dense(family="llama", *, dtype=torch.float64, seed=0, **overrides):
    model_class, config_class, settings, *_ = DENSE[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**_COMMON, **settings, **overrides}))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # biases that are not zero, and norms that are not one
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model.to(dtype).eval()


def token_ids(batch=3, length=20, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


CALIBRATION = [token_ids(4, 32, seed=1), token_ids(4, 32, seed=2)]


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=token_ids() if ids is None else ids).logits


def same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
