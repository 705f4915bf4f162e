"""Checks a GPU backend, then times it against its rivals, in one call.

    python benchmarks/run_gpu.py                               # on a GPU, under 9 minutes
    python benchmarks/run_gpu.py --backend cuda --only promises training    # a part of it
    TRITON_INTERPRET=1 python benchmarks/run_gpu.py --trial    # tiny shapes, on any machine

What fails is recorded with its error, and the rest still runs; the file is written anew after each
case, and none starts after --deadline. Ends with 1 where something is wrong, with 2 where something
was left out. Rivals: transformers' experts implementations, grouped_mm
also compiled, PEFT and split LoRA on grouped_mm, and where they are installed Liger's fused MoE and
axolotl's ScatterMoE with LoRA.
"""

import gc
import os
import re
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a rival that must be downloaded is missing, at once
import bench_training_step
import torch
from bars import Bar
from lib.cases import _weights, make_problem
from lib.cli import add_rotation, finish, make_parser, options_of
from lib.costs import backward, forward
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
from lib.providers import provider_names, set_up_provider
from lib.result_files import default_path
from lib.runs import compare, fastest, run_decode, run_training, time_of
from lib.timing import Statistics, now
from tables import bars_table, case_title, providers_table, steps_table
from torch.profiler import ProfilerActivity, profile

from moe_kernels.ops import dispatch
from moe_kernels.testing import MoeInputs

NAME = "gpu"
PEFT, SPLIT, GROUPED = "peft:grouped_mm", "split:masked", "hf:grouped_mm"
SPLITS = (SPLIT, "split:gathered", "split:compiled")
HF = [name for name in provider_names() if name.startswith("hf:")]
SLOW = ("hf:eager", "liger")  # no bar is theirs: a few rounds tell
PEERS = [*HF, "hf_compiled:grouped_mm", "liger"]  # of the base, without adapters
# shape, tokens, share of image rows; the first of a shape and number of tokens has all rivals
LAYERS = (
    ("olmoe", 8192, 0.25), ("olmoe", 8192, 1.0), ("mixtral", 8192, 0.25), ("qwen3", 32768, 0.5),
    ("olmoe", 32768, 0.25),
)  # fmt: skip
TRIAL_LAYERS = (("tiny", 24, 0.25), ("tiny", 24, 1.0))
DECODE_TOKENS = (1, 8, 64)

GEMM_RATE = {"forward": 480.0, "both": 400.0}  # TFLOP/s of the base, qwen3
OVER_BASE = {0.25: 1.04, 1.0: 1.10}
FASTER_THAN_PEER = 0.95
FASTER_THAN_GROUPED = 1.8
FASTER_THAN_PEFT = 3.0
FASTER_THAN_SPLIT = 1.5
MEMORY_OF_SPLIT = 0.5
OVER_READING = 1.15
DISPATCH_US, DISPATCH_OVER_TORCH = 25.0, 4.0
CALLS_IN_GRAPH = 20
# number, what, its kernels, its names in the cost model, wanted
BY_COPY = (
    (10, "combine", "combine", ("combine", "combine dX"), 0.85),
    (
        11, "low-rank passes", "project|outer|sum_parts",
        ("shrink x", "shrink act", "du2, dB2", "du1, dB1", "dA1", "dA2"), 0.8,
    ),
)  # fmt: skip
FASTER_STEP = 2.0


# --- what is measured


def measure_ceilings(given: Namespace) -> dict:
    """TB/s of a copy, read and written, and TFLOP/s of a square GEMM of random numbers."""
    megabytes, size = (1, 64) if given.trial else (2048, 8192)
    source = torch.randn(megabytes * 2**18, device=given.device)
    target = torch.empty_like(source)
    left, right = (
        torch.randn(size, size, device=given.device, dtype=dtype_of(given)) for _ in "ab"
    )
    copy = _median(lambda: target.copy_(source), given.device)
    gemm = _median(lambda: left @ right, given.device)
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


