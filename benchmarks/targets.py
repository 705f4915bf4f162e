"""The targets for speed and memory, on a CPU and on a GPU, and the judge of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from lib.cases import ADDED_SHARE, DECODE_TOKENS
from lib.pages.tables import MODES, SHORT_DTYPES, case_title
from lib.providers import (
    ACCELERATED,
    ADDED_KINDS,
    BASE_COMPETITORS,
    GROUPED,
    HF_TRAINING,
    PEFT,
    SPLIT,
    SPLITS,
    hf_decode,
)
from lib.records import (
    Measure,
    dispatch_speed,
    dispatch_time,
    measured_backend,
    memory_ratio,
    over_reading_at_copy_rate,
    share_of_copy_rate,
    tflops,
    time_ratio,
)
from lib.steps.added_experts import FULL
from lib.timing import Statistics

_SPREAD = 0.03  # a median may exceed a limit "within the spread" by so much


@dataclass(frozen=True)
class Target:
    """A promise about speed or memory.

    Attributes:
        device: where it is measured, "cpu" or "cuda".
        number: as the pages cite it; related targets of a device share one.
        name: what is measured.
        section: the section of a run's results that has its records.
        measured: returns the measured value in a record.
        limit: the largest value that meets it, or the smallest with ``at_least``.
        at_least: whether larger is better.
        within_spread: whether noise is allowed for: the 20th percentile must meet the limit, and
            the median may exceed it by 0.03.
        applies: returns whether a record is a case of this target.
    """

    device: str
    number: int
    name: str
    section: str
    measured: Measure
    limit: float
    at_least: bool = False
    within_spread: bool = False
    applies: Callable[[Mapping], bool] = lambda record: True

    def met(self, measured: Statistics | None) -> bool | None:
        """Return whether a measured value meets the target, or None without a value."""
        if measured is None:
            return None
        if self.within_spread:
            return measured.p20 <= self.limit and measured.median <= self.limit + _SPREAD
        if self.at_least:
            return measured.median >= self.limit
        return measured.median <= self.limit

    def verdict(self, record: Mapping, results: Mapping) -> dict:
        """The target, the case, the measured value and whether it was met, as plain data."""
        measured = self.measured(record, results)
        return {
            "number": self.number,
            "name": self.name,
            "case": self._title(record["case"]),
            "measured": measured and asdict(measured.rounded()),
            "limit": self.limit,
            "at_least": self.at_least,
            "within_spread": self.within_spread,
            "met": self.met(measured),
            "note": "" if measured else "no number: a side is missing or wrong",
        }

    def _title(self, case: Mapping) -> str:
        if "name" in case:  # a whole model
            return case["name"]
        with_tokens = self.device == "cuda" or self.section == "decode"
        return case_title(case) + (f" T={case['T']}" if with_tokens else "")


def judge(results: Mapping, device: str) -> list[dict]:
    """Return a verdict for every target of the device in every case that was measured."""
    return [
        target.verdict(record, results)
        for target in TARGETS
        if target.device == device
        for record in _records(results.get(target.section))
        if target.applies(record)
    ]


def _records(section: Mapping | Sequence[Mapping] | None) -> Sequence[Mapping]:
    if section is None:
        return []
    return section if isinstance(section, list) else [section]


def _in_case(**values: object) -> Callable[[Mapping], bool]:
    """A target that applies to cases with these values."""
    return lambda record: all(record["case"][key] == value for key, value in values.items())


def _beside(provider: str) -> Callable[[Mapping], bool]:
    """A target that applies where a provider, or one of our kinds, was to be measured too."""
    return lambda record: (
        provider in record["providers"] or measured_backend(record, provider) is not None
    )


def _on_cuda_backend(record: Mapping) -> bool:
    return record["backend"] == "cuda"


# --- on a CPU


_cpu = partial(Target, "cpu")


def _cpu_training() -> Iterator[Target]:
    """Targets 1 to 4 and 6: forward and backward of a layer."""
    for dtype, over_gemms, over_hf in (("bfloat16", 1.25, 1.8), ("float32", 1.12, 1.2)):
        short, applies = SHORT_DTYPES[dtype], _in_case(dtype=dtype)
        yield _cpu(
            1, f"time over the expert GEMMs alone, {short}", "training",
            time_ratio("ours", "bound"), over_gemms, applies=applies,
        )  # fmt: skip
        yield _cpu(
            2, f"speed over transformers' best without adapter, {short}", "training",
            time_ratio(HF_TRAINING, "ours"), over_hf, at_least=True, applies=applies,
        )  # fmt: skip
    yield _cpu(
        3, "speed over PEFT on grouped_mm", "training", time_ratio(PEFT, "ours"), 2.5,
        at_least=True, applies=_beside(PEFT),
    )  # fmt: skip
    for mode in MODES:
        yield _cpu(
            4, f"adapters at half image over our base, {mode}", "training",
            time_ratio("ours", "ours_base", mode), 1.06,
        )  # fmt: skip
        yield _cpu(
            4, f"adapters without image over our base, {mode}", "training",
            time_ratio("ours_text", "ours_base", mode), 1.0, within_spread=True,
        )  # fmt: skip
    for key, memory in (
        ("saved_formula", "kept for backward, by formula"),
        ("saved", "kept for backward"),
        ("peak", "peak"),
    ):
        yield _cpu(
            6, f"memory over split LoRA's: {memory}", "training", memory_ratio(key), 0.6,
            applies=_beside(SPLIT),
        )  # fmt: skip


def _cpu_peft() -> Iterator[Target]:
    """Target 14: PEFT's own adapters, computed by our kernels, against PEFT; all rows adapted."""
    target = partial(_cpu, 14, applies=_beside(ACCELERATED))
    yield target(
        "speed of PEFT accelerated over PEFT on grouped_mm", "training",
        time_ratio(PEFT, ACCELERATED), 2.5, at_least=True,
    )  # fmt: skip
    yield target(
        "peak memory of PEFT accelerated over PEFT's", "training",
        memory_ratio("peak", ACCELERATED, PEFT), 0.6,
    )  # fmt: skip
    yield target(
        "training tokens/s of PEFT accelerated over PEFT", "steps",
        time_ratio(PEFT, ACCELERATED, "step"), 1.8, at_least=True,
    )  # fmt: skip


