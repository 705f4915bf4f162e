"""Load the compiled extension ``moe_kernels._C``, or say why it is missing.

Importing this module never fails. The extension is loaded when it is first needed. Before that, the
note that the build left beside it is compared with the running torch, because a library built for
another torch can crash the process instead of raising.
"""

import functools
import json
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from moe_kernels import _nvrtc, env

_NOTE = Path(__file__).with_name("_build_info.json")
_REBUILD = "rebuild with `pip install --no-build-isolation --force-reinstall --no-deps .`"


def _series(version: str) -> str:
    """Return the part of a torch version that fixes its binary interface: major.minor."""
    return ".".join(version.split(".")[:2])


def _why_not_this_torch(built_for: str) -> str | None:
    if _series(built_for) == _series(torch.__version__):
        return None
    return f"built for torch {built_for}, this is torch {torch.__version__}: {_REBUILD}"


def _note() -> dict[str, str]:
    try:
        return json.loads(_NOTE.read_text())
    except (OSError, ValueError):
        return {}


def _why_not_built(reason: str | None) -> str:
    """Return why there is no extension; ``reason`` is what the build noted, or None."""
    if reason is None:
        return (
            "not built: install with a C++ compiler (on Debian, apt install g++) and without "
            "MOE_KERNELS_SKIP_CPP: `pip install --no-build-isolation .`"
        )
    return f"not built, because {reason}; mend that and {_REBUILD}"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """Return the extension, or the reason why there is none."""
    if find_spec("moe_kernels._C") is None:
        return None, _why_not_built(_note().get("not_built"))
    built_for = _note().get("torch_version")
    reason = _why_not_this_torch(built_for) if built_for else None
    if reason:
        return None, reason
    try:
        extension = import_module("moe_kernels._C")
    except ImportError as error:
        return (
            None,
            f"built, but does not load into torch {torch.__version__} ({error}): {_REBUILD}",
        )
    if env.brgemm() is not None:
        extension.prefer_brgemm(env.brgemm())
    if _compiles_kernels(extension):
        _nvrtc.expect_sources(getattr(extension, "CUDA_SOURCES", ""))  # an old build has none
        extension.set_cuda_compiler(_nvrtc.compile_kernel)
    reason = _why_not_this_torch(extension.build_info()["torch_version"])
    return (None, reason) if reason else (extension, None)


def _compiles_kernels(extension: ModuleType) -> bool:
    """Return whether this extension's CUDA kernels are compiled when they are first launched."""
    return hasattr(extension, "set_cuda_compiler")


def is_available() -> bool:
    """Return whether the native ops can be called."""
    return _load()[0] is not None


def why_not() -> str | None:
    """Return None where the native ops can be called, else the reason."""
    return _load()[1]


def was_declined(*notes: str) -> bool:
    """Return whether whoever built the package asked for less.

    notes: of what is missing, "not_built" for the extension or "no_cuda" for its CUDA kernels
    """
    note = _note()
    return any((note.get(name) or "").startswith("MOE_KERNELS_SKIP") for name in notes)


def has_cuda_kernel(op: str) -> bool:
    """Return whether the native op of this name can be called on CUDA tensors."""
    return is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"moe_kernels_native::{op}", "CUDA"
    )


def why_no_cuda() -> str | None:
    """Return None where the extension has CUDA kernels or can compile them, else the reason."""
    if reason := why_not():
        return f"the extension is missing: {reason}"
    if has_cuda_kernel("dispatch"):
        return _nvrtc.why_not() if compiles_cuda_kernels() else None
    reason = _note().get("no_cuda") or "the build left no note of why"
    return f"the extension was built without CUDA kernels ({reason})"


def compiles_cuda_kernels() -> bool:
    """Return whether CUDA kernels are compiled when they are first launched, not by the build."""
    return is_available() and _compiles_kernels(_load()[0])


def cuda_kernels() -> list[tuple[str, str]]:
    """Return (file, C++ name) of all CUDA kernels that are compiled when first launched."""
    return _load()[0].cuda_kernels() if compiles_cuda_kernels() else []


@functools.cache  # every call of an op asks
def has_engine() -> bool:
    """Return whether the extension has, or compiles, kernels for sm_90 with its own instructions.

    Built for 9.0 without the "a" they are empty.
    """
    return compiles_cuda_kernels() or "9.0a" in build_info().get("cuda_arch_list", "")


@functools.cache  # every call of an op asks
def runs_on(capability: tuple[int, int]) -> bool:
    """Return whether the CUDA kernels run on a device of this compute capability.

    They do if they were built for it, for an earlier one of the same major version, or as PTX for
    an earlier one. Kernels that are compiled at their first use are compiled for the device.
    """
    if compiles_cuda_kernels():
        return _nvrtc.runs_on(capability)
    arch_list = build_info().get("cuda_arch_list", "")
    for major, minor, own, ptx in re.findall(r"(\d+)\.(\d+)(a?)(\+PTX)?", arch_list):
        built = (int(major), int(minor))
        if built == capability or (
            not own and built < capability and (ptx or built[0] == capability[0])
        ):
            return True
    return False


def max_dispatch_keys() -> int:
    """Return the exclusive limit on pairs of an expert and a modality in the CUDA dispatch."""
    return _load()[0].MAX_DISPATCH_KEYS


def cuda_limit(name: str) -> int:
    """Return MAX_MAPS, ADAPTER_BLOCK and the like of the compiled CUDA kernels."""
    return getattr(_load()[0], name)


def grouped_gemm_block(num_rows: int, num_experts: int) -> int:
    """Return the rows of a tile of the CUDA grouped GEMMs."""
    return _load()[0].grouped_gemm_block_m(num_rows, num_experts)


def chunk_rows(num_rows: int, size: int) -> int:
    """Return the rows of a tile of a sum over rows, with ``size`` elements, of the CUDA kernels."""
    return _load()[0].chunk_rows(num_rows, size)


def gives_du(rank: int, width: int, num_rows: int) -> bool:
    """Return whether the CUDA kernels compute du (num_rows, rank) in the pass of dB."""
    return _load()[0].gives_du(rank, width, num_rows)


def folds_gradients(
    num_rows: int, num_base: int, modalities: int, inter: int, rank1: int, rank2: int
) -> bool:
    """Return whether the engine's dA' leaves what the gradients of adapters need of its tiles."""
    return _load()[0].folds_gradients(num_rows, num_base, modalities, inter, rank1, rank2)


def gives_u2(num_rows: int, num_base: int, inter: int, rank1: int, rank2: int) -> bool:
    """Return whether the CUDA kernels compute u2 (num_rows, rank2), in parts, with gate_up."""
    return _load()[0].gives_u2(num_rows, num_base, inter, rank1, rank2)


def decode_takes(tokens: int, top_k: int, hidden: int, inter: int, rank: int) -> bool:
    """Return whether the two CUDA kernels of decoding take a layer of these sizes."""
    return _load()[0].decode_takes(tokens, top_k, hidden, inter, rank)


def ops():
    """Return ``torch.ops.moe_kernels_native``, or raise RuntimeError with the reason."""
    extension, reason = _load()
    if extension is None:
        raise RuntimeError(f"the native ops of moe_kernels are not available: {reason}")
    extension.set_poison(env.poison())
    return torch.ops.moe_kernels_native


def build_info() -> dict:
    """Return facts about the extension's build and this CPU; empty without the extension."""
    extension = _load()[0]
    if extension is None:
        return {}
    return extension.build_info() | {"cpu_features": extension.cpu_features()}
