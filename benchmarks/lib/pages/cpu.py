"""Blocks of the pages that show results of the CPU, out of the file of a run."""

import itertools
from collections.abc import Mapping, Sequence

from lib import result_files
from lib.markdown import markdown
from lib.pages import machine, milliseconds
from lib.pages.tables import MODES, added_steps_table, case_title, interval, summary, summary_of_two
from lib.providers import ACCELERATED, ADDED_KINDS, HF_TRAINING, PEFT
from lib.records import compare, fastest, measured_backend, time_of
from lib.timing import ratio, summarize

RESULTS = "cpu.json"
AGAIN = "cpu-again.json"  # a second run of the same sources
ADDED_ALONE = "cpu-added.json"  # added experts alone, where RESULTS is older than they
WITH_PEFT = "cpu-peft.json"  # a run with accelerated PEFT, where RESULTS is older than it
OVERHEAD = "cpu-overhead.json"  # the section of this name alone, where RESULTS is older
PACKED = "cpu-packed.json"  # a run of packed.py
PACKED_STEP = "cpu-packed-step.json"  # a run of packed_step.py
MIXED_ADAPTERS = "cpu-mixed-adapters.json"  # a run of mixed_adapters.py
_ADDED_TARGETS = (12, 13)


def targets_twice(results: Mapping) -> str:
    """Every target in two runs of the same sources."""
    again = result_files.read(result_files.RESULTS / AGAIN)
    if again["environment"]["source_hash"] != results["environment"]["source_hash"]:
        return f"The runs have different sources: make {AGAIN} again.\n"
    return summary_of_two(results["targets"], again["targets"])


def overhead(results: Mapping) -> str:
    """Time with adapters over time without, by image share and rank."""
    rows = []
    for record in results["overhead"]:
        case = record["case"]
        pair = overhead_pair(record)
        ratios = (interval(compare(record, *pair, mode)) for mode in MODES)
        rows.append((f"{case['image_share']:.0%}", str(case["r"]), *ratios))
    return markdown(("image rows", "rank", *MODES), rows)


def overhead_pair(record: Mapping) -> tuple[str, str]:
    """Names of our providers with and without adapters in a record."""
    return measured_backend(record, "ours"), measured_backend(record, "ours_base")


def adapters(results: Mapping) -> str:
    """Time with adapters over time without, in every training case."""
    rows = []
    for record in results["training"]:
        base, title = measured_backend(record, "ours_base"), case_title(record["case"])
        for kind, image_rows in (("ours", "half image"), ("ours_text", "no image")):
            provider = measured_backend(record, kind)
            ratios = (interval(compare(record, provider, base, mode)) for mode in MODES)
            rows.append((title, image_rows, *ratios))
    return markdown(("case", "rows", *MODES), rows)


def floors(results: Mapping) -> str:
    """Time of our base and of transformers' fastest experts over the expert GEMMs alone."""
    rows = []
    for record in results["training"]:
        base = measured_backend(record, "ours_base")
        competitor = fastest(record, HF_TRAINING, "both")
        ratios = (interval(compare(record, name, "bound", "both")) for name in (base, competitor))
        gemms = milliseconds(record, "bound", "both")
        rows.append((case_title(record["case"]), gemms, *ratios, competitor or ""))
    header = (
        "case", "GEMMs, ms", "ours without adapters over them", "transformers over them",
        "its best",
    )  # fmt: skip
    return markdown(header, rows)


def decode_gap(results: Mapping) -> str:
    """Time of a decoding call, and what its reads and its arithmetic take alone.

    Reads are one reading of the base's weights; arithmetic runs at the rate that the GEMMs of
    training have.
    """
    rates, rows = _gemm_rates(results["training"]), []
    for record in results["decode"]:
        case = record["case"]
        kinds = ("ours_base", "ours_text", "ours")
        names = ("read", *(measured_backend(record, kind) for kind in kinds))
        times = [time_of(record, name, "decode") for name in names]
        if not all(times):
            continue
        read, rate = times[0].median, rates.get((case["shape"], case["dtype"]))
        rows.append(
            (
                f"{case_title(case)} T={case['T']}", f"{read * 1e3:.3g}",
                f"{record['bytes']['decode'] / read / 1e9:.0f}",
                f"{record['flops']['decode'] / rate * 1e3:.3g}" if rate else "",
                *(f"{time.median * 1e3:.3g}" for time in times[1:]),
            )
        )  # fmt: skip
    header = (
        "case", "reading, ms", "GB/s", "arithmetic, ms", "no adapters, ms", "no image, ms",
        "half image, ms",
    )  # fmt: skip
    return markdown(header, rows)


def _gemm_rates(records: Sequence[Mapping]) -> dict[tuple[str, str], float]:
    """FLOP/s of the expert GEMMs alone, by shape and dtype, with balanced routing."""
    return {
        (case["shape"], case["dtype"]): record["flops"]["both"] / bound.median
        for record in records
        if (case := record["case"])["routing"] == "balanced"
        and (bound := time_of(record, "bound", "both"))
    }


