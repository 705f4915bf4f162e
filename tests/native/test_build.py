"""The build: its decisions on each kind of machine, and the messages when something is missing."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from moe_kernels import _native, backends, env, info, ops

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "build", "dist", "*.so", "*.egg-info", "_build_info.json", "__pycache__", "out"
)
REPORT = """
import json, torch
from moe_kernels import _native, _nvrtc
used = False
if _native.is_available():
    perm, *_ = _native.ops().dispatch(torch.tensor([[1], [0]]), 2, None, 0)
    used = perm.tolist() == [1, 0]
reasons = {"why_not": _native.why_not(), "why_no_cuda": _native.why_no_cuda()}
reasons["cuda_sources"] = str(_nvrtc._SOURCES)
print(json.dumps({"file": _native.__file__, "used": used, **reasons}))
"""


@pytest.fixture(scope="module")
def setup_module():
    spec = importlib.util.spec_from_file_location("moe_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", False), ("0", False), ("false", False), ("1", True), ("TRUE", True)],
)
def test_build_flags(setup_module, monkeypatch, value, expected):
    monkeypatch.setenv("MOE_KERNELS_SKIP_CPP", value)
    assert setup_module.flag("MOE_KERNELS_SKIP_CPP") is expected


def test_an_unclear_build_flag_is_an_error(setup_module, monkeypatch):
    monkeypatch.setenv("MOE_KERNELS_SKIP_CPP", "maybe")
    with pytest.raises(SystemExit, match="must be 0, 1, true or false"):
        setup_module.flag("MOE_KERNELS_SKIP_CPP")


@pytest.mark.parametrize(("version", "built"), [("68.2.2", False), ("77.0.1", True)])
def test_an_old_setuptools_is_refused_in_one_sentence(tmp_path, version, built):
    """A stand-in of setuptools says its version, and that it came to read pyproject.toml."""
    (tmp_path / "setuptools" / "command").mkdir(parents=True)
    text = f"__version__ = {version!r}\ndef setup(**options): print('pyproject.toml is read')\n"
    (tmp_path / "setuptools" / "__init__.py").write_text(text)
    (tmp_path / "setuptools" / "command" / "build_py.py").write_text("build_py = object\n")
    result = subprocess.run(
        [sys.executable, "setup.py", "egg_info"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (result.returncode == 0, "is read" in result.stdout) == (built, built)
    refusal = 'this is 68.2.2: run `pip install "setuptools>=77"`'
    assert (refusal in result.stderr and len(result.stderr.splitlines()) == 1) is not built


def test_the_least_setuptools_is_that_of_pyproject(setup_module):
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert f"setuptools>={setup_module.LEAST_SETUPTOOLS}" in requires


@pytest.fixture
def toolkit(monkeypatch, tmp_path):
    """Return a fake CUDA toolkit whose nvcc reports version 13.0, in a clean environment."""
    for name in ("MOE_KERNELS_SKIP_CUDA", "CUDA_HOME", "CUDA_PATH", "CC", "PYTORCH_NVCC"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "cuda"
    for folder in ("bin", "include"):
        (home / folder).mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\ncase "$1" in\n--version) echo "Cuda compilation tools, release 13.0, V13.0";;\n'
        f'--dryrun) echo "#$ TOP={home}/bin/.." >&2;;\nesac\n'
    )
    nvcc.chmod(0o755)
    return home


def test_why_no_cuda(setup_module, monkeypatch, toolkit):
    assert setup_module.why_no_cuda(toolkit, "13.0") is None
    assert setup_module.why_no_cuda(toolkit, "13.2") is None
    assert "without CUDA" in setup_module.why_no_cuda(toolkit, None)
    assert "nvcc was not found" in setup_module.why_no_cuda(None, "13.0")
    assert "nvcc was not found" in setup_module.why_no_cuda(toolkit / "include", "13.0")
    other = setup_module.why_no_cuda(toolkit, "12.8")
    assert f"at {toolkit} has version 13.0, but the installed torch is built for CUDA 12.8" in other
    assert "major versions must agree" in other
    (toolkit / "bin" / "nvcc").write_text("")
    assert "does not report its version" in setup_module.why_no_cuda(toolkit, "13.0")
    (toolkit / "include" / "cuda_runtime.h").unlink()
    assert "has nvcc but no headers" in setup_module.why_no_cuda(toolkit, "13.0")
    monkeypatch.setenv("MOE_KERNELS_SKIP_CUDA", "1")
    assert "SKIP_CUDA" in setup_module.why_no_cuda(toolkit, "13.0")


def test_an_nvcc_that_refuses_the_compiler(setup_module, monkeypatch, toolkit):
    """The reason is one line, the first error among all that nvcc prints."""
    nvcc = toolkit / "bin" / "nvcc"
    refusal = "/usr/include/crt/host_config.h:168:2: error: #error -- unsupported GNU version!"
    monkeypatch.setenv("CC", "gcc-99")
    nvcc.write_text(
        nvcc.read_text().replace(
            "esac",
            '*) [ "$1 $2" = "-ccbin gcc-99" ] || exit 0; '
            f'printf "In file included from\\n{refusal}\\n" >&2; exit 1;;\nesac',
        )
    )
    reason = setup_module.why_no_cuda(toolkit, "13.0")
    assert reason.endswith(refusal) and "does not compile with gcc-99 (set CC" in reason
    assert "\n" not in reason
    monkeypatch.delenv("CC")
    assert setup_module.why_no_cuda(toolkit, "13.0") is None


def test_nvcc_is_tried_as_torch_calls_it(setup_module, monkeypatch, toolkit):
    """The command has CC if it is set, even to nothing, and PYTORCH_NVCC if ninja builds."""
    nvcc = str(toolkit / "bin" / "nvcc")
    assert setup_module.nvcc_command(toolkit) == [nvcc]
    monkeypatch.setenv("CC", "")
    assert setup_module.nvcc_command(toolkit) == [nvcc, "-ccbin", ""]
    monkeypatch.setenv("PYTORCH_NVCC", f"/nowhere/ccache {nvcc}")
    monkeypatch.setattr(setup_module, "uses_ninja", lambda: False)
    assert setup_module.nvcc_command(toolkit) == [nvcc, "-ccbin", ""]
    monkeypatch.setattr(setup_module, "uses_ninja", lambda: True)
    assert setup_module.nvcc_command(toolkit) == ["/nowhere/ccache", nvcc, "-ccbin", ""]
    assert "which cannot be run" in setup_module.why_no_cuda(toolkit, "13.0")
    monkeypatch.setenv("PYTORCH_NVCC", "")
    monkeypatch.delenv("CC")
    assert "PYTORCH_NVCC is ''" in setup_module.why_no_cuda(toolkit, "13.0")


def test_architectures_before_ampere_are_left_out(setup_module, monkeypatch, toolkit):
    usable = setup_module.usable_arch_list
    assert usable("7.5 8.0;9.0a,10.0+PTX") == ("8.0;9.0a;10.0+PTX", ["7.5"])
    assert usable("Hopper;6.1") == ("Hopper", ["6.1"])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX")
    assert "need 8.0 or later" in setup_module.why_no_cuda(toolkit, "13.0")


def test_the_cuda_toolkit_is_found(setup_module, monkeypatch, toolkit, tmp_path):
    """The toolkit is found from a script on the path; CUDA_HOME takes precedence."""
    script = tmp_path / "path" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/bin:/usr/bin")
    assert setup_module.cuda_home() == toolkit
    monkeypatch.setenv("CUDA_HOME", "/somewhere/else")
    assert setup_module.cuda_home() == Path("/somewhere/else")


def test_architectures_are_those_that_nvcc_knows(setup_module):
    """PTX for later GPUs is for an architecture without "a", which other GPUs can run."""
    assert setup_module.default_arch_list((13, 0)) == "8.0;9.0a;10.0+PTX"
    assert setup_module.default_arch_list((12, 6)) == "8.0+PTX;9.0a"


def test_compiler_is_found_or_not(setup_module, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert "no working C++20 compiler (/nonexistent/c++" in setup_module.why_no_build()
    monkeypatch.setenv("CXX", "")
    assert "CXX is empty" in setup_module.why_no_build()


@pytest.fixture
def no_python_headers(setup_module, monkeypatch, tmp_path):
    """Imitate a machine that has a compiler but no Python headers."""
    if setup_module.why_no_build():
        pytest.skip(setup_module.why_no_build())
    for name in ("CPATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    paths = sysconfig.get_paths() | {"include": str(tmp_path), "platinclude": str(tmp_path)}
    monkeypatch.setattr(setup_module.sysconfig, "get_paths", lambda: paths)


def test_python_headers_are_found_or_not(setup_module, no_python_headers, tmp_path):
    assert f"Python.h was not found in {tmp_path}" in setup_module.why_no_build()
    assert "python3-dev" in setup_module.why_no_build()


@pytest.fixture
def building(setup_module, monkeypatch):
    """Return setup.py as a module, about to build an extension, with no variables set."""
    for name in ("SKIP_CPP", "SKIP_CUDA", "FORCE_CUDA"):
        monkeypatch.delenv(f"MOE_KERNELS_{name}", raising=False)
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    monkeypatch.setattr(setup_module, "why_no_build", lambda: None)
    monkeypatch.setenv("CUDA_HOME", "/a/toolkit")
    monkeypatch.setattr(setup_module, "why_no_cuda", lambda *found: None)
    monkeypatch.setattr(setup_module, "why_no_launches", lambda: "this is no Linux")
    monkeypatch.setattr(setup_module, "extension", lambda cuda, by_name: (cuda, by_name))
    return setup_module


def test_what_is_built(building, monkeypatch, capsys):
    assert building.decide()["ext_modules"] == [(Path("/a/toolkit"), False)]
    assert "the CUDA kernels (/a/toolkit)" in capsys.readouterr().err
    monkeypatch.setattr(building, "why_no_cuda", lambda *found: "there is no nvcc")
    assert building.decide()["ext_modules"] == [(None, False)]
    assert "no CUDA kernels: there is no nvcc; this is no Linux" in capsys.readouterr().err
    monkeypatch.setattr(building, "why_no_launches", lambda: None)
    decided = building.decide()
    assert decided["ext_modules"] == [(None, True)] and "build_py" in decided["cmdclass"]
    assert "compiled at first use: there is no nvcc" in capsys.readouterr().err
    monkeypatch.setattr(building, "why_no_build", lambda: "there is no Python.h")
    assert list(building.decide()["cmdclass"]) == ["build_py"]
    assert "there is no Python.h: installing as pure Python" in capsys.readouterr().err


def test_skip_cpp_builds_nothing(building, monkeypatch, capsys):
    monkeypatch.setenv("MOE_KERNELS_SKIP_CPP", "1")
    assert list(building.decide()) == ["cmdclass"]
    assert "MOE_KERNELS_SKIP_CPP is set" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["why_no_build", "why_no_cuda"])
def test_force_cuda_fails_with_the_reason(building, monkeypatch, what):
    monkeypatch.setenv("MOE_KERNELS_FORCE_CUDA", "1")
    assert building.decide()["ext_modules"] == [(Path("/a/toolkit"), False)]
    monkeypatch.setattr(building, what, lambda *found: "this is missing")
    with pytest.raises(SystemExit, match="FORCE_CUDA is set, but this is missing"):
        building.decide()


@pytest.mark.parametrize("other", ["SKIP_CPP", "SKIP_CUDA"])
def test_contradicting_flags_are_an_error(building, monkeypatch, other):
    monkeypatch.setenv("MOE_KERNELS_FORCE_CUDA", "1")
    monkeypatch.setenv(f"MOE_KERNELS_{other}", "1")
    with pytest.raises(SystemExit, match="contradicts"):
        building.decide()


@pytest.mark.parametrize("openmp", [True, False])
def test_openmp_is_used_where_the_compiler_has_it(setup_module, monkeypatch, capsys, openmp):
    monkeypatch.setattr(setup_module, "compiles", lambda source, flags: openmp)
    extension = setup_module.extension(cuda=None, by_name=False)
    macros = dict(extension.define_macros)
    for flags in (
        extension.extra_compile_args["cxx"],
        extension.extra_link_args,
        macros["MOE_KERNELS_CXX_FLAGS"],
    ):
        assert ("-fopenmp" in flags) is openmp
    assert ("the compiler has no OpenMP" in capsys.readouterr().err) is not openmp


def test_file_names_in_the_extension_are_without_folders(setup_module):
    if setup_module.why_no_build():
        pytest.skip(setup_module.why_no_build())
    extension = setup_module.extension(cuda=None, by_name=False)
    flags = extension.extra_compile_args["cxx"]
    assert f"-ffile-prefix-map={ROOT}=modality-moe-kernels" in flags
    assert f"-ffile-prefix-map={Path(torch.__file__).parent}=torch" in flags
    assert str(ROOT) not in dict(extension.define_macros)["MOE_KERNELS_CXX_FLAGS"]


def test_every_kernel_has_its_launches_without_nvcc(setup_module, monkeypatch, tmp_path):
    """The C++ compiler gets a file for each .cu file, and no file that needs nvcc."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(setup_module, "ROOT", tmp_path)
    extension = setup_module.extension(cuda=None, by_name=True)
    assert all(source.endswith(".cpp") for source in extension.sources)
    kernels = {path.stem for path in (tmp_path / "csrc/cuda").glob("*.cu")}
    assert {Path(source).stem for source in extension.sources} >= kernels | {"launchers", "by_name"}
    written = tmp_path / "build/launches/combine.cpp"
    assert (written.parent / "../../csrc/cuda/combine.cu").is_file()
    assert written.read_text() == '#include "../../csrc/cuda/combine.cu"\n'
    assert ("MOE_KERNELS_BY_NAME", None) in extension.define_macros
    noted = tmp_path / "build/launches/sources.cpp"
    assert "build/launches/sources.cpp" in extension.sources
    text = noted.read_text()
    for file in ("combine.cu", "combine.h", "no_toolkit/std/cstdint"):
        digest = hashlib.sha256((tmp_path / "csrc/cuda" / file).read_bytes()).hexdigest()
        assert f'"{digest} {file}\\n"' in text
    with open(tmp_path / "csrc/cuda/combine.h", "a") as header:
        header.write("\n")
    setup_module.launches()  # so that the file is new, and setuptools links anew
    assert noted.read_text() != text


