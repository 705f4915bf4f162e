"""Batches of PEFT's ``adapter_names``, one adapter for each sequence, on experts too.

PEFT hands the names down by hooks, which it puts on its layers for the time of a call. Experts see
rows and no sequences, so that hooks of the models around them compare the numbers of both.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_kernels.modes import ending_with

_BASE = "__base__"  # PEFT's name for "no adapter" among adapter_names
_NO_GRAPH = "adapter_names do not go into a graph of torch.compile"


def by_sequence(
    wrappers: Sequence[nn.Module], adapter_names: Sequence[str], hidden_states: Tensor
) -> tuple[list[tuple[str, ...]], Tensor]:
    """Return adapters as groups of one, and the number of each row's group, 0 for none.

    Args:
        wrappers: of one experts module.
        adapter_names: of the sequences.
        hidden_states: (T, H), the rows of all sequences.
    """
    if any(each.merged or each.disable_adapters for each in wrappers):
        raise ValueError(
            "adapter_names cannot be given while adapters are merged, or disabled for one of the "
            "projections: model.unmerge_adapter(), model.base_model.enable_adapter_layers()"
        )
    tokens = hidden_states.shape[0]
    if not adapter_names or tokens % len(adapter_names):
        raise ValueError(
            f"adapter_names must have one name for each sequence, got {len(adapter_names)} for "
            f"{tokens} tokens"
        )
    names = [name for name in dict.fromkeys(adapter_names) if name != _BASE]
    numbers = {name: number for number, name in enumerate(names, 1)} | {_BASE: 0}
    ids = torch.tensor([numbers[name] for name in adapter_names], device=hidden_states.device)
    # One group at least: a batch of the base alone still has its shapes.
    return [(name,) for name in names] or [()], ids.repeat_interleave(tokens // len(adapter_names))


def watch_names(
    model: nn.Module, found: Mapping[str, Sequence[nn.Module]]
) -> Iterator[Callable[[], object]]:
    """Register what ``adapter_names`` need, and yield how to undo it.

    Args:
        model: the model of PEFT.
        found: its wrappers of each experts module, by the name of the outermost.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraModel
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils import AuxiliaryTrainingWrapper

    inner = {wrapper for wrappers in found.values() for wrapper in wrappers[1:]}
    for name, each in model.named_modules():
        if isinstance(each, PeftModel | PreTrainedModel):
            inside = f"{name}." if name else ""
            for path in [path for path in found if path.startswith(inside)][:1]:
                check = _OneNameForEachSequence(found[path][0])
                yield each.register_forward_pre_hook(check, with_kwargs=True).remove
        if isinstance(each, LoraModel):
            each._enable_peft_forward_hooks = functools.partial(_hand_down, each)
            yield functools.partial(delattr, each, "_enable_peft_forward_hooks")
        if isinstance(each, LoraLayer | AuxiliaryTrainingWrapper) and each not in inner:
            yield each.register_forward_pre_hook(_keep_out_of_graphs).remove
            each.register_forward_pre_hook = functools.partial(_register_for_thread, each)
            yield functools.partial(delattr, each, "register_forward_pre_hook")


def remove_names(model: nn.Module, lists: Collection[int] | None = None) -> None:
    """Remove the hooks by which PEFT hands names down, those of layers that came later too.

    Args:
        model: with PEFT's layers.
        lists: the lists of names by ``id``; None: all, which calls have left that failed.
    """
    for each in model.modules():
        for number, hook in tuple(each._forward_pre_hooks.items()):
            if not _hands_names(hook):
                continue
            if lists is None or id(hook.keywords["adapter_names"]) in lists:
                del each._forward_pre_hooks[number]
                each._forward_pre_hooks_with_kwargs.pop(number, None)


def number_of_hooks(module: nn.Module, kind: str) -> int:
    """Return the number of a module's hooks.

    A graph of torch.compile has no guard on hooks that are read as an attribute of the module, and
    would not see those that come later. It has one on their number in ``__dict__``.
    """
    return len(module.__dict__[kind])


# --- names


