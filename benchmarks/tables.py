"""Tables of results, for the terminal and for the pages that show them.

python benchmarks/tables.py    # writes those pages' tables anew from benchmarks/results/
"""

import itertools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence

from lib import result_files
from lib.markdown import markdown
from lib.providers import ADDED_KINDS, HF_TRAINING
from lib.runs import compare, fastest, time_of
from lib.timing import Statistics
from shared import markers

PAGES = (result_files.ROOT / "README.md", result_files.ROOT / "docs/results/cpu.md")
GPU_PAGE = result_files.ROOT / "docs/results/gpu.md"
RESULTS = "bars-cpu.json"  # what their tables are made from
GPU_RESULTS = "gpu-h100.json"  # of run_gpu.py, for GPU_PAGE and the README
AGAIN = "bars-cpu-again.json"  # a second run of the same sources
ADDED_ALONE = "bars-cpu-added.json"  # of bars.py --only added added_steps, where RESULTS is older
MODES = ("forward", "backward", "both")
_OF_ADDED = (12, 13)  # numbers of the bars
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}


def interval(values: Statistics | None, scale: float = 1.0, digits: int = 2) -> str:
    """The median, then the 20th and 80th percentile in brackets."""
    if values is None:
        return ""
    median, low, high = (f"{v * scale:.{digits}f}" for v in (values.median, values.p20, values.p80))
    return f"{median} ({low}-{high})"


def case_title(case: Mapping) -> str:
    return f"{case['shape']} {_SHORT[case['dtype']]} {case['routing']}"


def provider_note(entry: Mapping) -> str:
    """Why a provider has no number, or no speed-up; the file has it in full."""
    if "missing" in entry:
        return textwrap.shorten(f"missing: {entry['missing']}", 80, placeholder="...")
    return f"refused: {entry['error']}" if entry["error"] else ""


# --- one record, for the terminal


def providers_table(record: Mapping, mode: str) -> str:
    """Every provider of a layer's record in one mode, relative to its bound."""
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
    """A row for each case and provider: time, and the ratio to a reference."""
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
    keys = ("tokens", "features", "rank", "image_share", "dtype")
    return _plain_table(records, keys, "both", "base", 1e3)


def dispatch_table(records: Sequence[Mapping]) -> str:
    keys = ("tokens", "experts", "top_k", "routing")
    return _plain_table(records, keys, "forward", "hf:grouped_mm", 1e6)


def steps_table(records: Sequence[Mapping]) -> str:
    """Tokens a second of whole training steps."""
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
    """Tokens a second, parameters and memory of steps that train added experts, or all."""
    rows = []
    for record in records:
        entries, tokens = record["providers"], record["case"]["tokens"]
        rival = fastest(record, [name for name in entries if name != "ours"], "step")
        for name, entry in entries.items():
            time = time_of(record, name, "step")
            rows.append(
                (
                    record["case"]["name"], name, f"{tokens / time.median:.0f}" if time else "",
                    interval(rival and compare(record, rival, name, "step")),
                    f"{entry['trained'] / 1e6:.3g}" if time else "",
                    f"{entry['peak'] / 2**20:.0f}" if time else "", provider_note(entry),
                )
            )  # fmt: skip
    header = (
        "model", "provider", "tokens/s", "times the faster full's (20-80 %)",
        "trained, millions", "peak, MiB", "note",
    )  # fmt: skip
    return markdown(header, rows)


# --- bars


def bars_table(bars: Sequence[Mapping]) -> str:
    """Every bar in every case."""
    rows = [
        (
            f"{bar['number']}. {bar['what']}", bar["case"], interval(_statistics(bar), digits=3),
            _limit(bar), {True: "yes", False: "NO", None: bar["note"]}[bar["met"]],
        )
        for bar in bars
    ]  # fmt: skip
    return markdown(("bar", "case", "measured (20-80 %)", "wanted", "met?"), rows)


