"""Fixtures that several test modules use."""

import pytest
import torch


@pytest.fixture
def filled_memory(monkeypatch):
    """Fill memory that torch or the native extension leaves uninitialised with NaN."""
    monkeypatch.setenv("MOE_KERNELS_POISON", "1")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def thread_count():
    """Restores the number of threads after a test that sets it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every run, whatever ran before."""
    torch.manual_seed(0)
