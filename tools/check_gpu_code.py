"""Compiles every GPU kernel without a GPU, and reads the resources that the compilers report.

    python tools/check_gpu_code.py                 # what `make check-gpu-code` runs
    python tools/check_gpu_code.py --all           # every Triton kernel; hours on a busy machine
    python tools/check_gpu_code.py --dtype fp16    # the other half precision
    python tools/check_gpu_code.py --compiler nvrtc --arch 90    # one compiler and one GPU

Of each Triton kernel it compiles so many of the architectures, dtypes, tiles and compile-time
arguments that the package uses that any two values occur together; --all compiles every set. It
prints registers, spilled stores, shared memory, programs that fit a multiprocessor, and matrix
instructions.

It fails on a spill (for a kernel whose registers are capped, on more than a few), on more shared
memory than the device has, and on an sm_90 GEMM without warp-group instructions.

CUDA kernels are compiled where nvcc is found, in the way setup.py finds it. There it also fails on
a warning, and on a GEMM of half precision without matrix instructions. Where NVRTC is found, it
compiles every kernel that an extension built without nvcc launches, one by one as at first use.
"""

import argparse
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # for its lib
import torch
import triton
from lib.markdown import markdown
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_kernels import _native, _nvrtc
from moe_kernels.ops import triton_kernels as shared
from moe_kernels.ops import triton_launches as launches
from moe_kernels.ops.dispatch import triton_impl as dispatch
from moe_kernels.ops.dispatch import triton_sort
from moe_kernels.ops.lora_linear import triton_impl as linear
from moe_kernels.ops.moe_mlp import triton_kernels as moe_mlp
from moe_kernels.ops.moe_mlp.tiles import Tiles
from moe_kernels.ops.moe_mlp.triton_tiles import built_in
from moe_kernels.ops.triton_tile_maps import tile_maps_kernel

