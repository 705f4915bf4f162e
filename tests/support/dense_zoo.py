"""Tiny random dense models of every convertible family."""

import pytest
import torch
from support import model_zoo
from support.model_zoo import COMMON, randomise_vectors
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

D_FF = 48
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
    sizes = {"intermediate_size": D_FF, "max_position_embeddings": 64}
    model = model_class(config_class(**COMMON | sizes | settings | overrides))
    randomise_vectors(model, std=0.2)
    return model.to(dtype).eval()


def token_ids(batch=3, length=20, *, seed=0):
    return model_zoo.token_ids(batch, length, seed=seed)


CALIBRATION = [token_ids(4, 32, seed=1), token_ids(4, 32, seed=2)]


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=token_ids() if ids is None else ids).logits


def same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
