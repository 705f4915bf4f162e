"""Runs ``triton_cases.py`` in processes of their own."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_native import run_pytest

SHARES = (
    "test_matches",
    "test_odd or test_shapes",
    "not test_matches and not test_odd and not test_shapes",
)


@pytest.mark.skipif(
    find_spec("triton") is None, reason="needs triton, which the test extra installs on Linux"
)
@pytest.mark.parametrize("selected", SHARES)
def test_kernels(selected):
    environment = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    run_pytest(str(Path(__file__).with_name("triton_cases.py")), "-k", selected, **environment)