def test_why_there_are_no_launches(setup_module, monkeypatch):
    monkeypatch.delenv("MOE_KERNELS_SKIP_CUDA", raising=False)
    if sys.platform == "linux":
        assert setup_module.why_no_launches() is None
    monkeypatch.setattr(torch.utils.cpp_extension, "include_paths", lambda: ["/nowhere"])
    assert "does not give the handle of a stream" in setup_module.why_no_launches()
    monkeypatch.setattr(sys, "platform", "win32")
    assert "for Linux" in setup_module.why_no_launches()
    monkeypatch.setenv("MOE_KERNELS_SKIP_CUDA", "1")
    assert setup_module.why_no_launches() == "MOE_KERNELS_SKIP_CUDA is set"


@pytest.mark.parametrize("command", ["sdist", "egg_info", "dist_info"])
def test_metadata_needs_no_compiler(setup_module, command):
    assert not setup_module.needs_extensions([command])
    assert setup_module.needs_extensions(["bdist_wheel"])


@pytest.fixture
def reloaded():
    _native._load.cache_clear()
    yield
    _native._load.cache_clear()


def test_another_torch_is_refused_before_loading(monkeypatch, reloaded):
    monkeypatch.setattr(_native, "find_spec", lambda name: True)
    monkeypatch.setattr(_native, "_note", lambda: {"torch_version": "2.5.1"})
    monkeypatch.setattr(_native, "import_module", None)
    assert not _native.is_available()
    assert _native.why_not().startswith(f"built for torch 2.5.1, this is torch {torch.__version__}")
    with pytest.raises(RuntimeError, match="rebuild with"):
        _native.ops()