def measure_layers(given: Namespace) -> Iterator[Callable[[], dict]]:
    seen = set()
    for name, tokens, share in given.layers:
        case, mine = layer_case(given, name, tokens, share), _ours_of(given)
        rivals = [] if (name, tokens) in seen else [*PEERS, PEFT, *SPLITS, "scattermoe"]
        seen.add((name, tokens))
        names = ["bound", *mine, *rivals]
        options = options_of(given, thorough={*names} - {*SLOW}, memory=(ours(given), SPLIT))
        yield partial(run_training, case, names, options)


def _ours_of(given: Namespace) -> list[str]:
    return [ours(given, kind) for kind in ("ours", "ours_text", "ours_base")]


def measure_decode(given: Namespace) -> Iterator[Callable[[], dict]]:
    for tokens in DECODE_TOKENS:
        case = layer_case(given, "tiny" if given.trial else "olmoe", tokens)
        options = replace(options_of(given), rotated_bytes=given.rotate_mb * 10**6)
        yield partial(run_decode, case, [*_ours_of(given), *HF], options)


def measure_kernels(given: Namespace) -> dict:
    """ms of every kernel of a forward and backward, as the profiler sees them."""
    case = layer_case(given, *given.layers[0])
    problem = make_problem(case)
    runner = set_up_provider(ours(given), problem)
    runner.backward(runner.forward(), problem.grad_out)
    runner.clear()  # or the gradients would be added to these
    on_gpu = given.device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        runner.backward(runner.forward(), problem.grad_out)
        now(given.device)
    time_of_event = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = [
        (event.key[:70], event.count, getattr(event, time_of_event) / 1e3)
        for event in profiler.key_averages()
        if getattr(event, time_of_event)
    ]
    rows.sort(key=lambda row: -row[2])
    print(markdown(("kernel", "launches", "ms"), [(k, str(n), f"{t:.3f}") for k, n, t in rows]))
    print(cost_table(case, 3.0, 800.0, given.backend))
    return {"case": case.describe(), "kernels": [list(row) for row in rows]}


def measure_dispatch(given: Namespace) -> dict:
    """us of dispatch for the first of the timed layers, by torch, and by the backend with the tile
    maps of a forward pass; on a GPU in CUDA graphs, since launching takes longer than they do.
    """
    problem = make_problem(layer_case(given, *given.layers[0]))
    inputs, found = problem.inputs, {}
    for backend in ("reference", given.backend):

        def sort(backend: str = backend) -> None:
            if backend == given.backend:
                _dispatch_with_maps(backend, inputs)
            else:
                dispatch(
                    inputs.topk_ids, problem.case.shape.E, modality_ids=inputs.modality_ids,
                    num_modalities=1, backend=backend,
                )  # fmt: skip

        found[backend] = 1e6 * _seconds_in_a_graph(sort, given.device)
    return {"rows": inputs.topk_ids.numel(), "us": found}


def _seconds_in_a_graph(function: Callable[[], object], device: str) -> float:
    """Of one call among many in a CUDA graph, so that the replay's own launch and the wait for it
    count little; elsewhere of a call.
    """
    if device != "cuda":
        return _median(function, device)
    function()  # what is made at first use
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_IN_GRAPH):
            function()
    return _median(graph.replay, device) / CALLS_IN_GRAPH


def _dispatch_with_maps(backend: str, inputs: MoeInputs) -> None:
    implementation = import_module(f"moe_kernels.ops.dispatch.{backend}_impl")
    maps = import_module("moe_kernels.ops.triton_tile_maps")
    experts = inputs.gate_up_proj.shape[0]
    wanted = [(maps.by_expert(experts, 1), 128), (maps.by_adapter(experts, 1), 64)]
    implementation.dispatch_with_maps(inputs.topk_ids, experts, inputs.modality_ids, 1, wanted)


