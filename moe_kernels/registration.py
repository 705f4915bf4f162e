"""The name "moe_kernels" in transformers' registries, without an import of transformers.

It names an implementation of experts, and one of expert parallelism. ``import moe_kernels`` must
not import transformers, which takes seconds. So the names are registered when transformers'
registries are imported, by whoever it is. A version without one of them gets no name there.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

IMPLEMENTATION = "moe_kernels"
_EXPERTS = "moe_kernels.models.experts"
_SPREAD = "moe_kernels.models.spread_experts"


def register() -> None:
    """Register the name now in registries that are imported, in others when they will be."""
    for name, add in _REGISTRIES.items():
        if (registry := sys.modules.get(name)) is not None:
            add(registry)
        else:
            sys.meta_path.insert(0, _RegistryFinder(name, add))


def _add_experts(registry: ModuleType) -> None:
    registry.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


def _add_spread(registry: ModuleType) -> None:
    # Absent in versions that have the module without a registry.
    if (implementations := getattr(registry, "EPImplementationInterface", None)) is not None:
        implementations.register(IMPLEMENTATION, _spread_experts)


_REGISTRIES = {
    "transformers.integrations.moe": _add_experts,
    "transformers.distributed.expert_parallel": _add_spread,
}


def _spread_experts(*arguments):
    """Import the implementation of expert parallelism, and make one of an experts module."""
    return import_module(_SPREAD).SpreadExperts(*arguments)


def _experts_forward(*arguments, **keywords):
    """Import the implementation, which registers itself in place of this function, and call it."""
    _load()
    return sys.modules[_EXPERTS].experts_forward(*arguments, **keywords)


def _load() -> None:
    import_module(_EXPERTS)


# torch.compile runs it then, since it cannot trace an import. This is all that
# torch.compiler.assume_constant_result does, but that one imports torch's compiler, and Triton.
_load._dynamo_marked_constant = True


class _RegistryFinder(MetaPathFinder):
    """Finds a registry as the other finders do, and adds the name after its import."""

    def __init__(self, registry: str, add: Callable[[ModuleType], None]):
        self._registry, self._add = registry, add
        self._local = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._registry or getattr(self._local, "asking", False):
            return None
        self._local.asking = True  # the other finders
        try:
            spec = find_spec(fullname)
        finally:
            self._local.asking = False
        if spec is not None:
            spec.loader.exec_module = self._and_add(spec.loader.exec_module)
        return spec

    def _and_add(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            self._add(module)
            if self in sys.meta_path:  # until here: a spec may be asked for without an import
                sys.meta_path.remove(self)

        return execute_and_add
