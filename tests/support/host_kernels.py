"""Launch functions of the CUDA kernels, compiled as plain C++ and called through ctypes."""

import ctypes
import fcntl
import mmap
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

HOST = Path(__file__).with_name("host")
KERNELS = HOST.parents[2] / "csrc" / "cuda"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

LIBC = ctypes.CDLL(None)
TYPES = {
    "pointer": ctypes.c_void_p, "int": ctypes.c_int, "long": ctypes.c_int64, "bool": ctypes.c_bool
}  # fmt: skip


def fields(**names_of: str) -> list[tuple[str, type]]:
    """Return a structure's (name, type) pairs in order, from a string of names for each type."""
    return [(name, TYPES[kind]) for kind, names in names_of.items() for name in names.split()]


class DispatchOut(ctypes.Structure):
    _fields_ = fields(pointer="perm inv_perm tokens_per_expert expert_offsets segment_offsets")


class Maps(ctypes.Structure):
    _fields_ = fields(pointer="tiles groups pair_tiles pair_groups")


class Combine(ctypes.Structure):
    _fields_ = fields(
        pointer="rows inv_perm num_rows weights out", long="num_tokens", int="width top_k"
    )


class Shrink(ctypes.Structure):
    _fields_ = fields(
        pointer="left matrix perm tiles segments out",
        int="num_tiles num_rows num_base num_modalities experts_of_m size_k rank top_k",
        bool="by_token rank_first",
    )


class AddLowRank(ctypes.Structure):
    _fields_ = fields(
        pointer="u v scaling perm tiles out", int="num_tiles rank width", bool="rank_last"
    )


class WgradProblem(ctypes.Structure):
    _fields_ = fields(
        pointer="left right tiles groups factors weights matrix out partial",
        long="chunk",
        int="left_dtype weights_dtype matrix_dtype num_tiles num_groups groups_of_factor height"
        " width",
        bool="transposed left_by_token right_by_token",
    )


class FoldedSums(ctypes.Structure):
    _fields_ = fields(pointer="slots out", long="size")


class Folded(ctypes.Structure):
    _fields_ = [
        ("sums", 2 * FoldedSums),
        *fields(pointer="segments", int="num_sums num_base num_modalities"),
    ]


class Wgrad(ctypes.Structure):
    _fields_ = [
        ("problems", 2 * WgradProblem),
        ("folded", Folded),
        *fields(
            pointer="perm du parts dots sum_of_dots",
            long="num_rows",
            int="dots_dtype num_problems num_dots top_k",
        ),
    ]


class GroupedGemm(ctypes.Structure):
    _fields_ = fields(
        pointer="left stack extra perm tiles segments u v scaling sum",
        int="num_rows num_parts num_tiles num_base num_experts num_modalities experts_of_v rank "
        "size_k size_n top_k",
    )


class PartsOfU(ctypes.Structure):
    _fields_ = fields(pointer="a parts", int="experts rank", bool="is_float")


class AdapterGradients(ctypes.Structure):
    _fields_ = fields(pointer="u1 b1 scaling du1 d_b1 d_a2", int="rank", bool="b_is_float")


class ActBackward(ctypes.Structure):
    _fields_ = [
        *fields(
            pointer="weights pre d_pre act dots",
            long="num_rows",
            bool="weights_are_float act_of_adapted act_of_added",
        ),
        ("adapters", AdapterGradients),
    ]


class Decode(ctypes.Structure):
    _fields_ = fields(
        pointer="topk_ids modality_ids topk_weights hidden_states gate_up down extra_gate_up "
        "extra_down a1 b1 scaling1 a2 b2 scaling2 act parts out",
        int="tokens top_k num_base num_experts num_modalities hidden inter rank1 rank2 "
        "experts_of_a1 experts_of_a2",
        bool="weights_are_float extra_is_float is_float1 is_float2",
    )


def cuda_include() -> Path | None:
    """Return the folder of CUDA's headers, or None."""
    compiler = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), compiler and Path(compiler).resolve().parents[1]]
    for home in (*filter(None, homes), "/usr/local/cuda"):
        if (Path(home) / "include" / "cuda_bf16.h").is_file():
            return Path(home) / "include"
    return None


def missing() -> str | None:
    """Return a reason why the kernels cannot be compiled here, or None."""
    if shutil.which(COMPILER[0]) is None:
        return "needs a C++ compiler: install one"
    if cuda_include() is None:
        return "needs CUDA's headers: install the toolkit, or set CUDA_HOME"
    return None


def compiler_flags() -> list[str]:
    """Return the flags for kernels on the host; warnings are errors."""
    return [
        "-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi",
        "-U_FORTIFY_SOURCE", "-fno-strict-aliasing",
        "-fPIC", "-isystem", str(cuda_include()), f"-I{HOST}",
    ]  # fmt: skip


def executable(path: Path, source: Path, kernels: Path) -> Path:
    """Compile a program from one file and the headers of the kernels in a folder."""
    flags = [*compiler_flags(), "-std=c++20", f"-I{kernels}"]
    subprocess.run([*COMPILER, *flags, str(source), "-o", str(path)], check=True)
    return path