def measure_graphs(given: Namespace) -> dict:
    """ms of the base without gaps between launches: forward, and forward and backward, each as a
    CUDA graph that is replayed.
    """
    found = {}
    for name, tokens, share in given.layers:
        problem = make_problem(layer_case(given, name, tokens, share))
        runner = set_up_provider(ours(given, "ours_base"), problem)
        times = {}
        for mode, grad_out in (("forward", None), ("both", problem.grad_out)):
            graph, _ = capture(runner, grad_out)
            times[mode] = 1e3 * _median(graph.replay, given.device)
            del graph
            runner.clear()
        found[f"{name} T={tokens}"] = times
    return found


def measure_step(given: Namespace) -> Iterator[Callable[[], dict]]:
    name = "tiny" if given.trial else "olmoe-1b-7b"
    options = replace(options_of(given), rounds=5, min_rounds=2)
    model = bench_training_step.MODELS[name]
    yield partial(bench_training_step.run, model, options, given.device, given.seed, given.backend)


# One result of each of the first, a list of those of the second.
SINGLE: dict[str, Callable[[Namespace], dict]] = {
    "ceilings": measure_ceilings,
    "promises": check_promises,
    "accuracy": measure_accuracy,
    "tests": run_tests,
    "sanitizer": sanitize,
    "graphs": measure_graphs,
    "dispatch": measure_dispatch,
    "kernels": measure_kernels,
    "counters": profile_counters,
}
SEVERAL: dict[str, Callable[[Namespace], Iterator[Callable[[], dict]]]] = {
    "training": measure_layers,
    "decode": measure_decode,
    "steps": measure_step,
}
SECTIONS = (
    "ceilings", "promises", "accuracy", "tests", "sanitizer", "training", "graphs", "decode",
    "dispatch", "kernels", "steps", "counters",
)  # fmt: skip


# --- what is judged


def judge(results: Mapping, given: Namespace) -> list[Bar]:
    """The bars of the sections that were measured."""
    mine = _ours_of(given)
    bars = [bar for record in results.get("training", ()) for bar in _layer_bars(record, *mine)]
    ceilings = results.get("ceilings") or {}
    for record in results.get("decode", ()):
        bars += _decode_bar(record, mine[1], ceilings.get("copy_TBps"))
    for record in results.get("steps", ()):
        ratio = compare(record, PEFT, "ours", "step")
        case = record["case"]["name"]
        bars.append(Bar(8, "step, tokens/s over PEFT's", case, ratio, FASTER_STEP, at_least=True))
    if given.backend == "cuda":
        bars += _launch_bars(results, given, ceilings.get("copy_TBps"))
    return sorted(bars, key=lambda bar: bar.number)


def _launch_bars(results: Mapping, given: Namespace, copy_rate: float | None) -> Iterator[Bar]:
    """Of the small launches: dispatch by its time, the others by the operands and results that they
    move in the time that the profiler saw, each counted once, as a share of the rate of a copy.
    """
    case = layer_case(given, *given.layers[0])
    label = f"{case.name} T={case.shape.T} image {case.image_share:.0%}"
    if "dispatch" in results:
        torch_us, own_us = results["dispatch"]["us"].values()
        yield Bar(9, "dispatch and tile maps, us", label, _one(own_us), DISPATCH_US)
        what = "speed of dispatch and tile maps over torch's dispatch"
        yield Bar(9, what, label, _one(torch_us / own_us), DISPATCH_OVER_TORCH, at_least=True)
    if "kernels" not in results or not copy_rate:
        return
    costs = [*forward(case), *backward(case, given.backend)]
    for number, what, kernels, names, limit in BY_COPY:
        moved = sum(cost.useful_bytes for cost in costs if cost.kernel in names)
        ms = sum(ms for name, _, ms in results["kernels"]["kernels"] if re.search(kernels, name))
        share = _one(moved / (ms * 1e9) / copy_rate) if ms else None
        yield Bar(number, f"{what}, share of a copy's rate", label, share, limit, at_least=True)