def _cpu_decode() -> Iterator[Target]:
    """Target 5: a call against one reading of the weights, and against transformers."""
    over_reading = {1: 1.05, 8: 1.15, 64: 1.3}
    for tokens in DECODE_TOKENS:
        # In float32, 64 tokens are bound by arithmetic, not by reading.
        read_bound = _in_case(T=tokens) if tokens < 64 else _in_case(T=tokens, dtype="bfloat16")
        for kind, rows in (("ours_text", "no image"), ("ours", "half image")):
            name = f"decode T={tokens}, {rows}"
            yield _cpu(
                5, f"{name}: time over reading the weights", "decode",
                time_ratio(kind, "read", "decode"), over_reading[tokens], applies=read_bound,
            )  # fmt: skip
            yield _cpu(
                5, f"{name}: speed over transformers' best", "decode",
                time_ratio(hf_decode(tokens), kind, "decode"), 1.0, at_least=True,
                applies=_in_case(T=tokens),
            )  # fmt: skip


def _cpu_added_experts() -> Iterator[Target]:
    """Target 12: an added expert costs no more than its share s of the T K routed rows.

    It is measured in the op ``moe_mlp``, against the op without the expert at the same T, H, I, E
    and K, and in a patched model's MoE block, which contains its router.

    K stays, so forward has as many operations as the base's. The gradients of the added rows'
    inputs replace others, but the gradients of the added expert's weights are as many operations
    again as those of its rows' inputs. With the base's forward and backward of the same size, that
    is 1 + s / 2 of the base. The limits are 1.05 forward, for reading and rounding an expert in
    float32, and 1 + s for forward and backward: what exceeds 1 + s / 2 is for that and for writing
    the gradients in float32, and in the block for a second routing.

    Where no row has the modality, no row is sent to the added expert, and the op must cost what it
    costs without it. So must the block, although it routes all rows twice even then.
    """
    limits = {"forward": 1.05, "both": 1 + ADDED_SHARE}
    rows = f"{ADDED_SHARE:.0%} of the rows"
    for part, (base, with_rows, without_rows) in ADDED_KINDS.items():
        for mode, limit in limits.items():
            yield _cpu(
                12, f"{part}, added expert with {rows} over our base, {mode}",
                "added", time_ratio(with_rows, base, mode), limit,
            )  # fmt: skip
            yield _cpu(
                12, f"{part}, added expert without a row over our base, {mode}", "added",
                time_ratio(without_rows, base, mode), 1.0, within_spread=True,
            )  # fmt: skip


def _cpu_steps() -> Iterator[Target]:
    """Targets 7 and 13: training steps of whole models."""
    yield _cpu(
        7, "training tokens/s over transformers with PEFT", "steps",
        time_ratio(PEFT, "ours", "step"), 2.0, at_least=True,
    )  # fmt: skip
    yield _cpu(
        13, "training tokens/s with added experts over all experts", "added_steps",
        time_ratio(FULL, "ours", "step"), 2.0, at_least=True,
    )  # fmt: skip


