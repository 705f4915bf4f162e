"""Run a test's script in several gloo processes on this machine, and what the scripts share."""

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def run_ranks(script: str, *arguments: object, codes: Sequence[int] = (0, 0)) -> list[str]:
    """Run ``python script arguments`` as every rank; return what each printed.

    The test fails with the output of a rank that does not exit with its code of ``codes``.
    """
    number = len(codes)
    tests = str(Path(__file__).parents[1])
    common = {
        "PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, script, *map(str, arguments)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(number)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output, code in zip(processes, outputs, codes, strict=True):
        assert process.returncode == code, output[-5000:]
    return outputs


def play(scenes: Mapping[str, Callable], rank: int, folder: Path) -> None:
    """Play scenes ``f(rank, folder)`` on this rank, each in a folder of its own.

    What went wrong is kept for :func:`errors_of`.
    """
    errors = {}
    for name, scene in scenes.items():
        own = folder / name
        own.mkdir(exist_ok=True)
        try:
            scene(rank, own)
        except BaseException:  # the other scenes still have something to say
            errors[name] = traceback.format_exc()
    torch.save(errors, folder / f"errors-{rank}.pt")


def errors_of(folder: Path, number: int = 2) -> dict[str, str]:
    """Return what went wrong by scene, on all ranks."""
    found = {}
    for rank in range(number):
        for name, text in torch.load(folder / f"errors-{rank}.pt").items():
            found[name] = f"{found.get(name, '')}rank {rank}: {text}"
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
