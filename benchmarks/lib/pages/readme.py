"""The table of speed in the README, out of the files of a CPU and a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass

from lib import result_files
from lib.markdown import markdown
from lib.pages import common_rounds, cpu, gpu, machine
from lib.pages.tables import interval
from lib.providers import PEFT, SPLIT
from lib.records import compare, time_of

_GPU, _CPU = "H100", "CPU"
_FILES = {_GPU: gpu.RESULTS, _CPU: cpu.RESULTS}
_COMMANDS = {
    _GPU: "`python benchmarks/run.py --backend cuda`",
    _CPU: "`make bench`",
}
_COMPETITORS = {
    PEFT: "PEFT on grouped_mm",
    SPLIT: "split LoRA",
    "split:compiled": "split LoRA, compiled",
    "hf_compiled:grouped_mm": "transformers, compiled",
}


@dataclass(frozen=True)
class _Row:
    """One comparison: ours and a competitor in one case of a section."""

    machine: str
    section: str
    case: str  # a shape or a model
    share: float | None  # of image rows; None: any
    ours: str
    competitor: str

    @property
    def mode(self) -> str:
        return "step" if self.section == "steps" else "both"

    def record(self, results: Mapping) -> Mapping:
        """The first record of this case."""
        return next(record for record in results[self.section] if self._fits(record["case"]))

    def _fits(self, case: Mapping) -> bool:
        names = (case.get("shape"), case.get("name"))
        return self.case in names and self.share in (None, case["image_share"])


_ROWS = (
    _Row(_GPU, "training", "olmoe", 0.25, "ours:cuda", PEFT),
    _Row(_GPU, "training", "olmoe", 0.25, "ours:cuda", "split:compiled"),
    _Row(_GPU, "training", "mixtral", 0.25, "ours:cuda", "split:compiled"),
    _Row(_GPU, "training", "mixtral", 0.25, "ours_base:cuda", "hf_compiled:grouped_mm"),
    _Row(_GPU, "steps", "olmoe-1b-7b", 0.5, "ours", PEFT),
    _Row(_CPU, "training", "olmoe", 0.5, "ours:cpu", PEFT),
    _Row(_CPU, "training", "olmoe", 0.5, "ours:cpu", SPLIT),
    _Row(_CPU, "steps", "demo", None, "ours", PEFT),
)


def speed(_: Mapping) -> str:
    """A few ratios from both runs, and the machine of each."""
    runs = {name: result_files.read(result_files.RESULTS / file) for name, file in _FILES.items()}
    header = ("on", "forward and backward", "ms", "compared with", "ms", "times as fast (20-80 %)",
              "measured by")  # fmt: skip
    table = markdown(header, [_cells(row, row.record(runs[row.machine])) for row in _ROWS])
    machines = "".join(f"- {name}: {machine(run)}" for name, run in runs.items())
    return f"{table}\n{machines}"


def _cells(row: _Row, record: Mapping) -> tuple[str, ...]:
    pair, common = (row.ours, row.competitor), common_rounds(record)
    ours, competitor = (1e3 * time_of(common, name, row.mode).median for name in pair)
    return (
        row.machine, _title(record["case"], row.ours), _short(ours), _COMPETITORS[row.competitor],
        _short(competitor), interval(compare(record, row.competitor, row.ours, row.mode)),
        _COMMANDS[row.machine],
    )  # fmt: skip


def _short(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _title(case: Mapping, ours: str) -> str:
    if "name" in case:
        return f"training step, {case['name']}"
    rows = "no adapters" if ours.startswith("ours_base:") else f"{case['image_share']:.0%} image"
    return f"{case['shape']} layer, {case['T']:,} tokens, {rows}"
