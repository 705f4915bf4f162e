"""Times and ratios in a record: the plain data that a run keeps of one case.

A record has a "case" and "providers": for each of these why it is "missing", or its "error" (None
where its results are right) and the "seconds" of every round by mode. The mode "both" is not kept:
it is the sum of "forward" and "backward".
"""

from collections.abc import Mapping, Sequence

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
