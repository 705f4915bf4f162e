"""``accelerate_peft``: compute experts that PEFT has adapted by the kernels of this package."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from moe_kernels import backends
from moe_kernels.models.handle import PatchState, get_patched, is_patched
from moe_kernels.models.intact import find_links
from moe_kernels.models.parameters import is_added
from moe_kernels.models.peft_names import remove_names, watch_names
from moe_kernels.models.peft_rows import bind_rows
from moe_kernels.models.peft_stacks import (
    KernelForward,
    Stack,
    find_stacks,
    is_accelerated,
)
from moe_kernels.models.undo import all_or_nothing

_HANDLE = "_accelerated_peft"


def accelerate_peft(
    model: nn.Module, *, modality: str | None = None, backend: str | None = None
) -> "AcceleratedPeft":
    """Compute the experts that PEFT has adapted by the kernels of this package, in place.

    The adapters stay PEFT's parameters under their names. Saving, loading, merging, switching
    between adapters, training loops and optimisers work as before. Merged and disabled adapters are
    computed by PEFT. ``adapter_names``, one adapter for each sequence, works on experts too.

    Args:
        model: the result of ``peft.get_peft_model`` with ``target_parameters`` among experts, or a
            model with such adapters.
        modality: the adapters act on tokens of this modality alone. The model was patched for it
            (``patch_model`` with ``target_modules=()``) before PEFT took it. Rows of added tokens,
            which PEFT has frozen, train again if any of these adapters trains now, and stay frozen
            otherwise (``PeftModel.from_pretrained`` without ``is_trainable=True``).
        backend: see :func:`moe_kernels.backends.select`.

    Returns:
        A handle, whose ``undo`` gives the experts back to PEFT; see :func:`get_accelerated`.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: the model is not a module.
        ValueError: no adapted experts were found, or some that cannot be computed; nothing has
            changed then.
        RuntimeError: the named backend is not available.

    Example:
        >>> config = LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        >>> model = get_peft_model(model, config)
        >>> moe_kernels.accelerate_peft(model)
    """
    found = find_stacks(model)
    remove_names(model)  # PEFT leaves them where a call has failed
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts with adapters of PEFT: give LoraConfig "
            'target_parameters, such as ["experts.gate_up_proj", "experts.down_proj"]'
        )
    if any(is_accelerated(stack.outermost) for stack in found.values()):
        raise ValueError(
            "this model was accelerated already, or is a copy of one that was: "
            "moe_kernels.get_accelerated(model) returns its handle, whose undo() gives the experts "
            "back to PEFT"
        )
    problems = [f"{name}: {each}" for name, stack in found.items() for each in stack.problems()]
    if problems:
        raise ValueError(f"these experts cannot be computed: {'; '.join(problems)}")
    for stack in found.values():
        backends.select(backend, stack.experts.down_proj.device, stack.experts.down_proj.dtype)
    patched, modality_id = _patched_within(model, modality), None
    if patched is not None:
        modality_id = patched.modality_id(modality)
        patched.check_one_adapter("accelerate_peft with a modality")
        _check_own(patched)
        _check_masked(model, found)
    with all_or_nothing(model):
        undo = _bind(model, patched, found) if patched is not None else []
        undo += watch_names(model, {name: stack.wrappers for name, stack in found.items()})
        for stack in found.values():
            stack.attach(KernelForward(stack, modality_id, backend))
            undo.append(stack.detach)
        wrappers = tuple(stack.outermost for stack in found.values())
        handle = AcceleratedPeft(model, tuple(found), wrappers, tuple(undo))
        model.__dict__[_HANDLE] = handle  # copied, and pickled, with the model
        return handle


def get_accelerated(model: nn.Module) -> "AcceleratedPeft":
    """Return the handle of an accelerated model, or of a deepcopy or an unpickled copy of one.

    Args:
        model: that was given to :func:`accelerate_peft`, or a module around it.

    Raises:
        ValueError: the model is not accelerated, or is but a part of one that is.

    Example:
        >>> moe_kernels.get_accelerated(copy.deepcopy(model)).undo()
    """
    handles = (module.__dict__.get(_HANDLE) for module in model.modules())
    handle = next(filter(None, handles), None)
    if handle is not None:
        return handle
    name = type(model).__name__
    if any(map(is_accelerated, model.modules())):
        raise ValueError(
            f"this {name} is a part of an accelerated model, whose whole has the handle: copy and "
            "give the model that accelerate_peft was given"
        )
    raise ValueError(f"this {name} is not accelerated: call accelerate_peft(model) first")


@dataclass(frozen=True)
class AcceleratedPeft:
    """Experts of a model that are computed by :func:`accelerate_peft`.

    Attributes:
        model: that was given.
        names: of the accelerated modules in the model.
        modules: PEFT's wrappers.
    """

    model: nn.Module = field(repr=False)
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...] = field(repr=False)
    _undo: tuple[Callable[[], object], ...] = field(repr=False)

    def undo(self) -> None:
        """Let PEFT compute the experts again, as before.

        Raises:
            RuntimeError: a forward was replaced since, and nothing has changed.
        """
        if self.model.__dict__.get(_HANDLE) is not self:
            return
        for name, module in zip(self.names, self.modules, strict=True):
            if "forward" in module.__dict__ and not is_accelerated(module):
                raise RuntimeError(
                    f"the forward of {name} was replaced after accelerate_peft (a device map?): "
                    "put it back first (accelerate.hooks.remove_hook_from_submodules)"
                )
        with all_or_nothing(self.model):
            del self.model.__dict__[_HANDLE]
            for each in self._undo:
                each()


# --- the modality


def _patched_within(model: nn.Module, modality: str | None) -> PatchState | None:
    """Return the patch whose modality the adapters are to be bound to, or raise ValueError."""
    base = next(filter(is_patched, model.modules()), None)
    if base is not None:
        if modality is None:
            raise ValueError(
                "this model was patched, and PEFT's adapters would act on all of its tokens: name "
                "the modality that they are for, accelerate_peft(model, modality=...)"
            )
        return get_patched(base)
    if modality is not None:
        raise ValueError(
            f"modality={modality!r} needs a model that knows each token's modality: call "
            "patch_model(model, ModalityLoraConfig(target_modules=())) before get_peft_model"
        )
    return None


def _check_own(patched: PatchState) -> None:
    """Raise ValueError if the patch has more than a mask and rows, which PEFT would not save."""
    own = {"adapters": patched.projections, "added experts": patched.extensions}
    if found := [what for what, each in own.items() if each]:
        raise ValueError(
            f"the model has {' and '.join(found)} of patch_model, which PEFT's files and "
            "checkpoints leave out: patch it with ModalityLoraConfig(target_modules=()), or adapt "
            "the experts by patch_model too"
        )


def _check_masked(model: nn.Module, found: dict[str, Stack]) -> None:
    """Raise ValueError if text meets what trains: adapters of others than experts, or the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    of_experts = {wrapper for stack in found.values() for wrapper in stack.wrappers}
    if any(wrapper.merged for wrapper in of_experts):
        raise ValueError("adapters are merged into weights that text uses too: load the base anew")
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        and module not in of_experts
    ]
    if others:
        raise ValueError(
            f"{len(others)} adapters of PEFT, such as {others[0]}, act on tokens of every modality "
            "and would change text: leave them out, or adapt experts and attention by patch_model"
        )
    own = {p for wrapper in of_experts for p in wrapper.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in own and not is_added(name):
            raise ValueError(f"{name} of the base trains (bias=?), which would change text")


def _bind(
    model: nn.Module, patched: PatchState, found: dict[str, Stack]
) -> list[Callable[[], object]]:
    """Let rows of added tokens train and be saved, and watch all modules; return how to undo it."""
    adapters = (p for stack in found.values() for p in stack.outermost.parameters())
    # PEFT freezes all parameters but its own; none trains in a model for inference.
    undo = bind_rows(model, patched, train=any(adapter.requires_grad for adapter in adapters))
    undo.append(functools.partial(setattr, patched, "links", patched.links))
    inner = {each for stack in found.values() for each in stack.outermost.modules()}
    others = [each for each in patched.model.modules() if each not in inner]
    # An adapter that comes later on another module, a shared expert, would change text.
    known = {link.path for link in patched.links}
    new = find_links(patched.model, others)
    patched.links += tuple(link for link in new if link.path not in known)
    return undo
