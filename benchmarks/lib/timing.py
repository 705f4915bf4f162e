"""Interleaved rounds, and the statistics of what they measured."""

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


def summarize(values: Sequence[float]) -> Statistics:
    p20, median, p80 = np.percentile(values, (20, 50, 80)).tolist()
    return Statistics(median, p20, p80, len(values))


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Statistics:
    """Of the ratios within each round, in which both ran; a provider that stops early stops last.

    A round's neighbours in time share the machine's state: their ratio is steadier than a ratio of
    two medians.
    """
    common = min(len(numerator), len(denominator))
    return summarize([numerator[i] / denominator[i] for i in range(common)])


def order(names: Sequence[str], round_index: int) -> list[str]:
    """Every name once, rotated by one more in each round and every other round backwards, so that
    no name always follows the same one.
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
    """Run every step once in each round; every step must be warm.

    Args:
        steps: by name, what runs once and returns seconds by mode.
        min_rounds: done whatever they cost.
        max_rounds: no more than these.
        max_seconds: for the rounds after those; none starts later.
        thorough: after ``min_rounds`` only these go on; None: all do.
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
                    results[name].setdefault(mode, []).append(seconds)
            gc.collect()
            on_round()
    finally:
        gc.enable()
        gc.unfreeze()
    return results


class Clock:
    """Seconds between marks, on the host."""

    def __init__(self):
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in itertools.pairwise(self._marks)]


class GpuClock:
    """The same on the GPU, for which the host need not wait in between.

    Before the first mark the GPU clears a buffer larger than its L2, as ``triton.testing.do_bench``
    has it, so that nobody finds the inputs there. It takes 0.1 ms on an H100: so far the host is
    ahead at the first mark.
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
    """Seconds, when all that was launched on the device has ended."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
