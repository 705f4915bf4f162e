"""Quantised models: weights that are packed, and the flags that transformers leaves on a model.

What patching adapts, or reads as a plain tensor, must be one; the class and dtype of each such
weight decide, whatever the flags say. All other modules may be quantised: they are called.

``Trainer`` refuses a model with the flag ``is_quantized`` but adapters that are not PEFT's, so the
flag is away until :func:`restore`. Where nothing is packed, because a loader has unpacked a GGUF or
FP8 file to floats, all flags are, and the model is saved as what it is.
"""

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from moe_kernels.models import sharding
from moe_kernels.ops.dtypes import FLOATS

_FLAG = "is_quantized"
_OF_QUANTISER = ("quantization_method", "hf_quantizer")
_CONFIG_FLAGS = ("quantization_config", "_is_quantized")
_CODES = (torch.int8, torch.uint8, torch.int16, torch.int32)  # in buffers: of GPTQ, AWQ and others
_REMEDY = (
    "leave it out of the quantisation (modules_to_not_convert, llm_int8_skip_modules, filter_fn), "
    "or load it unpacked (GgufConfig and FineGrainedFP8Config have dequantize=True)"
)


def weight_problem(module: nn.Module) -> str | None:
    """Return why the weight of a module is no plain tensor of floats; None: it is one."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not is_packed(weight):
        return None
    what = weight.dtype if type(weight.data) is Tensor else type(weight.data).__name__
    return f"a packed weight ({what}): {_REMEDY}"


def class_problem(module: nn.Module, required: type[nn.Module]) -> str | None:
    """Return why a module is not of a class itself, with the remedy if it is quantised; or None."""
    found = sharding.plain_class(module)
    if found is required:
        return None
    remedy = f": {_REMEDY}" if has_packed_weights(module) else ""
    return f"{found.__name__}, not nn.{required.__name__}{remedy}"


def has_packed_weights(model: nn.Module) -> bool:
    """Return whether any parameter or buffer below a module is packed."""
    return any(map(is_packed, model.parameters())) or any(map(is_codes, model.buffers()))


def is_codes(buffer: Tensor) -> bool:
    """Return whether a buffer has the values of a packed weight."""
    return buffer.ndim > 1 and buffer.dtype in _CODES


def is_packed(weight: Tensor) -> bool:
    """Return whether a weight is no plain tensor of floats; a sharded one counts as plain.

    A library may lay a packed weight out anew when it computes, so that its shape and values say
    nothing (bitsandbytes does, on CPUs).
    """
    if sharding.is_sharded(weight):
        return False
    return weight.dtype not in FLOATS or type(weight.data) is not Tensor


def take_flags(model: PreTrainedModel) -> dict:
    """Remove the model's flags of quantisation, and return them for :func:`restore`."""
    names = (_FLAG,) if has_packed_weights(model) else (_FLAG, *_OF_QUANTISER)
    return {name: model.__dict__.pop(name) for name in names if name in model.__dict__}


def restore(model: PreTrainedModel, flags: dict) -> None:
    """Undo :func:`take_flags`."""
    model.__dict__.update(flags)


def clear(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Remove the flags of quantisation from a configuration, unless the model is packed."""
    if not has_packed_weights(model):
        for name in _CONFIG_FLAGS:
            config.__dict__.pop(name, None)
