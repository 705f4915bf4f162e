"""Parametrised weights, computed at each read, such as experts packed in 4 bits.

``torch.nn.utils.parametrize`` keeps a tensor of its own in a weight's place, and computes the
weight from it whenever the module's attribute is read. bitsandbytes packs stacks of experts so
(``replace_parameter_4bit``). Where the op can unpack a weight itself, it gets the stored data: see
:func:`recipe`. Otherwise a layer's weights are in full size while it computes, and neither before
nor after: what only needs their shape reads none, and autograd keeps none.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from moe_kernels.models import recipes
from moe_kernels.models.trial_copies import same_bits, trial_copy
from moe_kernels.modes import evaluating
from moe_kernels.ops import PackedWeights
from moe_kernels.ops.gradients import PLAIN, in_transform, is_plain

_NAN = float("nan")
_PARTS = "parametrizations"


class _Found(NamedTuple):
    """Facts of a parametrised weight, found by reading it once.

    Attributes:
        computing: the parametrisations that this follows from.
        deciding: shapes, dtypes and devices that it follows from.
        outline: see :func:`outline`.
        has_recipe: the op unpacks the weight itself, to the same bits.
        problem: why it cannot be read again in the backward pass; None: it can.
    """

    computing: tuple[nn.Module, ...]
    deciding: tuple
    outline: Tensor
    has_recipe: bool
    problem: str | None


_known: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()  # by what holds the parts


def outline(module: nn.Module, name: str) -> Tensor | None:
    """Return a module's parameter, or what has the shape of a parametrised one; None: neither.

    For a parametrised weight it is one NaN, expanded to the weight's shape, of its dtype and on its
    device. The weight is computed once to learn these; one of a tensor's subclass is returned.
    """
    if is_parametrized(module, name):
        found = _find(module, name)
        return found.outline if isinstance(found, _Found) else found
    # In a forward of expert parallelism a plain tensor is there, this rank's part.
    found = getattr(module, name, None)
    is_parameter = isinstance(found, nn.Parameter) or name in module._parameters
    return found if is_parameter and isinstance(found, Tensor) else None


def recipe(module: nn.Module, name: str) -> PackedWeights | None:
    """Return a module's parametrised weight as stored, for the op to unpack; None: it cannot.

    Raises:
        ValueError: the weight was parametrised after patching, and has a :func:`problem`.
    """
    found = _find(module, name) if is_parametrized(module, name) else None
    if not isinstance(found, _Found):
        return None
    if found.problem is not None:
        raise ValueError(found.problem)
    return recipes.nf4(module.parametrizations[name]) if found.has_recipe else None


def problem(module: nn.Module, name: str) -> str | None:
    """Return why a module's weight cannot be read again in the backward pass; None: it can."""
    found = _find(module, name) if is_parametrized(module, name) else None
    return found.problem if isinstance(found, _Found) else None


def _find(module: nn.Module, name: str) -> _Found | Tensor | None:
    """Return what was found of a parametrised weight, or one of a subclass itself."""
    stored = module.parametrizations[name]
    parts = (*stored.parameters(), *stored.buffers())
    deciding = tuple((part.shape, part.dtype, part.device) for part in parts)
    found = _known.get(stored)
    if found is None or found.deciding != deciding or not _are(found.computing, stored):
        with torch.no_grad(), evaluating(stored):  # some change what they store in training
            weight = getattr(module, name)
        if type(weight) not in PLAIN:
            return weight if isinstance(weight, Tensor) else None
        # Parts on the device meta are offloaded: they come where the weight is computed.
        own = None if any(part.is_meta for part in parts) else recipes.nf4(stored)
        has_recipe = own is not None and recipes.gives(own, weight)
        facts = _outline_of(weight), has_recipe, None if has_recipe else _problem(stored, name)
        found = _known[stored] = _Found(tuple(stored), deciding, *facts)
    return found


def _are(modules: tuple[nn.Module, ...], others: ParametrizationList) -> bool:
    """Return whether these are the same objects; torch.compile traces this comparison."""
    return len(modules) == len(others) and all(
        one is other for one, other in zip(modules, others, strict=True)
    )


@torch.no_grad()
def _problem(stored: ParametrizationList, name: str) -> str | None:
    """Return why two reads of a weight in training may differ, by two reads of a copy of its parts.

    Some parametrisations draw noise or improve an estimate at each read (``spectral_norm``).
    """
    if recipes.is_of_bitsandbytes(stored):
        return None  # it unpacks what it stores, and a copy would need memory
    classes = ", ".join(type(each).__name__ for each in stored)
    trial = trial_copy(stored).train()
    devices = {part.device for part in stored.parameters() if part.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        first, second = trial(), trial()
    if same_bits(first, second):
        return None
    return (
        f"the parametrisation of {name} ({classes}) gives another weight at each read in training, "
        "so that text would change and backward pass differ from forward: make the weight plain "
        f"(torch.nn.utils.parametrize.remove_parametrizations(experts, {name!r}))"
    )


def _outline_of(weight: Tensor) -> Tensor:
    like = torch.zeros((), dtype=weight.dtype, device=weight.device)
    like = like.fill_(_NAN) if weight.is_floating_point() else like
    return like.expand(weight.shape)


def parametrised(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Map the name of each parametrised weight of a model to its module and its name there."""
    return {
        f"{path}.{name}": (module, name)
        for path, module in model.named_modules()
        if is_parametrized(module)
        for name in module.parametrizations
    }


def is_part(name: str) -> bool:
    """Return whether a parameter of this name is a part from which a weight is computed."""
    return _PARTS in name.split(".")


def weight_of(name: str) -> str:
    """Return the name of the weight that a parameter is a part of, or is."""
    above, *parts = name.split(f".{_PARTS}.")
    return f"{above}.{parts[0].partition('.')[0]}" if parts else name


class _Again(NamedTuple):
    """Stand-in of a weight that autograd keeps: how to compute it again."""

    read: Callable[[], Tensor]


class _Place(NamedTuple):
    """Place of a tensor's values: no two tensors that are alive have the same."""

    pointer: int
    shape: torch.Size
    stride: tuple[int, ...]


def _place(tensor: Tensor) -> _Place:
    return _Place(tensor.data_ptr(), tensor.shape, tensor.stride())


def read_again(
    weights: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> contextlib.AbstractContextManager[object]:
    """Let autograd keep none of these weights within: its backward pass reads them again.

    All else is kept as outside, by checkpointing or other hooks on saved tensors, if there are any.
    In what is compiled, traced or transformed the weights are kept.

    Args:
        weights: by name; frozen.
        read: computes the weight of a name again, with the same bits.
    """
    if not weights or in_transform() or not is_plain(*weights.values()):
        return contextlib.nullcontext()
    names = {_place(weight): name for name, weight in weights.items()}
    # The hooks that are set last act alone: those outside are called by these.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack, unpack = outer or (Tensor.detach, _as_it_is)

    def pack_others(tensor: Tensor) -> Any:
        name = names.get(_place(tensor))
        return pack(tensor) if name is None else _Again(lambda: read(name))

    def unpack_others(kept: Any) -> Tensor:
        return kept.read() if isinstance(kept, _Again) else unpack(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack_others, unpack_others)


def _as_it_is(kept: Tensor) -> Tensor:
    return kept
