"""Time the Triton tiles on this machine's GPU and store the best ones.

    moe-kernels tune --experts 64 --hidden 2048 --intermediate 1024 --top-k 8

For each number of tokens every candidate runs forward and backward of ``moe_mlp`` on balanced
routing, with float32 adapters on half the rows; on a GPU as a CUDA graph, which has no gaps between
launches. Compiling a candidate takes ten to twenty seconds, so a whole table takes long;
``--limit`` and fewer ``--tokens`` shorten it. The file (``MOE_KERNELS_TILES``) holds the fastest
tiles by the average number of rows of an expert, for this device, dtype and shape; the next process
uses them. Other tiles sum in another order, so results keep their accuracy, not their last bits.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_kernels import backends, env
from moe_kernels.files import replacing
from moe_kernels.ops import moe_mlp
from moe_kernels.ops.moe_mlp import triton_tiles
from moe_kernels.ops.moe_mlp.tiles import Tiles, force
from moe_kernels.progress import bar
from moe_kernels.testing import MoeInputs, Shape, assert_close, make_moe_inputs

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def candidates(rows_per_expert: int, dtype: torch.dtype) -> list[Tiles]:
    """List the tiles to try: heights near the rows of an expert, in sizes that compile."""
    heights = [m for m in (16, 32, 64, 128) if m // 4 <= rows_per_expert] or [16]
    depths = (32,) if dtype == torch.float32 else (32, 64, 128)
    found = [
        Tiles(m, n, n // 2, k, 8, 8 if m * n >= 128 * 128 else 4, stages)
        for m, n, k, stages in itertools.product(heights[-3:], (64, 128, 256), depths, (3, 4))
        if k < 128 or m == 16
    ]
    # Large tiles of dA' also with registers for two programs.
    return found + [t._replace(act_registers=128) for t in found if t.warps == 8 and t.n == 256]


def tune(shape: Shape, dtype: torch.dtype, device: str, *, trials: int = 10, limit: int = 0):
    """Find the fastest tiles for one shape.

    Args:
        trials: timed runs of each candidate; the median counts.
        limit: most candidates to try; 0: all.

    Returns:
        (the fastest, its seconds), or None where no candidate ran.
    """
    inputs = _inputs(shape, dtype, device)
    grad_out = torch.randn_like(inputs.hidden_states)
    expected = _run(inputs, grad_out)
    best = None
    average = shape.T * shape.K // shape.E
    chosen = triton_tiles.built_in(dtype, triton_tiles.capability(inputs.hidden_states.device))
    found = candidates(average, dtype)
    found += [tiles for least, tiles in chosen if average >= least and tiles not in found][:1]
    trials_left = bar(found[: limit or None], desc=f"T = {shape.T}", unit="tiles")
    for tiles in trials_left:
        try:
            with force(tiles):
                for name, tensor in _run(inputs, grad_out).items():
                    assert_close(tensor, expected[name], dtype=dtype, name=name)
                seconds = _seconds(inputs, grad_out, trials)
        except Exception as error:  # mostly too much shared memory or too many registers
            trials_left.write(f"{tiles}: {type(error).__name__} {str(error)[:100]}")
            continue
        if best is None or seconds < best[1]:
            best = tiles, seconds
    return best


def _inputs(shape: Shape, dtype: torch.dtype, device: str) -> MoeInputs:
    """Make inputs in the dtypes of training: half the rows image, no padding."""
    inputs = make_moe_inputs(shape, modality="no_padding").to(dtype, lora_dtype=torch.float32)
    return _on(inputs, device).requires_grad_()


def _on(inputs: MoeInputs, device: str) -> MoeInputs:
    def move(value):
        if isinstance(value, tuple):
            return type(value)(*map(move, value))
        return None if value is None else value.to(device)

    return MoeInputs(*map(move, inputs))


def _run(inputs: MoeInputs, grad_out: Tensor) -> dict[str, Tensor]:
    """Return the output and every gradient."""
    out = moe_mlp(*inputs[:5], **inputs.keywords(), backend="triton")
    leaves = inputs.differentiable()
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def _seconds(inputs: MoeInputs, grad_out: Tensor, trials: int) -> float:
    """Return the median time of a warm run."""
    if not grad_out.is_cuda:
        return statistics.median(_timed(lambda: _run(inputs, grad_out)) for _ in range(trials))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run(inputs, grad_out)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    replay()
    return statistics.median(_timed(replay) for _ in range(trials))


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def store(key: str, table: list[tuple[int, Tiles]]) -> None:
    """Add a table to the file of tuned tiles, atomically."""
    path = env.tiles_path()
    tables = triton_tiles.read(path) | {key: sorted(table, reverse=True)}
    content = {k: [(least, t._asdict()) for least, t in each] for k, each in tables.items()}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    triton_tiles.forget_stored()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="moe-kernels tune", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--experts", type=int, required=True)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--intermediate", type=int, required=True)
    parser.add_argument("--top-k", type=int, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 1024, 8192])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--trials", type=int, default=10, help="timed runs of each candidate")
    parser.add_argument("--limit", type=int, default=0, help="candidates to try (default: all)")
    args = parser.parse_args(arguments)
    if reason := backends.available()["triton"]:
        parser.error(f"nothing to tune: {reason}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune every requested number of tokens, and store the table."""
    args = parse(arguments)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", _DTYPES[args.dtype]
    table = []
    for tokens in sorted(args.tokens):
        shape = Shape(tokens, args.top_k, args.experts, args.hidden, args.intermediate, args.rank)
        best = tune(shape, dtype, device, trials=args.trials, limit=args.limit)
        if best:
            table.append((tokens * args.top_k // args.experts, best[0]))
            print(f"T = {tokens}: {best[0]}, {best[1] * 1e3:.3f} ms")
    if not table:
        raise SystemExit(
            f"no tiles could run on {device} in {args.dtype}: try fewer --tokens or another "
            "--dtype, and see moe-kernels info"
        )
    stack = torch.empty(
        args.experts, 2 * args.intermediate, args.hidden, dtype=dtype, device=device
    )
    store(triton_tiles.key_of(stack), table)
    print(f"wrote {env.tiles_path()}")


if __name__ == "__main__":
    main()
