"""The name "moe_kernels" among transformers' experts implementations, without its import.

``import moe_kernels`` must not import transformers, which takes seconds. So the name is registered
when transformers' registry is imported, by whoever it is.
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
_REGISTRY = "transformers.integrations.moe"


def register() -> None:
    """Register the name now if transformers' registry is imported, else when it will be."""
    if (registry := sys.modules.get(_REGISTRY)) is not None:
        _add(registry)
    else:
        sys.meta_path.insert(0, _RegistryFinder())


def _add(registry: ModuleType) -> None:
    registry.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


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
    """Finds the registry as the other finders do, and adds the name after its import."""

    def __init__(self):
        self._local = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY or getattr(self._local, "asking", False):
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
            _add(module)
            if self in sys.meta_path:  # until here: a spec may be asked for without an import
                sys.meta_path.remove(self)

        return execute_and_add
