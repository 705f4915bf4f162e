"""Decide which extensions to build; all other metadata is in pyproject.toml.

Environment variables:
    MOE_KERNELS_SKIP_CPP=1    build no extension: a pure Python package
    MOE_KERNELS_SKIP_CUDA=1   build the CPU kernels only
    MOE_KERNELS_FORCE_CUDA=1  build the CUDA kernels with nvcc, or fail
    TORCH_CUDA_ARCH_LIST      architectures of the CUDA kernels
    CUDA_HOME                 the CUDA toolkit; default: that of the nvcc on the path
    PYTORCH_NVCC              command for nvcc when ninja builds, such as "ccache nvcc"
    CC                        host compiler of nvcc; default: the one that nvcc finds
    MAX_JOBS                  number of parallel compilations
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LEAST_SETUPTOOLS = 77  # the first that reads `license = "Apache-2.0"` in pyproject.toml
SKIPPED = "MOE_KERNELS_SKIP_CPP is set"
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-Wall",
    "-Wextra",
    # Never fuse a product into a sum: the compiler would do so depending on how it unrolls a loop.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]


def flag(name: str) -> bool:
    """Return a boolean environment variable; any value but 0, 1, true and false is an error."""
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "0", "false"):
        return False
    if value in ("1", "true"):
        return True
    raise SystemExit(f"{name} must be 0, 1, true or false; got {value!r}")


def say(message: str) -> None:
    print(f"modality-moe-kernels: {message}", file=sys.stderr, flush=True)


def check_setuptools() -> None:
    """End with one sentence where setuptools would refuse pyproject.toml with a page.

    pip brings a setuptools that is new enough, but not with --no-build-isolation.
    """
    found = setuptools.__version__
    if int(found.split(".")[0]) < LEAST_SETUPTOOLS:
        raise SystemExit(
            f"modality-moe-kernels needs setuptools {LEAST_SETUPTOOLS} or later to be built, this "
            f'is {found}: run `pip install "setuptools>={LEAST_SETUPTOOLS}"`, then the same '
            "command again"
        )


def needs_extensions(argv: list[str]) -> bool:
    """Return False for commands that need neither torch nor a compiler: metadata and sdist."""
    light = {"sdist", "egg_info", "dist_info", "clean", "--version", "--name", "--help"}
    return not light.intersection(argv)


def compiler_command() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def compiles(source: str, flags: list[str]) -> bool:
    """Return True if the C++ compiler builds a shared library from this source."""
    command = compiler_command()
    if not command or shutil.which(command[0]) is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.cpp"
        path.write_text(source)
        arguments = [*command, "-shared", "-fPIC", *flags, str(path), "-o", f"{folder}/probe.so"]
        return subprocess.run(arguments, capture_output=True).returncode == 0


def why_no_build() -> str | None:
    """Return the reason why no extension can be built, or None."""
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


def without_paths() -> list[str]:
    """Return the flags that keep the folders of this machine out of assertions' file names."""
    import torch

    folders = {ROOT: "modality-moe-kernels", Path(torch.__file__).parent: "torch"}
    flags = [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]
    return flags if compiles("int probe() { return 0; }\n", flags) else []


def sources_in(folder: str, *patterns: str) -> list[str]:
    paths = [path for pattern in patterns for path in (ROOT / folder).glob(pattern)]
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def output_of(*command: str | Path) -> str:
    """Return what a program prints, or "" if it cannot be run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout + result.stderr


def cuda_home() -> Path | None:
    """Return the folder of the CUDA toolkit, or None.

    An nvcc on the path may be a link or a script outside the toolkit, so ask it for the folder.
    """
    requested = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if requested:
        return Path(requested)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        default = Path("/usr/local/cuda")
        return default if default.is_dir() else None
    top = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "-c", "none.cu"), re.MULTILINE)
    return (Path(top[1]) if top else Path(nvcc).parents[1]).resolve()


def nvcc_version(home: Path) -> tuple[int, int] | None:
    """Return the toolkit's version, such as (13, 0), or None if nvcc does not report one."""
    found = re.search(r"release (\d+)\.(\d+)", output_of(home / "bin" / "nvcc", "--version"))
    return (int(found[1]), int(found[2])) if found else None


