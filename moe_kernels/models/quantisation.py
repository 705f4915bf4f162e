"""Models that say they are quantised: which of them have plain weights all the same.

transformers keeps the flag of a GGUF file on a model whose weights it has unpacked to floats. Such
a model is patched, and loses the flag until :func:`restore`: ``Trainer``, ``save_pretrained`` and
``.to(dtype)`` refuse whatever carries it.
"""

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

# Methods whose loaders may unpack all weights.
_UNPACKED = ("gguf",)
_OF_MODEL = ("is_quantized", "quantization_method", "hf_quantizer")
_OF_CONFIG = ("quantization_config", "_is_quantized")


def unsupported(model: PreTrainedModel) -> str | None:
    """Why a model counts as quantised, with the method's name; None: its weights are plain."""
    method = getattr(model, "quantization_method", None)
    if not getattr(model, "is_quantized", False) and method is None:
        return None
    method = str(getattr(method, "value", method))
    if method not in _UNPACKED:
        return f"is quantised ({method}): load it in bfloat16, float16 or float32"
    if packed := _packed(model):
        return (
            f"is quantised ({method}), {packed[0]} is packed: load it with "
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
    """Remove what says that the model is quantised, and return it for :func:`restore`."""
    present = [name for name in _OF_MODEL if name in model.__dict__]
    return {name: model.__dict__.pop(name) for name in present}


def restore(model: PreTrainedModel, flags: dict) -> None:
    """Undo :func:`take_flags`."""
    model.__dict__.update(flags)


def clear(config: PretrainedConfig) -> None:
    """Remove what says so from a configuration."""
    for name in _OF_CONFIG:
        config.__dict__.pop(name, None)
