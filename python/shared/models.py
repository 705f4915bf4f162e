"""Pretrained models: loading, and refusing those without experts."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")
# Names that configurations have for the number of experts of a layer.
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def count_experts(config: PretrainedConfig) -> int | None:
    """Return the number of experts of a layer; None for a dense model."""
    return next((n for name in _NUM_EXPERTS if (n := getattr(config, name, None))), None)


def require_experts(model: str) -> None:
    """Raise unless the model, a local folder or a hub id, is a Mixture of Experts.

    Raises:
        ValueError: the folder does not exist, or the model is dense.
    """
    if model.startswith(("/", ".", "~")) and not Path(model).is_dir():
        raise ValueError(f"{model} is not a folder")
    config = AutoConfig.from_pretrained(model)
    if count_experts(config) is None:
        raise ValueError(
            f"{model} is a dense {config.model_type!r} model: "
            "convert_dense_to_moe.py makes a Mixture of Experts of it"
        )


def load_causal_lm(model: str | Path, dtype: str | torch.dtype, device: str) -> PreTrainedModel:
    """Return the model in eval mode, its experts "eager" where grouped_mm does not support them."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    for module in loaded.modules():
        weight = getattr(module, "down_proj", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 3:
            if weight.shape[-1] * weight.element_size() % 16:
                loaded.set_experts_implementation("eager")
            break
    return loaded.to(device).eval()