@dataclass(frozen=True, eq=False)
class _NamesOfThread:
    """PEFT's hook that hands names to a layer, for the thread that was given them.

    Attributes:
        hook: that of PEFT.
        thread: the thread's identifier.
    """

    hook: Callable
    thread: int

    @property
    def keywords(self) -> dict:
        """Keyword arguments of PEFT's hook, the names among them."""
        return self.hook.keywords

    def __call__(self, *inputs) -> object:
        if threading.get_ident() != self.thread:
            raise RuntimeError(
                "another thread runs this model with adapter_names, which PEFT hands down by hooks "
                "that all threads share: other forwards must wait for it (threading.Lock)"
            )
        return self.hook(*inputs)


def _register_for_thread(
    module: nn.Module, hook: Callable, **settings
) -> torch.utils.hooks.RemovableHandle:
    """Register a forward pre-hook; that of names is bound to this thread."""
    if _hands_names(hook):
        hook = _NamesOfThread(hook, threading.get_ident())
    return type(module).register_forward_pre_hook(module, hook, **settings)


def _hands_names(hook: Callable) -> bool:
    """Return whether a hook is PEFT's, which hands names to a layer."""
    if isinstance(hook, _NamesOfThread):
        return True
    return (
        isinstance(hook, functools.partial)
        and "adapter_names" in hook.keywords
        and str(getattr(hook.func, "__module__", "")).startswith("peft.")
    )


def _names_for(module: nn.Module) -> Sequence[str] | None:
    """Return the names that this thread's call hands to a layer, or None."""
    # The number first, and more than ours: the graph of a call without names has a guard on it.
    if number_of_hooks(module, "_forward_pre_hooks") == 1:
        return None
    # A copy: another thread may be registering its own.
    hooks = [hook for hook in tuple(module._forward_pre_hooks.values()) if _hands_names(hook)]
    if hooks and torch.compiler.is_compiling():
        raise RuntimeError(_NO_GRAPH)
    own = (hook for hook in hooks if _is_of_this_thread(hook))
    return next((hook.keywords["adapter_names"] for hook in own), None)


def _is_of_this_thread(hook: Callable) -> bool:
    return isinstance(hook, _NamesOfThread) and hook.thread == threading.get_ident()


def _keep_out_of_graphs(module: nn.Module, args: tuple) -> None:
    """End a graph of torch.compile before a layer that is handed names.

    A graph has no guard on what a hook hands down, and would keep the first names.
    """
    if torch.compiler.is_compiling():
        _names_for(module)


def _hand_down(tuner: nn.Module, *args, **settings) -> contextlib.AbstractContextManager:
    """Let PEFT hand names down for the time of a call, however the call ends.

    PEFT (0.21) leaves its hooks in place where one fails, and calls without names would use them.
    """
    names, hand_down = settings.get("adapter_names"), type(tuner)._enable_peft_forward_hooks
    if names is None:
        return hand_down(tuner, *args, **settings)
    if torch.compiler.is_compiling():
        raise RuntimeError(_NO_GRAPH)
    if isinstance(names, list | tuple):
        settings["adapter_names"] = list(names)  # one that no other call has
    return _ending(tuner, hand_down(tuner, *args, **settings))


@contextlib.contextmanager
def _ending(tuner: nn.Module, handing: contextlib.AbstractContextManager) -> Iterator[None]:
    """Enter PEFT's context, and remove at the end what hooks it has left."""
    before = _lists_of_names(tuner)  # of a call around this one
    with ending_with(lambda: remove_names(tuner, _lists_of_names(tuner) - before)), handing:
        yield


def _lists_of_names(tuner: nn.Module) -> set[int]:
    """Return which lists of names the calls of this thread hand down; each call has its own."""
    hooks = (hook for each in tuner.modules() for hook in tuple(each._forward_pre_hooks.values()))
    return {id(hook.keywords["adapter_names"]) for hook in hooks if _is_of_this_thread(hook)}


# --- the number of sequences


@dataclass(frozen=True, eq=False)
class _OneNameForEachSequence:
    """Pre-hook of a model that compares the numbers of names and sequences.

    Attributes:
        wrapper: of PEFT, within the model.
    """

    wrapper: nn.Module

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        names = kwargs.get("adapter_names")
        if names is None:
            names = _names_for(self.wrapper)
        given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
        inputs = next((each for each in given if isinstance(each, Tensor)), None)
        if names is None or inputs is None or len(names) == inputs.shape[0]:
            return
        raise ValueError(
            f"adapter_names must have one name for each sequence, got {len(names)} for "
            f"{inputs.shape[0]} sequences"
        )
