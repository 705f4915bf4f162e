"""The sections of a run on a GPU: checks of a backend, then its speed."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module

import torch
from torch.profiler import ProfilerActivity, profile

from lib.cases import DECODE_TOKENS, Problem, make_problem
from lib.cli import options_of
from lib.costs import table as cost_table
from lib.gpu_checks import (
    capture,
    check_promises,
    layer_case,
    measure_accuracy,
    ours,
    profile_counters,
    run_tests,
    sanitize,
)
from lib.markdown import markdown
from lib.providers import ACCELERATED, BASE_COMPETITORS, HF, PEFT, SPLIT, SPLITS, set_up_provider
from lib.runs import run_decode, run_training
from lib.steps import MODELS
from lib.steps.training import run as run_steps
from lib.timing import now
from moe_kernels.ops import dispatch
from moe_kernels.testing import MoeInputs

Jobs = Iterator[Callable[[], dict]]

# Shape, tokens, share of image rows. The competitors run in the first case of a shape and a number
# of tokens.
LAYERS = (
    ("olmoe", 8192, 0.25), ("olmoe", 8192, 1.0), ("mixtral", 8192, 0.25), ("qwen3", 32768, 0.5),
    ("olmoe", 32768, 0.25),
)  # fmt: skip
TRIAL_LAYERS = (("tiny", 24, 0.25), ("tiny", 24, 1.0))
_SLOW = {"hf:eager", "liger"}  # never the fastest: a few rounds of them are enough
_CALLS_IN_GRAPH = 20


def measure_ceilings(args: Namespace) -> dict:
    """TB/s of a copy, read and written, and TFLOP/s of a square GEMM of random numbers."""
    megabytes, size = (1, 64) if args.trial else (2048, 8192)
    dtype = getattr(torch, args.dtype)
    source = torch.randn(megabytes * 2**18, device=args.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=args.device, dtype=dtype) for _ in range(2))
    copy = _median(lambda: target.copy_(source), args.device)
    gemm = _median(lambda: left @ right, args.device)
    return {
        "copy_TBps": 2 * source.nbytes / copy / 1e12,
        "gemm_TFLOPps": 2 * size**3 / gemm / 1e12,
        "gemm_size": size,
    }


def _median(function: Callable[[], object], device: str, rounds: int = 10) -> float:
    for _ in range(3):
        function()
    times = []
    for _ in range(rounds):
        started = now(device)
        function()
        times.append(now(device) - started)
    return sorted(times)[rounds // 2]


def measure_layers(args: Namespace) -> Jobs:
    """Forward and backward of a layer."""
    seen = set()
    for name, tokens, share in args.layers:
        with_competitors = (name, tokens) not in seen
        competitors = []
        if with_competitors:
            competitors = [*BASE_COMPETITORS, PEFT, ours(args, ACCELERATED), *SPLITS, "scattermoe"]
        seen.add((name, tokens))
        providers = ["bound", *_our_kinds(args), *competitors]
        options = options_of(args, thorough={*providers} - _SLOW, memory=(ours(args), SPLIT))
        yield partial(run_training, layer_case(args, name, tokens, share), providers, options)


def _our_kinds(args: Namespace) -> list[str]:
    return [ours(args, kind) for kind in ("ours", "ours_text", "ours_base")]


def measure_decode(args: Namespace) -> Jobs:
    """One call without autograd, on a few tokens."""
    for tokens in DECODE_TOKENS:
        case = layer_case(args, "tiny" if args.trial else "olmoe", tokens)
        options = options_of(args, rotated_bytes=args.rotate_mb * 10**6)
        yield partial(run_decode, case, [*_our_kinds(args), *HF], options)


def measure_steps(args: Namespace) -> Jobs:
    """Training steps of a whole model."""
    model = MODELS["tiny" if args.trial else "olmoe-1b-7b"]
    options = options_of(args, rounds=5, min_rounds=2)
    yield partial(run_steps, model, options, args.device, args.seed, args.backend)


def measure_kernels(args: Namespace) -> dict:
    """Milliseconds of every kernel in one forward and backward, by the profiler."""
    case = layer_case(args, *args.layers[0])
    rows = _profile(args, make_problem(case))
    print(markdown(("kernel", "launches", "ms"), [(k, str(n), f"{t:.3f}") for k, n, t in rows]))
    print(cost_table(case, 3.0, 800.0, args.backend))
    return {"case": case.describe(), "backend": args.backend, "kernels": rows}


def _profile(args: Namespace, problem: Problem) -> list[list]:
    """Name, launches and milliseconds of every kernel, the longest first."""
    runner = set_up_provider(ours(args), problem)
    runner.backward(runner.forward(), problem.grad_out)
    runner.clear()  # or the second backward would add to these gradients
    on_gpu = args.device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        runner.backward(runner.forward(), problem.grad_out)
        now(args.device)
    time_name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = [
        [event.key[:70], event.count, getattr(event, time_name) / 1e3]
        for event in profiler.key_averages()
        if getattr(event, time_name)
    ]
    return sorted(rows, key=lambda row: -row[2])


def measure_dispatch(args: Namespace) -> dict:
    """Microseconds of torch's dispatch, and of the backend's with the tile maps of a forward pass.

    On a GPU the calls are in CUDA graphs, since launching them takes longer than they do.
    """
    case = layer_case(args, *args.layers[0])
    inputs = make_problem(case).inputs
    by_torch = partial(
        dispatch, inputs.topk_ids, case.shape.E, modality_ids=inputs.modality_ids,
        num_modalities=1, backend="reference",
    )  # fmt: skip
    by_backend = partial(_dispatch_with_maps, args.backend, inputs)
    times = {
        name: 1e6 * _seconds_in_a_graph(function, args.device)
        for name, function in (("reference", by_torch), (args.backend, by_backend))
    }
    return {
        "case": case.describe(),
        "backend": args.backend,
        "rows": inputs.topk_ids.numel(),
        "us": times,
    }


def _seconds_in_a_graph(function: Callable[[], object], device: str) -> float:
    """Seconds of one call among many in a CUDA graph; not on a GPU, of a plain call.

    With many calls, the launch of the replay and the wait for it count little.
    """
    if device != "cuda":
        return _median(function, device)
    function()  # not in the graph: what is made at first use
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS_IN_GRAPH):
            function()
    return _median(graph.replay, device) / _CALLS_IN_GRAPH


def _dispatch_with_maps(backend: str, inputs: MoeInputs) -> None:
    implementation = import_module(f"moe_kernels.ops.dispatch.{backend}_impl")
    maps = import_module("moe_kernels.ops.triton_tile_maps")
    experts = inputs.gate_up_proj.shape[0]
    requested = [(maps.by_expert(experts, 1), 128), (maps.by_adapter(experts, 1), 64)]
    implementation.dispatch_with_maps(inputs.topk_ids, experts, inputs.modality_ids, 1, requested)


def measure_graphs(args: Namespace) -> dict:
    """Milliseconds of the base in a replayed CUDA graph, without gaps between launches: forward,
    and forward and backward.
    """
    layers = {}
    for name, tokens, share in args.layers:
        problem = make_problem(layer_case(args, name, tokens, share))
        runner = set_up_provider(ours(args, "ours_base"), problem)
        times = {}
        for mode, grad_out in (("forward", None), ("both", problem.grad_out)):
            graph, _ = capture(runner, grad_out)
            times[mode] = 1e3 * _median(graph.replay, args.device)
            del graph
            runner.clear()
        layers[f"{name} T={tokens}"] = times
    return layers


def _once(function: Callable[[Namespace], dict]) -> Callable[[Namespace], Jobs]:
    """A section of one job."""
    return lambda args: iter([partial(function, args)])


SECTIONS: dict[str, Callable[[Namespace], Jobs]] = {
    "ceilings": _once(measure_ceilings),
    "promises": _once(check_promises),
    "accuracy": _once(measure_accuracy),
    "tests": _once(run_tests),
    "sanitizer": _once(sanitize),
    "training": measure_layers,
    "graphs": _once(measure_graphs),
    "decode": measure_decode,
    "dispatch": _once(measure_dispatch),
    "kernels": _once(measure_kernels),
    "steps": measure_steps,
    "counters": _once(profile_counters),
}
# Sections whose result is a list with a record for each case; that of the others is one record.
LISTS = ("training", "decode", "steps")
