"""The CUDA kernels as plain C++, compiled once for all files of tests."""

import pytest
from support import host_kernels


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return host_kernels.build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(params=["ascending", "descending"])
def library(compiled, request):
    """Run threads and blocks in one order with late copies, or in the other with early copies.

    A missing barrier shows in one of the two.
    """
    descending = request.param == "descending"
    compiled.set_order(descending, descending)
    return compiled
