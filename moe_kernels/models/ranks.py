"""Meetings of the processes that hold one sharded model.

A collective that one process calls alone hangs. Before the first, all therefore meet at the store
of the process group, which works with any backend and can give up.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import distributed_c10d

_GO = "go"


@dataclass
class Ranks:
    """The processes that hold one model.

    Attributes:
        members: their ranks, in order.
        what: the function that all of them have called, for messages.
        timeout: seconds to wait for the others.
        met: how often all have met.
    """

    members: tuple[int, ...]
    what: str
    timeout: float
    met: int = 0

    @property
    def first(self) -> bool:
        """Return whether this process is the one that writes files."""
        return dist.get_rank() == self.members[0]

    def meet(self, same: str = "", error: BaseException | None = None) -> None:
        """Wait until all have come here, and return if none of them brings an error.

        Args:
            same: what must be the same on all of them, such as the hash of a file.
            error: what keeps this one from going on.

        Raises:
            RuntimeError: others did not come in time, or brought an error or another ``same``.
            BaseException: ``error``, once the others know of it.
        """
        try:
            decision = _Meeting(self).decide(same, error)
        except BaseException:
            if error is not None:
                raise error from None
            raise
        if error is not None:
            raise error
        if decision != _GO:
            raise _Stopped(decision)
        self.met += 1

    @contextlib.contextmanager
    def leaving_together(self) -> Iterator[None]:
        """Meet at the end, so that an error within reaches all, at this meeting or one within."""
        try:
            yield
        except _Stopped:
            raise
        except BaseException as error:
            self.meet(error=error)
        else:
            self.meet()


class _Stopped(RuntimeError):
    """The decision of a meeting not to go on, which all its members know."""


class _Meeting:
    """One meeting, by counters in the store.

    Whoever comes last decides to go on, and whoever waits too long decides to give up. The first
    decision counts. Who comes later then waits at the next meeting.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.rank = ranks, dist.get_rank()
        # No public function returns the store of a group that init_process_group has made.
        self.store = distributed_c10d._get_default_store()
        self.name = f"moe_kernels/{ranks.what}/{ranks.members}"

    def decide(self, same: str, error: BaseException | None) -> str:
        """Return the decision of the first meeting that was not given up before this came."""
        while True:
            number = self.store.add(f"{self.name}/calls of {self.rank}", 1)
            place = f"{self.name}/{number}"
            if not self._given_up(place):
                return self._attend(place, same, error)

    def _attend(self, place: str, same: str, error: BaseException | None) -> str:
        what, who = self.ranks.what, f"rank {self.rank}"
        if error is not None:
            self._set_once(
                f"{place}/error", f"{what} failed on {who}: {type(error).__name__}: {error}"
            )
        elif self._set_once(f"{place}/same", same) != same:
            self._set_once(
                f"{place}/error", f"{what} found another file or model on {who} than on others"
            )
        came, size = self.store.add(f"{place}/came", 1), len(self.ranks.members)
        if came == size:
            if not self.store.add(f"{place}/error/set", 0):
                return self._settle(place, _GO)
            return self._settle(place, self._read(f"{place}/error") or f"{what} failed")
        return self._read(f"{place}/decision") or self._settle(place, self._lonely(place))

    def _set_once(self, key: str, value: str) -> str:
        """Set a key that nobody has set yet, and return its value, ours or an earlier one."""
        if self.store.add(f"{key}/set", 1) == 1:
            self.store.set(key, value)
            return value
        return self._read(key) or value

    def _settle(self, place: str, decision: str) -> str:
        settled = self._set_once(f"{place}/decision", decision)
        if settled != _GO:
            self.store.add(f"{place}/given up", 1)
        return settled

    def _given_up(self, place: str) -> bool:
        came = self.store.add(f"{place}/came", 0)
        return came < len(self.ranks.members) and self.store.add(f"{place}/given up", 0) > 0

    def _read(self, key: str) -> str | None:
        """Return what a process sets; None: nobody does in time."""
        end, pause = time.monotonic() + self.ranks.timeout, 0.001
        while not self.store.check([key]):  # a wait in the store would not see Ctrl-C
            if time.monotonic() > end:
                return None
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return self.store.get(key).decode()

    def _lonely(self, place: str) -> str:
        came, size = self.store.add(f"{place}/came", 0), len(self.ranks.members)
        what, seconds = self.ranks.what, f"{self.ranks.timeout:g} seconds"
        if self.ranks.met:
            return f"{what} began on all {size} ranks, and {came} of them went on within {seconds}"
        who = f"rank {self.rank} of {size} alone" if came == 1 else f"{came} of {size} ranks"
        return (
            f"{what} was called on {who}, within {seconds}: it puts together what the ranks "
            "hold, so call it on all of them"
        )
