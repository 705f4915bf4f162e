"""The CUDA kernels as plain C++, compiled once for all files of tests."""

import pytest
from support import host_kernels


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, request):
    """Return the library of kernels, which one of xdist's workers builds for all of them."""
    folder = tmp_path_factory.getbasetemp()
    return host_kernels.build(folder.parent if hasattr(request.config, "workerinput") else folder)


@pytest.fixture(params=["ascending", "descending"])
def library(compiled, request):
    """Run threads and blocks in one order with late copies, or in the other with early copies.

    A missing barrier shows in one of the two.
    """
    descending = request.param == "descending"
    compiled.set_order(descending, descending, False)
    return compiled