def added(results: Mapping) -> str:
    """Targets, ops, blocks and steps of added experts, out of this run or a run of them alone."""
    run = _run_with_added(results)
    if run is None:
        return "Not measured yet.\n"
    verdicts = [v for v in run["targets"] if v["number"] in _ADDED_TARGETS]
    parts = [summary(verdicts), _added_layers(run), added_steps_table(run["added_steps"])]
    if run is not results:  # which the page describes elsewhere
        parts[0] = f"{machine(run)}\n{parts[0]}"
    return "\n".join(parts)


def peft(results: Mapping) -> str:
    """PEFT and PEFT accelerated, all rows adapted: layers, then whole training steps."""
    run, layers = results, _accelerated(results)
    if not layers and (path := result_files.RESULTS / WITH_PEFT).exists():
        run = result_files.read(path)
        layers = _accelerated(run)
    if not layers:
        return "Not measured yet.\n"
    rows = [_peft_row(case_title(record["case"]), record, "both") for record in layers]
    rows += [
        _peft_row(f"training step, {record['case']['name']}", record, "step")
        for record in run["steps"]
    ]
    header = (
        "forward and backward", "PEFT, ms", "accelerated, ms", "times as fast (20-80 %)",
        "PEFT's peak, MiB", "accelerated, MiB",
    )  # fmt: skip
    return f"{machine(run)}\n{markdown(header, rows)}"


def low_rank(results: Mapping) -> str:
    """Time of a layer with adapters over its time without, in the newest run that has it."""
    path = result_files.RESULTS / OVERHEAD
    run = result_files.read(path) if path.exists() else results
    return f"{machine(run)}\n{overhead(run)}"


def packed(results: Mapping) -> str:
    """Milliseconds of a call on a packed base, and how much faster that is than unpacking first."""
    rows = []
    for record in results["records"]:
        seconds = record["seconds"]
        for name in ("nf4", "fp8"):
            first = seconds[f"{name}, unpacked first"]
            medians = (summarize(each).median for each in (seconds["plain"], seconds[name], first))
            title = f"{record['mode']}, {record['shape']} T={record['tokens']}, {name}"
            faster = interval(ratio(first, seconds[name]))
            rows.append((title, *(f"{median * 1e3:.3g}" for median in medians), faster))
    header = ("bf16", "plain, ms", "packed, ms", "unpacked first, ms", "times as fast (20-80 %)")
    return f"{machine(results)}\n{markdown(header, rows)}"


def packed_step(results: Mapping) -> str:
    """Time and memory of a training step on experts in NF4, by what unpacks them."""
    record = results["record"]
    rows, seconds = [], record["seconds"]
    for name in ("the op", "reading"):
        milliseconds = f"{summarize(seconds[name]).median * 1e3:.0f}"
        peak = f"{record['peak_bytes'][name] / 2**20:.0f}"
        faster = interval(ratio(seconds["reading"], seconds["the op"])) if name == "the op" else ""
        rows.append((name, milliseconds, faster, peak))
    layer = record["layer_bytes"] / 2**20
    header = ("unpacked by", "step, ms", "times as fast (20-80 %)", "peak, MiB")
    text = (
        f"Two layers of hidden size {record['hidden']}, {record['tokens']} tokens; the experts of "
        f"a layer are {layer:.0f} MiB in bf16.\n"
    )
    return f"{machine(results)}{text}\n{markdown(header, rows)}"


def mixed_adapters(results: Mapping) -> str:
    """Milliseconds of a forward by the number of adapters in its batch."""
    names = list(results["records"][0]["seconds"])
    rows = []
    for name in names:
        cells = []
        for record in results["records"]:
            seconds = record["seconds"]
            cells.append(f"{summarize(seconds[name]).median * 1e3:.3g}")
            cells.append("" if name == "one" else interval(ratio(seconds[name], seconds["one"])))
        rows.append((name, *cells))
    header = ["adapters in the batch"]
    for record in results["records"]:
        header += [f"8 x {record['length']} tokens, ms", "times one (20-80 %)"]
    return f"{machine(results)}\n{markdown(header, rows)}"


def _accelerated(results: Mapping) -> list[Mapping]:
    return [r for r in results["training"] if measured_backend(r, ACCELERATED)]


def _peft_row(title: str, record: Mapping, mode: str) -> tuple[str, ...]:
    """Times, their ratio and the peaks of a layer, or of a step, whose peak is not measured."""
    pair = PEFT, measured_backend(record, ACCELERATED)
    memory = (record["providers"][name].get("memory") for name in pair)
    return (
        title, *(milliseconds(record, name, mode) for name in pair),
        interval(compare(record, *pair, mode)),
        *(f"{each['peak'] / 2**20:.0f}" if each else "" for each in memory),
    )  # fmt: skip


def _run_with_added(results: Mapping) -> Mapping | None:
    if "added" in results:
        return results
    path = result_files.RESULTS / ADDED_ALONE
    return result_files.read(path) if path.exists() else None


def _added_layers(results: Mapping) -> str:
    rows = []
    for record, (part, kinds) in itertools.product(results["added"], ADDED_KINDS.items()):
        base, *extended = (measured_backend(record, kind) for kind in kinds)
        for provider, experts in zip(extended, ("added expert", "other experts"), strict=True):
            times = (interval(compare(record, provider, base, mode)) for mode in MODES)
            rows.append((case_title(record["case"]), part, experts, *times))
    return markdown(("case", "in", "image rows go to", *MODES), rows)
