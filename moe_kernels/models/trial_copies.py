"""Copies of a layer for trials: the layer itself never runs, nor do its hooks."""

import copy
import functools
from collections.abc import Hashable
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_OF_TORCH = ("_parameters", "_buffers", "_modules")
_OF_ACCELERATE = "_hf_hook"
_LEFT_OUT = ("_compiled_call_impl",)  # runs the layer itself
_VALUES = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device)
_MOST_FACTS = 300  # of a layer; beyond them it is a kind of its own


def trial_copy(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer without its hooks; a hook of accelerate brings the same weights.

    What cannot be copied, such as a lock, is shared with the layer; tensors and generators never
    are.
    """
    modules = list(layer.modules())
    memo: dict[int, Any] = {id(module): type(module).__new__(type(module)) for module in modules}
    for module in modules:
        for name, value in vars(module).items():
            if name not in _LEFT_OUT:
                vars(memo[id(module)])[name] = _copied_attribute(name, value, memo)
    return memo[id(layer)]


def _copied_attribute(name: str, value: Any, memo: dict[int, Any]) -> Any:
    if _is_hooks(name, value):
        return type(value)()
    if name in _OF_TORCH:
        return {key: _copied(each, memo) for key, each in value.items()}
    if name == _OF_ACCELERATE:
        return copy.copy(value)  # what it refers to holds the weights of the whole model
    return _copied(value, memo)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of a value, in which copies stand for the modules in ``memo``."""
    if isinstance(value, _VALUES):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, FunctionType) and value.__closure__:
        return _copied_function(value, memo)
    if isinstance(value, nn.Module) and any(id(each) in memo for each in value.modules()):
        return value  # the model around the layer
    trial = dict(memo)  # a copy that fails leaves halves there
    try:
        copied = copy.deepcopy(value, trial)
    except Exception:  # of any library
        return _shared_or_cloned(value)
    alive = trial.pop(id(trial), [])  # whose ids must stay theirs, as deepcopy has it
    memo.update(trial)
    memo.setdefault(id(memo), []).extend(alive)
    return copied


def _shared_or_cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.clone_state() if isinstance(value, torch.Generator) else value


def _copied_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Return a function that has a copy of what its closure refers to."""
    cells = [CellType() for _ in function.__closure__ or ()]
    copied = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells),
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    memo[id(function)] = copied  # it may refer to itself
    for cell, original in zip(cells, function.__closure__ or (), strict=True):
        try:
            contents = original.cell_contents
        except ValueError:  # nothing has been put there yet
            continue
        cell.cell_contents = _copied(contents, memo)
    return copied


def _is_hooks(name: str, value: Any) -> bool:
    return "_hooks" in name and isinstance(value, dict)


def kind(layer: nn.Module) -> Hashable:
    """Return all that decides how a layer computes, but the values of its weights.

    Classes, settings, functions, and tensors' classes, shapes, dtypes and devices, at any depth.
    What cannot be compared is a kind of its own, so that two layers of one kind are alike.
    """
    return _facts(layer, {})


def _facts(value: Any, seen: dict[int, tuple[int, Any]]) -> Hashable:
    """Return facts of an object; ``seen`` has objects by id, which keeps them alive."""
    if isinstance(value, _VALUES):
        return type(value), value
    if id(value) in seen:
        return "seen", seen[id(value)][0]
    if len(seen) >= _MOST_FACTS:
        return "object", id(value)
    seen[id(value)] = len(seen), value
    parts = _parts(value)
    if parts is None:
        return "object", id(value)
    return type(value), tuple(_facts(each, seen) for each in parts)


def _parts(value: Any) -> tuple | None:
    """Return what makes up an object, or None if that is not known."""
    if isinstance(value, Tensor):
        return _parts_of_tensor(value)
    if isinstance(value, dict):
        return tuple(each for pair in value.items() for each in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(value)
    if isinstance(value, FunctionType):
        cells = value.__closure__ or ()
        return id(value.__code__), value.__defaults__, value.__kwdefaults__, *map(_contents, cells)
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if not hasattr(value, "__dict__"):
        return None
    own = {n: v for n, v in vars(value).items() if n != _OF_ACCELERATE and not _is_hooks(n, v)}
    return (own,)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _parts_of_tensor(tensor: Tensor) -> tuple:
    """Return facts of a tensor; a single number that is no float may be a switch."""
    facts = (tensor.dtype, *tensor.shape, tensor.device, vars(tensor))
    is_plain = type(tensor.data) is Tensor and not tensor.is_meta
    if is_plain and tensor.numel() == 1 and not tensor.is_floating_point():
        return (*facts, tensor.item())
    return facts


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have the same bits; NaN is then equal to itself."""
    if first.is_meta:
        return True
    return torch.equal(*(each.contiguous().view(torch.uint8) for each in (first, second)))
