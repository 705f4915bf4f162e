"""The index arithmetic of the CUDA dispatch, run on the host, against the reference."""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from moe_kernels.ops.dispatch import reference

SOURCE = Path(__file__).with_name("counting_sort_host.cpp")
COMPILER = shlex.split(os.environ.get("CXX", "c++"))

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None, reason="needs a C++ compiler: install one"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("host") / "counting_sort.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*COMPILER, *flags, str(SOURCE), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def ids(num_tokens, top_k, num_experts, num_modalities, *, skew, generator):
    """Experts, and modalities -1..M or none; a few ids are out of range."""
    experts = torch.randint(0, num_experts, (num_tokens, top_k), generator=generator)
    if skew:
        experts = experts * experts // num_experts
        experts[torch.rand(num_tokens, generator=generator) < 0.5] = num_experts // 2
    experts[torch.rand(experts.shape, generator=generator) < 0.02] = num_experts
    experts[torch.rand(experts.shape, generator=generator) < 0.02] = -1
    if num_modalities == 0:
        return experts, None
    modalities = torch.randint(-1, num_modalities + 2, (num_tokens,), generator=generator)
    return experts, modalities


def run_on_host(library, experts, modalities, num_experts, num_modalities, block_m, threads):
    """The fields of Dispatch, then both tile maps; NaN-like values where nothing was written."""
    rows = experts.numel()

    def empty(*size):
        return torch.full(size, -(2**40))

    counts = [
        library.num_tiles(rows, num_experts, num_modalities, block_m, num_experts, adapted)
        for adapted in (0, 1)
    ]
    out = [
        empty(rows), empty(rows), empty(num_experts), empty(num_experts + 1),
        empty(num_experts * (num_modalities + 1) + 1), *(empty(3, count) for count in counts),
    ]  # fmt: skip
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in out]
    blocks = library.run(
        ctypes.c_void_p(experts.data_ptr()),
        None if modalities is None else ctypes.c_void_p(modalities.data_ptr()),
        rows, experts.shape[1], num_experts, num_modalities, block_m, num_experts, threads,
        *pointers,
    )  # fmt: skip
    return out, blocks


def expected_tiles(bounds, block_m):
    return [
        (group, start, min(start + block_m, end))
        for group, (first, end) in enumerate(bounds)
        for start in range(first, end, block_m)
    ]


CASES = [
    (0, 2, 4, 1, False), (1, 1, 1, 0, False), (1, 1, 1, 2, False), (13, 2, 4, 1, False),
    (300, 4, 16, 2, True), (1000, 3, 5, 0, True), (5000, 8, 64, 1, False), (700, 1, 512, 3, True),
    (40000, 8, 64, 1, True),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "top_k", "num_experts", "num_modalities", "skew"), CASES)
@pytest.mark.parametrize("threads", [1, 7, 256])
def test_it_sorts_as_the_reference(
    library, tokens, top_k, num_experts, num_modalities, skew, threads
):
    generator = torch.Generator().manual_seed(tokens + threads)
    experts, modalities = ids(
        tokens, top_k, num_experts, num_modalities, skew=skew, generator=generator
    )
    block_m = [16, 64, 128][tokens % 3]
    (*fields, expert_tiles, adapted_tiles), blocks = run_on_host(
        library, experts, modalities, num_experts, num_modalities, block_m, threads
    )
    assert blocks <= 128 and (tokens * top_k <= 256) == (blocks == 1)
    expected = reference.dispatch(experts, num_experts, modalities, num_modalities)
    for actual, wanted in zip(fields, expected, strict=True):
        assert torch.equal(actual, wanted)

    segments = expected[-1].tolist()
    groups = num_modalities + 1
    offsets = [*segments[::groups], experts.numel()]
    of_experts = list(zip(offsets, offsets[1:], strict=False))
    of_pairs = [
        (segments[expert * groups + m], segments[expert * groups + m + 1])
        for m in range(1, groups)
        for expert in range(num_experts)
    ]
    for tiles, bounds in ((expert_tiles, of_experts), (adapted_tiles, of_pairs)):
        there = [tuple(tile) for tile in tiles.T.tolist() if tile[1] < tile[2]]
        assert there == expected_tiles(bounds, block_m)
        assert (tiles[1] >= 0).all() and (tiles[1] <= tiles[2]).all()