def _bars_summary(results: Mapping) -> str:
    """Each bar once: the case that is furthest from it."""
    rows = []
    for (number, what, limit), members in _grouped(results["bars"]).items():
        worst, met = _worst(members)
        value = interval(_statistics(worst)) if worst["measured"] else worst["note"]
        rows.append((f"{number}. {what}", limit, value, worst["case"], met))
    return markdown(("bar", "wanted", "worst measured (20-80 %)", "where", "met"), rows)


def _bars_twice(results: Mapping) -> str:
    """Each bar in the two runs: the worst case, and how many cases met it."""
    again = result_files.read(result_files.RESULTS / AGAIN)
    if again["environment"]["source_hash"] != results["environment"]["source_hash"]:
        return f"The runs have different sources: make {AGAIN} again.\n"
    second = _grouped(again["bars"])
    rows = []
    for key, members in _grouped(results["bars"]).items():
        cells = []
        for worst, met in (_worst(members), _worst(second[key])):
            cells += [interval(_statistics(worst)) or worst["note"], met]
        rows.append((f"{key[0]}. {key[1]}", key[2], *cells))
    header = ("bar", "wanted", "worst, first run", "met", "worst, second run", "met")
    return markdown(header, rows)


def _grouped(bars: Sequence[Mapping]) -> dict[tuple, list[Mapping]]:
    """The cases of each bar, by its number, name and limit."""
    groups: dict[tuple, list[Mapping]] = {}
    for bar in bars:
        groups.setdefault((bar["number"], bar["what"], _limit(bar)), []).append(bar)
    return groups


def _worst(members: Sequence[Mapping]) -> tuple[Mapping, str]:
    """The case that is furthest from the bar, and how many met it."""
    known = [bar for bar in members if bar["measured"]]
    met = sum(bar["met"] is True for bar in members)
    return max(known, key=_distance) if known else members[0], f"{met} of {len(members)}"


def _distance(bar: Mapping) -> float:
    """How far beyond its limit; larger is worse."""
    value = bar["measured"]["median"]
    return -value if bar["at_least"] else value


def _limit(bar: Mapping) -> str:
    if bar["by_p20"]:
        return f"{bar['limit']:.2f} within the spread, below {bar['limit'] + 0.03:.2f}"
    return f"{'at least' if bar['at_least'] else 'at most'} {bar['limit']:.2f}"


def _statistics(bar: Mapping) -> Statistics | None:
    return Statistics(**bar["measured"]) if bar["measured"] else None


# --- the pages


def _grid(
    records: Sequence[Mapping],
    column: Callable[[Mapping], str],
    cell: Callable[[Mapping, str], str],
) -> str:
    """A column for each record, a row for each provider with a cell that is not empty."""
    names = list(dict.fromkeys(name for record in records for name in record["providers"]))
    rows = [(name, *(cell(record, name) for record in records)) for name in names]
    header = ("", *(column(record) for record in records))
    return markdown(header, [row for row in rows if any(row[1:])])


def _training(results: Mapping) -> str:
    """ms of forward and backward, balanced routing."""
    records = [r for r in results["training"] if r["case"]["routing"] == "balanced"]
    return _grid(
        records,
        lambda record: f"{record['case']['shape']} {_SHORT[record['case']['dtype']]}",
        lambda record, name: _milliseconds(record, name, "both"),
    )


def _decode(results: Mapping) -> str:
    """ms of a call, bf16."""
    records = [r for r in results["decode"] if r["case"]["dtype"] == "bfloat16"]
    return _grid(
        records,
        lambda record: f"{record['case']['shape']} T={record['case']['T']}",
        lambda record, name: _milliseconds(record, name, "decode"),
    )


def _milliseconds(record: Mapping, name: str, mode: str) -> str:
    time = time_of(record, name, mode)
    if time is None:
        return ""
    return "refused" if record["providers"][name]["error"] else f"{time.median * 1e3:.3g}"


def _overhead(results: Mapping) -> str:
    """Forward and backward with adapters over ours without, by image share and by rank."""
    rows = [
        (
            f"{record['case']['image_share']:.0%}", str(record["case"]["r"]),
            *(
                interval(compare(record, *overhead_pair(record), mode))
                for mode in MODES
            ),
        )
        for record in results["overhead"]
    ]  # fmt: skip
    return markdown(("image rows", "rank", *MODES), rows)


