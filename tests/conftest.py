"""Fixtures that several test modules use."""

import pytest
import torch
from support.attacks import today
from support.ranks import errors_of

from moe_kernels.progress import Lines


def pytest_addoption(parser):
    """Add the options of tests/attacks, which pytest takes from this file alone."""
    group = parser.getgroup("attacks")
    group.addoption(
        "--attack-seed", type=int, default=today(), help="seed of the tries; default: the date"
    )
    group.addoption(
        "--attack-share", default="12", help="tries of each attack: a number, or a share as in 5%%"
    )


def pytest_report_header(config):
    """Say with what a failure of an attack can be repeated; so does each failure itself."""
    options = (f"{name} {config.getoption(name)}" for name in ("--attack-seed", "--attack-share"))
    return f"attacks: {' '.join(options)}"


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


@pytest.fixture(scope="module")
def scene_errors(request, tmp_path_factory):
    """Play a module's scenes on two ranks, once; return what went wrong by scene."""
    return errors_of(request.path, tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def thread_count():
    """Return a function that sets the number of threads; restore it after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    """Seed every test, so that its random numbers do not depend on the tests before."""
    torch.manual_seed(0)


class Clock:
    """Clock that stands still until it is told."""

    seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    """Return the clock of the lines of progress, whose ``seconds`` a test sets."""
    found = Clock()
    defaults = Lines.__init__.__kwdefaults__ | {"clock": found}
    monkeypatch.setattr(Lines.__init__, "__kwdefaults__", defaults)
    return found


@pytest.fixture
def matmul_flops():
    """Return a function that counts the operations of torch's matrix products in a call."""

    def count(function):
        """Return the result of ``function()`` and the floating-point operations of its GEMMs."""
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True
        ) as profile:
            result = function()
        events = [event for event in profile.events() if "mm" in event.name.split("::")[-1]]
        assert {event.name for event in events} <= {"aten::mm", "aten::addmm"}
        assert all(event.flops > 0 for event in events)
        return result, sum(event.flops for event in events)

    return count
