"""Interleaved rounds, and statistics over them."""

import functools
import gc
import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Samples = dict[str, list[float]]  # mode -> seconds, one for each round


@dataclass(frozen=True)
class Statistics:
    """Median, 20th and 80th percentile of ``count`` rounds."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def single(cls, value: float) -> "Statistics":
        """Statistics of one value."""
        return cls(value, value, value, 1)

    def rounded(self) -> "Statistics":
        """The same, with as many digits as a file of results keeps."""
        return Statistics(*map(rounded, (self.median, self.p20, self.p80)), self.count)


def rounded(value: float) -> float:
    """The value with seven digits: a measurement repeats to two or three."""
    return float(f"{value:.7g}")


def summarize(values: Sequence[float]) -> Statistics:
    p20, median, p80 = np.percentile(values, (20, 50, 80)).tolist()
    return Statistics(median, p20, p80, len(values))


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Statistics:
    """Statistics of the ratios within each round in which both ran.

    Neighbours in time share the state of the machine, so their ratio is steadier than a ratio of
    two medians. A provider that stops early ran in the first rounds.
    """
    common = min(len(numerator), len(denominator))
    return summarize([numerator[i] / denominator[i] for i in range(common)])


def order(names: Sequence[str], round_index: int) -> list[str]:
    """Return the names in the order of a round.

    The order rotates by one in each round, and every other round is reversed, so that no name
    always follows the same one.
    """
    start = round_index % len(names)
    rotated = [*names[start:], *names[:start]]
    return rotated[::-1] if round_index % 2 else rotated


def measure(
    steps: Mapping[str, Callable[[], Mapping[str, float]]],
    *,
    min_rounds: int = 3,
    max_rounds: int = 10,
    max_seconds: float = 10.0,
    thorough: Collection[str] | None = None,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Samples]:
    """Run every step, which must be warm, once in each round.

    Args:
        steps: by name, functions that run once and return seconds by mode.
        min_rounds: run however long they take.
        max_rounds: at most.
        max_seconds: no round after ``min_rounds`` starts later.
        thorough: the steps that run after ``min_rounds``; None: all.
        on_round: called after each round.
    """
    results: dict[str, dict[str, list[float]]] = {name: {} for name in steps}
    gc.collect()
    gc.freeze()  # a collection between rounds looks at what the rounds left, and is short
    gc.disable()
    names = list(steps)
    started = time.perf_counter()
    try:
        for index in range(max_rounds if steps else 0):
            if index == min_rounds:
                names = [name for name in steps if thorough is None or name in thorough]
                started = time.perf_counter()
            late = index >= min_rounds and time.perf_counter() - started >= max_seconds
            if late or not names:
                break
            for name in order(names, index):
                for mode, seconds in steps[name]().items():
                    results[name].setdefault(mode, []).append(rounded(seconds))
            gc.collect()
            on_round()
    finally:
        gc.enable()
        gc.unfreeze()
    return results


class Clock:
    """A clock on the host: seconds between marks."""

    def __init__(self):
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in itertools.pairwise(self._marks)]


class GpuClock:
    """A clock on the GPU: seconds between marks, without a wait of the host in between.

    Before the first mark the GPU clears a buffer larger than its L2 cache, so that no provider
    finds the inputs there (as in ``triton.testing.do_bench``). That takes 0.1 ms on an H100, by
    which the host is ahead at the first mark.
    """

    def __init__(self):
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        if not self._marks:
            _larger_than_l2().zero_()
        self._marks.append(torch.cuda.Event(enable_timing=True))
        self._marks[-1].record()

    def seconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in itertools.pairwise(self._marks)]


@functools.cache
def _larger_than_l2() -> torch.Tensor:
    return torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")


def now(device: str) -> float:
    """Wait for the device, and return the time in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
