"""Quantised models: weights that are packed, and the flags that transformers leaves on a model.

What patching adapts, or reads as a plain tensor, must be one; the class and dtype of each such
weight decide, whatever the flags say. All other modules may be quantised: they are called.

``Trainer`` refuses a model with the flag ``is_quantized`` but adapters that are not PEFT's, so the
flag is away until :func:`restore`. Where nothing is packed, because a loader has unpacked a GGUF or
FP8 file to floats, all flags are, and the model is saved as what it is.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from moe_kernels.models import offload, sharding
from moe_kernels.models.instance_forward import has_own_forward
from moe_kernels.modes import evaluating
from moe_kernels.ops.dtypes import FLOATS

_FLAG = "is_quantized"
_OF_QUANTISER = ("quantization_method", "hf_quantizer")
_CONFIG_FLAGS = ("quantization_config", "_is_quantized")
_CODES = (torch.int8, torch.uint8, torch.int16, torch.int32)  # in buffers: of GPTQ, AWQ and others
_TRIED = 16  # rows
_WIDTHS = ("in_features", "infeatures")  # names of a linear layer's input size
_KNOWN = ("torch.nn.modules.", "transformers.models.")
_USE = (
    "load it unquantised, with llm_int8_threshold=0, or with a scale for each row of activations "
    "(or use nn.Linear there)"
)
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
    if any(map(is_packed, model.parameters())):
        return True
    return any(buffer.ndim > 1 and buffer.dtype in _CODES for buffer in model.buffers())


def is_packed(weight: Tensor) -> bool:
    """Return whether a weight is no plain tensor of floats; a sharded one counts as plain.

    A library may lay a packed weight out anew when it computes, so that its shape and values say
    nothing (bitsandbytes does, on CPUs).
    """
    if sharding.is_sharded(weight):
        return False
    return weight.dtype not in FLOATS or type(weight.data) is not Tensor


@torch.no_grad()
def linear_problem(decoder: nn.Module, dtype: torch.dtype) -> str | None:
    """Return why text might change with pictures in a layer that computes a linear one's output.

    LLM.int8 computes those columns in 16 bits that are large in any row, and some layers have one
    scale for all rows of a batch, also beside a plain weight. Each layer that is not nn.Linear is
    tried, as a copy, on rows of which some get huge; the others must keep their bits.
    """
    for name, module in decoder.named_modules():
        if "parametrizations" in name.split(".") or not _may_mix(module):
            continue
        layer = f"{name} ({sharding.plain_class(module).__name__})"
        try:
            mixes = _mixes(module, dtype)
        except Exception as error:  # of any library
            if not _is_linear(module):
                continue  # another module that has a matrix
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            return (
                f"whether text would change with pictures cannot be tried in {layer}, which does "
                f"not run by itself ({why}): {_USE}"
            )
        if mixes:
            return (
                f"the bits of a row of {layer} depend on other rows, so that text would change "
                f"with pictures: {_USE}"
            )
    return None


def _may_mix(module: nn.Module) -> bool:
    """Return whether a module may stand in a linear layer's place without computing as nn.Linear.

    The classes of transformers' models do not mix rows unless a quantiser has changed them.
    """
    cls = sharding.plain_class(module)
    known = cls.forward is nn.Linear.forward or cls.__module__.startswith(_KNOWN)
    changed = has_own_forward(module) or any(map(is_packed, module.parameters(recurse=False)))
    if isinstance(module, nn.Embedding) or (known and not changed):
        return False
    return _is_linear(module) or (not known and getattr(_own_matrix(module), "ndim", 0) == 2)


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module says that it is a linear layer, or stores a matrix as codes."""
    if isinstance(module, nn.Linear) or any(hasattr(module, name) for name in _WIDTHS):
        return True
    known = sharding.plain_class(module).__module__.startswith(_KNOWN)
    return not known and (matrix := _own_matrix(module)) is not None and is_packed(matrix)


def _own_matrix(module: nn.Module) -> Tensor | None:
    """Return a module's own packed weight, or its weight, or None."""
    for buffer in module.buffers(recurse=False):
        if buffer.ndim > 1 and buffer.dtype in _CODES:
            return buffer
    own = dict(module.named_parameters(recurse=False))
    return next(filter(is_packed, own.values()), own.get("weight"))


def _mixes(module: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether rows of a layer depend on others, as a copy of it computes.

    Raises:
        ValueError: it is sharded already.
        Exception: its own, if it does not take rows.
    """
    own = [*module.parameters(), *module.buffers()]
    if any(map(sharding.is_sharded, own)):
        raise ValueError("it is sharded already: patch the model before")
    device = offload.device_of(module, own[0]) if own else torch.device("cpu")
    width = next((getattr(module, n) for n in _WIDTHS if hasattr(module, n)), None)
    width = _own_matrix(module).shape[-1] if width is None else width
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_TRIED, width, generator=generator, dtype=torch.float32, device="cpu")
    huge = rows.clone()
    huge[_TRIED // 4 :] *= torch.finfo(dtype).max / (4 * rows.abs().max())
    # In two sequences: rows may be mixed in each of them, or at each place in them.
    batches = [each.to(device, dtype).view(2, -1, width) for each in (rows, huge)]
    trial = _copy_of(module)
    with evaluating(trial):
        for training in (False, True):
            trial.train(training)
            first, second = (_seeded(trial, each)[0, : _TRIED // 4] for each in batches)
            if not torch.equal(first, second):
                return True
    return False


def _copy_of(module: nn.Module) -> nn.Module:
    """Return a copy of a layer, or itself if it has none; some lay their weights out anew."""
    if offload.is_offloaded(module):
        return module  # accelerate brings copies of its weights
    try:
        return copy.deepcopy(module)
    except RuntimeError:  # of torch: a tensor's subclass that cannot be copied
        return module


def _seeded(layer: nn.Module, batch: Tensor) -> Tensor:
    """Return what a layer computes, with the same dropout each time."""
    devices = [batch.device] if batch.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        output = layer(batch)
    if not isinstance(output, Tensor) or output.shape[:2] != batch.shape[:2]:
        raise TypeError("it gives no row for each row")
    return output


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