def test_an_undefined_symbol_is_a_reason(monkeypatch, reloaded):
    def fail(name):
        raise ImportError("undefined symbol: _ZN2at")

    monkeypatch.setattr(_native, "find_spec", lambda name: True)
    monkeypatch.setattr(_native, "_note", dict)
    monkeypatch.setattr(_native, "import_module", fail)
    assert "undefined symbol" in _native.why_not()
    assert _native.build_info() == {}


def test_not_built(monkeypatch, reloaded):
    monkeypatch.setattr(_native, "find_spec", lambda name: None)
    assert _native.why_not().startswith("not built: install with a C++ compiler")


@pytest.fixture
def computes(monkeypatch, reloaded):
    """Return a function that calls an op twice in a process without the extension.

    Its arguments: what a build has noted, and ``backend`` of the op.
    """
    monkeypatch.setattr(backends, "_WARNED", set())

    def compute(note, backend=None, built=False):
        monkeypatch.setattr(_native, "find_spec", lambda name: True if built else None)
        monkeypatch.setattr(_native, "_note", lambda: note)
        for _ in range(2):
            ops.linear_dispatch(torch.tensor([0, 1]), 1, backend=backend)

    return compute


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        ({}, "not built: install with a C.. compiler"),
        (
            {"not_built": "no working C++20 compiler"},
            "because no working C..20 compiler; mend that",
        ),
        ({"torch_version": "2.5.1"}, "built for torch 2.5.1, this is torch .*: rebuild with `pip"),
    ],
)
def test_a_fallback_to_the_reference_is_a_warning_once(computes, note, reason):
    """Nobody sees what a build prints under pip, nor that torch has changed since."""
    with pytest.warns(RuntimeWarning, match=f"'reference', plain torch.*'cpu'.*{reason}") as seen:
        computes(note, built="torch_version" in note)
    assert len(seen) == 1


