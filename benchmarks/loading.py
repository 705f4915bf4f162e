"""Measures the host memory that loading and patching take, on two processes (gloo).

    python benchmarks/loading.py                   # all cases, into results/loading.json
    python benchmarks/loading.py --only whole      # a part, into out/bench/

A Mixtral of --hidden-size is written once to a temporary folder with random weights, and loaded
from there by two processes in each of the ways in which a model gets sharded. A third process
reads /proc every few milliseconds. It needs Linux; "zero3" needs DeepSpeed.

Of each phase the most is kept that the processes held at one time above what they held before the
first: anonymous memory, which nothing but swap can take from them, and apart from that pages of
files. safetensors maps its files, so that resident memory alone counts those pages on every rank,
although the ranks share them and the kernel can drop them.
"""

import argparse
import importlib.util
import os
import select
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

from lib import loading_cases, result_files
from lib.cli import output_file
from lib.pages.ranks import loading

RANKS = 2
_KINDS = {"RssAnon": "anonymous", "RssShmem": "anonymous", "RssFile": "file"}
_PERIOD = 0.003  # seconds between two readings


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = [*loading_cases.CASES]
    parser.add_argument("--only", nargs="+", choices=cases, default=cases, metavar="CASE")
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 4], help="default: 2 4")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    parser.add_argument("--num-tokens", type=int, default=1026, help="added (default: 1026)")
    parser.add_argument("--output", type=output_file, help="default: results/loading.json")
    args = parser.parse_args(arguments)
    if "zero3" in args.only and importlib.util.find_spec("deepspeed") is None:
        parser.error("zero3 needs DeepSpeed: pip install deepspeed, or name others by --only")
    args.output = args.output or _default_output(parser, args)
    return args


def _default_output(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Path:
    given = {key: value for key, value in vars(args).items() if key != "output"}
    whole = all(parser.get_default(key) == value for key, value in given.items())
    return result_files.RESULTS / "loading.json" if whole else Path("out/bench/loading-part.json")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    records = []
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as folder:
            adapt = partial(loading_cases.adapt, rank=args.rank, num_tokens=args.num_tokens)
            sizes = loading_cases.write_model(Path(folder), layers, args.hidden_size, adapt)
            for name in args.only:
                phases = measure(name, folder, args)
                records.append({"case": name, "ranks": RANKS, **sizes, "phases": phases})
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    environment = result_files.environment("cpu")
    if importlib.util.find_spec("deepspeed"):
        environment["deepspeed"] = version("deepspeed")
    results = {"environment": environment, "arguments": settings, "records": records}
    result_files.write(args.output, results)
    print(loading(results))
    print(f"wrote {args.output}")
    return 0


def measure(name: str, folder: str, args: argparse.Namespace) -> list[dict]:
    """Return what the processes of one case held, by phase."""
    processes = [_start(rank, name, folder, args) for rank in range(RANKS)]
    phases: list[dict] = []
    try:
        phase = _next_phase(processes)
        before = [held(process.pid) for process in processes]
        while phase != "end":
            _answer(processes)
            phases.append({"phase": phase, **_watch(processes, before)})
            phase = _next_phase(processes)
        _answer(processes)
        return phases
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def _start(rank: int, name: str, folder: str, args: argparse.Namespace) -> subprocess.Popen:
    environment = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871",
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        # As large tensors do, the small ones of this model go back to the system when freed.
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }  # fmt: skip
    command = [sys.executable, loading_cases.__file__, name, folder, args.rank, args.num_tokens]
    return subprocess.Popen(
        list(map(str, command)), env=os.environ | environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _next_phase(processes: list[subprocess.Popen]) -> str:
    named = {process.stdout.readline().strip() for process in processes}
    if len(named) != 1 or "" in named:
        raise RuntimeError("a process has failed; its error is above")
    return named.pop()


def _answer(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


def _watch(processes: list[subprocess.Popen], before: list[dict[str, int]]) -> dict:
    """Read until the processes come to their next phase.

    Returns:
        The most bytes above ``before``: ``anonymous`` and ``file`` of each rank and ``together``,
        the most anonymous memory of all at one time; and ``left``, the anonymous memory of each at
        the end.
    """
    most = [dict.fromkeys(("anonymous", "file"), 0) for _ in processes]
    together, running = 0, True
    while running:
        running = not select.select([process.stdout for process in processes], [], [], _PERIOD)[0]
        now = [held(process.pid) for process in processes]
        above = [{k: n[k] - b[k] for k in n} for n, b in zip(now, before, strict=True)]
        most = [{k: max(m[k], a[k]) for k in m} for m, a in zip(most, above, strict=True)]
        together = max(together, sum(each["anonymous"] for each in above))
    return {
        "anonymous": [each["anonymous"] for each in most],
        "file": [each["file"] for each in most],
        "together": together,
        "left": [each["anonymous"] for each in above],
    }


def held(process: int) -> dict[str, int]:
    """Return the bytes that a process holds: ``anonymous``, and of ``file`` pages."""
    found = {"anonymous": 0, "file": 0}
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in _KINDS:
            found[_KINDS[name]] += 1024 * int(value.split()[0])
    return found


if __name__ == "__main__":
    sys.exit(main())
