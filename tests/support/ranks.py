"""Run a test's script in several gloo processes on this machine, and what the scripts share."""

import contextlib
import faulthandler
import multiprocessing
import os
import random
import runpy
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

# What ranks import before their scripts. The imports take longer than most scripts, and all ranks
# of a run of pytest share them: their processes are forked from one that has imported these.
IMPORTED = (
    "support.model_zoo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
    "transformers.trainer",
)  # fmt: skip

LIMIT = 240  # seconds that ranks may take; what they then do is printed


def run_ranks(script: str | Path, *arguments: object, codes: Sequence[int] = (0, 0)) -> list[str]:
    """Run ``python script arguments`` as every rank; return what each printed.

    The test fails with the output of a rank that does not exit with its code of ``codes``. A rank
    that reached its script's end counts as 0, and stays until all ranks have ended: when one leaves
    first, threads of gloo in the other can end that one by a signal after all its work.
    """
    number = len(codes)
    tests = str(Path(__file__).parents[1])
    common = {
        "PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    command, context = [*map(str, (script, *arguments))], multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    with (
        tempfile.TemporaryDirectory() as folder,
        _own_port() as port,
        mock.patch.dict(os.environ, common | {"MASTER_PORT": str(port)}),
    ):
        printed = [Path(folder, str(rank)) for rank in range(number)]
        processes = []
        for rank, path in enumerate(printed):
            own = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(context.Process(target=_rank, args=(command, own, path)))
        try:
            for process in processes:
                process.start()
            limit = time.monotonic() + LIMIT
            while None in (found := [*map(_exit_code, processes, printed)]):
                if time.monotonic() > limit:
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        outputs = [path.read_text() for path in printed]
    for rank, (exit_code, code) in enumerate(zip(found, codes, strict=True)):
        assert exit_code == code, f"rank {rank} of codes {found}: {outputs[rank][-5000:]}"
    return outputs


def _rank(command: list[str], environment: dict[str, str], printed: Path) -> None:
    """Be a process in which Python runs a command, and prints to a file."""
    with printed.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    faulthandler.enable()  # a signal that ends the rank leaves a traceback
    faulthandler.dump_traceback_later(LIMIT - 20)
    random.seed()  # its state was forked, too
    sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    faulthandler.cancel_dump_traceback_later()
    _end_of(printed).touch()
    while True:  # until it is killed with the others
        time.sleep(60)


def _exit_code(process: multiprocessing.Process, printed: Path) -> int | None:
    """Return 0 if the rank came to its script's end, its exit code if it ended otherwise."""
    return 0 if _end_of(printed).exists() else process.exitcode


def _end_of(printed: Path) -> Path:
    """Return the file that says that a rank came to its script's end."""
    return printed.with_suffix(".ended")


def play(scenes: Mapping[str, Callable], folder: str) -> None:
    """Play scenes ``f(rank, folder)``, each in a folder of its own, in a process of a group.

    The process joins a group of gloo unless it belongs to one. What went wrong is kept for
    :func:`errors_of`.
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


@contextlib.contextmanager
def _own_port() -> Iterator[int]:
    """Yield a port that no other call has: it is bound, but not listened to, so ranks may be."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