# Shared memory of a program, of a multiprocessor, and registers of it, by compute capability.
DEVICES = {80: (163, 164, 65536), 90: (227, 228, 65536), 100: (227, 228, 65536)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANKS = (0, 16, 256)  # no adapters, one step over the rank, and several
TOP_K = 8
# A cap on registers may cost a few stores in the epilogue; the second program that fits saves more.
MAX_SPILLS_UNDER_CAP = 40  # Triton 3.6 leaves up to 16 of SwiGLU, 3.9 up to 27, of others 37
CUDA_TARGETS = {80: "80", 90: "90a", 100: "100a"}
_ROOT = Path(__file__).resolve().parents[1]
_CUDA = _ROOT / "csrc" / "cuda"
# How experts compute, and whether their stacks are stored transposed: the usual ones, gpt-oss's and
# Nemotron-H's.
FORMS = (
    {"ACT": "silu", "ORDER": "paired", "STORED_TRANSPOSED": False},
    {"ACT": "clamped_swiglu", "ORDER": "interleaved", "STORED_TRANSPOSED": True},
    {"ACT": "relu_squared", "ORDER": "alone", "STORED_TRANSPOSED": False},
)
# How a frozen stack is packed.
NOT_PACKED = {"scales_ptr": None, "codes_ptr": None, "PACKING": "none", "SCALE_BLOCK": 1}
PACKED = ({"PACKING": "nf4", "SCALE_BLOCK": 64}, {"PACKING": "fp8", "SCALE_BLOCK": 128})
# HMMA and HGMMA, but not HFMA2.MMA, with which sm_90 moves constants.
_MATRIX = re.compile(r"(?<![.\w])HG?MMA\b")
_OF_WARPGROUP = re.compile(r"(?<![.\w])HGMMA\b")
_OBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Pointers that are not of the compute dtype. Float32 adapters take the most registers.
_POINTERS = dict.fromkeys(
    ("perm_ptr", "inv_perm_ptr", "tiles_ptr", "segments_ptr", "groups_ptr", "num_rows_ptr",
     "topk_ids_ptr", "modality_ids_ptr", "tokens_ptr", "experts_ptr"), "i64",
) | dict.fromkeys(("counts_ptr", "before_ptr", "totals_ptr"), "i32") | dict.fromkeys(
    ("scaling_ptr", "factors_ptr", "factors2_ptr", "du_ptr", "dots_ptr", "dots_out_ptr",
     "du_parts_ptr", "partial_ptr", "partial2_ptr", "a_ptr", "b_ptr", "v_ptr", "m_ptr",
     "matrix_ptr", "scales_ptr", "codes_ptr"),
    "fp32",
)  # fmt: skip
_SCALARS = dict.fromkeys(("alpha", "limit", "shift"), "fp32")
_MULTIPLES = (
    "hidden", "inter", "size_k", "size_n", "width", "width2", "height", "height2", "size", "size2",
    "stride_mk", "stride_mr", "stride_vr", "stride_vn", "stride_h", "stride_h2", "stride_w",
    "stride_w2",
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A kernel with values of its compile-time arguments."""

    function: triton.runtime.JITFunction
    constants: dict[str, object]
    warps: int = 4
    stages: int = 3
    pointers: dict[str, str] = field(default_factory=dict)  # that differ from those above
    gemm: bool = True
    registers: int = 0  # of a thread, at most; 0: any number

    def source(self, dtype: str) -> ASTSource:
        names = self.function.arg_names
        pointers = {name: dtype for name in names if name.endswith("_ptr") or name == "w"}
        pointers |= _POINTERS | self.pointers
        signature = {
            name: f"*{pointers[name]}" if name in pointers else _SCALARS.get(name, "i32")
            for name in names
            if name not in self.constants
        } | dict.fromkeys(self.constants, "constexpr")
        if self.constants.get("TMA"):
            signature["w"] = f"tensordesc<{dtype}{self.weights_block}>"
        aligned = [["tt.divisibility", 16]]
        return ASTSource(
            fn=self.function,
            signature={name: signature[name] for name in names},
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={
                (names.index(name),): aligned
                for name in names
                if name not in self.constants
                and (name in _MULTIPLES or signature[name].startswith("*"))
            },
        )

    @property
    def tile(self) -> str:
        """Sizes of the tile, for the table."""
        names = ("BLOCK_M", "BLOCK_H", "BLOCK_N", "BLOCK_K", "BLOCK_R")
        return "x".join(str(self.constants[name]) for name in names if name in self.constants)

    @property
    def weights_block(self) -> list[int]:
        """Block of the weights' descriptor, in the order of storage: (n, k) or (k, n)."""
        columns = 2 if self.constants.get("ORDER") == "interleaved" else 1
        if self.function is not moe_mlp.gate_up_kernel:
            columns = 1  # of dA', a tile has one for each pair
        block = [self.constants["BLOCK_K"], columns * self.constants["BLOCK_N"]]
        return block[::-1] if self.constants["TRANSPOSED"] else block


def kernels(tiles: Tiles, rank: int, dtype: str, arch: int) -> Iterator[Kernel]:
    """Yield every kernel that is launched for these tiles and this rank (0: no adapters)."""
    torch_dtype = DTYPES[dtype]
    if tiles in dict(built_in(torch_dtype, arch, packed=True)).values():
        yield from _packed_kernels(tiles, rank)
        return
    by_engine = [False, True] if arch >= 90 and dtype != "fp32" else [False]
    stacks = [{"HAS_EXTRA": True, "TMA": False} | NOT_PACKED] + [
        {"HAS_EXTRA": False, "TMA": tma} | NOT_PACKED for tma in by_engine
    ]
    for stack in stacks:
        yield from _expert_kernels(tiles, rank, stack)
    for weighted in (True, False):
        constants = {"TOP_K": TOP_K, "WEIGHTED": weighted, "BLOCK_N": 1024}
        yield Kernel(moe_mlp.combine_kernel, constants, gemm=False)
    if rank:
        yield from _shrink_kernels(tiles, rank, torch_dtype)
        yield from _low_rank_sums(rank, torch_dtype, arch)
    else:
        yield from _added_expert_sums(torch_dtype, arch)
        yield from _dispatch_kernels()


def _expert_kernels(tiles: Tiles, rank: int, stack: dict[str, bool]) -> Iterator[Kernel]:
    """Yield the GEMMs with the experts' weights, as inference and training launch them.

    With one modality the compiler knows the number of modalities; training also runs with several.
    """
    run = {"warps": tiles.warps, "stages": tiles.stages}
    common = {
        "BLOCK_M": tiles.m, "BLOCK_K": tiles.k, "GROUP_M": tiles.group, "RANK": rank,
        "BLOCK_R": launches.STEP_R, **stack,
    }  # fmt: skip
    for form in FORMS:
        yield from _gated_kernels(tiles, rank, common | form, run)
    for known in ({"num_modalities": 1}, {}) if rank else ({},):
        for transposed in (True, False):
            rows = common | known | {"BLOCK_N": tiles.n, "TRANSPOSED": transposed}
            unit = {"stride_vr" if transposed else "stride_vn": 1} if rank else {}
            yield Kernel(moe_mlp.grouped_gemm_kernel, rows | unit, **run)


def _packed_kernels(tiles: Tiles, rank: int) -> Iterator[Kernel]:
    """Yield the GEMMs of SwiGLU that unpack their weights, with added experts as without."""
    run = {"warps": tiles.warps, "stages": tiles.stages, "pointers": {"w": "u8"}}
    for form, extra in itertools.product(PACKED, (True, False)):
        common = {
            "BLOCK_M": tiles.m, "BLOCK_K": tiles.k, "GROUP_M": tiles.group, "RANK": rank,
            "BLOCK_R": launches.STEP_R, "HAS_EXTRA": extra, "TMA": False, **form,
        }  # fmt: skip
        yield from _gated_kernels(tiles, rank, common | FORMS[0], run)
        for transposed in (True, False):
            rows = common | {"BLOCK_N": tiles.n, "TRANSPOSED": transposed}
            unit = {"stride_vr" if transposed else "stride_vn": 1} if rank else {}
            yield Kernel(moe_mlp.grouped_gemm_kernel, rows | unit, **run)


def _gated_kernels(
    tiles: Tiles, rank: int, common: dict[str, object], run: dict[str, int]
) -> Iterator[Kernel]:
    """Yield the GEMMs with an activation in their epilogue, for one form of experts."""
    common = common | {"TOP_K": TOP_K}
    stored = common.pop("STORED_TRANSPOSED")
    up = common | {
        "BLOCK_N": tiles.n if common["ORDER"] == "alone" else tiles.n_gated,
        "HAS_BIAS": common["ORDER"] == "interleaved", "TRANSPOSED": not stored,
    }  # fmt: skip
    down = common | {"BLOCK_N": tiles.n_gated, "TRANSPOSED": stored}
    for known in ({"num_modalities": 1}, {}) if rank else ({},):
        for kept in (True, False) if known or not rank else (True,):
            yield Kernel(moe_mlp.gate_up_kernel, up | known | {"SAVE": kept}, **run)
            added = kept and common["HAS_EXTRA"]
            acts = {"WRITE_ADAPTED": kept and rank > 0, "WRITE_ADDED": added}
            cap = tiles.act_registers
            yield Kernel(moe_mlp.act_backward_kernel, down | known | acts, **run, registers=cap)


def _shrink_kernels(tiles: Tiles, rank: int, dtype: torch.dtype) -> Iterator[Kernel]:
    """Yield the kernels of u and du, for experts and for a projection."""
    block_r = min(rank, launches.rank_block(dtype))
    common = {"TOP_K": TOP_K, "RANK": rank, "BLOCK_R": block_r}
    k = launches.shrink_depth(dtype)
    for m in {min(tiles.m, launches.ADAPTER_ROWS), linear.BLOCK_M}:
        for by_token, backward in itertools.product((True, False), (False, True)):
            constants = common | {"BY_TOKEN": by_token, "BLOCK_M": m, "BLOCK_K": k}
            constants |= {"stride_mr" if backward else "stride_mk": 1, "FILL": not backward}
            pointers = {"out_ptr": "fp32"} if backward else {}
            yield Kernel(
                shared.shrink_kernel, constants, launches.shrink_warps(m), pointers=pointers
            )
    block = {"RANK": rank, "BLOCK_R": launches.STEP_R, "BLOCK_M": linear.BLOCK_M}
    for unit in ("stride_vr", "stride_vn"):
        constants = block | {"BLOCK_N": linear.BLOCK_N, unit: 1}
        yield Kernel(shared.add_low_rank_kernel, constants, gemm=False)


def _low_rank_sums(rank: int, dtype: torch.dtype, arch: int) -> Iterator[Kernel]:
    """Yield the gradients of B and A, two in a launch and alone, with du where that is one pass.

    In a layer those of B of gate_up and A of down are a launch, and those of B of down and A of
    gate_up; in a projection those of B and A.
    """
    of_B = {"RIGHT_BY_TOKEN": False, "WEIGHTED": False, "stride_h": 1}
    of_A = {"RIGHT_BY_TOKEN": False, "WEIGHTED": True, "stride_w": 1}
    by_token = {"RIGHT_BY_TOKEN": True}
    for du in [False, True] if rank <= launches.MAX_RANK_WITH_DU else [False]:
        yield _sums(rank, dtype, arch, of_B, of_A, left2="fp32", with_du=du)
        for alone in (of_B, of_B | by_token):
            yield _sums(rank, dtype, arch, alone, with_du=du)
    of_down = of_B | by_token | {"WEIGHTED": True}
    yield _sums(rank, dtype, arch, of_down, of_A | by_token | {"WEIGHTED": False}, left2="fp32")
    yield _sums(rank, dtype, arch, of_A, left="fp32")
    for rows in (launches.ADAPTER_ROWS, 16):
        constants = {"BLOCK_M": rows, "BLOCK": launches.FINISHED}
        pointers = dict.fromkeys(("out_ptr", "out2_ptr"), "fp32")
        yield Kernel(shared.finish_wgrad_kernel, constants, pointers=pointers, gemm=False)


def _added_expert_sums(dtype: torch.dtype, arch: int) -> Iterator[Kernel]:
    """Yield the gradients of both weights of added experts, in a launch and alone."""
    of_gate_up = {"RIGHT_BY_TOKEN": True, "WEIGHTED": False, "stride_w": 1}
    of_down = {"LEFT_BY_TOKEN": True, "RIGHT_BY_TOKEN": False, "WEIGHTED": True, "stride_w": 1}
    yield _sums(2048, dtype, arch, of_gate_up, of_down)
    yield _sums(2048, dtype, arch, of_gate_up)
    yield _sums(2048, dtype, arch, of_down)


def _sums(
    height: int,
    dtype: torch.dtype,
    arch: int,
    first: dict[str, object],
    second: dict[str, object] | None = None,
    *,
    with_du: bool = False,
    **left: str,
) -> Kernel:
    """Return ``wgrad_kernel`` for a problem or two; ``left`` and ``left2`` are their dtypes."""
    *blocks, warps = launches.wgrad_blocks(height, 2048, dtype, with_du=with_du, capability=arch)
    constants = {"TOP_K": TOP_K, "WITH_DU": with_du, "TWO": second is not None}
    for number, problem in (("", first), ("2", first if second is None else second)):
        named = {"LEFT_BY_TOKEN": False} | problem
        constants |= {f"{name}{number}": value for name, value in named.items()}
    constants |= dict(zip(("BLOCK_H", "BLOCK_N", "BLOCK_P"), blocks, strict=True))
    pointers = dict.fromkeys(("out_ptr", "out2_ptr"), "fp32")
    pointers |= {f"{name}_ptr": of for name, of in left.items()}
    return Kernel(shared.wgrad_kernel, constants, warps, pointers=pointers, gemm=False)


def _dispatch_kernels() -> Iterator[Kernel]:
    for groups in (16, 2048):  # upper limits on the number of groups of rows
        yield Kernel(tile_maps_kernel, {"BLOCK_G": groups, "BLOCK_T": 128}, gemm=False)
    for mask in (True, False):
        constants = {"TOP_K": TOP_K, "HAS_MODALITIES": mask, **dispatch.BLOCKS}
        yield Kernel(dispatch.dispatch_kernel, constants, gemm=False)
    for keys in (256, 4096):  # upper limits on the number of segments
        ids = {"TOP_K": TOP_K, "HAS_MODALITIES": True, "KEYS": keys}
        block = {"BLOCK": triton_sort.BLOCKS["BLOCK"]}
        yield Kernel(triton_sort.count_kernel, ids | block, gemm=False)
        yield Kernel(triton_sort.place_kernel, ids | triton_sort.BLOCKS, gemm=False)
    yield Kernel(triton_sort.scan_kernel, triton_sort.SCAN_BLOCKS, gemm=False)


def compile_job(
    arch: int, dtype: str, rank: int, tiles: Tiles, index: int
) -> tuple[tuple[str, ...], list[str]]:
    """Call :func:`compile_one` with a kernel by its index: kernels cannot be sent to a process."""
    kernel = list(kernels(tiles, rank, dtype, arch))[index]
    return compile_one(kernel, dtype, arch)


def compile_one(kernel: Kernel, dtype: str, arch: int) -> tuple[tuple[str, ...], list[str]]:
    """Compile a kernel; return its row of the table, and what is wrong."""
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages, "enable_fp_fusion": True}
    if kernel.registers:
        options["maxnreg"] = kernel.registers
    compiled = triton.compile(
        kernel.source(dtype), target=GPUTarget("cuda", arch, 32), options=options
    )
    registers, spills = _resources(compiled.asm["cubin"])
    _, sm_kib, sm_registers = DEVICES[arch]
    kib = compiled.metadata.shared / 1024
    resident = min(
        2048 // (32 * kernel.warps), sm_registers // (registers * 32 * kernel.warps),
        int(sm_kib // (kib + 1)),
    )  # fmt: skip
    wide, narrow = (len(re.findall(p, compiled.asm["ptx"])) for p in (
        r"wgmma\.mma_async|tcgen05\.mma", r"mma\.sync"))  # fmt: skip
    wrong = _faults(kernel, dtype, arch, spills=spills, kib=kib, wide=wide)
    name = kernel.function.__name__.removesuffix("_kernel")
    name += " TMA" if kernel.constants.get("TMA") else ""
    cells = (registers, spills, f"{kib:.0f}", resident, wide, narrow, "; ".join(wrong))
    return (f"sm_{arch}", dtype, name, kernel.tile, *map(str, cells)), wrong


def _faults(
    kernel: Kernel, dtype: str, arch: int, *, spills: int, kib: float, wide: int
) -> list[str]:
    """Return what is wrong with a compiled kernel; ``wide`` counts warp-group instructions."""
    faults, block_kib = [], DEVICES[arch][0]
    if spills > (MAX_SPILLS_UNDER_CAP if kernel.registers else 0):
        faults.append(f"{spills} spilled stores")
    if kib > block_kib:
        faults.append(f"{kib:.0f} KiB of shared memory, the device has {block_kib}")
    rows = kernel.constants.get("BLOCK_M", 0)
    if arch == 90 and kernel.gemm and dtype != "fp32" and rows >= 64 and not wide:
        faults.append("a GEMM without warp-group instructions")
    return faults


def _resources(cubin: bytes, symbol: str = "") -> tuple[int, int]:
    """Return the registers of a thread, and the number of spilled stores.

    Of the kernel ``symbol`` or, without it, of the only one.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [str(_OBJDUMP), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    usage = re.search(rf"Function {symbol}[^:]*:\s+REG:(\d+)", usage)
    body = code.partition(f"Function : {symbol}")[2].partition("Function :")[0]
    return int(usage[1]), len(re.findall(r"\bSTL\b", body))


def nvcc_command() -> list[str] | None:
    """Return the command by which setup.py would call nvcc, or None without nvcc."""
    spec = importlib.util.spec_from_file_location("moe_kernels_setup", _ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    home = setup.cuda_home()
    command = None if home is None else setup.nvcc_command(home)
    return command if command and shutil.which(command[0]) else None


def needs_matrix_instructions(kernel: str, arch: int) -> bool:
    """Return whether a kernel multiplies in half precision, by its name, plain or mangled.

    The engine is empty but on sm_90.
    """
    names = "grouped_gemm|wgrad|shrink|add_low_rank|decode_gate_up|decode_down"
    multiplies = rf"(?<![a-z_])({names}{'|engine' if arch == 90 else ''})_kernel"
    return bool(re.search(multiplies, kernel) and re.search("__half|__nv_bfloat16", kernel))


def compile_cuda(nvcc: list[str], source: Path, arch: int) -> tuple[list[tuple[str, ...]], str]:
    """Compile a file; return rows of its kernels and the compiler's complaint.

    A row is (kernel, registers, spilled bytes, matrix instructions). Shared memory is requested at
    launch; the sources limit it by a static_assert.
    """
    target = CUDA_TARGETS[arch]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *nvcc, "-std=c++20", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-gencode",
            f"arch=compute_{target},code=sm_{target}", "-c", str(source), "-o", f"{folder}/out.o",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            return [], result.stderr.strip()
        matrix = _matrix_instructions(f"{folder}/out.o")
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    entries = result.stderr.replace("\n", " ").replace("ptxas info    : Comp", "\nComp")
    rows = [
        (_demangled(mangled), registers, spilled, str(matrix[mangled]))
        for mangled, spilled, registers in re.findall(pattern, entries)
    ]
    return rows, "" if rows else f"{source.name}: the compiler reported no kernel"


def _matrix_instructions(path: str) -> dict[str, int]:
    """Count the matrix instructions of each kernel in an object file.

    Of the engine they are those of a warpgroup: others are of its low-rank term.
    """
    command = [str(_OBJDUMP), "-sass", path]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *functions = re.split(r"Function : (\w+)", code)
    parts = zip(functions[::2], functions[1::2], strict=True)
    return {
        name: len((_OF_WARPGROUP if "engine_kernel" in name else _MATRIX).findall(body))
        for name, body in parts
    }


def _demangled(name: str) -> str:
    """Return the kernel's name with its template arguments."""
    if shutil.which("c++filt") is None:
        return name
    full = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    short = re.search(r"(\w+(?:<[^()]*>)?)\(", full.replace("(anonymous namespace)::", ""))
    return short[1] if short else full


def check_cuda(archs: list[int]) -> int:
    """Print a row for each CUDA kernel, and return the number of faults."""
    sources = sorted(_CUDA.glob("*.cu"))
    nvcc = nvcc_command()
    if nvcc is None:
        print("nvcc was not found, so the CUDA kernels were not checked")
        return 0
    rows, wrong = [], 0
    for arch, source in itertools.product(archs, sources):
        compiled, complaint = compile_cuda(nvcc, source, arch)
        wrong += bool(complaint) + sum(row[2] != "0" for row in compiled)
        names = [row[0] for row in compiled if row[3] == "0"]
        without = [name for name in names if needs_matrix_instructions(name, arch)]
        if without:
            complaint = f"without matrix instructions: {', '.join(without)}"
            wrong += len(without)
        rows += [(f"sm_{CUDA_TARGETS[arch]}", source.name, *row) for row in compiled]
        if complaint:
            print(complaint)
    header = ("device", "file", "kernel", "registers", "spilled bytes", "matrix")
    print(markdown(header, rows))
    return wrong


def check_nvrtc(archs: list[int]) -> int:
    """Print a row for each kernel that NVRTC compiles at first use; return the number of faults."""
    try:
        print(f"NVRTC {_nvrtc.version()}")
    except RuntimeError as error:
        print(f"the kernels were not compiled as at first use: {error}")
        return 0
    if not _native.compiles_cuda_kernels():
        print("the kernels were not compiled as at first use: this extension was built with nvcc")
        return 0
    if reason := _nvrtc.why_other_sources():
        print(f"the extension names other kernels: {reason}")
        return 1
    jobs = [(arch, *kernel) for arch in archs for kernel in _native.cuda_kernels()]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rows = list(tqdm(pool.map(_compile_as_at_first_use, jobs), total=len(jobs), unit="kernel"))
    print(markdown(("device", "file", "kernel", "registers", "spills", "processor s"), rows))
    return sum(row[4] != "0" for row in rows)


def _compile_as_at_first_use(job: tuple[int, str, str]) -> tuple[str, ...]:
    arch, file, name = job
    target = _nvrtc._target(arch, _nvrtc._supported())
    begin = time.process_time()
    cubin, symbol = _nvrtc._run_nvrtc(f'#include "{file}"\n', name, target)
    seconds = time.process_time() - begin
    registers, spills = _resources(cubin, symbol)
    short = name.replace("moe_kernels::cuda::", "")
    return target, file, short, str(registers), str(spills), f"{seconds:.1f}"


def cover(keys: Iterable[tuple]) -> list[tuple]:
    """Choose keys so that any two parts that occur together in one do so in a chosen one.

    Of several that add as many pairs it takes the first, so the choice is the same at each run.
    """
    pairs = {key: frozenset(itertools.combinations(enumerate(key), 2)) for key in keys}
    missing, chosen = frozenset().union(*pairs.values()), []
    while missing:
        pairs = {key: left for key, found in pairs.items() if (left := found & missing)}
        best = max(pairs, key=lambda key: len(pairs[key]))
        missing -= pairs[best]
        chosen.append(best)
    return chosen


def _cover_of_each_kernel(jobs: dict[tuple, tuple]) -> dict[tuple, tuple]:
    """Choose jobs of each kernel in which any two values of its arguments occur."""
    names, by_kernel = defaultdict(set), defaultdict(dict)
    for _, _, kernel, *constants in jobs:
        names[kernel].update(name for name, _ in constants)
    for job in jobs:
        arch, dtype, kernel, *constants = job
        values = dict(constants)
        key = arch, dtype, *(values.get(name) for name in sorted(names[kernel]))
        by_kernel[kernel].setdefault(key, job)
    return {
        found[key]: jobs[found[key]] for found in by_kernel.values() for key in cover(found)
    }  # fmt: skip


def check_triton(args: argparse.Namespace) -> int:
    """Print a row for each Triton kernel, and return the number of kernels with faults."""
    jobs = {}
    for arch, dtype, rank in itertools.product(args.arch, args.dtype, args.rank):
        usual, packed = (built_in(DTYPES[dtype], arch, packed=packed) for packed in (False, True))
        for _, tiles in (*usual, *packed):
            for index, kernel in enumerate(kernels(tiles, rank, dtype, arch)):
                key = (arch, dtype, kernel.function.__name__, *sorted(kernel.constants.items()))
                jobs[key] = (arch, dtype, rank, tiles, index)
    number = len(jobs)
    if not args.all:
        jobs = _cover_of_each_kernel(jobs)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        running = pool.map(compile_job, *zip(*jobs.values(), strict=True))
        results = list(tqdm(running, total=len(jobs), unit="kernel"))
    header = ("device", "dtype", "kernel", "tile", "registers", "spills", "shared KiB",
              "programs an SM", "wgmma/tcgen05", "mma", "wrong")  # fmt: skip
    print(markdown(header, [row for row, _ in results]))
    failed = sum(bool(wrong) for _, wrong in results)
    print(f"{len(results)} of {number} Triton kernels compiled, {failed} with something wrong")
    return failed


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", type=int, choices=DEVICES, default=[*DEVICES])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--rank", nargs="+", type=int, default=[*RANKS])
    parser.add_argument(
        "--all", action="store_true",
        help="every Triton kernel, not as many as have any two values of its arguments in one",
    )  # fmt: skip
    compilers = ("triton", "nvcc", "nvrtc")
    parser.add_argument("--compiler", nargs="+", choices=compilers, default=compilers)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    checks = {
        "triton": lambda: check_triton(args),
        "nvcc": lambda: check_cuda(args.arch),
        "nvrtc": lambda: check_nvrtc(args.arch),
    }
    failed = [checks[compiler]() for compiler in args.compiler]
    return 1 if any(failed) else 0


if __name__ == "__main__":
    sys.exit(main())
