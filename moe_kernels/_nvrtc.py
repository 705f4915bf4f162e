"""Compile the extension's CUDA kernels at their first use, with NVRTC, where the build had no nvcc.

NVRTC is a library that every CUDA build of torch brings. What it makes is kept on disk, so that a
kernel is compiled once for each version of the package, of NVRTC and each kind of GPU.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from moe_kernels import _cuda_sources, env, files
from moe_kernels._version import __version__

try:
    import fcntl
except ImportError:  # Windows, where the extension is not built this way
    fcntl = None

_DRIVER = "libcuda.so.1"
_HERE = Path(__file__).resolve().parent
# In an installed package, or beside it in the repository.
_INSIDE, _BESIDE = _HERE / "csrc/cuda", _HERE.parent / "csrc/cuda"
_SOURCES = _BESIDE if _BESIDE.is_dir() and not _INSIDE.is_dir() else _INSIDE
# What NVRTC is told beside the target: options, and the folders of headers below the sources.
_FLAGS = ("--std=c++20", "--device-as-default-execution-space")
_HEADERS = (".", "no_toolkit", "no_toolkit/std")
_LEAST_ARCH = 80
# From this one on, instructions that only this very architecture has need an "a" in its name.
_FIRST_OWN_ARCH = 90
# What the extension was built from, as _cuda_sources.manifest gives it; None: no extension asked.
_built_from: str | None = None


class _Failed(RuntimeError):
    """A kernel could not be compiled; the message says why and what to do."""


@functools.cache  # every call of an op asks
def why_not() -> str | None:
    """Return None where kernels can be compiled and launched, else the reason."""
    if torch.version.cuda is None:
        return "the installed torch is built without CUDA"
    try:
        ctypes.CDLL(_DRIVER)
        _library()
    except OSError as error:
        return f"the CUDA driver does not load ({error}): install the NVIDIA driver"
    except _Failed as error:
        return str(error)
    return why_other_sources()


def expect_sources(built_from: str) -> None:
    """Compile only sources that an extension was built from, by their manifest.

    Its launches know the parameters that the kernels had then; others would be passed wrongly.
    """
    global _built_from
    _built_from = built_from


def runs_on(capability: tuple[int, int]) -> bool:
    """Return whether kernels can be compiled for a device of this compute capability."""
    return 10 * capability[0] + capability[1] >= _LEAST_ARCH


def version() -> str:
    """Return NVRTC's version, such as "13.0"; raises RuntimeError without NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_kernel(file: str, name: str, major: int, minor: int) -> tuple[bytes, str, str]:
    """Compile a kernel, or take it from the disk, for the extension.

    Args:
        file: name of its .cu file.
        name: a C++ expression for the kernel.
        major: compute capability of the device.
        minor: its second number.

    Returns:
        An image for the driver, the kernel's symbol in it, and an error in words; one of image and
        error is empty. An exception could not pass through the extension.
    """
    try:
        return *_compiled(file, name, 10 * major + minor), ""
    except (_Failed, OSError) as error:
        return b"", "", f"the CUDA kernel {name} cannot be compiled: {error}"


def _compiled(file: str, name: str, arch: int) -> tuple[bytes, str]:
    if reason := why_other_sources():
        raise _Failed(reason)
    target = _target(arch, _supported())
    path = _entry(file, name, target)
    if found := _read(path):
        return found
    with _only_one(path.parent):
        if found := _read(path):  # another process, or thread, has just compiled it
            return found
        image, symbol = _compile(file, name, target)
        _keep(path, image, symbol)
    return image, symbol


def _target(arch: int, supported: Sequence[int]) -> str:
    """Return the target to compile for: this GPU's, or the best that runs on it.

    Code for an earlier architecture of the same major version runs; of another one, only PTX does.
    """
    if arch in supported:
        return f"sm_{arch}{'a' if arch >= _FIRST_OWN_ARCH else ''}"
    earlier = [known for known in supported if _LEAST_ARCH <= known < arch]
    if not earlier:
        raise _Failed(f"NVRTC {version()} knows no GPU like sm_{arch}, only {list(supported)}")
    best = max(earlier)
    return f"{'sm' if best // 10 == arch // 10 else 'compute'}_{best}"


def _entry(file: str, name: str, target: str) -> Path:
    """Return the path of a kernel on disk: a new one for other sources, options and versions.

    The driver has no part in it: it loads the same image in every version.
    """
    sources = _cuda_sources.manifest(_SOURCES)
    parts = [__version__, sources, file, name, target, _FLAGS, _HEADERS, version()]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return env.cache_path() / "kernels" / f"{key}.bin"


