"""Modules that accelerate does not offload with the model around them."""

from collections.abc import Iterator
from typing import Any

from torch import nn

_FIRST, _LAST = "_old_forward", "_hf_hook"  # what accelerate sets on a module, in this order
_KEPT = "_parameters_before_hook"


class Resident(nn.Module):
    """Module with parameters that train, which stay in memory and stay the same objects.

    accelerate's ``add_hook_to_module`` notes a module's forward, moves its parameters to the device
    meta in new objects, and sets its hook. It brings them back when the module is called, which
    most modules here are not, and it would bring the values of then. An optimiser would hold the
    old objects. So the parameters are noted at the first step and put back at the last, on the
    device where the model computes.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == _FIRST:
            self.__dict__[_KEPT] = dict(self._parameters)
        elif name == _LAST:
            self._stay(value)

    def _stay(self, hook: Any) -> None:
        devices = [each.execution_device for each in hooks_of(hook) if _places(each)]
        for name, parameter in self.__dict__.pop(_KEPT, {}).items():
            if parameter is not None and devices:
                parameter.data = parameter.data.to(devices[-1])
            self._parameters[name] = parameter
        for each in hooks_of(hook):
            each.offload = False  # or its end would bring the values of before


def hooks_of(hook: Any) -> Iterator[Any]:
    """Yield the hooks of accelerate that one hook of a module consists of; none of None."""
    if hook is None:
        return
    inner = getattr(hook, "hooks", None)
    if inner is None:
        yield hook
    else:
        for each in inner:
            yield from hooks_of(each)


def _places(hook: Any) -> bool:
    return getattr(hook, "execution_device", None) is not None
