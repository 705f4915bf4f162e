"""Modality-masked low-rank updates fused into Mixture-of-Experts layers.

``import moe_kernels`` is lean: transformers, triton and POT are imported when a name that needs
them is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from moe_kernels import backends, ops, registration
from moe_kernels._version import __version__ as __version__

if TYPE_CHECKING:
    from moe_kernels.models import (
        AcceleratedPeft,
        LoraInitDiagnostics,
        ModalityLoraConfig,
        PatchedModel,
        SaveAdapter,
        TextCheck,
        accelerate_peft,
        add_modality_tokens,
        combine_adapters,
        get_accelerated,
        initialise_lora,
        load,
        patch_model,
        shard_evenly,
    )

__all__ = [
    "AcceleratedPeft",
    "LoraInitDiagnostics",
    "ModalityLoraConfig",
    "PatchedModel",
    "SaveAdapter",
    "TextCheck",
    "accelerate_peft",
    "add_modality_tokens",
    "backends",
    "combine_adapters",
    "get_accelerated",
    "initialise_lora",
    "load",
    "ops",
    "patch_model",
    "shard_evenly",
]

registration.register()

if not TYPE_CHECKING:  # a type checker would take every name for one that it returns

    def __getattr__(name: str) -> object:
        if name in __all__:
            return getattr(import_module("moe_kernels.models"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