# --- on a GPU


_gpu = partial(Target, "cuda")


def _gpu_layers() -> Iterator[Target]:
    """Targets 1 to 6: forward and backward of a layer."""
    for mode, limit in (("forward", 480.0), ("both", 400.0)):
        yield _gpu(
            1, f"TFLOP/s of the base, {mode}", "training", tflops("ours_base", mode), limit,
            at_least=True, applies=_in_case(shape="qwen3"),
        )  # fmt: skip
    for share, limit in ((0.25, 1.04), (1.0, 1.10)):
        yield _gpu(
            4, f"adapters at {share:.0%} image over the base", "training",
            time_ratio("ours", "ours_base"), limit, applies=_in_case(image_share=share),
        )  # fmt: skip
    yield _gpu(
        4, "adapters without image over the base", "training",
        time_ratio("ours_text", "ours_base"), 1.0, within_spread=True,
    )  # fmt: skip
    yield from _gpu_competitors()


def _gpu_competitors() -> Iterator[Target]:
    """Targets 2, 3, 5 and 6, in the cases in which the competitors run."""
    target = partial(_gpu, section="training", applies=_beside(GROUPED))
    for mode in ("forward", "both"):
        yield target(
            2, f"speed of the base over the fastest competitor's, {mode}", limit=0.95,
            measured=time_ratio(BASE_COMPETITORS, "ours_base", mode), at_least=True,
        )  # fmt: skip
    yield target(
        3, "speed of the base over transformers' grouped_mm", limit=1.8,
        measured=time_ratio(GROUPED, "ours_base"), at_least=True,
    )  # fmt: skip
    yield target(
        5, "speed over PEFT on grouped_mm", limit=3.0, measured=time_ratio(PEFT, "ours"),
        at_least=True,
    )  # fmt: skip
    yield target(
        6, "speed over split LoRA", limit=1.5, measured=time_ratio(SPLITS, "ours"), at_least=True
    )
    yield target(
        6, "kept for backward over split LoRA's", limit=0.5, measured=memory_ratio("saved")
    )


def _gpu_models() -> Iterator[Target]:
    """Targets 7 and 8: decoding, and training steps of a whole model."""
    yield _gpu(
        7, "decode over reading the weights", "decode", over_reading_at_copy_rate("ours_text"), 1.15
    )
    yield _gpu(
        8, "step, tokens/s over PEFT's", "steps", time_ratio(PEFT, "ours", "step"), 2.0,
        at_least=True,
    )  # fmt: skip


def _gpu_peft() -> Iterator[Target]:
    """Target 12: PEFT's own adapters, computed by our kernels, against PEFT; all rows adapted."""
    target = partial(_gpu, 12, applies=_beside(ACCELERATED), at_least=True)
    yield target(
        "speed of PEFT accelerated over PEFT on grouped_mm", "training",
        time_ratio(PEFT, ACCELERATED), 3.0,
    )  # fmt: skip
    yield target(
        "step, tokens/s of PEFT accelerated over PEFT's", "steps",
        time_ratio(PEFT, ACCELERATED, "step"), 1.8,
    )  # fmt: skip


def _gpu_launches() -> Iterator[Target]:
    """Targets 9 to 11: the small launches of the CUDA backend."""
    target = partial(_gpu, applies=_on_cuda_backend)
    yield target(9, "dispatch and tile maps, us", "dispatch", dispatch_time, 25.0)
    yield target(
        9, "speed of dispatch and tile maps over torch's dispatch", "dispatch", dispatch_speed, 4.0,
        at_least=True,
    )  # fmt: skip
    low_rank = (
        "shrink x", "shrink act", "du2", "dB1, du1 and dA2", "finish dB1, du1 and dA2", "du1",
        "dB2 and dA1",
    )  # fmt: skip
    for number, name, kernels, costs, limit in (
        (10, "combine", "combine", ("combine", "combine dX"), 0.85),
        (11, "low-rank passes", "shrink|wgrad|sum_parts", low_rank, 0.8),
    ):
        yield target(
            number, f"{name}, share of a copy's rate", "kernels",
            share_of_copy_rate(kernels, costs), limit, at_least=True,
        )  # fmt: skip


TARGETS = tuple(
    sorted(
        (
            *_cpu_training(), *_cpu_decode(), *_cpu_added_experts(), *_cpu_steps(), *_cpu_peft(),
            *_gpu_layers(), *_gpu_models(), *_gpu_launches(), *_gpu_peft(),
        ),
        key=lambda target: (target.device, target.number),
    )
)  # fmt: skip
