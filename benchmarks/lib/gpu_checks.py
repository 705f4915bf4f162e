"""Checks of a GPU backend: tests, sanitizers, promises, accuracy, and counters of ncu."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from lib import result_files
from lib.cases import Case, Problem, make_problem
from lib.check import Oracle
from lib.providers import set_up_provider
from lib.providers.runner import Runner
from moe_kernels.ops import LoraWeights
from moe_kernels.testing import TOLERANCES, MoeInputs

TESTS_SECONDS, TOOL_SECONDS = 120, 60  # limits
SANITIZERS = {
    "triton": ("memcheck", "racecheck"),
    "cuda": ("memcheck", "racecheck", "initcheck", "synccheck"),
}
# The first has rows of 82 bytes and few rows an expert; the second whole vectors and full tiles.
SANITIZED = (("odd", 37), ("small", 1024))
PROFILED = "gate_up|act_backward|grouped_gemm"
# A single row's error may exceed the limit of all rows together by this factor.
ROW_FACTOR = 4


def run_tests(args: Namespace) -> dict:
    """Run the GPU cases of the test suite in processes of their own, which mostly compile."""
    tests = result_files.ROOT / "tests"
    path = os.pathsep.join(filter(None, (str(tests), os.environ.get("PYTHONPATH"))))
    several = ["-n", "12"] if importlib.util.find_spec("xdist") else []
    cases = {"triton", args.backend}  # every backend uses Triton's kernels too
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *several,
        *(str(tests / "gpu" / f"{name}_suite.py") for name in sorted(cases)),
    ]  # fmt: skip
    result = _run(command, args, TESTS_SECONDS, PYTHONPATH=path)
    lines = result["output"].strip().splitlines() or [""]
    failed = [line for line in lines if line.startswith("FAILED")]
    counts = [line for line in lines if re.search(r"\d (passed|failed|errors?)\b.* in \d", line)]
    return {"passed": result["passed"], "output": (counts or lines)[-1], "failed": failed}


def sanitize(args: Namespace) -> dict:
    """Run compute-sanitizer on small layers, forward and backward, by tool and shape.

    All run at once, since a tool keeps a core busy and the GPU idle.
    """
    # A caching allocator would give each tensor a part of a large block.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with ThreadPoolExecutor() as pool:
        running = {}
        for shape, tokens in SANITIZED:
            program = [*_one_layer(args, shape), "--tokens", str(tokens)]
            if shutil.which("compute-sanitizer"):
                _run(program, args, TOOL_SECONDS)  # compiles the kernels
            for tool in SANITIZERS[args.backend]:
                command = ["compute-sanitizer", "--error-exitcode", "9", "--tool", tool, *program]
                job = partial(_run, command, args, TOOL_SECONDS, **alone)
                running[f"{tool} {shape}"] = pool.submit(job)
        return {name: job.result() for name, job in running.items()}


def profile_counters(args: Namespace) -> dict:
    """Run ncu on the two large kernels, on the first of the timed layers."""
    name, tokens, _ = args.layers[0]
    command = [
        "ncu", "--clock-control", "none", "--kernel-name", f"regex:{PROFILED}",
        "--launch-count", "2", "--section", "SpeedOfLight", "--section", "ComputeWorkloadAnalysis",
        "--section", "MemoryWorkloadAnalysis", "--section", "Occupancy",
    ]  # fmt: skip
    program = [*_one_layer(args, name), "--tokens", str(tokens)]
    result = _run([*command, *program], args, TOOL_SECONDS)
    none = "No kernels were profiled" in result["output"]
    return result | {"passed": False} if none else result


def _one_layer(args: Namespace, shape: str) -> list[str]:
    program = str(result_files.ROOT / "benchmarks" / "one_layer.py")
    return [
        sys.executable, program, "--shape", shape, "--dtype", args.dtype, "--device", args.device,
        "--backend", args.backend,
    ]  # fmt: skip


def _run(command: list[str], args: Namespace, seconds: float, **environment: str) -> dict:
    """Run a program; return whether it "passed", and the end of its "output".

    "passed" is None for a program that did not run to its end, and "output" says why: it is missing
    or its time was over.
    """
    if shutil.which(command[0]) is None:
        return {"passed": None, "output": f"{command[0]} is not on the path"}
    seconds = min(seconds, args.ends - time.perf_counter())
    if seconds < 5:
        return {"passed": None, "output": "no time was left"}
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=result_files.ROOT, timeout=seconds,
            env=os.environ | environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"passed": None, "output": f"not done after {seconds:.0f} s"}
    return {"passed": result.returncode == 0, "output": (result.stdout + result.stderr)[-6000:]}


def layer_case(args: Namespace, name: str, tokens: int, share: float = 0.5) -> Case:
    """Return the case of a timed layer."""
    return Case.named(
        name, T=tokens, dtype=args.dtype, image_share=share, device=args.device, seed=args.seed
    )


def ours(args: Namespace, kind: str = "ours") -> str:
    """Return the name of our provider of a kind on the measured backend."""
    return f"{kind}:{args.backend}"


def measure_accuracy(args: Namespace) -> dict:
    """Measure relative RMS errors against float64 in every timed layer: of all rows together, and
    of the worst row.
    """
    limit, errors, worst = TOLERANCES[getattr(torch, args.dtype)], {}, {}
    for name, tokens, share in args.layers:
        problem = make_problem(layer_case(args, name, tokens, share))
        oracle = Oracle(problem, num_tokens=tokens)
        runner = set_up_provider(ours(args), problem)
        label = f"{name} T={tokens} image {share:.0%}"
        errors[label] = oracle.errors(runner)
        out = runner.forward()[oracle.tokens]
        expected = oracle.expected(runner.adapted, True)["out"]
        worst[label] = ((out - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    return {
        "limit": limit, "errors": errors, "worst_row": worst,
        "passed": all(error <= limit for layer in errors.values() for error in layer.values())
        and all(error <= ROW_FACTOR * limit for error in worst.values()),
    }  # fmt: skip


def check_promises(args: Namespace) -> dict:
    """Check what the package promises of bits, on the first of the timed layers.

    Two runs give the same bits. Text rows keep theirs with NaN in every adapter and with other
    values and routes in all other rows. A captured graph gives the bits of the launches, forward
    and backward; if it could not be captured, "graph_capture" says why.
    """
    name, tokens, _ = args.layers[0]
    problem = make_problem(layer_case(args, name, tokens))
    text = problem.inputs.modality_ids == 0
    runner = set_up_provider(ours(args), problem)
    first, second = (_results(runner, problem.grad_out) for _ in range(2))
    inputs = _with_other_rows(problem.inputs, text)
    others = set_up_provider(ours(args), replace(problem, inputs=inputs))
    changed = _results(others, problem.grad_out)
    keys = ("out", "hidden_states", "topk_weights")
    return {
        "same_bits_twice": all(torch.equal(first[key], second[key]) for key in first),
        "text_bits": all(torch.equal(first[key][text], changed[key][text]) for key in keys),
        "other_rows_changed": not torch.equal(first["out"], changed["out"]),
        "graph_capture": _graph_keeps_bits(problem, args) if args.device == "cuda" else None,
    }


def _with_other_rows(inputs: MoeInputs, text: torch.Tensor) -> MoeInputs:
    def nan(lora: LoraWeights) -> LoraWeights:
        pair = (torch.full_like(tensor, float("nan")) for tensor in lora[:2])
        return LoraWeights(*pair, lora.scaling)

    is_text = text[:, None]
    return inputs._replace(
        hidden_states=torch.where(is_text, inputs.hidden_states, -3 * inputs.hidden_states),
        topk_ids=torch.where(is_text, inputs.topk_ids, inputs.topk_ids.flip(1).roll(1, 0)),
        gate_up_lora=nan(inputs.gate_up_lora), down_lora=nan(inputs.down_lora),
    )  # fmt: skip


def _results(runner: Runner, grad_out: torch.Tensor) -> dict[str, torch.Tensor]:
    out = runner.forward()
    runner.backward(out, grad_out)
    results = {"out": out.detach()} | {k: v.clone() for k, v in runner.gradients().items()}
    runner.clear()
    return results


def _graph_keeps_bits(problem: Problem, args: Namespace) -> bool | str:
    """Return whether a captured graph gives the bits of the launches, or why it is not captured."""
    try:
        runner = set_up_provider(ours(args), problem)
        expected = _results(runner, problem.grad_out)
        graph, results = capture(runner, problem.grad_out)
        for tensor in results.values():
            tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        return all(torch.equal(results[name], expected[name]) for name in expected)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


def capture(
    runner: Runner, grad_out: torch.Tensor | None
) -> tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor]]:
    """Capture a forward, and with ``grad_out`` a backward; return the graph and what it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.set_grad_enabled(grad_out is not None):
        for _ in range(2):  # what is made at first use is made on the stream that is captured
            _once(runner, grad_out)
        runner.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = _once(runner, grad_out)
    torch.cuda.current_stream().wait_stream(stream)
    return graph, results


def _once(runner: Runner, grad_out: torch.Tensor | None) -> dict[str, torch.Tensor]:
    out = runner.forward()
    if grad_out is None:
        return {"out": out}
    runner.backward(out, grad_out)
    return {"out": out.detach()} | runner.gradients()
