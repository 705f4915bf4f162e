"""Backends of the ops: their names, which of them work here, and the choice of one.

An explicit choice never falls back: the op runs on that backend or raises with the reason. A choice
that is left open falls back, and says so in a warning.
"""

import functools
import os
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from moe_kernels import _native, env

__all__ = ["NAMES", "available", "select"]

NAMES = ("reference", "cpu", "triton", "cuda")

# Backends that `backend=None` tries, best first, for tensors on a device type.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# Dtypes of the GPU backends; for other dtypes `backend=None` means the reference on a GPU.
_ON_GPUS = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)

_MODULES = {
    "reference": "reference",
    "cpu": "native_impl",
    "triton": "triton_impl",
    "cuda": "cuda_impl",
}

# Backend -> what the build notes where whoever built the package asked for its absence.
_NOTES = {"cpu": ("not_built",), "cuda": ("not_built", "no_cuda")}
_WARNED: set[tuple[str, str]] = set()  # chosen backends, with the best in their place

# Searched once: searching the path at every call would cost more than a small layer.
_HAS_TRITON = find_spec("triton") is not None


def available() -> dict[str, str | None]:
    """Map every backend's name to None where it works on this machine, else to the reason."""
    return {name: _why_not(name) for name in NAMES}


def _why_not(name: str, index: int | None = None) -> str | None:
    """Return why a backend does not work on the CUDA device ``index`` (None: current), or None."""
    if name == "cpu":
        return _native.why_not()
    if name == "reference":
        return None
    if index is None:  # whichever is current may change
        return _WHY_NOT_ON[name](index)
    return _why_not_on(name, index, triton_is_interpreted())


# A compiled program uses the answer as a constant, since it cannot trace the search. The line is
# all that torch.compiler.assume_constant_result does, after importing the compiler for seconds.
_why_not._dynamo_marked_constant = True


@functools.cache  # every call of an op asks
def _why_not_on(name: str, index: int, interpreted: bool) -> str | None:
    """Return why a backend does not work on a device.

    Triton's interpreter alone can be turned on while a program runs, so the answer depends on it.
    """
    return _WHY_NOT_ON[name](index)


def _why_no_triton(index: int | None) -> str | None:
    if not _HAS_TRITON:
        return "triton is not installed"
    if triton_is_interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs Triton's kernels on the CPU, slowly)"
    if torch.version.hip:
        return "the kernels have not been tried on ROCm"
    return _why_too_old(torch.cuda.get_device_capability(index))


def _why_too_old(capability: tuple[int, int]) -> str | None:
    if capability >= _LEAST_CAPABILITY:
        return None
    major, minor = capability
    return f"the kernels need compute capability 8.0 or later, this device has {major}.{minor}"


def _why_no_cuda(index: int | None) -> str | None:
    if reason := _native.why_no_cuda():
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(index)
    if not _native.runs_on(capability) and _native.compiles_cuda_kernels():
        return _why_too_old(capability)
    if not _native.runs_on(capability):
        return (
            f"the extension was not built for this device, {capability[0]}.{capability[1]}: build "
            "it again with TORCH_CUDA_ARCH_LIST naming that (the kernels need 8.0 or later)"
        )
    if not _HAS_TRITON:
        return (
            "triton is not installed, and the extension's kernels do not do everything without it"
        )
    return None


_WHY_NOT_ON = {"triton": _why_no_triton, "cuda": _why_no_cuda}


def triton_is_interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def select(backend: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Choose the backend for tensors of ``dtype`` on ``device``.

    Args:
        backend: a name of :data:`NAMES` gives that backend or an error. None gives the best that
            works; the environment variable ``MOE_KERNELS_BACKEND`` overrides the order.
        device: the device of the op's tensors.
        dtype: the dtype of the computation; it matters for ``backend=None`` alone.

    Warns:
        RuntimeWarning: None is not the best that the device could have, once a process; the
            message says why, and what to do.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the named backend does not work here, or not on this device; the message
            says why.
    """
    backend = backend or env.backend()
    if backend is None:
        known = device.type == "cpu" or dtype in _ON_GPUS
        order = _ORDER.get(device.type, ("reference",)) if known else ("reference",)
        chosen = next(name for name in order if _why_not(name, device.index) is None)
        if chosen != order[0]:
            _warn_of_fallback(chosen, order[0], device.index)
        return chosen
    if backend not in NAMES:
        raise ValueError(f"unknown backend {backend!r}; the backends are {', '.join(NAMES)}")
    if reason := _why_not(backend, device.index):
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    if backend == "cpu" and device.type != "cpu":
        raise RuntimeError(f"backend 'cpu' needs tensors on the CPU, got {device}")
    anywhere = backend == "triton" and triton_is_interpreted()
    if backend in ("triton", "cuda") and device.type != "cuda" and not anywhere:
        raise RuntimeError(f"backend {backend!r} needs tensors on a CUDA device, got {device}")
    return backend


def _warn_of_fallback(chosen: str, best: str, index: int | None) -> None:
    """Warn once a process that ``backend=None`` is not the best for a device, unless asked for."""
    if (chosen, best) in _WARNED:
        return
    _WARNED.add((chosen, best))
    better = _ORDER[best][: _ORDER[best].index(chosen)]  # "cpu" and "cuda" are devices too
    reasons = [
        f"backend {name!r} is not available: {_why_not(name, index)}"
        for name in better
        if not _native.was_declined(*_NOTES.get(name, ()))
    ]
    if reasons:
        slow = ", plain torch, which is slow" if chosen == "reference" else ""
        warnings.warn(
            f"moe_kernels computes by the backend {chosen!r}{slow}; {'; '.join(reasons)}",
            RuntimeWarning,
            stacklevel=3,
        )


_warn_of_fallback._dynamo_marked_constant = True


@functools.cache
def implementation(op: str, backend: str) -> ModuleType:
    """Import the module of an op of ``moe_kernels.ops`` for a backend.

    It is imported when first needed, since importing Triton is slow.

    Raises:
        NotImplementedError: the backend does not have the op.
    """
    name = f"moe_kernels.ops.{op}.{_MODULES[backend]}"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.rpartition(".")[0]):  # an import of the backend's own
            raise
        raise NotImplementedError(f"backend {backend!r} does not have the op {op!r}") from error
