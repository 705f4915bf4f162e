"""Times, ratios and measures in a record: the plain data that a run keeps of one case.

A record has a "case" and "providers": for each of these why it is "missing", or its "error" (None
where its results are right) and the "seconds" of every round by mode. The mode "both" is not kept:
it is the sum of "forward" and "backward".
"""

import re
from collections.abc import Callable, Mapping, Sequence

from lib.cases import Case
from lib.costs import backward, forward
from lib.providers import SPLIT
from lib.timing import Statistics, ratio, summarize


def seconds(record: Mapping, provider: str, mode: str) -> list[float]:
    """The rounds of a provider; empty where it is missing or was not measured."""
    kept = record["providers"].get(provider, {}).get("seconds", {})
    if mode == "both":
        passes = (kept.get(name, []) for name in ("forward", "backward"))
        return [sum(pair) for pair in zip(*passes, strict=False)]
    return kept.get(mode, [])


def time_of(record: Mapping, provider: str, mode: str) -> Statistics | None:
    """Statistics of a provider's time, or None."""
    values = seconds(record, provider, mode)
    return summarize(values) if values else None


def is_right(record: Mapping, provider: str) -> bool:
    """Return whether a provider ran and its results passed the check."""
    entry = record["providers"].get(provider, {})
    return "error" in entry and entry["error"] is None


def compare(
    record: Mapping, numerator: str | None, denominator: str | None, mode: str
) -> Statistics | None:
    """Statistics of the ratio of two times; None where a side is missing or computes wrongly."""
    times = []
    for name in (numerator, denominator):
        values = seconds(record, name, mode) if name else []
        if not values or not is_right(record, name):
            return None
        times.append(values)
    return ratio(*times)


def fastest(record: Mapping, providers: Sequence[str], mode: str) -> str | None:
    """The provider with the smallest median, among those that ran and are right."""
    times = {
        name: time_of(record, name, mode).median
        for name in providers
        if seconds(record, name, mode) and is_right(record, name)
    }
    return min(times, key=times.get) if times else None


def measured_backend(record: Mapping, kind: str) -> str | None:
    """The name of our provider of a kind, such as "ours_base", on the backend that was measured.

    A record may have our other backends too; the measured one comes first.
    """
    return next((name for name in record["providers"] if name.partition(":")[0] == kind), None)


# --- measures of targets; each returns None where there is no number


# Takes a record and all results of its run.
Measure = Callable[[Mapping, Mapping], Statistics | None]


def time_ratio(
    numerator: str | Sequence[str], denominator: str | Sequence[str], mode: str = "both"
) -> Measure:
    """The time of one side over that of the other.

    A side is a provider, or one of our kinds, such as "ours_base", or the fastest of several
    providers.
    """

    def measured(record: Mapping, _: Mapping) -> Statistics | None:
        sides = (_provider(record, side, mode) for side in (numerator, denominator))
        return compare(record, *sides, mode)

    return measured


def _provider(record: Mapping, side: str | Sequence[str], mode: str) -> str | None:
    if not isinstance(side, str):
        return fastest(record, side, mode)
    return side if side in record["providers"] else measured_backend(record, side)


def memory_ratio(key: str, numerator: str = "ours", denominator: str = SPLIT) -> Measure:
    """The memory of one side over that of the other: the "peak", or what is "saved" for backward.

    A side is a provider, or one of our kinds.
    """

    def measured(record: Mapping, _: Mapping) -> Statistics | None:
        pair = [_provider(record, side, "both") for side in (numerator, denominator)]
        memory = [record["providers"].get(name, {}).get("memory") for name in pair]
        if not all(memory) or not all(is_right(record, name) for name in pair):
            return None
        return Statistics.single(memory[0][key] / memory[1][key])

    return measured


def tflops(kind: str, mode: str) -> Measure:
    """TFLOP/s of the base's GEMMs, over the time of the whole layer."""

    def measured(record: Mapping, _: Mapping) -> Statistics | None:
        time = _right_time(record, kind, mode)
        if time is None:
            return None
        work = record["flops"][mode] / 1e12
        return Statistics(work / time.median, work / time.p80, work / time.p20, time.count)

    return measured


def over_reading_at_copy_rate(kind: str) -> Measure:
    """The time of decoding over that of reading the experts' weights at the rate of a copy."""

    def measured(record: Mapping, results: Mapping) -> Statistics | None:
        time, rate = _right_time(record, kind, "decode"), _copy_rate(results)
        if time is None or rate is None:
            return None
        reading = record["bytes"]["decode"] / rate / 1e12
        quantiles = (value / reading for value in (time.median, time.p20, time.p80))
        return Statistics(*quantiles, time.count)

    return measured


def _right_time(record: Mapping, kind: str, mode: str) -> Statistics | None:
    """The time of our provider of a kind, if its results are right."""
    provider = measured_backend(record, kind)
    return time_of(record, provider, mode) if provider and is_right(record, provider) else None


def _copy_rate(results: Mapping) -> float | None:
    """TB/s, read and written."""
    return results.get("ceilings", {}).get("copy_TBps")


def dispatch_time(record: Mapping, _: Mapping) -> Statistics:
    """Microseconds of dispatch with the tile maps."""
    return Statistics.single(record["us"]["cuda"])


def dispatch_speed(record: Mapping, _: Mapping) -> Statistics:
    """The time of torch's dispatch over that of dispatch with the tile maps."""
    return Statistics.single(record["us"]["reference"] / record["us"]["cuda"])


def share_of_copy_rate(kernels: str, costs: Sequence[str]) -> Measure:
    """The rate of some kernels as a share of the rate of a copy.

    Operands and results count once, over the time that the profiler saw.

    Args:
        kernels: a pattern of their names in the profiler.
        costs: their names in :mod:`lib.costs`.
    """

    def measured(record: Mapping, results: Mapping) -> Statistics | None:
        rate = _copy_rate(results)
        ms = sum(ms for name, _, ms in record["kernels"] if re.search(kernels, name))
        if not rate or not ms:
            return None
        case = Case.from_description(record["case"])
        launches = [*forward(case), *backward(case, record["backend"])]
        moved = sum(cost.useful_bytes for cost in launches if cost.kernel in costs)
        return Statistics.single(moved / (ms * 1e9) / rate)

    return measured
