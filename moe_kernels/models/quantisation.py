"""Quantised models: refused, unless the flag is all that is left of the quantisation.

transformers keeps the flag of a GGUF file on a model whose weights it has unpacked to floats. Such
a model can be patched. It loses the flag until :func:`restore`, because ``Trainer``,
``save_pretrained`` and ``.to(dtype)`` refuse a model that carries it.
"""

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

# Quantisation methods whose loaders may unpack all weights.
_UNPACKED = ("gguf",)
_MODEL_FLAGS = ("is_quantized", "quantization_method", "hf_quantizer")
_CONFIG_FLAGS = ("quantization_config", "_is_quantized")


def quantisation_problem(model: PreTrainedModel) -> str | None:
    """Return why a model counts as quantised, with the method's name, or None."""
    method = getattr(model, "quantization_method", None)
    if not getattr(model, "is_quantized", False) and method is None:
        return None
    method = str(getattr(method, "value", method))
    if method not in _UNPACKED:
        return f"is quantised ({method}): load it in bfloat16, float16 or float32"
    if packed := _packed(model):
        return (
            f"is quantised ({method}): {packed[0]} is packed; load it with "
            "quantization_config=GgufConfig(dequantize=True)"
        )
    return None


def _packed(model: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters()
        if not parameter.is_floating_point() or type(parameter.data) is not Tensor
    ]


def take_flags(model: PreTrainedModel) -> dict:
    """Remove the model's flags of quantisation, and return them for :func:`restore`."""
    present = [name for name in _MODEL_FLAGS if name in model.__dict__]
    return {name: model.__dict__.pop(name) for name in present}


def restore(model: PreTrainedModel, flags: dict) -> None:
    """Undo :func:`take_flags`."""
    model.__dict__.update(flags)


def clear(config: PretrainedConfig) -> None:
    """Remove the flags of quantisation from a configuration."""
    for name in _CONFIG_FLAGS:
        config.__dict__.pop(name, None)
