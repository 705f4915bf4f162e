"""Checks the Triton backend on a GPU, then times it against its rivals, in one call.

    python benchmarks/run_gpu.py                               # on a GPU, under 9 minutes
    TRITON_INTERPRET=1 python benchmarks/run_gpu.py --trial    # tiny shapes, on any machine

What fails is recorded with its error, and the rest still runs; the file is written anew after each
case, and none starts after --deadline. Rivals: transformers' experts implementations, grouped_mm
also compiled, PEFT and split LoRA on grouped_mm, and where they are installed Liger's fused MoE and
axolotl's ScatterMoE with LoRA.
"""

import gc
import os
import shutil
import subprocess
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a rival that must be downloaded is missing, at once
import _providers
import _record
import bench_training_step
import torch
from _cases import Case, _weights, make_problem
from _check import Oracle
from _cli import add_rotation, finish, make_parser, options_of
from _runs import compare, fastest, run_decode, run_training, time_of
from _timing import Statistics, now
from bars import Bar
from cost_model import table as cost_table
from tables import bars_table, case_title, markdown, providers_table, steps_table
from torch.profiler import ProfilerActivity, profile

from moe_kernels.ops import LoraWeights
from moe_kernels.testing import TOLERANCES, MoeInputs

NAME = "gpu"
OURS, TEXT, BASE = (f"{kind}:triton" for kind in ("ours", "ours_text", "ours_base"))
PEFT, SPLIT, GROUPED = "peft:grouped_mm", "split:masked", "hf:grouped_mm"
SPLITS = (SPLIT, "split:compiled")
HF = [name for name in _providers.names() if name.startswith("hf:")]
PEERS = [*HF, "hf_compiled:grouped_mm", "liger"]  # of the base, without adapters
# shape, tokens, share of image rows; the first of a shape and number of tokens has all rivals
LAYERS = (
    ("olmoe", 8192, 0.25), ("olmoe", 8192, 1.0), ("mixtral", 8192, 0.25), ("qwen3", 32768, 0.5),
    ("olmoe", 32768, 0.25),
)  # fmt: skip
TRIAL_LAYERS = (("tiny", 24, 0.25), ("tiny", 24, 1.0))
TESTS_SECONDS, TOOL_SECONDS = 150, 90
SANITIZERS = ("memcheck", "racecheck")
PROFILED = "gate_up_kernel|act_backward_kernel"
METRICS = (
    "gpu__time_duration.sum", "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed", "lts__t_sector_hit_rate.pct",
)  # fmt: skip
DECODE_TOKENS = (1, 8, 64)

GEMM_RATE = {"forward": 480.0, "both": 400.0}  # TFLOP/s of the base, qwen3
OVER_BASE = {0.25: 1.04, 1.0: 1.10}
FASTER_THAN_PEER = 0.95
FASTER_THAN_GROUPED = 1.8
FASTER_THAN_PEFT = 3.0
FASTER_THAN_SPLIT = 1.5
MEMORY_OF_SPLIT = 0.5
OVER_READING = 1.15
FASTER_STEP = 2.0


# --- what is measured


def run_tests(given: Namespace) -> dict:
    """The Triton cases of the test suite, in a process of their own: most of it is compiling."""
    cases = _record.ROOT / "tests" / "triton_cases.py"
    path = os.pathsep.join(filter(None, (str(cases.parent), os.environ.get("PYTHONPATH"))))
    try:
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
            capture_output=True, text=True, cwd=_record.ROOT, timeout=TESTS_SECONDS,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
    except subprocess.TimeoutExpired as ended:
        return {"passed": None, "summary": f"not done after {ended.timeout:.0f} s", "failed": []}
    lines = result.stdout.strip().splitlines() or [result.stderr[-500:]]
    failed = [line for line in lines if line.startswith("FAILED")]
    return {"passed": result.returncode == 0, "summary": lines[-1], "failed": failed}


def sanitize(given: Namespace) -> dict:
    """What compute-sanitizer says of a small layer, forward and backward, by tool."""
    command = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    return {tool: _run_tool([*command, tool, *_one_layer(given, "odd")]) for tool in SANITIZERS}


def profile_counters(given: Namespace) -> dict:
    """ncu's counters of the two large kernels, on the first of the timed layers."""
    name, tokens, _ = (TRIAL_LAYERS if given.trial else LAYERS)[0]
    command = [
        "ncu", "--clock-control", "none", "--csv", "--kernel-name", f"regex:{PROFILED}",
        "--launch-count", "2", "--metrics", ",".join(METRICS),
    ]  # fmt: skip
    return _run_tool([*command, *_one_layer(given, name), "--tokens", str(tokens)])


