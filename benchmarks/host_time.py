"""Times what the host does in a layer's forward and backward on a GPU backend, on the CPU.

    python benchmarks/host_time.py                         # this checkout
    python benchmarks/host_time.py --against ../earlier    # beside another one, in pairs

Every launch does nothing: Triton looks for its compiled kernel as always, but that is an empty
function, and native ops give new memory alone. Tensors are on the CPU, and small in the sizes that
the host does not see. What is left is Python and torch: checks, the choice of backend and tiles,
allocation, arguments of launches, autograd, Triton's launcher. Not in it are the driver and what
torch asks of a device. It is the time of one thread: waiting for a busy machine does not count.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lib.markdown import markdown
from triton.backends.compiler import GPUTarget

HERE = Path(__file__).resolve()
BACKENDS = ("triton", "cuda")  # "cuda" as on sm_90: dispatch, tile maps and combine are native
ADAPTERS = {"adapters": 16, "none": 0}  # rank
HALVES = ("forward alone", "forward", "backward")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.measure:
        return _serve(args)
    checkouts = [HERE.parents[1], *([args.against] if args.against else [])]
    rows = []
    for backend in BACKENDS:
        for name, rank in ADAPTERS.items():
            samples = _in_turn(checkouts, args, backend, rank)
            rows += [_row(backend, name, half, samples) for half in HALVES]
    header = ["backend", "adapters", "half", "us", "us against", "ratio (20-80 %)"]
    print(markdown(header[: 4 if args.against is None else None], rows))
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another checkout, with its extension")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=20, help="of each half in a round")
    parser.add_argument("--measure", nargs=2, metavar=("BACKEND", "RANK"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _in_turn(
    checkouts: list[Path], args: argparse.Namespace, backend: str, rank: int
) -> list[list[list[float]]]:
    """Return microseconds of each half by checkout and round; the checkouts take turns."""
    options = ["--tokens", str(args.tokens), "--calls", str(args.calls)]
    command = [sys.executable, str(HERE), *options, "--measure", backend, str(rank)]
    workers = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {
                "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"
            },
        )
        for path in checkouts
    ]  # fmt: skip
    try:
        rounds = [[_ask(worker) for worker in workers] for _ in range(args.rounds)]
    finally:
        for worker in workers:
            worker.communicate()
    return [list(each) for each in zip(*rounds, strict=True)]


def _ask(worker: subprocess.Popen) -> list[float]:
    worker.stdin.write("\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit("a checkout could not be measured; its error is above")
    return [float(value) for value in line.split()]


def _row(backend: str, adapters: str, half: str, samples: list[list[list[float]]]) -> list[str]:
    index = HALVES.index(half)
    times = [[each[index] for each in rounds] for rounds in samples]
    cells = [backend, adapters, half, *(f"{statistics.median(each):.0f}" for each in times)]
    if len(times) > 1:
        ratios = [ours / theirs for ours, theirs in zip(*times, strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=5) if len(ratios) > 1 else 2 * ratios
        cells.append(f"{statistics.median(ratios):.2f} ({low:.2f}-{high:.2f})")
    return cells


def _serve(args: argparse.Namespace) -> int:
    """Print the microseconds of each half for each line of the input."""
    backend, rank = args.measure[0], int(args.measure[1])
    torch.set_num_threads(1)
    make_launches_do_nothing(backend)
    halves = _halves(args.tokens, backend, rank)
    for half in halves:
        half()
    for _ in sys.stdin:
        print(*(1e6 * _seconds(half, args.calls) for half in halves), flush=True)
    return 0


def _seconds(half: Callable[[], object], calls: int) -> float:
    began = time.thread_time()
    for _ in range(calls):
        half()
    return (time.thread_time() - began) / calls


def make_launches_do_nothing(backend: str) -> None:
    """Replace compiled kernels, native ops and the device, an H100, on which both would run."""
    from triton.runtime import JITFunction, driver

    from moe_kernels import _native, backends
    from moe_kernels.ops import checks

    def compile_nothing(kernel, key, signature, device, *arguments, **options):
        kernel.device_caches[device][0][key] = _Compiled
        return _Compiled

    driver.set_active(_Driver)
    JITFunction._do_compile = compile_nothing
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    checks.reads_values = lambda device: False  # nor are values read on a GPU
    select, device = backends.select, torch.device("cuda", 0)
    backends.select = lambda name, _, *dtype: select(name, device, *dtype)
    if backend == "cuda":
        torch._C._dispatch_has_kernel_for_dispatch_key = lambda *names: True
        _native.why_no_cuda = lambda: None  # older checkouts ask torch and the extension themselves
        _native.runs_on = lambda capability: True
        _native.ops = lambda: _NativeOps


class _Driver:
    """A driver of a device that is not there, as Triton's launcher sees it."""

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0

    @staticmethod
    def get_current_target() -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _Compiled:
    """A kernel that does nothing."""

    function = packed_metadata = None

    @staticmethod
    def launch_metadata(grid, stream, *arguments) -> None:
        return None

    @staticmethod
    def run(*arguments) -> None:
        return None


class _NativeOps:
    """Native ops that return memory of the right shapes."""

    @staticmethod
    def dispatch_with_maps(topk_ids, num_experts, modality_ids, num_modalities, blocks, groups):
        rows, segments = topk_ids.numel(), num_experts * (num_modalities + 1) + 1
        fields = map(topk_ids.new_empty, (rows, rows, num_experts, num_experts + 1, segments))
        perm, inv_perm, tokens, experts, offsets = fields
        maps = _NativeOps.tile_maps(offsets, rows, blocks, groups)
        return perm, inv_perm, tokens, experts, offsets, maps

    @staticmethod
    def tile_maps(segment_offsets, num_rows, blocks, groups):
        from moe_kernels.ops.triton_tile_maps import most_tiles

        return [
            segment_offsets.new_empty(3, columns)
            for block, num in zip(blocks, groups[::5], strict=True)
            for columns in (most_tiles(num_rows, num, block), num)
        ]

    @staticmethod
    def combine(rows, inv_perm, num_rows, weights, num_tokens):
        return rows.new_empty(num_tokens, rows.shape[1])


def _halves(tokens: int, backend: str, rank: int) -> list[Callable[[], object]]:
    """Return inference, the forward of training, and its backward, with all gradients."""
    from moe_kernels.ops import moe_mlp
    from moe_kernels.testing import Shape, make_moe_inputs

    shape = Shape(T=tokens, K=8, E=64, H=64, I=64, r=max(rank, 1))
    options = {} if rank else {"modality": None, "ranks": (0, 0)}
    made = make_moe_inputs(shape, **options)
    inputs = made.to(torch.bfloat16, lora_dtype=torch.float32).requires_grad_()
    leaves = list(inputs.differentiable().values())
    grad_out = torch.randn_like(inputs.hidden_states)

    def forward() -> torch.Tensor:
        return moe_mlp(*inputs[:5], **inputs.keywords(), backend=backend)

    def forward_alone() -> torch.Tensor:
        with torch.no_grad():
            return forward()

    out = forward()

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    return [forward_alone, forward, backward]


if __name__ == "__main__":
    sys.exit(main())