def _one(value: float) -> Statistics:
    return Statistics(value, value, value, 1)


def _layer_bars(record: Mapping, adapted: str, text: str, base: str) -> Iterator[Bar]:
    case = f"{case_title(record['case'])} T={record['case']['T']}"
    share = record["case"]["image_share"]
    if record["case"]["shape"] == "qwen3":
        for mode, limit in GEMM_RATE.items():
            rate = _rate(record, base, mode)
            yield Bar(1, f"TFLOP/s of the base, {mode}", case, rate, limit, at_least=True)
    if GROUPED in record["providers"]:  # a case with rivals
        yield from _rival_bars(record, case, adapted, base)
    if share in OVER_BASE:
        what = f"adapters at {share:.0%} image over the base"
        yield Bar(4, what, case, compare(record, adapted, base, "both"), OVER_BASE[share])
    what = "adapters without image over the base"
    yield Bar(4, what, case, compare(record, text, base, "both"), 1.0, by_p20=True)


def _rival_bars(record: Mapping, case: str, adapted: str, base: str) -> Iterator[Bar]:
    """Without a number where a rival is missing or wrong."""

    def faster(number: int, what: str, rival: str | None, mine: str, limit: float, mode="both"):
        ratio = compare(record, rival, mine, mode) if rival else None
        return Bar(number, what, case, ratio, limit, at_least=True)

    for mode in ("forward", "both"):
        what = f"speed of the base over the fastest peer's, {mode}"
        yield faster(2, what, fastest(record, PEERS, mode), base, FASTER_THAN_PEER, mode)
    what = "speed of the base over transformers' grouped_mm"
    yield faster(3, what, GROUPED, base, FASTER_THAN_GROUPED)
    yield faster(5, "speed over PEFT on grouped_mm", PEFT, adapted, FASTER_THAN_PEFT)
    split = fastest(record, SPLITS, "both")
    yield faster(6, "speed over split LoRA", split, adapted, FASTER_THAN_SPLIT)
    entries = [record["providers"].get(name, {}) for name in (adapted, SPLIT)]
    memory = [None if entry.get("error") else entry.get("memory") for entry in entries]
    part = _one(memory[0]["saved"] / memory[1]["saved"]) if all(memory) else None
    yield Bar(6, "kept for backward over split LoRA's", case, part, MEMORY_OF_SPLIT)


def _rate(record: Mapping, base: str, mode: str) -> Statistics | None:
    time = time_of(record, base, mode)
    if time is None or record["providers"][base]["error"]:
        return None
    work = record["flops"][mode] / 1e12
    return Statistics(work / time.median, work / time.p80, work / time.p20, time.count)


def _decode_bar(record: Mapping, text: str, copy_rate: float | None) -> Iterator[Bar]:
    """Over the time to read the weights that are hit, at the rate of a copy."""
    time = time_of(record, text, "decode")
    case = f"{case_title(record['case'])} T={record['case']['T']}"
    ratio = None
    if time and copy_rate and not record["providers"][text]["error"]:
        reading = record["bytes"]["decode"] / copy_rate / 1e12
        ratio = Statistics(
            time.median / reading, time.p20 / reading, time.p80 / reading, time.count
        )
    yield Bar(7, "decode over reading the weights", case, ratio, OVER_READING)


# --- the program


def dtype_of(given: Namespace) -> torch.dtype:
    return getattr(torch, given.dtype)


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = make_parser(__doc__, NAME, dtypes=False)
    add_rotation(parser)
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS])
    parser.add_argument(
        "--deadline",
        type=float,
        default=480.0,
        metavar="S",
        help="no case starts later, and no program that it starts runs longer",
    )
    parser.add_argument("--trial", action="store_true", help="tiny shapes, to see that it runs")
    parser.set_defaults(rounds=20, max_seconds=4.0)
    given = parser.parse_args(arguments)
    given.dtype = "float32" if given.trial else "bfloat16"
    given.layers = TRIAL_LAYERS if given.trial else LAYERS
    given.ends = time.perf_counter() + given.deadline
    if given.device != "cuda" and not given.trial:
        parser.error("there is no CUDA device; --trial runs tiny shapes in Triton's interpreter")
    if not given.output and (given.trial or {*given.only} != {*SECTIONS}):
        given.output = Path(f"out/bench/gpu-{'trial' if given.trial else 'part'}.json")
    if not given.output:
        given.output = default_path(f"{NAME}-{given.backend}", given.device)
    return given