def _adapters(results: Mapping) -> str:
    """With adapters over ours without, in every training case."""
    rows = []
    for record in results["training"]:
        base, name = _base(record), case_title(record["case"])
        for kind, rows_of in (("ours:", "half image"), ("ours_text:", "no image")):
            mine = base.replace("ours_base:", kind)
            times = (compare(record, mine, base, mode) for mode in MODES)
            rows.append((name, rows_of, *(interval(time) for time in times)))
    return markdown(("case", "rows", *MODES), rows)


def _floors(results: Mapping) -> str:
    """What transformers leaves to be won: its best frozen experts over the GEMMs alone."""
    rows = []
    for record in results["training"]:
        rival, base = fastest(record, HF_TRAINING, "both"), _base(record)
        rows.append(
            (
                case_title(record["case"]), _milliseconds(record, "bound", "both"),
                interval(compare(record, base, "bound", "both")),
                interval(rival and compare(record, rival, "bound", "both")), rival or "",
            )
        )  # fmt: skip
    header = (
        "case", "GEMMs, ms", "ours without adapters over them", "transformers over them",
        "its best",
    )  # fmt: skip
    return markdown(header, rows)


def _decode_gap(results: Mapping) -> str:
    """What a call takes beside one reading of the base's weights, and what its arithmetic takes at
    the rate of the GEMMs of training.
    """
    rates = {
        (case["shape"], case["dtype"]): record["flops"]["both"] / bound.median
        for record in results["training"]
        if (case := record["case"])["routing"] == "balanced"
        and (bound := time_of(record, "bound", "both"))
    }
    rows = []
    for record in results["decode"]:
        base, case = _base(record), record["case"]
        kinds = [
            "read",
            base,
            *(base.replace("ours_base:", kind) for kind in ("ours_text:", "ours:")),
        ]
        times = [time_of(record, name, "decode") for name in kinds]
        if not all(times):
            continue
        read = times[0].median
        rate = rates.get((case["shape"], case["dtype"]))
        arithmetic = f"{record['flops']['decode'] / rate * 1e3:.3g}" if rate else ""
        rows.append(
            (
                f"{case_title(case)} T={case['T']}", f"{read * 1e3:.3g}",
                f"{record['bytes']['decode'] / read / 1e9:.0f}", arithmetic,
                *(f"{time.median * 1e3:.3g}" for time in times[1:]),
            )
        )  # fmt: skip
    header = (
        "case", "reading, ms", "GB/s", "arithmetic, ms", "no adapters, ms", "no image, ms",
        "half image, ms",
    )  # fmt: skip
    return markdown(header, rows)


def _added(results: Mapping) -> str:
    """Bars, ops, blocks and steps of added experts, of this run or of one of that part alone."""
    results, machine = _with_added(results)
    if not results:
        return "Not measured yet.\n"
    rows = []
    for record, (what, kinds) in itertools.product(results["added"], ADDED_KINDS.items()):
        names = {name.partition(":")[0]: name for name in record["providers"]}
        base, *extended = (names[kind] for kind in kinds)
        for mine, where in zip(extended, ("added expert", "other experts"), strict=True):
            times = (interval(compare(record, mine, base, mode)) for mode in MODES)
            rows.append((case_title(record["case"]), what, where, *times))
    layers = markdown(("case", "in", "image rows go to", *MODES), rows)
    bars = {"bars": [bar for bar in results["bars"] if bar["number"] in _OF_ADDED]}
    steps = added_steps_table(results["added_steps"])
    return machine + "\n".join([_bars_summary(bars), layers, steps])


def _with_added(results: Mapping) -> tuple[Mapping | None, str]:
    """The run that has added experts, and what it ran on where that is not said elsewhere."""
    if "added" in results:
        return results, ""
    path = result_files.RESULTS / ADDED_ALONE
    if not path.exists():
        return None, ""
    alone = result_files.read(path)
    return alone, f"{_machine(alone)}\n"


