"""Tables of records, and of the verdicts on targets, for the terminal and for pages."""

import textwrap
from collections.abc import Mapping, Sequence

from lib.markdown import markdown
from lib.records import compare, fastest, time_of
from lib.timing import Statistics

MODES = ("forward", "backward", "both")
SHORT_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}


def interval(values: Statistics | None, scale: float = 1.0, digits: int = 2) -> str:
    """The median, and in brackets the 20th and 80th percentile."""
    if values is None:
        return ""
    median, low, high = (f"{v * scale:.{digits}f}" for v in (values.median, values.p20, values.p80))
    return f"{median} ({low}-{high})"


def case_title(case: Mapping) -> str:
    """Shape, dtype and routing of a case."""
    return f"{case['shape']} {SHORT_DTYPES[case['dtype']]} {case['routing']}"


def provider_note(entry: Mapping) -> str:
    """Why a provider has no number or no speed-up, shortened."""
    if "missing" in entry:
        return textwrap.shorten(f"missing: {entry['missing']}", 80, placeholder="...")
    return f"refused: {entry['error']}" if entry["error"] else ""


def providers_table(record: Mapping, mode: str) -> str:
    """Every provider of a layer's record in one mode, with the ratio to its bound."""
    reference = "read" if mode == "decode" else "bound"
    rows = [
        (name, *_provider_cells(record, name, mode, reference), provider_note(entry))
        for name, entry in record["providers"].items()
    ]
    case = record["case"]
    sizes = ", ".join(f"{key} {case[key]}" for key in ("T", "K", "E", "H", "I", "r"))
    title = f"\n{case_title(case)}, {mode}: {sizes}, image share {case['image_share']}\n\n"
    header = ("provider", "ms (20-80 %)", "GFLOP/s", "GB/s", f"x {reference}", "MiB", "note")
    return title + markdown(header, rows)


def _provider_cells(record: Mapping, name: str, mode: str, reference: str) -> tuple[str, ...]:
    time = time_of(record, name, mode)
    if time is None:
        return ("",) * 5
    gflops = record["flops"][mode] / time.median / 1e9
    gbytes = record["bytes"][mode] / time.median / 1e9
    memory = record["providers"][name].get("memory")
    return (
        interval(time, 1e3), f"{gflops:.0f}" if name != "read" else "", f"{gbytes:.1f}",
        interval(compare(record, name, reference, mode)),
        f"{memory['peak'] / 2**20:.0f}" if memory else "",
    )  # fmt: skip


def _plain_table(
    records: Sequence[Mapping], keys: Sequence[str], mode: str, reference: str, scale: float
) -> str:
    """Time of each provider in each case, and the ratio to a reference."""
    rows = [
        (
            *(str(record["case"][key]) for key in keys), name,
            interval(time_of(record, name, mode), scale),
            interval(compare(record, name, reference, mode)), provider_note(entry),
        )
        for record in records
        for name, entry in record["providers"].items()
    ]  # fmt: skip
    unit = {1e3: "ms", 1e6: "us"}[scale]
    return markdown((*keys, "provider", f"{unit} (20-80 %)", f"x {reference}", "note"), rows)


def linear_table(records: Sequence[Mapping]) -> str:
    """Forward and backward of ``lora_linear``."""
    keys = ("tokens", "features", "rank", "image_share", "dtype")
    return _plain_table(records, keys, "both", "base", 1e3)


def dispatch_table(records: Sequence[Mapping]) -> str:
    """Time of ``dispatch``."""
    keys = ("tokens", "experts", "top_k", "routing")
    return _plain_table(records, keys, "forward", "hf:grouped_mm", 1e6)


def steps_table(records: Sequence[Mapping]) -> str:
    """Tokens per second of whole training steps."""
    rows = []
    for record in records:
        tokens = record["case"]["tokens"]
        for name, entry in record["providers"].items():
            time = time_of(record, name, "step")
            rate = f"{tokens / time.median:.0f}" if time else ""
            faster = interval(compare(record, "peft:grouped_mm", name, "step"))
            rows.append((record["case"]["name"], name, rate, faster, provider_note(entry)))
    header = ("model", "provider", "tokens/s", "times PEFT's (20-80 %)", "note")
    return markdown(header, rows)


def added_steps_table(records: Sequence[Mapping]) -> str:
    """Tokens per second, trained parameters and memory of steps that train added or all experts."""
    rows = []
    for record in records:
        entries, tokens = record["providers"], record["case"]["tokens"]
        fastest_full = fastest(record, [name for name in entries if name != "ours"], "step")
        for name, entry in entries.items():
            time = time_of(record, name, "step")
            rows.append(
                (
                    record["case"]["name"], name, f"{tokens / time.median:.0f}" if time else "",
                    interval(compare(record, fastest_full, name, "step")),
                    f"{entry['trained'] / 1e6:.3g}" if time else "",
                    f"{entry['peak'] / 2**20:.0f}" if time else "", provider_note(entry),
                )
            )  # fmt: skip
    header = (
        "model", "provider", "tokens/s", "times the faster full's (20-80 %)",
        "trained, millions", "peak, MiB", "note",
    )  # fmt: skip
    return markdown(header, rows)


# --- targets and whether they were met


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
