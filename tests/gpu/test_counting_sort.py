"""The index arithmetic of the CUDA dispatch and tile maps, run on the host."""

import ctypes
import itertools
import shutil
import subprocess

import pytest
import torch
from support.host_kernels import COMPILER, HOST, tile_map
from support.segments import Segments

from moe_kernels.ops.dispatch import reference

SOURCE = HOST / "counting_sort_host.cpp"

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
    """Return experts, and modalities -1..M or none; a few ids are out of range."""
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


def unwritten(*size):
    return torch.full(size, -(2**40))


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


CASES = [
    (0, 2, 4, 1, False), (1, 1, 1, 0, False), (1, 1, 1, 2, False), (13, 2, 4, 1, False),
    (300, 4, 16, 2, True), (1000, 3, 5, 0, True), (5000, 8, 64, 1, False), (700, 1, 512, 3, True),
    (40000, 8, 64, 1, True),
]  # fmt: skip
MANY = (131_000, 8, 512, 3, True)  # a million rows: every block, several steps of a warp


@pytest.mark.parametrize(("case", "threads"), [*itertools.product(CASES, [1, 7, 256]), (MANY, 256)])
def test_it_sorts_as_the_reference(library, case, threads):
    tokens, top_k, num_experts, num_modalities, skew = case
    generator = torch.Generator().manual_seed(tokens + threads)
    experts, modalities = ids(
        tokens, top_k, num_experts, num_modalities, skew=skew, generator=generator
    )
    expected = reference.dispatch(experts, num_experts, modalities, num_modalities)
    fields = [unwritten(*field.shape) for field in expected]
    blocks = library.run(
        pointer(experts), pointer(modalities), experts.numel(), top_k, num_experts, num_modalities,
        threads, *map(pointer, fields),
    )  # fmt: skip
    assert blocks <= 128 and (tokens * top_k <= 256) == (blocks == 1)
    for actual, expected_field in zip(fields, expected, strict=True):
        assert torch.equal(actual, expected_field)


@pytest.mark.parametrize("threads", [1, 7, 256])
@pytest.mark.parametrize("block", [1, 16, 300, 2**30])
@pytest.mark.parametrize("kind", ["experts", "adapters", "added experts"])
def test_tile_maps(library, kind, block, threads):
    """Tile maps have the order and the padding of Triton's (``triton_suite.test_tile_maps``)."""
    segments = Segments(threads)
    base, extra, period, offsets = segments.base, segments.extra, 4, segments.offsets
    experts, pairs, num_rows = segments.experts, segments.pairs, segments.rows
    bounds, groups = {
        "experts": (experts, (len(experts), len(experts), period, 0, period)),
        "adapters": (pairs, (len(pairs), base, period, 1, 1)),
        "added experts": (segments.added, (extra, extra, period, base * period, period)),
    }[kind]
    tiles = unwritten(3, library.num_tiles(num_rows, len(bounds), block))
    rows = unwritten(3, len(bounds))
    library.run_tile_map(
        pointer(offsets), offsets.numel() - 1, num_rows, block, *groups, threads, pointer(tiles),
        pointer(rows),
    )  # fmt: skip
    expected_tiles, expected_rows = tile_map(bounds, num_rows, block)
    assert torch.equal(tiles, expected_tiles) and torch.equal(rows, expected_rows)
