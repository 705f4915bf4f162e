"""Meetings of ranks, which are threads here."""

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from moe_kernels.models import ranks
from moe_kernels.models.ranks import Ranks

_own = threading.local()


@pytest.fixture(autouse=True)
def store(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: _own.rank)
    return store


def play(*scenes):
    """Return what each rank's scene returns."""

    def run(rank):
        _own.rank = rank
        return scenes[rank]()

    with ThreadPoolExecutor(len(scenes)) as pool:
        return list(pool.map(run, range(len(scenes))))


def call(timeout, work=lambda: None, size=2):
    """Call as save_adapter does, with a meeting before the work; return the error, if any."""
    together = Ranks(tuple(range(size)), "save_adapter", timeout)
    try:
        with together.leaving_together():
            together.meet({"model": "m"})
            work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_a_late_writer_stays_in_step():
    """Its last meeting was the first of the others' next call, and the call after it hung."""
    given_up = threading.Event()

    def writer():
        return [call(0.3, given_up.wait), call(20), call(20)]

    def other():
        found = [call(0.3)]
        given_up.set()
        return [*found, call(20), call(20)]

    for late, *retries in play(writer, other):
        assert "RuntimeError: save_adapter began on all 2 ranks, and 1 of them went on" in late
        assert "The others may finish it later, so look whether it is done" in late
        assert retries == [None, None]


def test_a_call_that_was_given_up_is_passed_over():
    given_up = threading.Event()

    def early():
        found = [call(0.1), call(0.1)]
        given_up.set()
        return [*found, call(20)]

    def late():
        given_up.wait()
        return [call(20)]

    (*alone, met), others = play(early, late)
    assert ["rank 0 of 2 alone" in each for each in alone] == [True, True]
    assert [met, *others] == [None, None]


def test_what_calls_leave_in_the_store(store):
    """The number of calls of each rank alone; one that was given up goes with the next."""

    def repeated():
        return [call(20, size=3) for _ in range(5)]

    assert play(*[repeated] * 3) == [[None] * 5] * 3
    assert store.num_keys() == 3
    given_up = threading.Event()

    def early():
        call(0.1, size=3)
        given_up.set()
        return call(20, size=3)

    def late():
        given_up.wait()
        return call(20, size=3)

    assert play(early, late, late) == [None] * 3
    assert store.num_keys() == 3


def test_a_difference_is_named():
    def meet(values):
        together = Ranks((0, 1), "load_adapter", 20)
        with pytest.raises(RuntimeError) as failure:
            together.meet(values)
        return str(failure.value)

    one = {"adapter in /a": "x", "model": "m"}
    other = {"adapter in /b": "y", "model": "m"}
    first, second = play(lambda: meet(one), lambda: meet(other))
    assert first == second
    assert "load_adapter found another adapter in /" in first and "than on others" in first


@pytest.mark.parametrize("met_already", [False, True])
def test_an_interrupt_reaches_the_others(met_already):
    """Whoever was interrupted while it waited has come to that meeting already."""
    waits = threading.Event()

    def interrupted():
        read = ranks._Meeting._read

        def interrupt(meeting, key):
            if key == "decision" and not waits.is_set():
                waits.set()
                if met_already:
                    read(meeting, key)
                raise KeyboardInterrupt
            return read(meeting, key)

        with (
            mock.patch.object(ranks._Meeting, "_read", interrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            call(20)
        return call(20)

    def other():
        waits.wait()
        return [call(20), call(20)]

    again, (told, retry) = play(interrupted, other)
    assert "save_adapter failed on rank 0: KeyboardInterrupt" in told
    assert (again, retry) == (None, None)


def test_users_see_a_plain_runtime_error():
    def fail():
        raise ValueError("no room")

    own, told = play(lambda: call(20, fail), lambda: call(20))
    assert own == "ValueError: no room"
    assert told == "RuntimeError: save_adapter failed on rank 0: ValueError: no room"