def test_what_was_asked_for_is_no_warning(setup_module, computes, monkeypatch, recwarn):
    computes({"not_built": setup_module.SKIPPED})
    computes({}, backend="reference")
    monkeypatch.setenv("MOE_KERNELS_BACKEND", "reference")
    computes({})
    assert not recwarn


def test_asking_what_there_is_is_no_fallback(monkeypatch, reloaded, recwarn):
    monkeypatch.setattr(_native, "find_spec", lambda name: None)
    assert backends.available()["cpu"].startswith("not built")
    assert not recwarn


@pytest.mark.parametrize(
    ("missing", "note", "expected"),
    [
        (("cuda",), {}, "'triton'; backend 'cuda' is not available: cuda is missing"),
        (("cuda",), {"no_cuda": "MOE_KERNELS_SKIP_CUDA is set"}, None),
        (
            ("cuda", "triton"),
            {},
            "'reference', plain torch, which is slow; backend 'cuda' is not available: cuda is "
            "missing; backend 'triton' is not available: triton is missing",
        ),
        ((), {}, None),
    ],
)
def test_a_fallback_on_a_gpu_is_a_warning_once(monkeypatch, recwarn, missing, note, expected):
    def why_not(name, index=None):
        return f"{name} is missing" if name in missing else None

    monkeypatch.setattr(backends, "_WARNED", set())
    monkeypatch.setattr(backends, "_why_not", why_not)
    monkeypatch.setattr(_native, "_note", lambda: note)
    for _ in range(2):
        backends.select(None, torch.device("cuda", 0), torch.bfloat16)
    backends.select(None, torch.device("cuda", 0), torch.float64)  # the reference by design
    found = [str(each.message) for each in recwarn]
    assert found == ([f"moe_kernels computes by the backend {expected}"] if expected else [])