def jobs_of(name: str, given: Namespace) -> Iterator[Callable[[], dict]]:
    """What a section runs, one by one."""
    if name in SINGLE:
        yield partial(SINGLE[name], given)
    else:
        yield from SEVERAL[name](given)


def attempt(name: str, job: Callable[[], dict], results: dict, given: Namespace) -> None:
    """Put the result of a job, or its error, into ``results``; leave no memory behind."""
    try:
        found = job()
        if name in SINGLE:
            results[name] = found
        else:
            results.setdefault(name, []).append(found)
    except Exception:
        results["errors"].setdefault(name, []).append(traceback.format_exc())
        print(results["errors"][name][-1], file=sys.stderr)
    results["bars"] = [bar.to_dict() for bar in judge(results, given)]
    _weights.cache_clear()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wrong(results: Mapping) -> list[str]:
    """What is not as it should be, speed apart."""
    found = [f"{name}: an error" for name in results["errors"]]
    promises = results.get("promises", {})
    found += [
        f"promises: {key}: {kept}" for key, kept in promises.items() if kept not in (True, None)
    ]
    found += [f"{name}: {entry}" for name, entry in _programs(results) if entry["passed"] is False]
    if results.get("accuracy", {}).get("passed") is False:
        found.append(f"accuracy: above {results['accuracy']['limit']}")
    for name in SEVERAL:
        for record in results.get(name, ()):
            for provider, entry in record["providers"].items():
                if provider.startswith("ours") and entry.get("error"):
                    found.append(f"{name}: {provider}: {entry['error']}")
    return found


def left_out(results: Mapping) -> list[str]:
    """What was to be found out, and was not."""
    found = [f"{name}: {e['output']}" for name, e in _programs(results) if e["passed"] is None]
    return found + [f"{name}: no time was left" for name in results["skipped"]]


def _programs(results: Mapping) -> Iterator[tuple[str, Mapping]]:
    """What was run in a process of its own, and how it ended."""
    for name in ("tests", "counters"):
        if name in results:
            yield name, results[name]
    for name, entry in results.get("sanitizer", {}).items():
        yield name, entry


def show(name: str, results: Mapping) -> None:
    """What a section found, for the terminal."""
    found = results.get(name)
    if name in ("training", "decode"):
        mode = "both" if name == "training" else "decode"
        for record in found or ():
            print(case_title(record["case"]), f"T={record['case']['T']}")
            print(providers_table(record, mode))
    elif name == "steps" and found:
        print(steps_table(found))
    elif name != "kernels":
        print(name, found)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    results: dict = {"errors": {}, "seconds": {}, "skipped": []}
    for name in given.only:
        started = time.perf_counter()
        for number, job in enumerate(jobs_of(name, given)):
            if time.perf_counter() > given.ends:
                results["skipped"].append(f"{name} {number}")
                continue
            attempt(name, job, results, given)
            results["seconds"][name] = round(time.perf_counter() - started, 1)
            finish(NAME, given, results)
        show(name, results)
    print(bars_table(results["bars"]))
    print("seconds:", results["seconds"])
    mistakes, open_questions = wrong(results), left_out(results)
    print("\n".join(mistakes) or "nothing that was looked at is wrong")
    print("\n".join(f"not found out: {question}" for question in open_questions))
    return 1 if mistakes else 2 if open_questions else 0


if __name__ == "__main__":
    sys.exit(main())
