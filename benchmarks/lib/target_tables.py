"""Tables of targets and whether they were met, out of the verdicts of runs."""

from collections.abc import Mapping, Sequence

from lib.markdown import markdown
from lib.tables import interval
from lib.timing import Statistics


def targets_table(verdicts: Sequence[Mapping]) -> str:
    """Every target in every case."""
    rows = [
        (
            f"{verdict['number']}. {verdict['name']}", verdict["case"],
            interval(_statistics(verdict), digits=3), _limit(verdict),
            {True: "met", False: "missed", None: verdict["note"]}[verdict["met"]],
        )
        for verdict in verdicts
    ]  # fmt: skip
    return markdown(("target", "case", "measured (20-80 %)", "limit", "result"), rows)


def summary(verdicts: Sequence[Mapping]) -> str:
    """Every target once, in the case that is worst, with the number of cases that met it."""
    rows = []
    for (title, limit), cases in _by_target(verdicts).items():
        worst = _worst(cases)
        rows.append((title, limit, _value(worst), worst["case"], _count_met(cases)))
    return markdown(("target", "limit", "worst measured (20-80 %)", "where", "met"), rows)


def summary_of_two(first: Sequence[Mapping], second: Sequence[Mapping]) -> str:
    """Every target once, in the worst case of each of two runs."""
    others, rows = _by_target(second), []
    for target, cases in _by_target(first).items():
        cells = []
        for members in (cases, others[target]):
            cells += [_value(_worst(members)), _count_met(members)]
        rows.append((*target, *cells))
    header = ("target", "limit", "worst, first run", "met", "worst, second run", "met")
    return markdown(header, rows)


def _by_target(verdicts: Sequence[Mapping]) -> dict[tuple[str, str], list[Mapping]]:
    """The verdicts by title and limit of their target."""
    groups: dict[tuple[str, str], list[Mapping]] = {}
    for verdict in verdicts:
        target = f"{verdict['number']}. {verdict['name']}", _limit(verdict)
        groups.setdefault(target, []).append(verdict)
    return groups


def _worst(cases: Sequence[Mapping]) -> Mapping:
    """The measured case that is furthest from the limit, or the first if none was measured."""
    known = [verdict for verdict in cases if verdict["measured"]]
    return max(known, key=_distance) if known else cases[0]


def _distance(verdict: Mapping) -> float:
    """A number that is larger where the measured value is worse."""
    value = verdict["measured"]["median"]
    return -value if verdict["at_least"] else value


def _count_met(cases: Sequence[Mapping]) -> str:
    return f"{sum(verdict['met'] is True for verdict in cases)} of {len(cases)}"


def _value(verdict: Mapping) -> str:
    return interval(_statistics(verdict)) or verdict["note"]


def _limit(verdict: Mapping) -> str:
    if verdict["within_spread"]:
        return f"{verdict['limit']:.2f} within the spread, below {verdict['limit'] + 0.03:.2f}"
    return f"{'at least' if verdict['at_least'] else 'at most'} {verdict['limit']:.2f}"


def _statistics(verdict: Mapping) -> Statistics | None:
    return Statistics(**verdict["measured"]) if verdict["measured"] else None