def _one_layer(given: Namespace, shape: str) -> list[str]:
    program = str(Path(__file__).with_name("one_layer.py"))
    return [
        sys.executable, program, "--shape", shape, "--dtype", given.dtype, "--device", given.device,
    ]  # fmt: skip


def _run_tool(command: list[str]) -> dict:
    """Whether a program ended well, and the end of what it printed; or why it did not run."""
    if shutil.which(command[0]) is None:
        return {"passed": None, "output": f"{command[0]} is not on the path"}
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=_record.ROOT, timeout=TOOL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"passed": None, "output": f"not done after {TOOL_SECONDS} s"}
    output = (result.stdout + result.stderr)[-4000:]
    return {"passed": result.returncode == 0, "output": output}


def measure_accuracy(given: Namespace) -> dict:
    """Relative RMS errors of all rows of every timed layer against the float64 reference."""
    errors = {}
    for name, tokens, share in TRIAL_LAYERS if given.trial else LAYERS:
        case = Case.named(
            name, T=tokens, dtype=given.dtype, image_share=share, device=given.device,
            seed=given.seed,
        )  # fmt: skip
        problem = make_problem(case)
        oracle = Oracle(problem, num_tokens=tokens)
        label = f"{name} T={tokens} image {share:.0%}"
        errors[label] = oracle.errors(_providers.set_up(OURS, problem))
    limit = TOLERANCES[dtype_of(given)]
    return {
        "limit": limit, "errors": errors,
        "passed": all(error <= limit for found in errors.values() for error in found.values()),
    }  # fmt: skip


def measure_ceilings(given: Namespace) -> dict:
    """TB/s of a copy, read and written, and TFLOP/s of a square GEMM of random numbers."""
    megabytes, size = (1, 64) if given.trial else (2048, 8192)
    source = torch.randn(megabytes * 2**18, device=given.device)
    target = torch.empty_like(source)
    left, right = (
        torch.randn(size, size, device=given.device, dtype=dtype_of(given)) for _ in "ab"
    )
    copy = _best(lambda: target.copy_(source), given.device)
    gemm = _best(lambda: left @ right, given.device)
    return {
        "copy_TBps": 2 * source.nbytes / copy / 1e12,
        "gemm_TFLOPps": 2 * size**3 / gemm / 1e12,
        "gemm_size": size,
    }


