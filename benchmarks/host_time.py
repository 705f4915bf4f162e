"""Times what the host does in a layer's forward and backward on a GPU backend, on the CPU.

    python benchmarks/host_time.py                         # this checkout
    python benchmarks/host_time.py --against ../earlier    # beside another one, in pairs
    python benchmarks/host_time.py --library ops.so        # a native op a half, beside one a launch

Every launch does nothing: Triton looks for its compiled kernel as always, but that is an empty
function, and native ops give new memory alone. Tensors are on the CPU, and small in the sizes that
the host does not see. What is left is Python and torch: checks, the choice of backend and tiles,
allocation, arguments of launches, autograd, Triton's launcher. Not in it are the driver and what
torch asks of a device. It is the time of one thread: waiting for a busy machine does not count.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lib.markdown import markdown
from triton.backends.compiler import GPUTarget

HERE = Path(__file__).resolve()
BACKENDS = ("triton", "cuda")  # "cuda" as on sm_90: dispatch, tile maps and combine are native
ADAPTERS = {"adapters": 16, "none": 0}  # rank
HALVES = ("forward alone", "forward", "backward")
WITHOUT_API = ("forward without checks and autograd", "backward without them")
# Courses of "cuda" where the extension multiplies: a native op for each half, or for each launch.
COURSES = ("cuda, an op a half", "cuda, an op a launch")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.measure:
        return _serve(args)
    if args.library:
        build(args.library)
        _print(args, COURSES[:1], [(HERE.parents[1], course) for course in COURSES])
        return 0
    checkouts = [HERE.parents[1], *([args.against] if args.against else [])]
    _print(args, BACKENDS, [(checkout, None) for checkout in checkouts])
    return 0


def _print(
    args: argparse.Namespace, backends: Sequence[str], measured: list[tuple[Path, str | None]]
) -> None:
    """Print times of the backends by each measured checkout, or by its own course instead."""
    rows = []
    for backend in backends:
        for name, rank in ADAPTERS.items():
            workers = [(path, course or backend) for path, course in measured]
            samples = _in_turn(workers, args, rank)
            halves = (*HALVES, *WITHOUT_API) if args.library else HALVES
            rows += [_row(backend, name, i, half, samples) for i, half in enumerate(halves)]
    header = ["backend", "adapters", "half", "us", "us against", "ratio (20-80 %)"]
    print(markdown(header[: 4 if len(measured) == 1 else None], rows))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another checkout, with its extension")
    parser.add_argument("--library", type=Path, help="of tests/support/host_kernels.build_ops")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=20, help="of each half in a round")
    parser.add_argument("--measure", nargs=2, metavar=("BACKEND", "RANK"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _in_turn(
    measured: list[tuple[Path, str]], args: argparse.Namespace, rank: int
) -> list[list[list[float]]]:
    """Return microseconds of each half by checkout and course, and round; these take turns."""
    options = ["--tokens", str(args.tokens), "--calls", str(args.calls)]
    options += ["--library", str(args.library)] if args.library else []
    workers = [
        subprocess.Popen(
            [sys.executable, str(HERE), *options, "--measure", course, str(rank)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {
                "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"
            },
        )
        for path, course in measured
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


def _row(
    backend: str, adapters: str, index: int, half: str, samples: list[list[list[float]]]
) -> list[str]:
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
    make_launches_do_nothing(backend, args.library)
    halves = _halves(args.tokens, backend.partition(",")[0], rank)
    if args.library:
        halves += _without_api(halves)
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


def build(path: Path) -> None:
    """Build the library of native ops, unless it is there."""
    if path.exists():
        return
    sys.path.insert(0, str(HERE.parents[1] / "tests"))
    from support import host_kernels

    path.parent.mkdir(parents=True, exist_ok=True)
    host_kernels.build_ops(path.parent).rename(path)


def make_launches_do_nothing(backend: str, library: Path | None = None) -> None:
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
    if backend != "triton":
        torch._C._dispatch_has_kernel_for_dispatch_key = lambda *names: True
        _native.why_no_cuda = lambda: None  # older checkouts ask torch and the extension themselves
        _native.runs_on = lambda capability: True
    if backend in COURSES:
        _take_ops_of(library, in_one_call=backend == COURSES[0])
    elif backend == "cuda":
        _native.ops = lambda: _NativeOps


def _take_ops_of(library: Path, *, in_one_call: bool) -> None:
    """Use a library's ops, on a device where the extension multiplies."""
    from moe_kernels import _native
    from moe_kernels.ops.moe_mlp import cuda_impl

    _native.ops()  # registers the ops that the library has kernels of
    torch.ops.load_library(str(library.resolve()))
    ctypes.CDLL(str(library.resolve())).set_idle(True)
    os.environ["MOE_KERNELS_ENGINE"] = "1"
    _native.has_engine = lambda: True
    if not in_one_call:
        cuda_impl.in_one_call = lambda *layer: False


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


def _without_api(halves: list[Callable[[], object]]) -> list[Callable[[], object]]:
    """Return the backend's own forward and backward, with the arguments that the halves give."""
    from moe_kernels.ops.moe_mlp import cuda_impl

    seen = {}

    def record(name: str) -> Callable[[], object]:
        function = getattr(cuda_impl, name)

        def recorded(*arguments: object) -> object:
            seen[name] = arguments
            return function(*arguments)

        setattr(cuda_impl, name, recorded)
        return torch.no_grad()(lambda: function(*seen[name]))

    alone = [record("forward"), record("backward")]
    for half in halves[1:]:
        half()
    return alone


if __name__ == "__main__":
    sys.exit(main())
