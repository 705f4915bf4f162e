"""Lower bounds on time: the expert GEMMs alone, and one reading of the weights."""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lib.cases import Problem
from lib.providers.runner import Runner, Unavailable

_SOURCE = Path(__file__).with_name("read_bound.cpp")
_BUILD = Path(__file__).parents[2] / ".build"
_COMMAND = shlex.split(os.environ.get("CXX", "c++")) + [
    "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC",
]  # fmt: skip


def gemms(problem: Problem, _: str = "") -> Runner:
    """The provider "bound"."""
    bare = ExpertGemms(problem)
    return Runner(bare.forward, bare.backward)


def reading(problem: Problem, _: str = "") -> Runner:
    """The provider "read"."""
    if problem.case.device != "cpu":
        raise Unavailable("it reads the CPU's memory")
    try:
        read = weight_reader(problem)
    except OSError as error:
        raise Unavailable(str(error)) from error

    def forward() -> None:
        read()

    return Runner(forward, lambda *_: None)


class ExpertGemms:
    """The base's products for the routed rows of each expert, on contiguous operands.

    No gather, activation, combine or allocation. Backward is the gradient of the inputs only.
    """

    def __init__(self, problem: Problem):
        inputs, case = problem.inputs, problem.case
        hidden, inter = case.shape.H, case.shape.I

        def rows(width: int) -> Tensor:
            return torch.randn(case.rows, width, device=case.device).to(case.torch_dtype)

        x, pre, act, out = rows(hidden), rows(2 * inter), rows(inter), rows(hidden)
        result = {width: rows(width) for width in (hidden, inter, 2 * inter)}
        counts = torch.bincount(inputs.topk_ids.reshape(-1), minlength=case.shape.E).tolist()
        self._forward, self._backward, start = [], [], 0
        for expert, count in enumerate(counts):
            part = slice(start, start + count)
            start += count
            if count == 0:
                continue
            gate_up, down = inputs.gate_up_proj[expert], inputs.down_proj[expert]
            self._forward += [
                (x[part], gate_up.T, result[2 * inter][part]),
                (act[part], down.T, result[hidden][part]),
            ]
            self._backward += [
                (out[part], down, result[inter][part]),
                (pre[part], gate_up, result[hidden][part]),
            ]

    def forward(self) -> None:
        for left, right, out in self._forward:
            torch.mm(left, right, out=out)

    def backward(self, *_) -> None:
        for left, right, out in self._backward:
            torch.mm(left, right, out=out)


def weight_reader(problem: Problem) -> Callable[[], int]:
    """Return a function that reads the weights of the chosen experts once."""
    function = _library().read_all
    stacks = (problem.inputs.gate_up_proj, problem.inputs.down_proj)
    slices = [stack[expert] for expert in problem.hit_experts.tolist() for stack in stacks]
    starts = (ctypes.c_void_p * len(slices))(*(part.data_ptr() for part in slices))
    words = (ctypes.c_int64 * len(slices))(*(part.nbytes // 8 for part in slices))
    return lambda: function(starts, words, len(slices), torch.get_num_threads())


@functools.cache
def _library() -> ctypes.CDLL:
    """Load the compiled loop, which is kept until its source or the command changes.

    Raises:
        OSError: the compiler is missing or fails.
    """
    key = hashlib.sha256(_SOURCE.read_bytes() + " ".join(_COMMAND).encode()).hexdigest()[:16]
    path = _BUILD / f"read_bound-{key}.so"
    if not path.exists():
        _BUILD.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        command = [*_COMMAND, str(_SOURCE), "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise OSError(f"{' '.join(command)} failed: {result.stderr.strip()}")
        partial.replace(path)
    library = ctypes.CDLL(str(path))
    library.read_all.restype = ctypes.c_uint64
    return library
