"""Pretrained models: loading, and refusing those that are damaged or have no experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moe_kernels.models import dense
from moe_kernels.models.loading import finding

DTYPES = ("float32", "bfloat16", "float16")
# Names that configurations have for the number of experts of a layer.
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def count_experts(config: PretrainedConfig) -> int | None:
    """Return the number of experts of a layer; None for a dense model."""
    return next((n for name in _NUM_EXPERTS if (n := getattr(config, name, None))), None)


def require_experts(model: str) -> None:
    """Raise unless the model, a local folder or a hub id, is a Mixture of Experts.

    Raises:
        ValueError: the model is dense.
        OSError: as :func:`reading`.
    """
    config = load_config(model)
    if count_experts(config) is None:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        problem = dense.problem(getattr(model_class, "__name__", config.model_type))
        raise ValueError(f"{model} is a dense {config.model_type!r} model: {problem}")


@contextmanager
def reading(model: str | Path) -> Iterator[None]:
    """Name the model, and the folder that is not there, in whatever transformers raises.

    Raises:
        ValueError: a file is damaged.
        OSError: there is no such folder, and the hub has no such model, or cannot be asked.
    """
    try:
        with finding(model):
            yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{model} cannot be loaded, a file may be damaged ({problem})") from error


def load_config(model: str | Path, **options: Any) -> PretrainedConfig:
    """Return the model's configuration; raises as :func:`reading`."""
    with reading(model):
        return AutoConfig.from_pretrained(model, **options)


def load_tokenizer(model: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; raises as :func:`reading`."""
    with reading(model):
        return AutoTokenizer.from_pretrained(model, **options)


def load_weights(model: str | Path, **options: Any) -> PreTrainedModel:
    """Return the model with its weights, options: of `from_pretrained`; raises as :func:`reading`.

    Raises:
        ValueError: the files lack weights. transformers would draw them at random.
    """
    with reading(model):
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model, output_loading_info=True, **options
        )
    if missing := sorted(info["missing_keys"]):
        names = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise ValueError(f"{model} lacks {len(missing)} weights: {names}")
    return loaded


def load_causal_lm(model: str | Path, dtype: str | torch.dtype, device: str) -> PreTrainedModel:
    """Return the model in eval mode, its experts "eager" where grouped_mm does not support them."""
    loaded = load_weights(model, dtype=dtype)
    for module in loaded.modules():
        weight = getattr(module, "down_proj", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 3:
            if weight.shape[-1] * weight.element_size() % 16:
                loaded.set_experts_implementation("eager")
            break
    return loaded.to(device).eval()
