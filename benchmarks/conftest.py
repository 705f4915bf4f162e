"""The option of the pytest-benchmark entry points, and the path to what they import."""

import sys
from pathlib import Path

from moe_kernels.testing import SHAPES

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption(
        "--moe-shape", choices=SHAPES, default="small", help="shape of benchmarks/test_speed.py"
    )
