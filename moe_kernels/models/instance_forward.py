"""The forward of one instance of a module, also within a hook of accelerate.

accelerate puts a function of its own in the place of an instance's forward. It calls
``_old_forward`` between its two halves, which is therefore the place of ours.
"""

import functools
from collections.abc import Callable
from types import MethodType

from torch import nn

_HOOK, _INNER = "_hf_hook", "_old_forward"
OF_ACCELERATE = (_HOOK, _INNER, "forward")  # what it sets on an instance


def set_forward(module: nn.Module, function: Callable) -> None:
    """Let an instance compute by a function of it and its inputs, within accelerate's hook."""
    own, forward = module.__dict__, MethodType(function, module)
    if _HOOK not in own:
        own["forward"] = forward
        return
    own[_INNER] = forward
    if (outer := _of_accelerate(module)) is not None:
        # A new one: its signature is that of what it says to wrap.
        again = functools.partial(outer.func, *outer.args, **outer.keywords)
        own["forward"] = functools.update_wrapper(again, forward)


def reset_forward(module: nn.Module) -> None:
    """Let an instance compute by its class's forward again, within accelerate's hook."""
    if _HOOK in module.__dict__:
        set_forward(module, type(module).forward)
    else:
        module.__dict__.pop("forward", None)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether an instance's forward is neither its class's nor accelerate's around that.

    accelerate leaves the class's bound when it takes its hook off.
    """
    own = module.__dict__
    if _HOOK in own and not isinstance(own.get("forward"), functools.partial):
        return True
    forward = own.get(_INNER if _HOOK in own else "forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def was_hooked(module: nn.Module) -> bool:
    """Return whether accelerate has a hook on a module, or has taken one off."""
    own = module.__dict__
    return _HOOK in own or ("forward" in own and not has_own_forward(module))


def _of_accelerate(module: nn.Module) -> functools.partial | None:
    """Return the function that accelerate has put around a module's forward, below wrappers."""
    found = module.__dict__.get("forward")
    while found is not None:
        found = getattr(found, "__func__", found)
        if isinstance(found, functools.partial) and module in found.args:
            return found
        found = getattr(found, "__wrapped__", None)
    return None
