"""Batches of PEFT's ``adapter_names``, one adapter for each sequence, on experts too.

PEFT hands the names down by hooks, which it puts on its layers for the time of a call. Experts see
rows and no sequences, so that hooks of the block around them note how many sequences there are.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_BASE = "__base__"  # PEFT's name for "no adapter" among adapter_names
_noted = threading.local()  # .batch: the number of sequences


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
    batch, tokens = getattr(_noted, "batch", None), hidden_states.shape[0]
    if batch not in (None, len(adapter_names)) or tokens % len(adapter_names):
        raise ValueError(
            f"adapter_names must have one name for each sequence, got {len(adapter_names)} for "
            f"{batch or '?'} sequences of {tokens} tokens"
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
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for name in found:
        block = model.get_submodule(name.rpartition(".")[0])
        yield block.register_forward_pre_hook(_note_batch).remove
        yield block.register_forward_hook(_forget_batch, always_call=True).remove
    inner = {wrapper for wrappers in found.values() for wrapper in wrappers[1:]}
    for each in model.modules():
        if isinstance(each, PeftModel | PreTrainedModel):
            yield each.register_forward_hook(_forget_names, always_call=True).remove
        if isinstance(each, LoraLayer | AuxiliaryTrainingWrapper) and each not in inner:
            yield each.register_forward_pre_hook(_keep_out_of_graphs).remove
            each.register_forward_pre_hook = functools.partial(_register_for_thread, each)
            yield functools.partial(delattr, each, "register_forward_pre_hook")


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
    return "adapter_names" in getattr(hook, "keywords", ())


def _keep_out_of_graphs(module: nn.Module, args: tuple) -> None:
    """End a graph of torch.compile before a layer that is handed names.

    A graph has no guard on what a hook hands down, and would keep the first names.
    """
    # The number first, and more than ours: the graph of a call without names has a guard on it.
    if not torch.compiler.is_compiling() or number_of_hooks(module, "_forward_pre_hooks") == 1:
        return
    if any(map(_hands_names, module._forward_pre_hooks.values())):
        raise RuntimeError("adapter_names do not go into a graph of torch.compile")


def _forget_names(module: nn.Module, args: tuple, output: object) -> None:
    """Take away the names of this thread's forward that has failed.

    PEFT (0.21) leaves them with its layers, and forwards without names would use them.
    """
    if output is not None:
        return
    places = [
        (each, number, hook)
        for each in module.modules()
        for number, hook in each._forward_pre_hooks.items()
        if _hands_names(hook)
    ]
    thread = threading.get_ident()
    # One list for all layers of a call, those that are not bound to a thread too.
    of_others = {
        id(hook.keywords["adapter_names"])
        for _, _, hook in places
        if isinstance(hook, _NamesOfThread) and hook.thread != thread
    }
    for each, number, hook in places:
        if id(hook.keywords["adapter_names"]) not in of_others:
            del each._forward_pre_hooks[number]
            each._forward_pre_hooks_with_kwargs.pop(number, None)


# --- the number of sequences


def _note_batch(module: nn.Module, args: tuple) -> None:
    if not torch.compiler.is_compiling():
        _noted.batch = args[0].shape[0] if args and args[0].ndim == 3 else None


def _forget_batch(module: nn.Module, args: tuple, output: object) -> None:
    if not torch.compiler.is_compiling():
        _noted.batch = None