def _best(function: Callable[[], object], device: str, rounds: int = 10) -> float:
    for _ in range(3):
        function()
    times = []
    for _ in range(rounds):
        started = now(device)
        function()
        times.append(now(device) - started)
    return sorted(times)[rounds // 2]


def check_promises(given: Namespace) -> dict:
    """On a layer that is timed: same bits twice; text's bits with NaN in every adapter and with
    other values and routes of all other rows; a captured graph that gives the bits of the launches.
    """
    name, tokens, _ = (TRIAL_LAYERS if given.trial else LAYERS)[0]
    case = Case.named(name, T=tokens, dtype=given.dtype, device=given.device, seed=given.seed)
    problem = make_problem(case)
    text = problem.inputs.modality_ids == 0
    runner = _providers.set_up(OURS, problem)
    first, second = (_results(runner, problem.grad_out) for _ in range(2))
    others = _providers.set_up(
        OURS, replace(problem, inputs=_with_other_rows(problem.inputs, text))
    )
    changed = _results(others, problem.grad_out)
    keys = ("out", "hidden_states", "topk_weights")
    return {
        "same_bits_twice": all(torch.equal(first[key], second[key]) for key in first),
        "text_bits": all(torch.equal(first[key][text], changed[key][text]) for key in keys),
        "other_rows_changed": not torch.equal(first["out"], changed["out"]),
        "graph_capture": _graph_gives(runner) if given.device == "cuda" else None,
    }


def _with_other_rows(inputs: MoeInputs, text: torch.Tensor) -> MoeInputs:
    def nan(lora: LoraWeights) -> LoraWeights:
        pair = (torch.full_like(tensor, float("nan")) for tensor in lora[:2])
        return LoraWeights(*pair, lora.scaling)

    here = text[:, None]
    return inputs._replace(
        hidden_states=torch.where(here, inputs.hidden_states, -3 * inputs.hidden_states),
        topk_ids=torch.where(here, inputs.topk_ids, inputs.topk_ids.flip(1).roll(1, 0)),
        gate_up_lora=nan(inputs.gate_up_lora), down_lora=nan(inputs.down_lora),
    )  # fmt: skip


def _results(runner: _providers.Runner, grad_out: torch.Tensor) -> dict[str, torch.Tensor]:
    out = runner.forward()
    runner.backward(out, grad_out)
    results = {"out": out.detach()} | {k: v.clone() for k, v in runner.gradients().items()}
    runner.clear()
    return results


@torch.no_grad()
def _graph_gives(runner: _providers.Runner) -> bool:
    expected = runner.forward()  # also compiles what the capture needs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = runner.forward()
    out.zero_()
    graph.replay()
    return torch.equal(out, expected)


def measure_layers(given: Namespace) -> Iterator[Callable[[], dict]]:
    seen = set()
    for name, tokens, share in TRIAL_LAYERS if given.trial else LAYERS:
        case = Case.named(
            name, T=tokens, dtype=given.dtype, image_share=share, device=given.device,
            seed=given.seed,
        )  # fmt: skip
        rivals = [] if (name, tokens) in seen else [*PEERS, PEFT, *SPLITS, "scattermoe"]
        seen.add((name, tokens))
        options = options_of(given, thorough={OURS, TEXT, BASE, "bound"}, memory=(OURS, SPLIT))
        yield partial(run_training, case, ["bound", OURS, TEXT, BASE, *rivals], options)


def measure_decode(given: Namespace) -> Iterator[Callable[[], dict]]:
    for tokens in DECODE_TOKENS:
        case = Case.named(
            "tiny" if given.trial else "olmoe", T=tokens, dtype=given.dtype, device=given.device,
            seed=given.seed,
        )  # fmt: skip
        options = replace(options_of(given), rotated_bytes=given.rotate_mb * 10**6)
        yield partial(run_decode, case, [OURS, TEXT, BASE, *HF], options)


def measure_kernels(given: Namespace) -> dict:
    """ms of every kernel of a forward and backward, as the profiler sees them."""
    name, tokens, share = (TRIAL_LAYERS if given.trial else LAYERS)[0]
    case = Case.named(
        name, T=tokens, dtype=given.dtype, image_share=share, device=given.device, seed=given.seed
    )
    problem = make_problem(case)
    runner = _providers.set_up(OURS, problem)
    runner.backward(runner.forward(), problem.grad_out)
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
    print(cost_table(case, 3.0, 800.0))
    return {"case": case.describe(), "kernels": [list(row) for row in rows]}


def measure_step(given: Namespace) -> Iterator[Callable[[], dict]]:
    name = "tiny" if given.trial else "olmoe-1b-7b"
    options = replace(options_of(given), rounds=5, min_rounds=2)
    model = bench_training_step.MODELS[name]
    yield partial(bench_training_step.run, model, options, given.device, given.seed)


# One result of each of the first, a list of those of the second.
SINGLE: dict[str, Callable[[Namespace], dict]] = {
    "ceilings": measure_ceilings,
    "promises": check_promises,
    "accuracy": measure_accuracy,
    "kernels": measure_kernels,
    "sanitizer": sanitize,
    "counters": profile_counters,
    "tests": run_tests,
}
SEVERAL: dict[str, Callable[[Namespace], Iterator[Callable[[], dict]]]] = {
    "training": measure_layers,
    "decode": measure_decode,
    "steps": measure_step,
}
SECTIONS = (
    "ceilings", "promises", "accuracy", "training", "decode", "kernels", "steps", "sanitizer",
    "counters", "tests",
)  # fmt: skip


# --- what is judged


def judge(results: Mapping) -> list[Bar]:
    """The bars of the sections that were measured."""
    bars = [bar for record in results.get("training", ()) for bar in _layer_bars(record)]
    ceilings = results.get("ceilings") or {}
    for record in results.get("decode", ()):
        bars += _decode_bar(record, ceilings.get("copy_TBps"))
    for record in results.get("steps", ()):
        ratio = compare(record, PEFT, "ours", "step")
        case = record["case"]["name"]
        bars.append(Bar(8, "step, tokens/s over PEFT's", case, ratio, FASTER_STEP, at_least=True))
    return sorted(bars, key=lambda bar: bar.number)


def _layer_bars(record: Mapping) -> Iterator[Bar]:
    case = f"{case_title(record['case'])} T={record['case']['T']}"
    share = record["case"]["image_share"]
    if record["case"]["shape"] == "qwen3":
        for mode, limit in GEMM_RATE.items():
            rate = _rate(record, mode)
            yield Bar(1, f"TFLOP/s of the base, {mode}", case, rate, limit, at_least=True)
    if peer := fastest(record, PEERS, "both"):
        for mode in ("forward", "both"):
            ratio = compare(record, fastest(record, PEERS, mode), BASE, mode)
            what = f"speed of the base over the fastest peer's, {mode}"
            yield Bar(2, what, case, ratio, FASTER_THAN_PEER, at_least=True)
    for number, what, rival, mine, limit in (
        (3, "speed of the base over transformers' grouped_mm", GROUPED, BASE, FASTER_THAN_GROUPED),
        (5, "speed over PEFT on grouped_mm", PEFT, OURS, FASTER_THAN_PEFT),
        (6, "speed over split LoRA", fastest(record, SPLITS, "both"), OURS, FASTER_THAN_SPLIT),
    ):
        if rival in record["providers"] and peer:
            ratio = compare(record, rival, mine, "both")
            yield Bar(number, what, case, ratio, limit, at_least=True)
    if share in OVER_BASE:
        what = f"adapters at {share:.0%} image over the base"
        yield Bar(4, what, case, compare(record, OURS, BASE, "both"), OVER_BASE[share])
    what = "adapters without image over the base"
    yield Bar(4, what, case, compare(record, TEXT, BASE, "both"), 1.0, by_p20=True)
    entries = [record["providers"].get(name, {}) for name in (OURS, SPLIT)]
    memory = [None if entry.get("error") else entry.get("memory") for entry in entries]
    if all(memory):
        part = memory[0]["saved"] / memory[1]["saved"]
        what = "kept for backward over split LoRA's"
        yield Bar(6, what, case, Statistics(part, part, part, 1), MEMORY_OF_SPLIT)


def _rate(record: Mapping, mode: str) -> Statistics | None:
    time = time_of(record, BASE, mode)
    if time is None or record["providers"][BASE]["error"]:
        return None
    work = record["flops"][mode] / 1e12
    return Statistics(work / time.median, work / time.p80, work / time.p20, time.count)


def _decode_bar(record: Mapping, copy_rate: float | None) -> Iterator[Bar]:
    """Over the time to read the weights that are hit, at the rate of a copy."""
    time = time_of(record, TEXT, "decode")
    case = f"{case_title(record['case'])} T={record['case']['T']}"
    ratio = None
    if time and copy_rate and not record["providers"][TEXT]["error"]:
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
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS])
    parser.add_argument(
        "--deadline", type=float, default=540.0, metavar="S", help="no case starts later"
    )
    parser.add_argument("--trial", action="store_true", help="tiny shapes, to see that it runs")
    parser.set_defaults(rounds=20, max_seconds=4.0)
    given = parser.parse_args(arguments)
    given.dtype = "float32" if given.trial else "bfloat16"
    if given.device != "cuda" and not given.trial:
        parser.error("there is no CUDA device; --trial runs tiny shapes in Triton's interpreter")
    if given.trial and not given.output:
        given.output = Path("out/bench/gpu-trial.json")
    return given


