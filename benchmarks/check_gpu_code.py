"""Compiles every Triton kernel for GPUs that need not be there, and reads what the compiler made.

    python benchmarks/check_gpu_code.py            # what `make check-gpu-code` runs

For each kernel, dtype and tile that the package uses, and each architecture: registers, spilled
stores, shared memory, programs that fit a multiprocessor, and matrix instructions. Fails on a
spill, on more shared memory than the device has, and on an sm_90 GEMM without warp-group
instructions.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import triton
from tables import markdown
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_kernels.ops import triton_kernels as shared
from moe_kernels.ops.lora_linear import triton_impl as linear
from moe_kernels.ops.moe_mlp import triton_kernels as moe_mlp
from moe_kernels.ops.moe_mlp.triton_tiles import FLOAT32, HALF, Tiles

# Shared memory of a program, of a multiprocessor, and registers of it, by compute capability.
DEVICES = {80: (163, 164, 65536), 90: (227, 228, 65536), 100: (227, 228, 65536)}
DTYPES = ("bf16", "fp16", "fp32")
RANKS = (16, 64)
_OBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Pointers that are not of the compute dtype; integers that are not known to be multiples of 16.
_POINTERS = {
    "perm_ptr": "i64", "inv_perm_ptr": "i64", "tiles_ptr": "i64", "segments_ptr": "i64",
    "groups_ptr": "i64", "num_rows_ptr": "i64", "scaling_ptr": "fp32", "factors_ptr": "fp32",
    "du_ptr": "fp32", "dots_ptr": "fp32",
}  # fmt: skip
_MULTIPLES = ("hidden", "inter", "size_k", "size_n", "width", "height")


@dataclass(frozen=True)
class Kernel:
    """A kernel with one setting of its compile-time arguments."""

    function: triton.runtime.JITFunction
    constants: dict[str, object]
    warps: int = 4
    stages: int = 3
    pointers: dict[str, str] = field(default_factory=dict)  # other than those above
    gemm: bool = True

    def source(self, dtype: str) -> ASTSource:
        names = self.function.arg_names
        pointers = {name: dtype for name in names if name.endswith("_ptr")} | _POINTERS
        pointers |= self.pointers
        signature = {
            name: f"*{pointers[name]}" if name in pointers else "i32"
            for name in names
            if name not in self.constants
        } | dict.fromkeys(self.constants, "constexpr")
        aligned = [["tt.divisibility", 16]]
        return ASTSource(
            fn=self.function,
            signature={name: signature[name] for name in names},
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={
                (names.index(name),): aligned
                for name in names
                if name not in self.constants and (name.endswith("_ptr") or name in _MULTIPLES)
            },
        )


def kernels(tiles: Tiles, rank: int) -> Iterator[Kernel]:
    """Everything that is launched for these tiles."""
    low_rank = {"RANK": rank, "BLOCK_R": max(16, rank)}
    modal = {"NUM_MODALITIES": 2, "HAS_EXTRA": True, **low_rank}
    blocks = {"BLOCK_M": tiles.m, "BLOCK_K": tiles.k, "GROUP_M": tiles.group}
    run = {"warps": tiles.warps, "stages": tiles.stages}
    plain, gated = ({**modal, **blocks, "BLOCK_N": n} for n in (tiles.n, tiles.n_gated))
    yield Kernel(moe_mlp.gate_up_kernel, {"TOP_K": 8, "SAVE": True, **gated}, **run)
    yield Kernel(moe_mlp.rows_kernel, plain, **run)
    yield Kernel(moe_mlp.act_backward_kernel, {"TOP_K": 8, "WRITE_ACT": True, **gated}, **run)
    project = {"TOP_K": 8, "BY_TOKEN": True, **low_rank}
    for m, k in ((tiles.m, tiles.k), (linear.BLOCK_M, linear.BLOCK_K)):
        yield Kernel(shared.project_kernel, {**project, "BLOCK_M": m, "BLOCK_K": k})
    outer = {"TOP_K": 8, "LEFT_BY_TOKEN": True, "RIGHT_BY_TOKEN": True, "WEIGHTED": True}
    for height in (max(16, rank), 64):
        block = {"BLOCK_H": height, "BLOCK_N": 128, "BLOCK_P": shared.ROWS_OF_OUTER}
        fp32 = {"left_ptr": "fp32", "out_ptr": "fp32"}
        yield Kernel(shared.outer_kernel, {**outer, **block}, pointers=fp32, gemm=False)
    block = {"BLOCK_M": linear.BLOCK_M, "BLOCK_N": linear.BLOCK_N}
    yield Kernel(shared.add_low_rank_kernel, {**low_rank, **block}, gemm=False)
    combine = {"TOP_K": 8, "WEIGHTED": True, "BLOCK_N": 1024}
    yield Kernel(moe_mlp.combine_kernel, combine, gemm=False)


def compile_one(kernel: Kernel, dtype: str, arch: int) -> tuple[tuple[str, ...], list[str]]:
    """A row of the table, and what is wrong."""
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    compiled = triton.compile(
        kernel.source(dtype), target=GPUTarget("cuda", arch, 32), options=options
    )
    registers, spills = _resources(compiled.asm["cubin"])
    block_kib, sm_kib, sm_registers = DEVICES[arch]
    kib = compiled.metadata.shared / 1024
    resident = min(
        2048 // (32 * kernel.warps), sm_registers // (registers * 32 * kernel.warps),
        int(sm_kib // (kib + 1)),
    )  # fmt: skip
    wide, narrow = (len(re.findall(p, compiled.asm["ptx"])) for p in (
        r"wgmma\.mma_async|tcgen05\.mma", r"mma\.sync"))  # fmt: skip
    wrong = []
    if spills:
        wrong.append(f"{spills} spilled stores")
    if kib > block_kib:
        wrong.append(f"{kib:.0f} KiB of shared memory, the device has {block_kib}")
    rows = kernel.constants.get("BLOCK_M", 0)
    if arch == 90 and kernel.gemm and dtype != "fp32" and rows >= 64 and not wide:
        wrong.append("a GEMM without warp-group instructions")
    shape = "x".join(
        str(kernel.constants[name])
        for name in ("BLOCK_M", "BLOCK_H", "BLOCK_N", "BLOCK_K", "BLOCK_R")
        if name in kernel.constants
    )
    name = kernel.function.__name__.removesuffix("_kernel")
    cells = (registers, spills, f"{kib:.0f}", resident, wide, narrow, "; ".join(wrong))
    return (f"sm_{arch}", dtype, name, shape, *map(str, cells)), wrong


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and stores of registers to its own memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [str(_OBJDUMP), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    return int(re.search(r"REG:(\d+)", usage)[1]), len(re.findall(r"\bSTL\b", code))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", type=int, choices=DEVICES, default=[*DEVICES])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--rank", nargs="+", type=int, default=[*RANKS])
    given = parser.parse_args(arguments)
    jobs = {}
    for arch, dtype, rank in itertools.product(given.arch, given.dtype, given.rank):
        for _, tiles in FLOAT32 if dtype == "fp32" else HALF:
            for kernel in kernels(tiles, rank):
                key = (arch, dtype, kernel.function.__name__, *sorted(kernel.constants.items()))
                jobs[key] = (kernel, dtype, arch)
    results = [compile_one(*job) for job in tqdm(jobs.values(), unit="kernel")]
    header = ("device", "dtype", "kernel", "tile", "registers", "spills", "shared KiB",
              "programs an SM", "wgmma/tcgen05", "mma", "wrong")  # fmt: skip
    print(markdown(header, [row for row, _ in results]))
    failed = sum(bool(wrong) for _, wrong in results)
    print(f"{len(results)} kernels compiled, {failed} with something wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
