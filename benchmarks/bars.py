"""Measures all that the package promises about speed and memory, and says which bars are met.

python benchmarks/bars.py                        # everything; what `make bench` runs
python benchmarks/bars.py --only decode          # a part, into out/bench/
python benchmarks/bars.py --shapes small --models tiny --rounds 2    # a trial in seconds
"""

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import bench_added_experts
import bench_training_step
import torch
from lib.cases import Case
from lib.cli import add_rotation, finish, make_parser, options_of, progress
from lib.providers import ADDED_KINDS, HF_TRAINING, provider_names
from lib.runs import Options, compare, fastest, run_decode, run_training
from lib.timing import Statistics
from tables import MODES, bars_table, case_title

from moe_kernels import backends
from moe_kernels.testing import SHAPES

NAME = "bars"
SECTIONS = ("training", "decode", "overhead", "steps", "added", "added_steps")
PEFT = "peft:grouped_mm"
SPLIT = "split:masked"  # keeps less than split:gathered: the harder rival on memory
DECODE_TOKENS = (1, 8, 64)
OVERHEAD = [(0.0, 16), (0.25, 16), (0.5, 16), (1.0, 16), (0.5, 64)]
_SHORT_CASES = 5  # times the rounds where one takes milliseconds

# Limits by dtype.
OVER_GEMMS = {"bfloat16": 1.25, "float32": 1.12}
FASTER_THAN_HF = {"bfloat16": 1.8, "float32": 1.2}
FASTER_THAN_PEFT = 2.5
ADAPTERS = 1.06
OVER_READING = {(1, None): 1.05, (8, None): 1.15, (64, "bfloat16"): 1.3}
MEMORY = 0.6
FASTER_STEP = 2.0
ADDED_SHARE = 0.1  # of all rows, those of the added expert; see _added_bars
ADDED = {"forward": 1.05, "both": 1 + ADDED_SHARE}
FASTER_THAN_FULL = 2.0


@dataclass(frozen=True)
class Bar:
    """A promise in one case; ``measured`` is None where a side of it is missing or wrong."""

    number: int
    what: str
    case: str
    measured: Statistics | None
    limit: float
    at_least: bool = False
    by_p20: bool = False  # met when the limit lies within a spread about less than 3 % more

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        if self.by_p20:
            return self.measured.p20 <= self.limit and self.measured.median <= self.limit + 0.03
        if self.at_least:
            return self.measured.median >= self.limit
        return self.measured.median <= self.limit

    def to_dict(self) -> dict:
        note = "" if self.measured else "no number: a side is missing or wrong"
        return asdict(self) | {"met": self.met, "note": note}


# --- what is measured


def ours(device: str) -> str:
    """The backend that the package takes here."""
    return backends.select(None, torch.device(device))


def hf_decode(tokens: int) -> tuple[str, ...]:
    """batched_mm copies the weights of every row: with more rows than one it is out of the race."""
    return (*HF_TRAINING, "hf:batched_mm") if tokens == 1 else HF_TRAINING


def training_providers(backend: str, shape: str, dtype: str, routing: str) -> list[str]:
    """What takes many seconds a step, or is hardly changed by the routing, does not run in all
    cases.
    """
    rivals = [*HF_TRAINING]
    if shape != "olmoe" or (routing, dtype) == ("balanced", "bfloat16"):
        rivals.append(PEFT)
    if routing == "balanced" and (shape, dtype) != ("olmoe", "float32"):
        rivals.append(SPLIT)
    return [
        "bound", f"ours:{backend}", f"ours_text:{backend}", f"ours_base:{backend}", *rivals,
        *_absent(backend, HF_TRAINING),
    ]  # fmt: skip


def decode_providers(backend: str, tokens: int) -> list[str]:
    rivals = hf_decode(tokens)
    return [
        "read", f"ours:{backend}", f"ours_text:{backend}", f"ours_base:{backend}", *rivals,
        *_absent(backend, rivals),
    ]  # fmt: skip


def _absent(backend: str, measured: Sequence[str]) -> list[str]:
    """Our other backends and transformers' other functions: mostly rows that say why not."""
    others = [f"ours:{name}" for name in backends.NAMES if name not in (backend, "reference")]
    theirs = [name for name in provider_names() if name.startswith("hf:")]
    return others + [name for name in theirs if name not in (*measured, "hf:batched_mm")]


def _mine(providers: Sequence[str]) -> set[str]:
    return {name for name in providers if name.startswith(("bound", "read", "ours"))}