def test_a_compiled_fallback_is_one_graph(computes, monkeypatch):
    def compute(ids):
        return ids + len(backends.select(None, ids.device))

    monkeypatch.setattr(_native, "find_spec", lambda name: None)
    monkeypatch.setattr(_native, "_note", dict)
    compiled = torch.compile(compute, backend="eager", fullgraph=True)
    with pytest.warns(RuntimeWarning, match="not built"):
        assert compiled(torch.tensor([1])).item() == 1 + len("reference")


def test_run_time_flags(monkeypatch):
    for name, read in {"CHECK": env.check_values, "POISON": env.poison}.items():
        monkeypatch.delenv(f"MOE_KERNELS_{name}", raising=False)
        assert read() is False
        monkeypatch.setenv(f"MOE_KERNELS_{name}", "true")
        assert read() is True
        monkeypatch.setenv(f"MOE_KERNELS_{name}", "yes")
        with pytest.raises(ValueError, match=f"MOE_KERNELS_{name} must be 1, 0, true or false"):
            read()


def test_backend_flag(monkeypatch):
    monkeypatch.delenv("MOE_KERNELS_BACKEND", raising=False)
    assert env.backend() is None
    monkeypatch.setenv("MOE_KERNELS_BACKEND", "reference")
    assert env.backend() == "reference"
    monkeypatch.setenv("MOE_KERNELS_BACKEND", "opencl")
    with pytest.raises(ValueError, match="'opencl'; the backends are reference, cpu, triton, cuda"):
        backends.select(None, torch.device("cpu"))


