"""Blocks of pages that show results of any device."""

from collections.abc import Callable, Mapping, Sequence

from lib.markdown import markdown
from lib.pages.tables import SHORT_DTYPES
from lib.records import time_of


def grid(
    records: Sequence[Mapping],
    column: Callable[[Mapping], str],
    cell: Callable[[Mapping, str], str],
) -> str:
    """A table with a column for each record, and a row for each provider that has a cell."""
    names = list(dict.fromkeys(name for record in records for name in record["providers"]))
    rows = [(name, *(cell(record, name) for record in records)) for name in names]
    header = ("", *(column(record) for record in records))
    return markdown(header, [row for row in rows if any(row[1:])])


def milliseconds(record: Mapping, name: str, mode: str) -> str:
    """The median time of a provider, unless its results were wrong."""
    time = time_of(record, name, mode)
    if time is None:
        return ""
    return "refused" if record["providers"][name]["error"] else f"{time.median * 1e3:.3g}"


def common_rounds(record: Mapping) -> Mapping:
    """The record without the rounds in which some providers had stopped."""
    timed = {n: e for n, e in record["providers"].items() if e.get("seconds")}
    rounds = min(len(values) for e in timed.values() for values in e["seconds"].values())
    cut = {
        name: entry | {"seconds": {m: v[:rounds] for m, v in entry["seconds"].items()}}
        for name, entry in timed.items()
    }
    return {**record, "providers": cut}


def training(results: Mapping) -> str:
    """Milliseconds of forward and backward, balanced routing."""
    records = [r for r in results["training"] if r["case"]["routing"] == "balanced"]
    return grid(
        records,
        lambda record: f"{record['case']['shape']} {SHORT_DTYPES[record['case']['dtype']]}",
        lambda record, name: milliseconds(record, name, "both"),
    )


def decode(results: Mapping) -> str:
    """Milliseconds of a call, bfloat16."""
    records = [r for r in results["decode"] if r["case"]["dtype"] == "bfloat16"]
    return grid(
        records,
        lambda record: f"{record['case']['shape']} T={record['case']['T']}",
        lambda record, name: milliseconds(record, name, "decode"),
    )


def machine(results: Mapping) -> str:
    """The processor, versions and sources of a run."""
    run = results["environment"]
    versions = ", ".join(f"{n} {run['versions'][n]}" for n in ("torch", "transformers", "peft"))
    commit = (run["commit"] or "unknown")[:7] + (" with changes" if run["dirty"] else "")
    return (
        f"{run['processor']}, {run['threads']} threads, {versions}; commit {commit}, "
        f"sources {(run['source_hash'] or 'unknown')[:12]}, {run['time'][:10]}.\n"
    )