def _base(record: Mapping) -> str:
    """The name of ours without adapters in a record."""
    return next(name for name in record["providers"] if name.startswith("ours_base:"))


def overhead_pair(record: Mapping) -> tuple[str, str]:
    """Names of ours with adapters and without in a record."""
    names = list(record["providers"])
    return next(name for name in names if name.startswith("ours:")), _base(record)


def _machine(results: Mapping) -> str:
    place = results["environment"]
    versions = ", ".join(f"{n} {place['versions'][n]}" for n in ("torch", "transformers", "peft"))
    commit = (place["commit"] or "unknown")[:7] + (" with changes" if place["dirty"] else "")
    return (
        f"{place['processor']}, {place['threads']} threads, {versions}; commit {commit}, "
        f"sources {(place['source_hash'] or 'unknown')[:12]}, {place['time'][:10]}.\n"
    )


# --- the page of the GPU


def _gpu_layers(results: Mapping) -> str:
    """ms of forward and backward of every layer and provider, over the rounds that all ran in: a
    card that gets warm is slower.
    """
    return _grid(
        [_common_rounds(record) for record in results["training"]],
        lambda record: f"{_gpu_title(record)}, {record['case']['image_share']:.0%} image",
        lambda record, name: _milliseconds(record, name, "both"),
    )


def _common_rounds(record: Mapping) -> Mapping:
    """Without the rounds that some providers were not in any more."""
    timed = {n: e for n, e in record["providers"].items() if e.get("seconds")}
    rounds = min(len(values) for e in timed.values() for values in e["seconds"].values())
    cut = {
        name: entry | {"seconds": {m: v[:rounds] for m, v in entry["seconds"].items()}}
        for name, entry in timed.items()
    }
    return {**record, "providers": cut}


def _gpu_ceilings(results: Mapping) -> str:
    found = results["ceilings"]
    return (
        f"A copy moves {found['copy_TBps']:.2f} TB/s, read and written; a product of "
        f"{found['gemm_size']:,} runs at {found['gemm_TFLOPps']:.0f} TFLOP/s.\n"
    )


def _gpu_title(record: Mapping) -> str:
    return f"{record['case']['shape']} T={record['case']['T']}"


def _gpu_rates(results: Mapping) -> str:
    """TFLOP/s of the GEMMs of the base, with all that a layer does besides in their time."""
    rows = []
    for record in results["training"]:
        title = _gpu_title(record)
        graph = results["graphs"][title]
        work = {mode: record["flops"][mode] / 1e12 for mode in ("forward", "both")}
        row = (
            title, *(f"{work[m] / time_of(record, _base(record), m).median:.0f}" for m in work),
            *(f"{work[m] / (graph[m] / 1e3):.0f}" for m in work),
        )  # fmt: skip
        if title not in {known for known, *_ in rows}:  # by other shares of image it is the same
            rows.append(row)
    header = ("layer", "forward, kept for backward", "and backward", "forward alone, in a graph",
              "and backward, in a graph")  # fmt: skip
    return markdown(header, rows)


def _gpu_kernels(results: Mapping) -> str:
    """ms of each kernel of one forward and backward, as the profiler saw them."""
    return markdown(
        ("kernel", "launches", "ms"),
        [
            (re.sub(r".*::(\w+_kernel).*", r"\1", name), str(count), f"{ms:.3f}")
            for name, count, ms in results["kernels"]["kernels"]
            if ms >= 0.002
        ],
    )


# --- the README

