"""Dense model classes, and for each the Mixture-of-Experts class with the same attention."""

from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import (
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)

from moe_kernels.models.dense import CONVERTIBLE
from moe_kernels.models.parts import find_experts

# Settings that all of these configurations have, with the same names and meaning.
_CARRIED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters",
    "attention_dropout",
)  # fmt: skip
SUPPORTED = {getattr(transformers, name): target for name, target in CONVERTIBLE.items()}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a sparse layer; ``expert`` and ``shared`` count neurons, 0 for no shared expert."""

    num_experts: int
    top_k: int
    expert: int
    shared: int


def check_source(model: Any) -> None:
    """Raise unless the model is a dense, unquantised one of a supported class.

    Raises:
        TypeError: it is not a plain transformers model.
        ValueError: it is a Mixture of Experts already, is quantised or offloaded, its class is not
            supported, it has biases that no Mixture-of-Experts class has, or its head contradicts
            its config.
    """
    name = type(model).__name__
    if hasattr(model, "peft_config"):
        raise TypeError(f"{name} carries PEFT adapters: merge_and_unload() them first")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"dense_to_moe needs a transformers model, got {name}")
    config = model.config
    counts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
    if find_experts(model) is not None or any(counts):
        raise ValueError(f"{name} is a Mixture of Experts already: nothing is left to convert")
    if type(model) not in SUPPORTED:
        known = "; ".join(f"{cls.__name__} ({target})" for cls, target in SUPPORTED.items())
        raise ValueError(f"{name} is not supported; supported are {known}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{name} has weights on the device meta (offloaded by accelerate?): load it on one "
            "device (device_map={'': device})"
        )
    if _has_quantised_weights(model):
        raise ValueError(f"{name} is quantised: load it in bfloat16, float16 or float32")
    for bias in ("mlp_bias", "attention_bias"):
        if getattr(config, bias, False) and type(model) is not Qwen3ForCausalLM:
            raise ValueError(
                f"{name} with {bias}=True is not supported: no target class has these biases"
            )
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if tied != bool(config.tie_word_embeddings):
        raise ValueError(
            f"{name}: the head is {'' if tied else 'not '}tied to the embeddings, but "
            f"config.tie_word_embeddings is {config.tie_word_embeddings}: make them agree"
        )


def _has_quantised_weights(model: PreTrainedModel) -> bool:
    """Return True if any projection is not a plain floating-point linear layer.

    The flag ``is_quantized`` would mislead: it stays set on a model unpacked from a GGUF file.
    """
    projections = [
        projection
        for layer in model.model.layers
        for block in (layer.self_attn, layer.mlp)
        for name, projection in block.named_children()
        if name.endswith("_proj")
    ]
    return any(
        type(projection) is not nn.Linear or not projection.weight.is_floating_point()
        for projection in projections
    )


def target_config(model: PreTrainedModel, sizes: Sizes) -> PreTrainedConfig:
    """Return the configuration of the Mixture of Experts that has this model's attention.

    Raises:
        ValueError: transformers has no such class; says why.
    """
    config = model.config
    common = {name: getattr(config, name) for name in _CARRIED}
    common["num_experts_per_tok"] = sizes.top_k
    if type(model) is Qwen3ForCausalLM:
        return _qwen3_moe(config, common, sizes)
    if type(model) is Qwen2ForCausalLM or sizes.shared:
        return _qwen2_moe(config, common, sizes)
    return MixtralConfig(
        **common,
        num_local_experts=sizes.num_experts,
        intermediate_size=sizes.expert,
        head_dim=config.head_dim,
        sliding_window=getattr(config, "sliding_window", None),
    )


def _qwen2_moe(config: PreTrainedConfig, common: dict[str, Any], sizes: Sizes) -> Qwen2MoeConfig:
    """Return a Qwen2-MoE configuration; its shared expert has no neurons if none is requested."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"]
        kinds *= config.num_hidden_layers
    if getattr(config, "head_dim", None) is not None:
        common["head_dim"] = config.head_dim
    return Qwen2MoeConfig(
        **common,
        num_experts=sizes.num_experts,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=sizes.expert,
        shared_expert_intermediate_size=sizes.shared,
        norm_topk_prob=True,
        qkv_bias=config.model_type == "qwen2",
        use_sliding_window=window is not None,
        sliding_window=window,
        layer_types=list(kinds),
    )


def _qwen3_moe(config: PreTrainedConfig, common: dict[str, Any], sizes: Sizes) -> Qwen3MoeConfig:
    if sizes.shared:
        raise ValueError(
            "a shared expert is not supported for Qwen3ForCausalLM: transformers has no class that "
            "combines it with per-head norms of q and k; pass shared_expert=0"
        )
    kinds = set(config.layer_types)
    if len(kinds) > 1:
        raise ValueError(
            "Qwen3ForCausalLM with both sliding and full attention layers is not supported: "
            "Qwen3-MoE has one kind of attention for all layers"
        )
    sliding = kinds == {"sliding_attention"}
    return Qwen3MoeConfig(
        **common,
        num_experts=sizes.num_experts,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=sizes.expert,
        head_dim=config.head_dim,
        norm_topk_prob=True,
        attention_bias=config.attention_bias,
        use_sliding_window=sliding,
        sliding_window=config.sliding_window if sliding else None,
    )
