"""Weights that accelerate keeps on the CPU or a disk, and brings to a module while it runs.

``cpu_offload``, ``disk_offload``, ``dispatch_model`` and ``from_pretrained(device_map=)`` give each
module with weights a hook, ``_hf_hook``, around its forward. Outside of the forward an offloaded
weight is a parameter on the device meta, whose values the hook's ``weights_map`` has. What patching
adds stays in memory (``layers/resident.py``).
"""

from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel

from moe_kernels.layers.resident import Resident, hooks_of
from moe_kernels.models import recipes, sharding
from moe_kernels.models.instance_forward import was_hooked

_TAKE_OFF = "take the hooks off (accelerate.hooks.remove_hook_from_submodules(model))"
# Hooks of models that problem() found sound. A forward searches all modules only if it meets
# another hook: a large model has ten thousand modules.
_checked: WeakSet[Any] = WeakSet()


def _hook(module: nn.Module) -> Any | None:
    """Return the hook of accelerate that brings a module's weights, or None."""
    own = module.__dict__.get("_hf_hook")
    return None if own is None else next(filter(_offloads, hooks_of(own)), None)


def is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate brings a module's own weights only while it runs."""
    return _hook(module) is not None


def value(module: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of a module; of an offloaded one its values, read now.

    They are on the device and in the dtype that the module computes with. What has no values at all
    (a model on the device meta) is returned as it is.
    """
    tensor = getattr(module, name)
    if not tensor.is_meta or (hook := _hook(module)) is None:
        return tensor
    return hook.weights_map[name].detach().to(_device(hook), tensor.dtype)


def device_of(module: nn.Module, tensor: Tensor) -> torch.device:
    """Return the device on which a module computes with a weight of its own."""
    hook = _hook(module) if tensor.is_meta else None
    return tensor.device if hook is None else _device(hook)


def device_of_model(model: nn.Module) -> torch.device:
    """Return the device on which a model computes with its first parameter."""
    pairs = ((m, p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return device_of(*next(pairs))


def offloaded(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Map the name of each offloaded parameter of a model to its module and its name there."""
    return {
        f"{path}.{name}" if path else name: (module, name)
        for path, module in model.named_modules()
        if is_offloaded(module)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    }


def tied_copies(model: PreTrainedModel) -> set[str]:
    """Return the names of tied parameters that are objects of their own, with the same values.

    Each hook of accelerate puts an object of its own in a weight's place, and leaves one there when
    it is taken off. Without hooks, then or now, the user has untied the weights, as where the
    configuration says that they are not tied.
    """
    # In any module: what a hook left on table and head is lost when they are patched and unpatched.
    if not any(map(was_hooked, model.modules())):
        return set()
    found = set()
    for copied, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        values = [_value_at(model, name) for name in (copied, source)]
        if values[0] is values[1] or any(v is None or _is_elsewhere(v) for v in values):
            continue
        if torch.equal(*values):
            found.add(copied)
    return found


def _value_at(model: nn.Module, name: str) -> Tensor | None:
    """Return the values of the parameter of a name, or None if the model has none."""
    path, _, own = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return None if module._parameters.get(own) is None else value(module, own)


def _is_elsewhere(tensor: Tensor) -> bool:
    return tensor.is_meta or sharding.is_sharded(tensor)


def problem(model: nn.Module) -> str | None:
    """Return why a model cannot compute what is added to it as accelerate runs it; None: it can."""
    named = {path or type(model).__name__: module for path, module in model.named_modules()}
    hooks = [(name, each, hook) for name, each in named.items() for hook in _hooks_on(each)]
    if not hooks:
        return None
    if found := next(filter(None, (_hook_problem(*each) for each in hooks)), None):
        return found
    for name, module in named.items():
        parameters = module._parameters.values() if isinstance(module, Resident) else ()
        if any(parameter is not None and parameter.is_meta for parameter in parameters):
            return (
                f"accelerate has moved {name} to the device meta, which was added and trains: "
                f"{_TAKE_OFF}, unpatch() it, and offload it before patch_model"
            )
    on = {str(_device(hook)) for *_, hook in hooks if hook.execution_device is not None}
    if len(on) > 1:
        return (
            f"accelerate computes it on several devices ({', '.join(sorted(on))}), which is "
            "not supported: load it with a device map of one device (device_map={'': device}), or "
            "of one beside 'cpu' and 'disk'; or shard it by FSDP2 or DeepSpeed"
        )
    _checked.update(hook for *_, hook in hooks)
    return None


def has_unchecked_hook(modules: Iterable[nn.Module]) -> bool:
    """Return whether accelerate has set a hook on a module since :func:`problem` found none."""
    return any(hook not in _checked for module in modules for hook in _hooks_on(module))


def _hooks_on(module: nn.Module) -> Iterator[Any]:
    return hooks_of(module.__dict__.get("_hf_hook"))


def _hook_problem(name: str, module: nn.Module, hook: Any) -> str | None:
    if type(hook).__name__ != "AlignDevicesHook":
        return (
            f"{name} has accelerate's {type(hook).__name__}: only the hooks of cpu_offload, "
            f"disk_offload and device maps are supported; {_TAKE_OFF}"
        )
    if _offloads(hook) and hook.place_submodules:
        return (
            f"accelerate brings {name} with all that is in it, adapters too, which it does not "
            f"have (preload_module_classes with {type(module).__name__}): {_TAKE_OFF}, offload it "
            "without preload_module_classes, and make an optimiser after that"
        )
    packed = isinstance(module, ParametrizationList) and recipes.is_of_bitsandbytes(module)
    if packed and _offloads(hook):
        return (
            f"accelerate has offloaded {name}, which bitsandbytes has packed "
            "(replace_parameter_4bit): state_dict() gives what it stores another name, by which "
            f"accelerate does not find it; {_TAKE_OFF}, or use a device map with these layers on "
            "the device that computes"
        )
    return None


def _offloads(hook: Any) -> bool:
    return getattr(hook, "offload", False) and hasattr(hook, "weights_map")


def _device(hook: Any) -> torch.device:
    device = torch.device(hook.execution_device)
    return torch.device(device.type, device.index or 0) if device.type != "cpu" else device