# results, part, case, share of image rows, mode, ours, the competitor
_SPEED = (
    (GPU_RESULTS, "training", "olmoe", 0.25, "both", "ours:cuda", "peft:grouped_mm"),
    (GPU_RESULTS, "training", "olmoe", 0.25, "both", "ours:cuda", "split:compiled"),
    (GPU_RESULTS, "training", "mixtral", 0.25, "both", "ours:cuda", "split:compiled"),
    (GPU_RESULTS, "training", "mixtral", 0.25, "both", "ours_base:cuda", "hf_compiled:grouped_mm"),
    (GPU_RESULTS, "steps", "olmoe-1b-7b", 0.5, "step", "ours", "peft:grouped_mm"),
    (RESULTS, "training", "olmoe", 0.5, "both", "ours:cpu", "peft:grouped_mm"),
    (RESULTS, "training", "olmoe", 0.5, "both", "ours:cpu", "split:masked"),
    (RESULTS, "steps", "demo", None, "step", "ours", "peft:grouped_mm"),
)
_MACHINES = {GPU_RESULTS: "H100", RESULTS: "CPU"}
_COMMANDS = {
    GPU_RESULTS: "`python benchmarks/run_gpu.py --backend cuda`",
    RESULTS: "`make bench`",
}
_COMPETITORS = {
    "peft:grouped_mm": "PEFT on grouped_mm",
    "split:compiled": "split LoRA, compiled",
    "split:masked": "split LoRA",
    "hf_compiled:grouped_mm": "transformers, compiled",
}


def _speed(_: Mapping) -> str:
    """A few ratios from both runs, and what each ran on."""
    runs = {name: result_files.read(result_files.RESULTS / name) for name in _MACHINES}
    rows = []
    for name, part, case, share, mode, ours, theirs in _SPEED:
        record = next(r for r in runs[name][part] if _is_case(r["case"], case, share))
        times = [time_of(_common_rounds(record), who, mode).median * 1e3 for who in (ours, theirs)]
        rows.append(
            (
                _MACHINES[name], _speed_title(record["case"], ours), _short_ms(times[0]),
                _COMPETITORS[theirs], _short_ms(times[1]),
                interval(compare(record, theirs, ours, mode)), _COMMANDS[name],
            )
        )  # fmt: skip
    header = ("on", "forward and backward", "ms", "compared with", "ms", "times as fast (20-80 %)",
              "measured by")  # fmt: skip
    machines = "".join(f"- {_MACHINES[name]}: {_machine(run)}" for name, run in runs.items())
    return f"{markdown(header, rows)}\n{machines}"


def _is_case(case: Mapping, name: str, share: float | None) -> bool:
    return name in (case.get("shape"), case.get("name")) and share in (None, case["image_share"])


def _short_ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _speed_title(case: Mapping, ours: str) -> str:
    if case.get("name"):
        return f"training step, {case['name']}"
    rows = "no adapters" if ours.startswith("ours_base:") else f"{case['image_share']:.0%} image"
    return f"{case['shape']} layer, {case['T']:,} tokens, {rows}"


def _gpu_summary(_: Mapping) -> str:
    """Each bar of the GPU once, for a page of other results."""
    return _bars_summary(result_files.read(result_files.RESULTS / GPU_RESULTS))


BLOCKS: dict[str, Callable[[Mapping], str]] = {
    "speed": _speed,
    "gpu_summary": _gpu_summary,
    "gpu_layers": _gpu_layers,
    "gpu_ceilings": _gpu_ceilings,
    "gpu_rates": _gpu_rates,
    "gpu_kernels": _gpu_kernels,
    "gpu_bars": lambda results: bars_table(results["bars"]),
    "machine": _machine,
    "bars": _bars_summary,
    "bars_twice": _bars_twice,
    "training": _training,
    "decode": _decode,
    "overhead": _overhead,
    "adapters": _adapters,
    "floors": _floors,
    "decode_gap": _decode_gap,
    "steps": lambda results: steps_table(results["steps"]),
    "added": _added,
}


def render(page: str, results: Mapping) -> str:
    """Return the page with every block between ``<!-- bench:NAME -->`` markers made anew.

    Raises:
        KeyError: a block of an unknown name, or of a part that was not measured.
        ValueError: a marker stands alone.
    """
    blocks = {name: BLOCKS[name](results) for name in markers.names(page, "bench")}
    return markers.fill(page, blocks, "bench")


def main() -> None:
    for name, pages in ((RESULTS, PAGES), (GPU_RESULTS, (GPU_PAGE,))):
        results = result_files.read(result_files.RESULTS / name)
        for page in pages:
            page.write_text(render(page.read_text(), results))
            print(f"wrote the tables of {page}")


if __name__ == "__main__":
    main()
