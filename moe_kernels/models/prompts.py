"""Refuse prompts that PEFT learns around a patched model: prefix, prompt and p-tuning, and others.

PEFT freezes what was added then, and puts tokens before those of text that have no modality. It
leaves no mark on the model within: :func:`watch` refuses the wrapper when PEFT makes it, and
:func:`prompt_around` finds one that was made before the model was patched.
"""

import functools
import gc
import sys

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from moe_kernels.models.handle import is_patched


@functools.cache
def watch() -> None:
    """Refuse, from now on in this process, PEFT's models with a prompt around patched models."""
    register_module_module_registration_hook(_refuse)


def prompt_around(model: nn.Module) -> str | None:
    """Return the class of PEFT's model with a prompt that a model is, or is within, or None.

    PEFT freezes the base of a prompt, so that a model is none of which most parameters train.
    """
    if _has_prompt(model):
        return type(model).__name__
    kind = getattr(sys.modules.get("peft"), "PeftModel", None)
    if not isinstance(kind, type):  # another module may have the name
        return None
    train = [parameter.requires_grad for parameter in model.parameters()]
    if 2 * sum(train) > len(train):
        return None
    if _find(model, kind) is not None:
        gc.collect()  # it may be one that nobody holds any more
    return _find(model, kind)


def _find(model: nn.Module, kind: type) -> str | None:
    for each in gc.get_objects():
        # Not isinstance, which asks objects for __class__: some proxies answer with an error.
        if issubclass(type(each), kind) and _has_prompt(each):
            base = each._modules.get("base_model")
            if base is not None and any(module is model for module in base.modules()):
                return type(each).__name__
    return None


def _has_prompt(module: nn.Module) -> bool:
    return bool(module.__dict__.get("_is_prompt_learning"))


def _refuse(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Raise RuntimeError if PEFT makes a model with a prompt around a patched one."""
    if name != "base_model" or not _has_prompt(module) or submodule is None:
        return
    if any(map(is_patched, submodule.modules())):
        raise RuntimeError(
            f"{type(module).__name__} of PEFT would freeze what patch_model has added, and put a "
            "learnt prompt (prefix, prompt or p-tuning), which has no modality, before all text: "
            "unpatch() the model first, or teach the modality by patch_model alone"
        )
