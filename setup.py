"""Decides which extensions to build; everything else is in pyproject.toml.

Environment:
    MOE_KERNELS_SKIP_CPP=1    no extension at all: a pure Python package
    MOE_KERNELS_SKIP_CUDA=1   the CPU extension only
    MOE_KERNELS_FORCE_CUDA=1  build the CUDA kernels, or fail
    TORCH_CUDA_ARCH_LIST      architectures for the CUDA kernels
    MAX_JOBS                  parallel compilations
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCH_LIST = "8.0;9.0a;10.0a+PTX"
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-Wall",
    "-Wextra",
    # Whether a product is fused into a sum must not depend on how a loop was unrolled.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]


def flag(name: str) -> bool:
    """Return a boolean environment variable; an unclear value is an error."""
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "0", "false"):
        return False
    if value in ("1", "true"):
        return True
    raise SystemExit(f"{name} must be 0, 1, true or false, is {value!r}")


def say(message: str) -> None:
    print(f"modality-moe-kernels: {message}", file=sys.stderr, flush=True)


def needs_extensions(argv: list[str]) -> bool:
    """Metadata and sdist need neither torch nor a compiler."""
    light = {"sdist", "egg_info", "dist_info", "clean", "--version", "--name", "--help"}
    return not light.intersection(argv)


def compiler_command() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def compiles(source: str, flags: list[str]) -> bool:
    """Return whether the C++ compiler builds a shared library from this source."""
    command = compiler_command()
    if not command or shutil.which(command[0]) is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.cpp"
        path.write_text(source)
        arguments = [*command, "-shared", "-fPIC", *flags, str(path), "-o", f"{folder}/probe.so"]
        return subprocess.run(arguments, capture_output=True).returncode == 0


def why_no_build() -> str | None:
    """Say what is missing for any extension; None where nothing is."""
    if not compiles("#include <vector>\nint probe() { return 0; }\n", ["-std=c++20"]):
        command = " ".join(compiler_command()) or "CXX is empty"
        return f"no working C++20 compiler ({command}; apt install g++ on Debian, or set CXX)"
    paths = sysconfig.get_paths()
    headers = sorted({paths["include"], paths["platinclude"]})
    flags = ["-std=c++20", *(f"-I{path}" for path in headers)]
    if not compiles("#include <Python.h>\nint probe() { return 0; }\n", flags):
        return (
            f"Python.h was not found in {', '.join(headers)} (on Debian: apt install python3-dev)"
        )
    return None


def openmp_flags() -> list[str]:
    source = "#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n"
    return ["-fopenmp"] if compiles(source, ["-fopenmp"]) else []


def cuda_sources() -> list[str]:
    folder = ROOT / "csrc" / "cuda"
    paths = [*folder.glob("*.cu"), *folder.glob("*.cpp")]
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def why_no_cuda(cuda_home: str | None, torch_cuda: str | None, sources: list[str]) -> str | None:
    """Say what is missing for the CUDA kernels; None where nothing is."""
    if flag("MOE_KERNELS_SKIP_CUDA"):
        return "MOE_KERNELS_SKIP_CUDA is set"
    if not sources:
        return "this source tree has no CUDA kernels (csrc/cuda/*.cu)"
    if torch_cuda is None:
        return "the installed torch is built without CUDA"
    if cuda_home is None or not (Path(cuda_home) / "bin" / "nvcc").exists():
        return "nvcc was not found: install the CUDA toolkit or set CUDA_HOME"
    return None


def extension(cuda: bool):
    """Describe moe_kernels._C, with the CUDA kernels or without."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, include_paths

    openmp = openmp_flags()
    if not openmp:
        say("the compiler has no OpenMP: the CPU kernels will run on one thread")
    # Given as system folders too, torch's headers raise none of our warnings.
    headers = [f"-isystem{path}" for path in include_paths()]
    flags = CXX_FLAGS + openmp
    sources = ["csrc/registration.cpp"]
    sources += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp"))
    macros = [("MOE_KERNELS_CXX_FLAGS", f'"{" ".join(flags)}"')]
    options = {"name": "moe_kernels._C", "extra_link_args": openmp}
    if not cuda:
        return CppExtension(
            sources=sources,
            define_macros=macros,
            extra_compile_args={"cxx": flags + headers},
            **options,
        )
    arch_list = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCH_LIST)
    macros += [
        ("MOE_KERNELS_WITH_CUDA", None),
        ("MOE_KERNELS_CUDA_ARCH_LIST", f'"{arch_list}"'),
    ]
    compile_args = {
        "cxx": flags + headers,
        "nvcc": ["-O3", "-std=c++20", "--expt-relaxed-constexpr"],
    }
    return CUDAExtension(
        sources=sources + cuda_sources(),
        define_macros=macros,
        extra_compile_args=compile_args,
        **options,
    )


def build_command():
    """Return torch's build_ext, which also leaves a note of what was built beside the module."""
    from torch import __version__ as torch_version
    from torch.utils.cpp_extension import BuildExtension

    class BuildExtensionAndNote(BuildExtension):
        def run(self) -> None:
            super().run()
            # Read before the module is loaded: loading it into another torch can crash.
            target = Path(self.get_ext_fullpath("moe_kernels._C")).parent / "_build_info.json"
            target.write_text(json.dumps({"torch_version": torch_version}) + "\n")

    return BuildExtensionAndNote.with_options(use_ninja=shutil.which("ninja") is not None)


def decide() -> dict:
    """Return setup()'s arguments for the extensions."""
    force_cuda = flag("MOE_KERNELS_FORCE_CUDA")
    if force_cuda and (flag("MOE_KERNELS_SKIP_CPP") or flag("MOE_KERNELS_SKIP_CUDA")):
        raise SystemExit("MOE_KERNELS_FORCE_CUDA contradicts MOE_KERNELS_SKIP_CPP and SKIP_CUDA")
    if not needs_extensions(sys.argv[1:]):
        return {}
    if flag("MOE_KERNELS_SKIP_CPP"):
        say("MOE_KERNELS_SKIP_CPP is set: installing as pure Python")
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError as error:
        raise SystemExit(
            "modality-moe-kernels is compiled against the installed torch, and there is none here: "
            "run `pip install torch`, then `pip install --no-build-isolation modality-moe-kernels` "
            f"(or set MOE_KERNELS_SKIP_CPP=1 for a pure Python package). The import said: {error}"
        ) from None
    missing = why_no_cuda(CUDA_HOME, torch.version.cuda, cuda_sources())
    if force_cuda and missing:
        raise SystemExit(f"MOE_KERNELS_FORCE_CUDA is set, but {missing}")
    if not force_cuda and missing is None:
        missing = "no backend uses them yet; MOE_KERNELS_FORCE_CUDA=1 builds them"
    no_build = why_no_build()
    if no_build:
        if force_cuda:
            raise SystemExit(f"MOE_KERNELS_FORCE_CUDA is set, but {no_build}")
        say(f"{no_build}: installing as pure Python; the 'cpu' backend will be missing")
        return {}
    say("building the CPU kernels" + (f"; no CUDA kernels: {missing}" if missing else " and CUDA"))
    return {
        "ext_modules": [extension(cuda=missing is None)],
        "cmdclass": {"build_ext": build_command()},
    }


if __name__ == "__main__":
    setup(**decide())
