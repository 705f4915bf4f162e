"""Run a test's script in several gloo processes on this machine, and what the scripts share."""

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist


def run_ranks(script: str | Path, *arguments: object, codes: Sequence[int] = (0, 0)) -> list[str]:
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
            [sys.executable, *map(str, (script, *arguments))],
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


def play(scenes: Mapping[str, Callable], folder: str) -> None:
    """Play scenes ``f(rank, folder)``, each in a folder of its own, in a process of a group.

    The process joins a group of gloo unless it belongs to one, and leaves it. What went wrong is
    kept for :func:`errors_of`.
    """
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    errors = {}
    for name, scene in scenes.items():
        own = Path(folder, name)
        own.mkdir(exist_ok=True)
        try:
            scene(dist.get_rank(), own)
        except BaseException:  # the other scenes still have something to say
            errors[name] = traceback.format_exc()
    torch.save(errors, Path(folder, f"errors-{dist.get_rank()}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def errors_of(
    script: str | Path, folder: Path, *arguments: object, number: int = 2
) -> dict[str, str]:
    """Run a script that plays scenes on ranks; return what went wrong by scene, on all ranks."""
    run_ranks(script, folder, *arguments, codes=(0,) * number)
    found = {}
    for rank in range(number):
        for name, text in torch.load(folder / f"errors-{rank}.pt").items():
            found[name] = f"{found.get(name, '')}rank {rank}: {text}"
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