def measure_training(given: Namespace, options: Options) -> Iterator[Callable[[], dict]]:
    backend = ours(given.device)
    for shape, dtype, routing in itertools.product(given.shapes, OVER_GEMMS, ("balanced", "zipf")):
        case = Case.named(shape, dtype=dtype, routing=routing, device=given.device, seed=given.seed)
        providers = training_providers(backend, shape, dtype, routing)
        own = replace(options, thorough=_mine(providers), memory=(f"ours:{backend}", SPLIT))
        if (shape, dtype) == ("olmoe", "float32"):
            own = replace(own, min_rounds=2)  # seconds a step
        yield partial(run_training, case, providers, own)


def measure_decode(given: Namespace, options: Options) -> Iterator[Callable[[], dict]]:
    options = replace(options, rounds=_SHORT_CASES * options.rounds, min_rounds=5)
    for shape, dtype, tokens in itertools.product(given.shapes, OVER_GEMMS, DECODE_TOKENS):
        providers = decode_providers(ours(given.device), tokens)
        options = replace(options, thorough=_mine(providers))
        case = Case.named(shape, T=tokens, dtype=dtype, device=given.device, seed=given.seed)
        yield partial(run_decode, case, providers, options)


def measure_overhead(given: Namespace, options: Options) -> Iterator[Callable[[], dict]]:
    backend = ours(given.device)
    options = replace(options, rounds=_SHORT_CASES * options.rounds)
    for share, rank in OVERHEAD:
        case = Case.named(
            given.shapes[0], r=rank, image_share=share, device=given.device, seed=given.seed
        )
        yield partial(run_training, case, [f"ours:{backend}", f"ours_base:{backend}"], options)


def measure_steps(given: Namespace, options: Options) -> Iterator[Callable[[], dict]]:
    for name in given.models:
        model = bench_training_step.MODELS[name]
        own = replace(options, min_rounds=2) if name == "olmoe" else options  # seconds a step
        yield partial(bench_training_step.run, model, own, given.device, given.seed)


def measure_added(given: Namespace, options: Options) -> Iterator[Callable[[], dict]]:
    backend = ours(given.device)
    providers = [f"{kind}:{backend}" for kinds in ADDED_KINDS.values() for kind in kinds]
    for shape, dtype in itertools.product(given.shapes, OVER_GEMMS):
        case = Case.named(
            shape, dtype=dtype, image_share=ADDED_SHARE * SHAPES[shape].K, device=given.device,
            seed=given.seed,
        )  # fmt: skip
        yield partial(run_training, case, providers, options)


def measure_added_steps(given: Namespace, options: Options) -> Iterator[Callable[[], dict]]:
    for name in given.models:
        model = bench_training_step.MODELS[name]
        own = replace(options, min_rounds=2) if name == "olmoe" else options  # seconds a step
        yield partial(bench_added_experts.run, model, own, given.device, given.seed)


MEASURE = {
    "training": measure_training,
    "decode": measure_decode,
    "overhead": measure_overhead,
    "steps": measure_steps,
    "added": measure_added,
    "added_steps": measure_added_steps,
}


# --- what is judged


def judge(results: Mapping, backend: str) -> list[Bar]:
    """All bars of the sections that were measured."""
    bars = [
        bar for record in results.get("training", ()) for bar in _training_bars(record, backend)
    ]
    bars += [bar for record in results.get("decode", ()) for bar in _decode_bars(record, backend)]
    bars += [_step_bar(record) for record in results.get("steps", ())]
    bars += [bar for record in results.get("added", ()) for bar in _added_bars(record, backend)]
    bars += [_added_step_bar(record) for record in results.get("added_steps", ())]
    return sorted(bars, key=lambda bar: bar.number)


def _training_bars(record: Mapping, backend: str) -> Iterator[Bar]:
    case, dtype = case_title(record["case"]), record["case"]["dtype"]
    mine, text, base = (f"{kind}:{backend}" for kind in ("ours", "ours_text", "ours_base"))
    short = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
    yield Bar(
        1, f"time over the expert GEMMs alone, {short}", case,
        compare(record, mine, "bound", "both"), OVER_GEMMS[dtype],
    )  # fmt: skip
    rival = fastest(record, HF_TRAINING, "both")
    yield Bar(
        2, f"speed over transformers' best without adapter, {short}", case,
        rival and compare(record, rival, mine, "both"), FASTER_THAN_HF[dtype], at_least=True,
    )  # fmt: skip
    if PEFT in record["providers"]:
        yield Bar(
            3, "speed over PEFT on grouped_mm", case, compare(record, PEFT, mine, "both"),
            FASTER_THAN_PEFT, at_least=True,
        )  # fmt: skip
    for mode in MODES:
        yield Bar(
            4, f"adapters at half image over our base, {mode}", case,
            compare(record, mine, base, mode), ADAPTERS,
        )  # fmt: skip
        yield Bar(
            4, f"adapters without image over our base, {mode}", case,
            compare(record, text, base, mode), 1.0, by_p20=True,
        )  # fmt: skip
    if SPLIT in record["providers"]:
        yield from _memory_bars(record, mine, case)