def test_info(capsys):
    info.main([])
    assert "backends:" in capsys.readouterr().out
    info.main(["--json"])
    assert json.loads(capsys.readouterr().out)["versions"]["torch"]


@pytest.fixture
def source(tmp_path):
    """Return a copy of the source tree without build outputs."""
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=NOT_SOURCE))


@pytest.fixture
def python(tmp_path):
    """Return the Python of a fresh environment that has this one's packages except moe_kernels."""
    folder = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages" / "outer.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )
    return folder / "bin" / "python"


def run(python, *arguments, **variables):
    """Run Python in an environment without our variables, except those given."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOE_KERNELS_", "PYTHONPATH"))}
    kept["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = {"cwd": python.parent, "capture_output": True, "text": True}
    return subprocess.run([python, *arguments], env=kept | variables, **options)


def pip_install(python, *arguments, **variables):
    """Return the exit status of pip, and all that it printed."""
    options = ("-v", "--no-build-isolation", "--no-deps", "--ignore-installed")
    command = ("-m", "pip", "install", *options, "--disable-pip-version-check")
    result = run(python, *command, *arguments, **variables)
    return result.returncode, result.stdout + result.stderr


def report(python):
    result = run(python, "-c", REPORT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_max_jobs_limits_the_compilations(setup_module, source, tmp_path):
    """A fake ninja, which only records its arguments, gets the number of jobs."""
    if setup_module.why_no_build():
        pytest.skip(setup_module.why_no_build())
    folder, note = tmp_path / "bin", tmp_path / "arguments"
    folder.mkdir()
    (folder / "ninja").write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || {{ echo "$@" > {note}; exit 1; }}\n'
    )
    (folder / "ninja").chmod(0o755)
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        env=os.environ
        | {"PATH": f"{folder}:{os.environ['PATH']}", "MAX_JOBS": "3", "MOE_KERNELS_SKIP_CPP": "0"},
        cwd=source,
        capture_output=True,
    )
    assert "-j 3" in note.read_text()


def test_the_wheel_has_the_page_and_says_that_it_has_types(source, tmp_path):
    """Without py.typed, type checkers take all names of an installed package for Any."""
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", tmp_path]
    variables = os.environ | {"MOE_KERNELS_SKIP_CPP": "1"}
    subprocess.run(command, cwd=source, check=True, capture_output=True, env=variables)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "moe_kernels/py.typed" in names
    assert "moe_kernels/programs/shared/serving/page.html" in names


@pytest.mark.slow
def test_sdist_installs(source, python):
    options = ["--sdist", "--no-isolation", "--outdir", source / "out"]
    command = [sys.executable, "-m", "build", *options]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (archive,) = (source / "out").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    expected = {"CONTRIBUTING.md", "docs/design.md", "python/demo.py", "tests/native/test_build.py"}
    expected |= {"examples/train.py", "examples/fsdp2.yaml", "examples/pieces.jsonl"}
    expected |= {"tools/draw_figures.py", "benchmarks/run.py", "benchmarks/lib/sections_cpu.py"}
    assert expected <= names
    assert archive.stat().st_size < 5 * 2**20  # no large file has slipped in
    status, output = pip_install(python, archive)
    assert status == 0, output
    warnings = [line for line in output.splitlines() if "warning:" in line]
    assert not any("csrc/cpu" in line for line in warnings)
    found = report(python)
    assert found["why_not"] is None and found["used"]
    assert "site-packages" in found["file"]


@pytest.mark.slow
@pytest.mark.parametrize("editable", [True, False])
def test_install_from_the_source_tree(source, python, editable):
    status, output = pip_install(python, *["-e"] * editable, source)
    assert status == 0, output
    found = report(python)
    assert found["why_not"] is None and found["used"]
    assert found["file"].startswith(str(source)) is editable
    (built,) = Path(found["file"]).parent.glob("_C*.so")
    for folder in (source, Path(torch.__file__).parent):
        assert str(folder).encode() not in built.read_bytes()
    if torch.version.cuda is None:
        assert found["why_no_cuda"] == "the installed torch is built without CUDA"
        assert Path(found["cuda_sources"], "combine.cu").is_file()
        assert found["cuda_sources"].startswith(str(source)) is editable


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["flag", "CXX", "PATH"])
def test_pure_python(source, python, reason):
    variables = {
        "flag": {"MOE_KERNELS_SKIP_CPP": "1"},
        "CXX": {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"},
        "PATH": {"PATH": str(python.parent), "CC": "/nonexistent/cc"},
    }[reason]
    status, output = pip_install(python, source, **variables)
    assert status == 0, output
    assert "installing as pure Python" in output
    assert ("no working C++20 compiler" in output) == (reason != "flag")
    found = report(python)
    assert found["why_not"].startswith("not built") and not found["used"]
    assert ("no working C++20 compiler" in found["why_not"]) == (reason != "flag")
    choose = "import torch; backends.select(None, torch.device('cpu'))"
    warned = run(python, "-c", f"from moe_kernels import backends; {choose}").stderr
    assert ("is not available: not built, because" in warned) == (reason != "flag")


@pytest.mark.slow
def test_forced_cuda_fails_where_it_cannot_be_built(source, python):
    variables = {"MOE_KERNELS_FORCE_CUDA": "1", "PATH": str(python.parent)}
    status, output = pip_install(python, source, **variables)
    assert status != 0 and "MOE_KERNELS_FORCE_CUDA is set, but" in output


@pytest.mark.slow
def test_a_compile_error_is_loud(source, python):
    (source / "csrc" / "cpu" / "alloc.cpp").write_text("#error broken on purpose\n")
    status, output = pip_install(python, source)
    assert status != 0 and "broken on purpose" in output


@pytest.mark.slow
def test_without_torch(source, tmp_path):
    folder = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (folder / "torch.py").write_text("raise ImportError('no torch here')\n")
    variables = {"PYTHONPATH": f"{folder}:{sysconfig.get_path('purelib')}"}
    result = subprocess.run(
        [folder / "bin" / "python", "setup.py", "bdist_wheel"],
        env=os.environ | variables,
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "compiled against the installed torch" in result.stderr
