"""The option of the pytest-benchmark entry points."""

from moe_kernels.testing import SHAPES


def pytest_addoption(parser):
    parser.addoption(
        "--moe-shape", choices=SHAPES, default="small", help="shape of benchmarks/test_speed.py"
    )
