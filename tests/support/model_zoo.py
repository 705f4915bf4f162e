"""Tiny random Hugging Face models of every family that is tested."""

import contextlib

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_kernels import patch_model

VOCAB = 48
PAD = 0

# Settings of every tiny model, dense ones included.
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}

# name -> (model class, config class, own settings)
FAMILIES: dict[str, tuple[type, type, dict]] = {
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {"num_local_experts": 4, "intermediate_size": 24, "head_dim": 8},
    ),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 4, "intermediate_size": 24}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "intermediate_size": 40,
            "head_dim": 8,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
        },
    ),
    # The second layer is dense, the first has a shared expert; q, k and v have biases.
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "intermediate_size": 40,
            "mlp_only_layers": [1],
        },
    ),
}
# name -> own settings, for families that are special in their routers, attention or other layers
OTHERS = {
    "deepseek_v3": {
        "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "deepseek_v2": {
        "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
    },
    "glm4_moe": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "head_dim": 8},
    "granitemoe": {"num_local_experts": 4},
    # A state space, a recurrence and linear attention in the place of the first layer's attention.
    "jamba": {
        "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1,
        "expert_layer_offset": 0, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "qwen3_next": {
        "num_experts": 4, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
        "linear_conv_kernel_dim": 3, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "mlp_only_layers": [],
        "shared_expert_intermediate_size": 24,
    },
    "minimax": {
        "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
    },
}  # fmt: skip
FAMILY = pytest.mark.parametrize("family", FAMILIES)
# Settings of a model in which a GEMM over routed rows would change bits.
LARGE = {
    "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "initializer_range": 0.05,
}  # fmt: skip


def make_model(
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    experts: str = "eager",
    attention: str = "sdpa",
    **overrides,
) -> PreTrainedModel:
    """Make a model in eval mode; the same seed gives the same weights.

    Args:
        family: a name of ``FAMILIES``.
        seed: seed of the weights.
        dtype: dtype of the weights.
        experts: transformers' own experts implementation.
        attention: transformers' attention implementation.
        **overrides: settings of the model's configuration.
    """
    model_class, config_class, own = FAMILIES[family]
    sizes = {"num_experts_per_tok": 2, "max_position_embeddings": 512}
    config = config_class(**COMMON | sizes | own | overrides)
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = model_class(config)
    randomise_vectors(model, std=0.1)
    model.set_experts_implementation(experts)
    return model.to(dtype).eval()


def make_other(family: str, **overrides) -> PreTrainedModel:
    """Make a model of one of ``OTHERS`` in eval mode."""
    sizes = {"intermediate_size": 24, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON | sizes | OTHERS[family] | overrides)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("eager")
    return model


def randomise_vectors(model: nn.Module, std: float) -> None:
    """Make biases and norms random, so that a path that omits one fails."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=std)


def randomise(patched, *, scale: float = 0.3, seed: int = 1) -> None:
    """Fill all adapters and added rows with noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in patched.trainable_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * scale)


def fill(patched, value: float) -> None:
    """Set all adapters and added rows to one value."""
    with torch.no_grad():
        for parameter in patched.trainable_parameters():
            parameter.fill_(value)


def token_ids(batch: int, length: int, *, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Return random ids (batch, length), none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab, (batch, length), generator=generator)


def hooks_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the number of forward hooks and forward pre-hooks of every module."""
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


def snapshot(model: nn.Module) -> dict:
    """Copy everything that patching may touch, for :func:`assert_same_snapshot`."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "buffers": sorted(name for name, _ in model.named_buffers()),
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": hooks_of(model),
        "non_persistent": {
            name: sorted(module._non_persistent_buffers_set)
            for name, module in model.named_modules()
        },
        "config": model.config.to_dict(),
        "experts_implementation": model.config._experts_implementation,
        "generation_config": model.generation_config.to_dict() if model.can_generate() else None,
        "vocab_sizes": [m.vocab_size for m in model.modules() if hasattr(m, "vocab_size")],
        "trained": model.training,
    }


def assert_same_snapshot(actual: dict, expected: dict) -> None:
    """Fail unless two snapshots are equal, tensors bit for bit."""
    assert actual.keys() == expected.keys()
    for key in expected:
        if key != "state":
            assert actual[key] == expected[key], key
    assert list(actual["state"]) == list(expected["state"])
    for name, tensor in expected["state"].items():
        assert tensor.dtype == actual["state"][name].dtype, name
        assert torch.equal(actual["state"][name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name


@contextlib.contextmanager
def unchanged(model: nn.Module):
    """Fail unless the model leaves the block as it entered it, tensors bit for bit."""
    before = snapshot(model)
    yield
    assert_same_snapshot(snapshot(model), before)


def refused(model, error, match, config=None):
    transformers_model = hasattr(model, "generation_config")
    context = unchanged(model) if transformers_model else contextlib.nullcontext()
    with context, pytest.raises(error, match=match):
        patch_model(model, config)