def compiled(folder: Path, *sources: Path, more: tuple[str, ...] = ()) -> list[str]:
    """Compile sources to object files, with extra flags."""
    flags, objects = [*compiler_flags(), *more], []
    for source in sources:
        objects.append(str(folder / f"{source.stem}.o"))
        command = [*COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    return objects


def linked(path: Path, objects: list[str], *more: str) -> Path:
    """Link objects to a shared library."""
    subprocess.run([*COMPILER, "-shared", *objects, *more, "-o", str(path)], check=True)
    return path


def build(folder: Path) -> ctypes.CDLL:
    """Build the library of launch functions in a folder that has none yet, and load it.

    Several processes may share the folder: one builds, and the others wait.
    """
    path = folder / "kernels.so"
    with open(folder / "kernels.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            linked(path, compiled(folder, HOST / "cuda_kernels_host.cpp", *KERNELS.glob("*.cu")))
    library = ctypes.CDLL(str(path))
    for structure in (
        DispatchOut, Maps, Combine, Shrink, WgradProblem, Folded, Wgrad, GroupedGemm, PartsOfU,
        AdapterGradients, ActBackward, AddLowRank, Decode,
    ):  # fmt: skip
        size = getattr(library, f"size_of_{structure.__name__.lower()}")
        size.restype = ctypes.c_size_t
        assert size() == ctypes.sizeof(structure), structure
    return library


def build_ops(folder: Path) -> Path:
    """Build a library that registers these kernels for CPU tensors in the ops of backend "cuda"."""
    from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

    headers = [f"-isystem{path}" for path in include_paths()]
    plain = (KERNELS.parent / name for name in ("outputs.cpp", "layer.cpp", "course.cpp"))
    sources = HOST / "cuda_launchers_host.cpp", *plain
    objects = compiled(
        folder, *sources, more=("-std=c++20", "-O3", f"-I{HOST / 'cuda_on_host'}", *headers)
    )
    objects += compiled(folder, *KERNELS.glob("*.cu"))
    libraries = ["-ltorch_cpu", "-ltorch", "-lc10", f"-Wl,-rpath,{TORCH_LIB_PATH}"]
    return linked(folder / "ops.so", objects, f"-L{TORCH_LIB_PATH}", *libraries)


class Guarded:
    """A copy of a tensor at the end of a memory page; touching the next page is a fault."""

    def __init__(self, tensor: Tensor):
        assert tensor.is_contiguous()
        self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
        pages = -(-self.bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.address = begin + pages - self.bytes
        ctypes.memmove(self.address, tensor.data_ptr(), self.bytes)
        assert LIBC.mprotect(ctypes.c_void_p(begin + pages), mmap.PAGESIZE, 0) == 0

    def copy_back(self) -> None:
        ctypes.memmove(self.tensor.data_ptr(), self.address, self.bytes)


def structure(kind: type, **values) -> ctypes.Structure:
    """Fill in a structure from tensors, dtypes, numbers and None (a null pointer)."""
    assert sorted(values) == sorted(name for name, _ in kind._fields_)
    filled = empty(kind)
    for name, value in values.items():
        if isinstance(value, ctypes.Structure):  # a part of this one
            filled.guarded += value.guarded
            setattr(filled, name, value)
        else:
            setattr(filled, name, plain(value, filled.guarded))
    return filled


def empty(kind: type) -> ctypes.Structure:
    """Return a structure of zeros and null pointers."""
    made = kind()
    made.guarded = []
    return made


def plain(value, guarded: list[Guarded]):
    """Convert a value for ctypes: a tensor to a pointer to its copy, a dtype to a ``Scalar``.

    A list of structures becomes an array of them.
    """
    if isinstance(value, torch.dtype):
        return SCALARS[value]
    if isinstance(value, list):
        for part in value:
            guarded += part.guarded
        return (type(value[0]) * len(value))(*value)
    if isinstance(value, ctypes.Structure):
        guarded += value.guarded
        return ctypes.byref(value)
    if not isinstance(value, Tensor):
        return value
    guarded.append(Guarded(value))
    return ctypes.c_void_p(guarded[-1].address)


def call(function, *arguments) -> None:
    """Launch the kernels and copy what they wrote back to the tensors."""
    guarded = []
    error = function(*(plain(argument, guarded) for argument in arguments))
    assert error == 0, f"cudaError_t {error}"
    for copy in guarded:
        copy.copy_back()


def tile_map(bounds: list[tuple[int, int]], num_rows: int, block: int) -> tuple[Tensor, Tensor]:
    """Return the tile map (3, tiles) and group map (3, groups) that ``triton_tile_maps`` defines.

    ``bounds`` holds (first row, end) of each group. Without groups there are no tiles.
    """
    tiles, groups, partial = [], [], 0
    for group, (low, high) in enumerate(bounds):
        group_tiles = [(group, at, min(at + block, high)) for at in range(low, high, block)]
        groups.append((low, high, partial))
        partial += len(group_tiles) if len(group_tiles) > 1 else 0
        tiles += group_tiles
    max_tiles = min(num_rows, num_rows // block + len(bounds)) if bounds else 0
    tiles += [(0, 0, 0)] * (max_tiles - len(tiles))
    return tuple(
        torch.tensor(rows, dtype=torch.int64).view(-1, 3).T.contiguous() for rows in (tiles, groups)
    )
