"""Meetings of the processes that hold one sharded model.

A collective that one process calls alone hangs. Before the first, all therefore meet at the store
of the process group, which works with any backend and can give up. A call has a number, which each
rank counts by itself, and its meetings are numbered as stages::

    rank 0: save 1, stage 0 ... gives up, alone                     error: "called on rank 0 alone"
    rank 1: save 1, stage 0 was given up, and so save 2, stage 0 ... waits
    rank 0: save 2, stage 0: both are here                          go: both gather the adapter
    rank 1: save 2, stage 1 ... gives up, while rank 0 writes       error: "1 of them went on"
    rank 0: save 2, stage 1 was given up: takes that decision       the same error

Only a call that has not begun, at stage 0, passes over what others gave up. Later the ranks would
be out of step: one would wait at the end of a call, and another at the beginning of the next.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
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
        call: the number of this call among those of this process; 0: it has met nobody yet.
        met: how often all have met in this call.
        stopped: a meeting has decided not to go on, which all its members know.
    """

    members: tuple[int, ...]
    what: str
    timeout: float
    call: int = 0
    met: int = 0
    stopped: bool = False

    @property
    def first(self) -> bool:
        """Return whether this process is the one that writes files."""
        return dist.get_rank() == self.members[0]

    def meet(
        self, same: Mapping[str, str] | None = None, error: BaseException | None = None
    ) -> None:
        """Wait until all have come here, and return if none of them brings an error.

        Args:
            same: what must be the same on all of them, such as the hash of a file, by its name.
            error: what keeps this one from going on.

        Raises:
            RuntimeError: others did not come in time, brought an error, or have something else.
            BaseException: ``error``, once the others know of it.
        """
        try:
            decision = self._decision(same or {}, error)
            while error is not None and decision == _GO:
                decision = self._decision({}, error)  # it was interrupted while the others went on
        except BaseException:
            if error is not None:
                raise error from None
            raise
        if error is not None:
            raise error
        if decision != _GO:
            self.stopped = True
            raise RuntimeError(decision)

    def _decision(self, same: Mapping[str, str], error: BaseException | None) -> str:
        if not self.call:
            self.call = _next_call(self)
        decision = _Meeting(self, self.call, self.met).attend(same, error)
        if decision == _GO:
            self.met += 1
        return decision

    @contextlib.contextmanager
    def leaving_together(self) -> Iterator[None]:
        """Meet at the end, so that an error within reaches all, at this meeting or one within."""
        try:
            yield
        except BaseException as error:
            if self.stopped:
                raise
            self.meet(error=error)
        else:
            self.meet()


def _next_call(ranks: Ranks) -> int:
    """Return the number of the first call of which the others have not given up the beginning."""
    while True:
        number = _store().add(f"{_name(ranks)}/calls of {dist.get_rank()}", 1)
        beginning = _Meeting(ranks, number, 0)
        if not beginning.given_up():
            return number
        beginning.leave()


def _name(ranks: Ranks) -> str:
    return f"moe_kernels/{ranks.what}/{ranks.members}"


def _store() -> dist.Store:
    # No public function returns the store of a group that init_process_group has made.
    return distributed_c10d._get_default_store()


class _Meeting:
    """One meeting, by counters in the store.

    Whoever comes last decides to go on, and whoever waits too long decides to give up. The first
    decision counts for all, also for those who come later. Whoever leaves last clears up.
    """

    _KEYS = ("came", "same", "error", "decision", "given up", "left")

    def __init__(self, ranks: Ranks, call: int, stage: int):
        self.ranks, self.rank, self.size = ranks, dist.get_rank(), len(ranks.members)
        self.store = _store()
        self.place = f"{_name(ranks)}/{call}/{stage}"

    def attend(self, same: Mapping[str, str], error: BaseException | None) -> str:
        """Come, and return the decision."""
        what, who = self.ranks.what, f"rank {self.rank}"
        if error is not None:
            self._set_once("error", f"{what} failed on {who}: {type(error).__name__}: {error}")
        elif same and (differing := self._differing(same)):
            self._set_once("error", f"{what} found another {differing} on {who} than on others")
        if self._count("came") == self.size:
            failed = self.store.add(f"{self.place}/error/set", 0)
            decision = self._settle((self._read("error") or f"{what} failed") if failed else _GO)
        else:
            decision = self._read("decision") or self._settle(self._lonely())
        self.leave()
        return decision

    def given_up(self) -> bool:
        """Return whether those who came did not wait for the others."""
        return self._count("came", 0) < self.size and self._count("given up", 0) > 0

    def leave(self) -> None:
        """Go, and clear up if nobody else will look here again."""
        if self._count("left") == self.size:
            for key in self._KEYS:
                self.store.delete_key(f"{self.place}/{key}")
                self.store.delete_key(f"{self.place}/{key}/set")

    def _differing(self, same: Mapping[str, str]) -> str:
        """Return the names of what others have otherwise."""
        others = json.loads(self._set_once("same", json.dumps(list(same.values()))))
        pairs = zip(same.items(), others, strict=True)
        return " and ".join(name for (name, value), other in pairs if value != other)

    def _count(self, key: str, more: int = 1) -> int:
        return self.store.add(f"{self.place}/{key}", more)

    def _set_once(self, key: str, value: str) -> str:
        """Set a key that nobody has set yet, and return its value, ours or an earlier one."""
        if self._count(f"{key}/set") == 1:
            self.store.set(f"{self.place}/{key}", value)
            return value
        return self._read(key) or value

    def _settle(self, decision: str) -> str:
        settled = self._set_once("decision", decision)
        if settled != _GO:
            self._count("given up")
        return settled

    def _read(self, key: str) -> str | None:
        """Return what a process sets; None: nobody does in time."""
        key = f"{self.place}/{key}"
        end, pause = time.monotonic() + self.ranks.timeout, 0.001
        while not self.store.check([key]):  # a wait in the store would not see Ctrl-C
            if time.monotonic() > end:
                return None
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return self.store.get(key).decode()

    def _lonely(self) -> str:
        came, size = self._count("came", 0), self.size
        what, seconds = self.ranks.what, f"{self.ranks.timeout:g} seconds"
        if self.ranks.met:
            return (
                f"{what} began on all {size} ranks, and {came} of them went on within {seconds}. "
                "The others may finish it later, so look whether it is done; a longer timeout "
                "waits for them"
            )
        who = f"rank {self.rank} of {size} alone" if came == 1 else f"{came} of {size} ranks"
        return (
            f"{what} was called on {who}, within {seconds}: it puts together what the ranks "
            "hold, so call it on all of them"
        )