def _memory_bars(record: Mapping, mine: str, case: str) -> Iterator[Bar]:
    memory = [record["providers"][name].get("memory") for name in (mine, SPLIT)]
    for key, what in (
        ("saved_formula", "kept for backward, by formula"),
        ("saved", "kept for backward"),
        ("peak", "peak"),
    ):
        measured = None
        if all(memory):
            share = memory[0][key] / memory[1][key]
            measured = Statistics(share, share, share, 1)
        yield Bar(6, f"memory over split LoRA's: {what}", case, measured, MEMORY)


def _decode_bars(record: Mapping, backend: str) -> Iterator[Bar]:
    tokens, dtype = record["case"]["T"], record["case"]["dtype"]
    case = f"{case_title(record['case'])} T={tokens}"
    rival = fastest(record, hf_decode(tokens), "decode")
    for kind, rows in (("ours_text", "no image"), ("ours", "half image")):
        mine = f"{kind}:{backend}"
        limit = OVER_READING.get((tokens, None)) or OVER_READING.get((tokens, dtype))
        if limit:
            yield Bar(
                5, f"decode T={tokens}, {rows}: time over reading the weights", case,
                compare(record, mine, "read", "decode"), limit,
            )  # fmt: skip
        yield Bar(
            5, f"decode T={tokens}, {rows}: speed over transformers' best", case,
            rival and compare(record, rival, mine, "decode"), 1.0, at_least=True,
        )  # fmt: skip


def _step_bar(record: Mapping) -> Bar:
    return Bar(
        7, "training tokens/s over transformers with PEFT", record["case"]["name"],
        compare(record, PEFT, "ours", "step"), FASTER_STEP, at_least=True,
    )  # fmt: skip


def _added_bars(record: Mapping, backend: str) -> Iterator[Bar]:
    """The op ``moe_mlp`` with one added expert costs no more over the same without it, at the same
    T, H, I, E and K, than that expert's share s of the T K rows; nor does a patched model's MoE
    block, whose router is in it.

    K stays, so a forward has the operations of the base's, and the added rows' gradients of the
    inputs are in the place of others; the gradients of the added expert's weights are as many
    operations again as those of its rows' inputs: with the base's forward and backward of the same
    size, 1 + s / 2 of the base's. The limits are 1.05 forward, for reading and rounding an expert
    in float32, and 1 + s for forward and backward: what lies above 1 + s / 2 is for that, and for
    writing its gradients in float32; in the block for routing a second time too. A row that has not
    its modality is not sent to it; where no row has, the op costs what it cost before, and so it is
    asked of the block, which routes all rows twice even then.
    """
    case, rows = case_title(record["case"]), f"{ADDED_SHARE:.0%} of the rows"
    for what, kinds in ADDED_KINDS.items():
        base, added, text = (f"{kind}:{backend}" for kind in kinds)
        for mode, limit in ADDED.items():
            yield Bar(
                12, f"{what}, added expert with {rows} over our base, {mode}", case,
                compare(record, added, base, mode), limit,
            )  # fmt: skip
            yield Bar(
                12, f"{what}, added expert without a row over our base, {mode}", case,
                compare(record, text, base, mode), 1.0, by_p20=True,
            )  # fmt: skip


def _added_step_bar(record: Mapping) -> Bar:
    """Against the faster of transformers' implementations."""
    rival = fastest(record, bench_added_experts.FULL, "step")
    return Bar(
        13, "training tokens/s with added experts over all experts", record["case"]["name"],
        rival and compare(record, rival, "ours", "step"), FASTER_THAN_FULL, at_least=True,
    )  # fmt: skip


# --- the program


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = make_parser(__doc__, NAME, dtypes=False)
    add_rotation(parser)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["one_layer", "olmoe"])
    parser.add_argument(
        "--models", nargs="+", choices=bench_training_step.MODELS, default=["demo", "olmoe"]
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="measure a part only")
    parser.set_defaults(max_seconds=2.0)
    given = parser.parse_args(arguments)
    if given.only and not given.output:
        given.output = Path("out/bench") / f"{NAME}-{given.device}.json"
    return given


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    results = {section: [] for section in given.only or SECTIONS}
    jobs: list[tuple[str, Callable[[], dict]]] = []
    options = options_of(given, rotated_bytes=given.rotate_mb * 10**6)
    for section in results:
        jobs += [(section, job) for job in MEASURE[section](given, options)]
    with progress(jobs) as (bar, _):
        for section, job in bar:
            bar.set_description(section)
            results[section].append(job())
    results["bars"] = [bar.to_dict() for bar in judge(results, ours(given.device))]
    print(bars_table(results["bars"]))
    finish(NAME, given, results)


if __name__ == "__main__":
    main()
