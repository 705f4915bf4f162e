"""Measure speed and memory against their targets, on a CPU or a GPU.

    python benchmarks/run.py --device cpu                      # what `make bench` runs
    python benchmarks/run.py --device cpu --only decode        # a part, into out/bench/
    python benchmarks/run.py --device cuda                     # on a GPU, under 9 minutes
    TRITON_INTERPRET=1 python benchmarks/run.py --device cuda --trial    # without one

A run on a GPU first checks the backend. An error is recorded, and the rest still runs. The file of
results is written anew after each case, and no case starts after --deadline. The exit status is 1
where something is wrong, 2 where something was left out; a missed target is neither.

See benchmarks/README.md for the sections, and benchmarks/targets.py for the targets.
"""

import argparse
import gc
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a competitor that needs a download is missing
import torch
from lib import result_files, sections_cpu, sections_gpu
from lib.cases import forget_weights
from lib.cli import add_rotation, make_parser, progress, write_results
from lib.pages.tables import added_steps_table, providers_table, steps_table, targets_table
from lib.providers import OURS
from lib.steps import MODELS
from targets import judge

from moe_kernels import backends
from moe_kernels.testing import SHAPES

SECTIONS = {"cpu": sections_cpu.SECTIONS, "cuda": sections_gpu.SECTIONS}
# Sections whose result is a list with a record for each case; that of the others is one record.
LISTS = {*sections_cpu.SECTIONS, *sections_gpu.LISTS}
_DEFAULTS = {
    "cpu": {"rounds": 10, "max_seconds": 2.0, "deadline": None, "rotate_mb": 600},
    "cuda": {"rounds": 20, "max_seconds": 4.0, "deadline": 480.0, "rotate_mb": 600},
}
_CPU_OPTIONS, _GPU_OPTIONS = ("shapes", "models"), ("backend",)


# --- the options


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        __doc__, rounds=None, max_seconds=None,
        output="benchmarks/results/cpu.json or gpu-<card>.json; out/bench/ for a part",
    )  # fmt: skip
    add_rotation(parser)
    parser.set_defaults(rotate_mb=None)
    _add_options(parser)
    args = parser.parse_args(arguments)
    if refusal := _refusal(args):
        parser.error(refusal)
    is_part = _is_part(args)
    _set_defaults(args)
    if not args.output:
        name = "cpu" if args.plan == "cpu" else _name_of_gpu_run(args.backend)
        kind = "-trial" if args.trial else "-part" if is_part else ""
        folder = Path("out/bench") if kind else result_files.RESULTS
        args.output = folder / f"{name}{kind}.json"
    return args


def _name_of_gpu_run(backend: str) -> str:
    """Return "gpu-h100" for the default backend on an H100, or "gpu-h100-triton" for another."""
    if not torch.cuda.is_available():
        return f"gpu-{backend}"
    device = torch.cuda.get_device_name()
    model = re.search(r"\b[A-Z]+\d+\w*", device)
    name = "gpu-" + (model[0] if model else device.replace(" ", "-")).lower()
    return name if backend == _default_gpu_backend() else f"{name}-{backend}"


def _default_gpu_backend() -> str:
    """Return the backend that the ops choose on this GPU; without one, that of the interpreter."""
    if not torch.cuda.is_available():
        return "triton"
    return backends.select(None, torch.device("cuda"), torch.bfloat16)