def uses_ninja() -> bool:
    return shutil.which("ninja") is not None


def nvcc_command(home: Path) -> list[str]:
    """Return the nvcc command that torch.utils.cpp_extension will use.

    It passes CC on if the variable is set, even to an empty value.
    """
    requested = os.environ.get("PYTORCH_NVCC") if uses_ninja() else None
    ccbin = os.environ.get("CC")
    command = [str(home / "bin" / "nvcc")] if requested is None else shlex.split(requested)
    return command + ([] if ccbin is None else ["-ccbin", ccbin])


def why_nvcc_refuses(home: Path) -> str | None:
    """Compile a small file with nvcc and its host compiler; return the first error, or None.

    The command is the one that the build will use.
    """
    command, ccbin = nvcc_command(home), os.environ.get("CC")
    if not command or shutil.which(command[0]) is None:
        return f"PYTORCH_NVCC is {' '.join(command)!r}, which cannot be run: set it to a command"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.cu"
        path.write_text("#include <vector>\n__global__ void probe() {}\n")
        command += ["-std=c++20", "-c", str(path), "-o", f"{folder}/probe.o"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    lines = (result.stderr + result.stdout).splitlines()
    errors = [line for line in lines if re.search("error|fatal", line)] or lines or ["no message"]
    compiler = "the C++ compiler that it finds" if ccbin is None else ccbin or "CC, which is empty"
    return (
        f"nvcc of {home} does not compile with {compiler} (set CC to a compiler that it supports): "
        f"{errors[0].strip()}"
    )


def why_no_cuda(home: Path | None, torch_cuda: str | None) -> str | None:
    """Return the reason why the CUDA kernels cannot be built, or None."""
    if flag("MOE_KERNELS_SKIP_CUDA"):
        return "MOE_KERNELS_SKIP_CUDA is set"
    if torch_cuda is None:
        return "the installed torch is built without CUDA"
    if home is None or not (home / "bin" / "nvcc").exists():
        return "nvcc was not found: install the CUDA toolkit or set CUDA_HOME"
    if not (home / "include" / "cuda_runtime.h").exists():
        return f"{home} has nvcc but no headers: set CUDA_HOME to the CUDA toolkit"
    version = nvcc_version(home)
    if version is None:
        return f"{home}/bin/nvcc does not run or does not report its version"
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if requested and not usable_arch_list(requested)[0]:
        return f"TORCH_CUDA_ARCH_LIST is {requested}, but the kernels need 8.0 or later"
    if str(version[0]) != torch_cuda.split(".")[0]:
        return (
            f"the CUDA toolkit at {home} has version {version[0]}.{version[1]}, but the installed "
            f"torch is built for CUDA {torch_cuda}: their major versions must agree (install a "
            "toolkit for this torch and set CUDA_HOME, or a torch for this toolkit)"
        )
    return why_nvcc_refuses(home)


def default_arch_list(version: tuple[int, int]) -> str:
    """Return the default architectures for this nvcc: Ampere, Hopper, and PTX for later ones.

    Code and PTX for an architecture with an "a" run on that architecture only, so the PTX must be
    for one without "a".
    """
    return "8.0;9.0a;10.0+PTX" if version >= (12, 8) else "8.0+PTX;9.0a"


def why_no_launches() -> str | None:
    """Return why the launches of kernels that NVRTC compiles at first use cannot be built, or None.

    They need no part of CUDA, not even a torch that is built for it.
    """
    from torch import __version__ as torch_version
    from torch.utils.cpp_extension import include_paths

    if flag("MOE_KERNELS_SKIP_CUDA"):
        return "MOE_KERNELS_SKIP_CUDA is set"
    if sys.platform != "linux":
        return "kernels without nvcc are for Linux"
    headers = [Path(path) / "c10/core/impl/DeviceGuardImplInterface.h" for path in include_paths()]
    if not any("getStreamNativeHandle" in path.read_text() for path in headers if path.exists()):
        return f"torch {torch_version} does not give the handle of a stream, later ones do"
    return None


def manifest_of_cuda() -> str:
    """Return the digests of what NVRTC reads, by the package's own file."""
    path = Path(__file__).resolve().parent / "moe_kernels" / "_cuda_sources.py"
    spec = importlib.util.spec_from_file_location("moe_kernels_cuda_sources", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.manifest(ROOT / "csrc" / "cuda")


def launches() -> list[str]:
    """Write the C++ files of a build without nvcc, and return their paths.

    There is one for each .cu file, of which a C++ compiler builds the launches, and one that keeps
    the digests of the sources. It also makes setuptools link anew after a change of any of them.
    """
    folder = ROOT / "build" / "launches"
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        Path(source).stem: f'#include "../../{source}"\n'
        for source in sources_in("csrc/cuda", "*.cu")
    }
    lines = "".join(f'    "{line}\\n"\n' for line in manifest_of_cuda().splitlines())
    texts["sources"] = (
        '#include "../../csrc/cuda/no_toolkit/by_name.h"\n\n'
        f"const char* moe_kernels::cuda::sources() {{\n  return\n{lines}    ;\n}}\n"
    )
    for name, text in texts.items():
        path = folder / f"{name}.cpp"
        if not path.exists() or path.read_text() != text:  # else ninja would build it again
            path.write_text(text)
    return [str((folder / f"{name}.cpp").relative_to(ROOT)) for name in texts]


def usable_arch_list(requested: str) -> tuple[str, list[str]]:
    """Split a TORCH_CUDA_ARCH_LIST into the usable architectures and those before 8.0.

    Containers often set a list that includes old ones.
    """
    entries = [entry for entry in re.split(r"[;, ]+", requested) if entry]
    old = [entry for entry in entries if re.match(r"\d", entry) and int(entry.split(".")[0]) < 8]
    return ";".join(entry for entry in entries if entry not in old), old


def extension(cuda: Path | None, by_name: bool):
    """Return the extension moe_kernels._C.

    With a toolkit it has CUDA kernels. Else, ``by_name``, it has the launches of kernels that NVRTC
    compiles.
    """
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, include_paths

    openmp = openmp_flags()
    if not openmp:
        say("the compiler has no OpenMP: the CPU kernels will run on one thread")
    # As system folders: our warning flags must not apply to torch's headers.
    headers = [f"-isystem{path}" for path in include_paths()] + without_paths()
    flags = CXX_FLAGS + openmp
    sources = sources_in("csrc", "*.cpp") + sources_in("csrc/cpu", "*.cpp")
    macros = [("MOE_KERNELS_CXX_FLAGS", f'"{" ".join(flags)}"')]
    options = {"name": "moe_kernels._C", "extra_link_args": openmp}
    if cuda is None:
        if by_name:
            own = "csrc/cuda/no_toolkit"
            sources += sources_in("csrc/cuda", "*.cpp") + sources_in(own, "*.cpp") + launches()
            macros += [("MOE_KERNELS_WITH_CUDA", None), ("MOE_KERNELS_BY_NAME", None)]
            # Kernels are read, not compiled, so their pragmas and casts do not matter.
            flags = [*flags, "-Wno-unknown-pragmas", "-Wno-strict-aliasing", f"-I{ROOT / own}"]
        return CppExtension(
            sources=sources,
            define_macros=macros,
            extra_compile_args={"cxx": flags + headers},
            **options,
        )
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_arch_list(nvcc_version(cuda))
    arch_list, old = usable_arch_list(requested)
    if old:
        say(
            f"TORCH_CUDA_ARCH_LIST: leaving out {', '.join(old)}, since the CUDA kernels need 8.0 "
            "or later"
        )
    os.environ["TORCH_CUDA_ARCH_LIST"] = arch_list
    macros += [
        ("MOE_KERNELS_WITH_CUDA", None),
        ("MOE_KERNELS_CUDA_ARCH_LIST", f'"{arch_list}"'),
    ]
    compile_args = {
        "cxx": flags + headers,
        "nvcc": ["-O3", "-std=c++20"],
    }
    return CUDAExtension(
        sources=sources + sources_in("csrc/cuda", "*.cu", "*.cpp"),
        define_macros=macros,
        extra_compile_args=compile_args,
        **options,
    )


def pure_python(reason: str) -> dict:
    """Return the arguments of setup() for a package that says at run time why nothing is built.

    pip does not show what a build prints.
    """
    say(f"{reason}: installing as pure Python; the 'cpu' backend will be missing")

    class BuildPythonAndNote(build_py):
        def run(self) -> None:
            super().run()
            folder = ROOT if self.editable_mode else Path(self.build_lib)
            note = {"not_built": reason}
            (folder / "moe_kernels" / "_build_info.json").write_text(json.dumps(note) + "\n")

    return {"cmdclass": {"build_py": BuildPythonAndNote}}


def copy_sources():
    """Return the command build_py, extended to copy what NVRTC compiles into the package."""

    class BuildPythonAndSources(build_py):
        def run(self) -> None:
            super().run()
            if not self.editable_mode:  # else they are read where they are
                folder = Path(self.build_lib) / "moe_kernels" / "csrc" / "cuda"
                shutil.copytree(ROOT / "csrc" / "cuda", folder, dirs_exist_ok=True)

    return BuildPythonAndSources


def build_command(no_cuda: str | None):
    """Return torch's build_ext, extended to write _build_info.json beside the module."""
    from torch import __version__ as torch_version
    from torch.utils.cpp_extension import BuildExtension

    class BuildExtensionAndNote(BuildExtension):
        def run(self) -> None:
            super().run()
            # moe_kernels reads this file first: loading the module into another torch can crash.
            target = Path(self.get_ext_fullpath("moe_kernels._C")).parent / "_build_info.json"
            note = {"torch_version": torch_version, "no_cuda": no_cuda}
            target.write_text(json.dumps(note) + "\n")

    return BuildExtensionAndNote.with_options(use_ninja=uses_ninja())


def decide() -> dict:
    """Return the arguments of setup() for the extensions."""
    force_cuda = flag("MOE_KERNELS_FORCE_CUDA")
    if force_cuda and (flag("MOE_KERNELS_SKIP_CPP") or flag("MOE_KERNELS_SKIP_CUDA")):
        raise SystemExit("MOE_KERNELS_FORCE_CUDA contradicts MOE_KERNELS_SKIP_CPP and SKIP_CUDA")
    if not needs_extensions(sys.argv[1:]):
        return {}
    if flag("MOE_KERNELS_SKIP_CPP"):
        return pure_python(SKIPPED)
    home = cuda_home()
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)  # torch.utils.cpp_extension reads it when imported
    try:
        import torch
        import torch.utils.cpp_extension
    except ImportError as error:
        raise SystemExit(
            "modality-moe-kernels is compiled against the installed torch, but torch cannot be "
            f"imported ({error}): run `pip install torch`, then `pip install --no-build-isolation "
            ".`, or set MOE_KERNELS_SKIP_CPP=1 for a pure Python package"
        ) from None
    missing = why_no_cuda(home, torch.version.cuda)
    if force_cuda and missing:
        raise SystemExit(f"MOE_KERNELS_FORCE_CUDA is set, but {missing}")
    no_build = why_no_build()
    if no_build:
        if force_cuda:
            raise SystemExit(f"MOE_KERNELS_FORCE_CUDA is set, but {no_build}")
        return pure_python(no_build)
    if not missing:
        say(f"building the CPU kernels and the CUDA kernels ({home})")
        return {
            "ext_modules": [extension(home, by_name=False)],
            "cmdclass": {"build_ext": build_command(None)},
        }
    no_launches = why_no_launches()
    if no_launches:
        missing = "; ".join(dict.fromkeys((missing, no_launches)))
        say(f"building the CPU kernels; no CUDA kernels: {missing}")
        commands = {}
    else:
        say(f"building the CPU kernels; CUDA kernels will be compiled at first use: {missing}")
        commands = {"build_py": copy_sources()}
    return {
        "ext_modules": [extension(None, by_name=not no_launches)],
        "cmdclass": {"build_ext": build_command(missing), **commands},
    }


if __name__ == "__main__":
    check_setuptools()  # before setup() reads pyproject.toml
    setup(**decide())
