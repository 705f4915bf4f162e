"""Stand-ins for the CUDA driver, NVRTC and a torch with CUDA, to launch kernels that do not run."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch
from support.host_kernels import COMPILER
from torch import Tensor

from moe_kernels import _native, _nvrtc

STUBS = Path(__file__).with_name("stubs")
NUMBERS = ("x", "y", "z", "threads", "shared", "stream", "first", "device", "early",
           "cluster")  # fmt: skip


def missing() -> str | None:
    """Return a reason why the launches cannot be played here, or None."""
    if shutil.which(COMPILER[0]) is None:
        return "needs a C++ compiler: install one"
    if torch.version.cuda is not None:
        return "imitates CUDA: run with a torch that is built without it"
    if not _native.compiles_cuda_kernels():
        return "needs an extension that was built without nvcc: build it on a machine without one"
    return None


def build(folder: Path) -> Path:
    """Build the stand-ins into a folder, for LD_LIBRARY_PATH."""
    from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

    own = f"-isystem{_nvrtc._SOURCES / 'no_toolkit'}"
    headers = [own, *(f"-isystem{path}" for path in include_paths())]
    for source, name in {
        "cuda_driver.cpp": "libcuda.so.1", "nvrtc.cpp": "libnvrtc.so.13",
        "torch_device.cpp": "libtorch_device.so",
    }.items():  # fmt: skip
        flags = ["-std=c++20", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", *headers]
        libraries = []
        if source == "torch_device.cpp":
            libraries = [f"-L{TORCH_LIB_PATH}", "-lc10", str(folder / "libcuda.so.1")]
        paths = [str(STUBS / source), *libraries, "-o", str(folder / name)]
        subprocess.run([*COMPILER, *flags, *paths], check=True)
    return folder


class Driver:
    """The record of the driver's stand-in in this process."""

    def __init__(self):
        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.symbol_of.restype = ctypes.c_char_p
        self.library.number_of.restype = ctypes.c_uint64
        # It uses functions of the extension, which Python has loaded for itself alone.
        from moe_kernels import _C

        ctypes.CDLL(_C.__file__, mode=ctypes.RTLD_GLOBAL)
        self.torch_device = ctypes.CDLL("libtorch_device.so")

    def take_launches(self) -> list[dict]:
        """Return the launches so far, oldest first, and forget them."""
        launches = [
            {"symbol": self.library.symbol_of(i).decode()}
            | {name: self.library.number_of(i, which) for which, name in enumerate(NUMBERS)}
            for i in range(self.library.launches_so_far())
        ]
        self.library.forget_launches()
        return launches


def call(op: str, *arguments) -> Tensor | tuple[Tensor, ...]:
    """Call the CUDA kernel of a native op on tensors of the CPU."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(_native.ops(), op).default.redispatch(keys, *arguments)
