"""Run ``triton_suite.py`` in processes of its own."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.devices import NEEDS_TRITON, ON_GPU
from support.processes import run_pytest

from moe_kernels.ops.triton_launch import launch

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "run.py"
CASES = Path(__file__).with_name("triton_suite.py")
_SHARES = (
    "bits or test_matches or test_text or test_the_host",
    "test_odd or test_shapes or test_random",
)
SHARES = (*_SHARES, f"not ({' or '.join(_SHARES)})")


def run_suite(*selection):
    environment = {} if ON_GPU else {"TRITON_INTERPRET": "1"}
    # Tests of one kind of device are skipped on the other.
    run_pytest(str(CASES), *selection, may_skip=True, **environment)


@NEEDS_TRITON
@pytest.mark.parametrize(
    "selected", (SHARES[0], *(pytest.param(each, marks=pytest.mark.slow) for each in SHARES[1:]))
)
def test_kernels(selected):
    run_suite("-k", selected, "-m", "not slow")


def test_every_launch_pins_the_fused_multiply_add():
    """Its default differs between releases of Triton, and so would the last bits."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **options: launched.append((grid, options))

    launch(Kernel(), (2,), x=1)
    launch(Kernel(), (2, 0), x=1)
    assert launched == [((2,), {"x": 1, "enable_fp_fusion": True})]
    by_subscript = {
        path.name
        for path in (ROOT / "moe_kernels" / "ops").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    }
    assert by_subscript == {"triton_launch.py"}


@pytest.mark.parametrize("capturing", [True, False])
def test_a_launch_that_fails_within_a_capture(capturing, monkeypatch):
    """The first launch of a kernel compiles and loads it, which the driver then refuses."""

    class Kernel:
        __name__ = "combine_kernel"

        def __getitem__(self, grid):
            def run(**arguments):
                raise RuntimeError("operation not permitted when stream is capturing")

            return run

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    words = "^combine_kernel .* CUDA graph .*operation not permitted.*run the layer once before"
    with pytest.raises(RuntimeError, match=words if capturing else "^operation not permitted"):
        launch(Kernel(), (1,))


@NEEDS_TRITON
def test_more_groups_than_the_second_axis_of_a_grid_has_programs(monkeypatch):
    """It ends at 65,535: more was a bare CUDA error."""
    from moe_kernels.ops import triton_launches
    from moe_kernels.ops.triton_tile_maps import TileMap

    grids, num_groups, one = [], 70_000, torch.ones(1, 1)
    monkeypatch.setattr(triton_launches, "launch", lambda _, grid, **rest: grids.append(grid))
    monkeypatch.setattr(triton_launches, "INTERPRETED", True)
    monkeypatch.setattr(triton_launches, "capability", lambda device: 90)
    rows = TileMap(torch.zeros(3, 1), torch.zeros(3, num_groups), 1, 16)
    problem = triton_launches.Wgrad(
        one, one, torch.zeros(1), rows, torch.ones(1), top_k=1, transposed=False
    )
    triton_launches.wgrad([problem])
    assert grids[-1][0] >= num_groups
    assert all(programs <= 65_535 for grid in grids for programs in grid[1:])


@pytest.mark.slow
@NEEDS_TRITON
def test_kernels_on_large_cases():
    run_suite("-m", "slow")


@pytest.mark.slow
@NEEDS_TRITON
@pytest.mark.skipif(ON_GPU, reason="of the interpreter: run on a machine without a GPU")
def test_the_gpu_program_runs_on_a_small_case(tmp_path):
    """Run all sections but the tests, which run above; every target of the sections is judged."""
    for needed in ("peft", "matplotlib"):
        pytest.importorskip(needed)
    path = tmp_path / "gpu.json"
    sections = [
        "ceilings", "promises", "accuracy", "training", "decode", "dispatch", "kernels", "steps",
        "sanitizer", "counters",
    ]  # fmt: skip
    command = ["--trial", "--device", "cuda", "--rounds", "1", "--rotate-mb", "0"]
    result = subprocess.run(
        [sys.executable, str(PROGRAM), *command, "--output", str(path), "--only", *sections],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr  # checks that need a GPU's tools were left out
    assert "not measured: memcheck odd: compute-sanitizer is not on the path" in result.stdout
    results = json.loads(path.read_text())
    assert results["errors"] == {} and results["skipped"] == []
    assert set(results["seconds"]) == set(sections)
    promises = results["promises"]
    assert promises.pop("graph_capture") is None and set(promises.values()) == {True}
    assert results["accuracy"]["passed"]
    numbers = {verdict["number"] for verdict in results["targets"]}
    assert numbers == {2, 3, 4, 5, 6, 7, 8, 12}  # target 1 judges another shape
    assert results["kernels"]["kernels"]
