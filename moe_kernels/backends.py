"""The backends an op can run on, which of them work here, and how one is chosen.

An explicit choice never falls back: the op runs on that backend or raises with the reason.
"""

import functools
import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from moe_kernels import _native, env

NAMES = ("reference", "cpu", "triton", "cuda")

# What `backend=None` tries, best first, for tensors on a device type.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# What the backends of GPUs compute in; for others `backend=None` is the reference there.
_ON_GPUS = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)

_MODULES = {
    "reference": "reference",
    "cpu": "native_impl",
    "triton": "triton_impl",
    "cuda": "cuda_impl",
}

# Found once: a search of the path at every call would cost more than a small layer.
_HAS_TRITON = find_spec("triton") is not None


def available() -> dict[str, str | None]:
    """Every backend's name -> None where it works on this machine, else the reason why not."""
    return {name: _why_not(name) for name in NAMES}


def _why_not(name: str, index: int | None = None) -> str | None:
    """Of a name in :data:`NAMES`, on the CUDA device of this index; None: the current one."""
    if name == "cpu":
        return _native.why_not()
    if name == "triton":
        return _why_no_triton(index)
    return _why_no_cuda(index) if name == "cuda" else None


# A compiled program takes the answer as it was, and could not find it out itself. This is all
# that torch.compiler.assume_constant_result does, after it has imported the compiler: for seconds.
_why_not._dynamo_marked_constant = True


def _why_no_triton(index: int | None) -> str | None:
    if not _HAS_TRITON:
        return "triton is not installed"
    if triton_is_interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs Triton's kernels on the CPU, slowly)"
    if torch.version.hip:
        return "the kernels have not been tried on ROCm"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < _LEAST_CAPABILITY:
        return f"the kernels need compute capability 8.0 or later, this device has {major}.{minor}"
    return None


def _why_no_cuda(index: int | None) -> str | None:
    if reason := _native.why_no_cuda():
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(index)
    if not _native.runs_on(capability):
        return (
            f"the extension was not built for this device, {capability[0]}.{capability[1]}: build "
            "it again with TORCH_CUDA_ARCH_LIST naming that (the kernels need 8.0 or later)"
        )
    if not _HAS_TRITON:
        return "triton is not installed, whose kernels do what those of the extension do not"
    return None


def triton_is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def select(backend: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend to run on for tensors of ``dtype`` on ``device``.

    Args:
        backend: a name of :data:`NAMES`: that one or an error. None: the best that works, in an
            order that the environment variable ``MOE_KERNELS_BACKEND`` can override.
        device: where the op's tensors are.
        dtype: what is computed in; None's choice follows it, a name that is given does not.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend named does not work here, or not on this device; the reason is
            in the message.
    """
    backend = backend or env.backend()
    if backend is None:
        known = device.type == "cpu" or dtype in _ON_GPUS
        order = _ORDER.get(device.type, ("reference",)) if known else ("reference",)
        return next(name for name in order if _why_not(name, device.index) is None)
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


@functools.cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module of an op of ``moe_kernels.ops`` for a backend; imported when first asked for, as
    Triton takes its time.
    """
    return import_module(f"moe_kernels.ops.{op}.{_MODULES[backend]}")
