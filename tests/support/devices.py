"""Marks of tests that need a device or a library."""

from importlib.util import find_spec

import pytest
import torch

ON_GPU = torch.cuda.is_available()
NEEDS_CUDA = pytest.mark.skipif(
    not ON_GPU, reason="needs a CUDA device: run on a machine with a GPU"
)
NEEDS_TRITON = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs triton, which the test extra installs on Linux"
)