def why_other_sources() -> str | None:
    """Return None where the sources are those of the extension's build, else the reason."""
    changed = [] if _built_from is None else _cuda_sources.changed(_SOURCES, _built_from)
    if not changed:
        return None
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return (
        f"{', '.join(changed[:3])}{more} in {_SOURCES} changed after the extension was built, "
        "whose launches may pass other parameters than these kernels take: rebuild with "
        "`pip install --no-build-isolation --force-reinstall --no-deps .`, or with `-e .` in "
        "the place of `.` if it was installed so"
    )


def _read(path: Path) -> tuple[bytes, str] | None:
    """Return an image and its symbol; None where the file is missing or damaged."""
    try:
        head, image = path.read_bytes().split(b"\n", 1)
        note = json.loads(head)
        if note["sha256"] == hashlib.sha256(image).hexdigest():
            return image, note["symbol"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _keep(path: Path, image: bytes, symbol: str) -> None:
    note = {"symbol": symbol, "sha256": hashlib.sha256(image).hexdigest()}
    try:
        with files.replacing(path) as new:
            new.write_bytes(json.dumps(note).encode() + b"\n" + image)
    except OSError as error:
        warnings.warn(
            f"moe_kernels cannot keep compiled kernels in {path.parent} ({error}), so every "
            "process compiles them: set MOE_KERNELS_CACHE to a folder that can be written",
            RuntimeWarning,
            stacklevel=2,
        )


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Wait until no other thread or process compiles; where files cannot be locked, do not wait."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / "lock", "a"))
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(file: str, name: str, target: str) -> tuple[bytes, str]:
    """Compile a kernel, and say on standard error that this happens and how long it took."""
    short = name.replace("moe_kernels::cuda::", "")
    print(
        f"moe_kernels: compiling {short} for {target}, at its first use ...",
        end="", file=sys.stderr, flush=True,
    )  # fmt: skip
    begin = time.perf_counter()
    try:
        made = _run_nvrtc(f'#include "{file}"\n', name, target)
    except _Failed:
        print(" failed", file=sys.stderr, flush=True)
        raise
    print(f" {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    return made


def _run_nvrtc(source: str, name: str, target: str) -> tuple[bytes, str]:
    library, program = _library(), ctypes.c_void_p()
    folders = [f"--include-path={_SOURCES / folder}" for folder in _HEADERS]
    options = [f"--gpu-architecture={target}", *_FLAGS, *folders]
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None
        )
    )
    try:
        _check(library.nvrtcAddNameExpression(program, name.encode()))
        values = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        if error := library.nvrtcCompileProgram(program, len(options), values):
            log = _output(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            _check(error, log)
        symbol = ctypes.c_char_p()
        _check(library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(symbol)))
        return _output(program, "CUBIN" if target[:3] == "sm_" else "PTX"), symbol.value.decode()
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _output(program: ctypes.c_void_p, what: str) -> bytes:
    library, size = _library(), ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(error: int, log: str = "") -> None:
    if error:
        text = _library().nvrtcGetErrorString(error).decode()
        raise _Failed(f"NVRTC {version()} says {text}" + (f":\n{log}" if log else ""))


def _supported() -> list[int]:
    """Return the architectures that NVRTC knows, such as 90."""
    number = ctypes.c_int()
    _check(_library().nvrtcGetNumSupportedArchs(ctypes.byref(number)))
    archs = (ctypes.c_int * number.value)()
    _check(_library().nvrtcGetSupportedArchs(archs))
    return sorted(archs)


@functools.cache
def _library() -> ctypes.CDLL:
    """Load NVRTC of the CUDA version that torch is built for, or raise with the reason."""
    major = (torch.version.cuda or "").split(".")[0]
    name = f"libnvrtc.so.{major or '*'}"  # any, to check kernels beside a torch without CUDA
    found = [path for folder in _folders() for path in sorted(folder.glob(name))]
    for path in (*found, name) if major else found:
        with contextlib.suppress(OSError):
            _load_builtins(path)
            library = ctypes.CDLL(str(path))
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            return library
    package = f"nvidia-cuda-nvrtc{'-cu12' if major == '12' else ''}"
    raise _Failed(
        f"NVRTC, which compiles the kernels at their first use, was not found ({name}): "
        f"pip install {package}, or build the extension with nvcc"
    )


def _folders() -> list[Path]:
    """Return where NVRTC may lie: in NVIDIA's packages, beside torch, or in conda's folder."""
    spec = find_spec("nvidia")
    packages = [Path(path) for path in (spec.submodule_search_locations if spec else ())]
    inside = [folder for package in packages for folder in sorted(package.glob("*/lib"))]
    return [*inside, Path(torch.__file__).parent / "lib", Path(sys.prefix) / "lib"]


def _load_builtins(nvrtc: Path | str) -> None:
    """Load a second library that NVRTC opens by its name alone, though it lies beside NVRTC."""
    if isinstance(nvrtc, Path):
        for path in sorted(nvrtc.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