def jobs_of(name: str, given: Namespace) -> Iterator[Callable[[], dict]]:
    """What a section runs, one by one."""
    if name in SINGLE:
        yield partial(SINGLE[name], given)
    else:
        yield from SEVERAL[name](given)


def attempt(name: str, job: Callable[[], dict], results: dict) -> None:
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
    results["bars"] = [bar.to_dict() for bar in judge(results)]
    _weights.cache_clear()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wrong(results: Mapping) -> list[str]:
    """What is not as it should be, speed apart."""
    found = [f"{name}: an error" for name in results["errors"]]
    promises = results.get("promises", {})
    found += [f"promises: {key}" for key, kept in promises.items() if kept is False]
    if results.get("tests", {}).get("passed") is False:
        found.append("tests: " + results["tests"]["summary"])
    if results.get("accuracy", {}).get("passed") is False:
        found.append(f"accuracy: above {results['accuracy']['limit']}")
    sanitizer = results.get("sanitizer", {})
    found += [f"sanitizer: {tool}" for tool, said in sanitizer.items() if said["passed"] is False]
    for name in SEVERAL:
        for record in results.get(name, ()):
            for provider, entry in record["providers"].items():
                if provider.startswith("ours") and entry.get("error"):
                    found.append(f"{name}: {provider}: {entry['error']}")
    return found


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
    began = time.perf_counter()
    for name in given.only:
        started = time.perf_counter()
        for number, job in enumerate(jobs_of(name, given)):
            if time.perf_counter() - began > given.deadline:
                results["skipped"].append(f"{name} {number}")
                continue
            attempt(name, job, results)
            results["seconds"][name] = round(time.perf_counter() - started, 1)
            finish(NAME, given, results)
        show(name, results)
    print(bars_table(results["bars"]))
    print("seconds:", results["seconds"], "skipped:", results["skipped"] or "nothing")
    mistakes = wrong(results)
    print("\n".join(mistakes) or "all results are right")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