def _add_options(parser: argparse.ArgumentParser) -> None:
    sections = list(dict.fromkeys(name for names in SECTIONS.values() for name in names))
    parser.add_argument("--only", nargs="+", choices=sections, help="measure these sections only")
    parser.add_argument("--trial", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument(
        "--deadline", type=float, metavar="S",
        help="start no case later, and stop programs that it starts (default: 480 on a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, help="on a CPU (default: one_layer olmoe)"
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, help="on a CPU (default: demo olmoe)"
    )
    parser.add_argument(
        "--backend", choices=("triton", "cuda"), help="on a GPU (default: that of the ops)"
    )


def _refusal(args: argparse.Namespace) -> str | None:
    """Say why the options do not go together, or return None."""
    for name in _GPU_OPTIONS if args.device == "cpu" else _CPU_OPTIONS:
        if getattr(args, name) is not None:
            return f"--{name} is not an option of --device {args.device}"
    unknown = [name for name in args.only or () if name not in SECTIONS[args.device]]
    if unknown:
        known = ", ".join(SECTIONS[args.device])
        return f"--device {args.device} has no section {unknown[0]}; it has {known}"
    if args.device == "cuda" and not args.trial and not torch.cuda.is_available():
        return "no CUDA device was found; --trial runs tiny shapes in Triton's interpreter"
    return None


def _is_part(args: argparse.Namespace) -> bool:
    """Return whether the results are only a part of those that pages show."""
    return bool(args.only or args.shapes or args.models or args.trial)


def _set_defaults(args: argparse.Namespace) -> None:
    """Fill in what depends on the device; afterwards ``device`` is where the tensors are."""
    args.plan = args.device
    trial_defaults = {"rounds": 2, "rotate_mb": 4} if args.trial else {}
    for name, value in (_DEFAULTS[args.plan] | trial_defaults).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.only = args.only or [*SECTIONS[args.plan]]
    if args.plan == "cpu":
        args.backend = sections_cpu.default_backend()
        args.shapes = args.shapes or (["small"] if args.trial else ["one_layer", "olmoe"])
        args.models = args.models or (["tiny"] if args.trial else ["demo", "olmoe"])
    else:
        args.backend = args.backend or _default_gpu_backend()
        args.dtype = "float32" if args.trial else "bfloat16"
        args.layers = sections_gpu.TRIAL_LAYERS if args.trial else sections_gpu.LAYERS
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.ends = time.perf_counter() + (float("inf") if args.deadline is None else args.deadline)


# --- the run


def run_section(name: str, args: argparse.Namespace, results: dict) -> None:
    """Run the jobs of a section into ``results``, and write these to the file after each job."""
    started = time.perf_counter()
    with progress(list(SECTIONS[args.plan][name](args))) as (jobs, _):
        jobs.set_description(name)
        for number, job in enumerate(jobs):
            if time.perf_counter() > args.ends:
                results["skipped"].append(f"{name} {number}")
                continue
            _attempt(name, job, results)
            results["targets"] = judge(results, args.plan)
            results["seconds"][name] = round(time.perf_counter() - started, 1)
            write_results(args, args.output, results)


def _attempt(name: str, job: Callable[[], dict], results: dict) -> None:
    """Put the result of a job, or its error, into ``results``; leave no memory behind."""
    try:
        record = job()
        if name in LISTS:
            results.setdefault(name, []).append(record)
        else:
            results[name] = record
    except Exception:
        results["errors"].setdefault(name, []).append(traceback.format_exc())
        print(results["errors"][name][-1], file=sys.stderr)
    torch._dynamo.reset()
    if torch.cuda.is_available():
        forget_weights()
        gc.collect()
        torch.cuda.empty_cache()


def show(name: str, results: Mapping) -> None:
    """Print the results of a section."""
    section = results.get(name)
    if section is None or name == "kernels":  # which are printed as they are measured
        return
    if name == "steps":
        print(steps_table(section))
    elif name == "added_steps":
        print(added_steps_table(section))
    elif name in LISTS:
        for record in section:
            print(providers_table(record, "decode" if name == "decode" else "both"))
    else:
        print(name, section)


# --- the outcome


def failures(results: Mapping) -> Iterator[str]:
    """Describe everything that is wrong; a missed target is not."""
    for name in results["errors"]:
        yield f"{name}: an error"
    for key, kept in results.get("promises", {}).items():
        if kept not in (True, None):
            yield f"promises: {key}: {kept}"
    for name, entry in _programs(results):
        if entry["passed"] is False:
            yield f"{name}: {entry}"
    if results.get("accuracy", {}).get("passed") is False:
        yield f"accuracy: above {results['accuracy']['limit']}"
    for name in LISTS:
        for record in results.get(name, ()):
            for provider, entry in record["providers"].items():
                if provider.startswith(OURS) and entry.get("error"):
                    yield f"{name}: {provider}: {entry['error']}"


def left_out(results: Mapping) -> Iterator[str]:
    """Name everything that was requested and not measured."""
    for name, entry in _programs(results):
        if entry["passed"] is None:
            yield f"{name}: {entry['output']}"
    for name in results["skipped"]:
        yield f"{name}: no time was left"


def _programs(results: Mapping) -> Iterator[tuple[str, Mapping]]:
    """Yield the programs that ran in processes of their own, and how they ended."""
    for name in ("tests", "counters"):
        if name in results:
            yield name, results[name]
    yield from results.get("sanitizer", {}).items()


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    results: dict = {"errors": {}, "seconds": {}, "skipped": [], "targets": []}
    for name in args.only:
        run_section(name, args, results)
        show(name, results)
    print(targets_table(results["targets"]))
    print("seconds:", results["seconds"])
    print(f"wrote {args.output}")
    wrong, missing = list(failures(results)), list(left_out(results))
    print("\n".join(wrong) or "nothing that was checked is wrong")
    print("\n".join(f"not measured: {section}" for section in missing))
    return 1 if wrong else 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
