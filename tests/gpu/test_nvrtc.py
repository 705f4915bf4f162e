"""Kernels that are compiled at first use: what they need, what they say, and NVRTC itself."""

import ctypes

import pytest
import torch
from support import stub_cuda
from support.processes import run_pytest

from moe_kernels import _native, _nvrtc, env


def no_nvrtc() -> str | None:
    try:
        _nvrtc.version()
    except RuntimeError as error:
        return f"needs NVRTC (100 MB): {error}"
    return None


@pytest.mark.skipif(stub_cuda.missing() is not None, reason=str(stub_cuda.missing()))
def test_launches_without_a_gpu(tmp_path):
    """Run launchers, cache and compiler's interface unchanged; nothing below them is real."""
    suite = str(stub_cuda.STUBS.parents[1] / "gpu" / "nvrtc_suite.py")
    run_pytest(suite, LD_LIBRARY_PATH=str(stub_cuda.build(tmp_path)))


def test_it_says_what_is_missing(monkeypatch):
    def load(name, **options):
        raise OSError(f"{name}: cannot open shared object file")

    why_not = _nvrtc.why_not.__wrapped__  # without its cache
    monkeypatch.setattr(torch.version, "cuda", None)
    assert why_not() == "the installed torch is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    _nvrtc._library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert "CUDA driver does not load (libcuda.so.1: cannot open" in why_not()
    monkeypatch.setattr(_nvrtc, "_DRIVER", None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name, **options: name and load(name))
    missing = r"was not found (libnvrtc.so.12): pip install nvidia-cuda-nvrtc-cu12, or build"
    assert missing in why_not()
    _nvrtc._library.cache_clear()


def test_where_kernels_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("MOE_KERNELS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert env.cache_path() == tmp_path / ".cache" / "moe_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert env.cache_path() == tmp_path / "xdg" / "moe_kernels"
    monkeypatch.setenv("MOE_KERNELS_CACHE", str(tmp_path / "own"))
    assert env.cache_path() == tmp_path / "own"


@pytest.mark.slow  # seconds each; `make check-gpu-code` compiles all of them
@pytest.mark.skipif(no_nvrtc() is not None, reason=str(no_nvrtc()))
@pytest.mark.skipif(
    not _native.compiles_cuda_kernels(), reason="needs an extension that was built without nvcc"
)
def test_nvrtc_compiles_a_kernel_of_each_file():
    """No header of CUDA or C++ is there, and the symbol is the kernel that was asked for."""
    kernels = dict(_native.cuda_kernels())
    sources = {path.name for path in _nvrtc._SOURCES.glob("*.cu")}
    assert {*sources, "engine.h"} == {*kernels}
    for file, name in kernels.items():
        cubin, symbol = _nvrtc._run_nvrtc(f'#include "{file}"\n', name, "sm_80")
        assert cubin.startswith(b"\x7fELF") and symbol.encode() in cubin
        assert name.partition("<")[0].rpartition("::")[2] in symbol
