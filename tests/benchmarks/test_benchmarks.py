"""The benchmarks: statistics, order, memory, checks, files, and the README's tables."""

import importlib
import itertools
import json
import re
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.figures import check_texts
from support.launches import COUNTS, ENGINE_COUNTS

from moe_kernels import _native, backends, ops

for _needed in ("peft", "matplotlib"):
    pytest.importorskip(_needed)

ROOT = Path(__file__).parents[2]
FOLDERS = (str(ROOT / "benchmarks"), str(ROOT / "tools"))
LIB = (
    "cases", "check", "collectives", "costs", "gpu_checks", "memory", "pages.cpu", "pages.ranks",
    "pages.tables", "providers",
    "providers.bounds", "providers.competitors", "providers.ours", "records", "result_files",
    "runs", "sections_cpu", "sections_gpu", "steps", "steps.added_experts", "steps.training",
    "timing",
)  # fmt: skip
PROGRAMS = (
    "bench_dispatch", "bench_lora_linear", "bench_moe_mlp", "host_time", "loading", "packed",
    "mixed_adapters", "packed_step", "plot", "run", "scaling", "targets",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    """Import the programs as modules; their folders are on the path only meanwhile."""
    before = [*sys.path]
    sys.path[:0] = FOLDERS
    try:
        lib = {name.split(".")[-1]: importlib.import_module(f"lib.{name}") for name in LIB}
        programs = {name: importlib.import_module(name) for name in PROGRAMS}
        pages = importlib.import_module("tables")  # lib.pages.tables has the same name
        yield SimpleNamespace(**lib, **programs, pages=pages)
    finally:
        sys.path[:] = before
        for name in [name for name in sys.modules if name == "lib" or name.startswith("lib.")]:
            del sys.modules[name]
        for name in (*PROGRAMS, "tables"):
            sys.modules.pop(name, None)


@pytest.fixture
def case(bench):
    return bench.cases.Case.named("small", dtype="float32")


# --- statistics and order


def test_statistics(bench):
    stats = bench.timing.summarize([4.0, 1.0, 3.0, 2.0, 5.0, 6.0])
    assert (stats.median, stats.p20, stats.p80, stats.count) == (3.5, 2.0, 5.0, 6)


def test_ratios_are_taken_within_each_round(bench):
    """The machine is 10 times slower in the second round; the ratio of the two stays."""
    stats = bench.timing.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
    assert (stats.median, stats.p20, stats.p80) == (2.0, 2.0, 2.0)
    assert bench.timing.ratio([2.0, 4.0, 9.0, 9.0], [1.0, 2.0]).count == 2


def test_no_round_has_the_order_of_the_one_before(bench):
    ran = []

    def step(name):
        return lambda: ran.append(name) or {"both": 1.0}

    names = ["a", "b", "c"]
    samples = bench.timing.measure({n: step(n) for n in names}, max_rounds=4, thorough=("b",))
    assert ran == ["a", "b", "c", "a", "c", "b", "c", "a", "b", "b"]
    assert {name: len(samples[name]["both"]) for name in names} == {"a": 3, "b": 4, "c": 3}


def test_a_budget_ends_the_rounds_but_not_the_first_three(bench):
    samples = bench.timing.measure({"a": lambda: {"both": 1.0}}, max_rounds=9, max_seconds=0)
    assert samples == {"a": {"both": [1.0, 1.0, 1.0]}}


# --- memory


def test_peak_of_a_made_example(bench):
    kept = torch.ones(1000)

    def function():
        first = torch.empty(3 << 20, dtype=torch.uint8)
        del first
        second = torch.empty(1 << 20, dtype=torch.uint8)
        third = torch.empty(1 << 20, dtype=torch.uint8)
        del second
        return third, torch.empty(1 << 20, dtype=torch.uint8), kept

    assert bench.memory.peak_bytes(function) == 3 << 20
    assert bench.memory.peak_bytes(lambda: (function(), function())) == 5 << 20
    assert bench.memory.peak_bytes(lambda: kept.sum()) < 1000


def test_saved_bytes_count_each_storage_once(bench):
    x = torch.ones(100, 10, requires_grad=True)

    def forward():
        y = x.exp()  # keeps its result
        return (y * y).sum()  # keeps y twice

    assert bench.memory.saved_bytes(forward, [x]) == 4000


@pytest.mark.parametrize("provider", ["ours:cpu", "split:masked", "split:gathered"])
def test_memory_formulas_agree_with_what_is_kept(bench, case, provider):
    record = bench.runs.run_training(
        case, [provider], bench.runs.Options(rounds=1, memory=[provider])
    )
    entry = record["providers"][provider]
    if "missing" in entry:
        pytest.skip(entry["missing"])
    memory = entry["memory"]
    assert memory["saved"] == pytest.approx(memory["saved_formula"], rel=0.06)
    assert memory["peak"] > memory["saved"]


# --- providers


@pytest.mark.parametrize(
    ("dtype", "routing"),
    [
        ("bfloat16", "balanced"),
        ("float32", "zipf"),
        pytest.param("float32", "balanced", marks=pytest.mark.slow),
        pytest.param("bfloat16", "zipf", marks=pytest.mark.slow),
    ],
)
def test_every_provider_is_right_or_says_why_it_is_missing(bench, dtype, routing):
    case = bench.cases.Case.named("small", dtype=dtype, routing=routing)
    names = [name for name in bench.providers.provider_names() if "compiled" not in name]  # slow
    record = bench.runs.run_training(case, names, bench.runs.Options(rounds=1))
    wrong = {name: e["error"] for name, e in record["providers"].items() if e.get("error")}
    assert not wrong
    missing = {name: e["missing"] for name, e in record["providers"].items() if "missing" in e}
    absent = {name for name, why in backends.available().items() if why is not None}
    expected = absent | {"deepgemm", "sonicmoe", "liger", "scattermoe"}
    if routing != "balanced":
        blocks = {name for name in missing if name.startswith("block")}
        assert len(blocks) == 3 * len(backends.NAMES)
        missing = {name: why for name, why in missing.items() if name not in blocks}
    assert all(name.split(":")[-1] in expected and why for name, why in missing.items())
    for name in ("bound", "hf:eager", "hf:grouped_mm", "peft:grouped_mm", "split:masked"):
        assert bench.records.compare(record, name, "bound", "both").count == 1


def test_decode_goes_through_enough_layers(bench):
    case = bench.cases.Case.named("tiny", dtype="float32")
    stack = case.expert_bytes * case.shape.E
    options = bench.runs.Options(rounds=2, rotated_bytes=3 * stack)
    record = bench.runs.run_decode(case, ["read", "hf:batched_mm"], options)
    hit = case.expert_bytes * min(case.rows, case.shape.E)
    assert record["case"]["layers"] == max(4, 1 + 3 * stack // hit)
    assert [entry["error"] for entry in record["providers"].values()] == [None, None]
    assert bench.records.time_of(record, "hf:batched_mm", "decode").count == 2


def test_the_bound_of_decoding_reads_every_weight_of_the_hit_experts(bench, case, thread_count):
    problem = bench.cases.make_problem(replace(case, shape=replace(case.shape, T=2)))
    stacks = (problem.inputs.gate_up_proj, problem.inputs.down_proj)
    expected = sum(int(w[problem.hit_experts].view(torch.int64).sum()) for w in stacks)
    assert 4 <= len(problem.hit_experts) <= 8
    for threads in (1, 2, 3):
        thread_count(threads)
        assert bench.bounds.weight_reader(problem)() == expected % 2**64


def corrupt(bench, monkeypatch, change):
    """Put a provider "wrong" beside the others: transformers' eager, but changed."""

    def set_up(problem, variant):
        runner = bench.competitors.hf(problem, "eager")
        return replace(runner, **change(runner))

    kind = bench.providers.Kind(set_up)
    monkeypatch.setitem(bench.providers.KINDS, "wrong", kind)


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_a_wrong_provider_gets_no_speed_up(bench, case, monkeypatch, what):
    changes = {
        "output": lambda runner: {"forward": lambda: runner.forward() * 1.001},
        "gradient": lambda runner: {"backward": lambda out, grad: out.backward(grad * 1.001)},
    }
    corrupt(bench, monkeypatch, changes[what])
    record = bench.runs.run_training(
        case, ["bound", "wrong", "hf:eager"], bench.runs.Options(rounds=2)
    )
    assert "relative RMS error" in record["providers"]["wrong"]["error"]
    assert bench.records.compare(record, "wrong", "bound", "both") is None
    assert bench.records.compare(record, "hf:eager", "wrong", "both") is None
    assert bench.records.fastest(record, ["wrong", "hf:eager"], "both") == "hf:eager"
    assert "refused: " in bench.tables.providers_table(record, "both")


@pytest.mark.slow
def test_the_programs_run(bench, tmp_path):
    """Each program runs on its smallest case; figures and pages show the results."""
    path = tmp_path / "cpu.json"
    shared = ["--device", "cpu", "--rounds", "1", "--output", str(path)]
    bench.bench_dispatch.main(["--tokens", "8", *shared])
    bench.bench_lora_linear.main(["--tokens", "8", "--features", "16", "--rank", "2", *shared])
    bench.bench_moe_mlp.main(["--shape", "tiny", "--providers", "bound", "hf:eager", *shared])
    assert bench.run.main(["--trial", "--rotate-mb", "1", *shared]) == 0
    results = json.loads(path.read_text())
    assert {verdict["number"] for verdict in results["targets"]} == {
        1, 2, 3, 4, 5, 6, 7, 12, 13, 14,
    }  # fmt: skip
    assert results["errors"] == {} and results["skipped"] == []
    assert results["environment"]["source_hash"] == bench.result_files.source_hash()
    assert len(bench.plot.draw(results, tmp_path / "plots")) == 3
    page = (ROOT / "docs/results/cpu.md").read_text()
    assert bench.pages.render(page, results) != page


def test_no_number_of_the_pictures_lies_over_a_bar_or_another_text(bench):
    results = bench.result_files.read(bench.result_files.RESULTS / "cpu.json")
    records = [r for r in results["training"] if r["case"]["routing"] == "balanced"]
    figure = bench.plot.time_figure(records)
    figure.tight_layout()
    check_texts(figure)
    for panel in figure.axes:
        ends = [bar.get_window_extent().x1 for bar in panel.patches]
        assert len(ends) == len(panel.texts)
        for end, text in zip(ends, panel.texts, strict=True):
            assert end < text.get_window_extent().x0
            assert text.get_window_extent().x1 < panel.get_window_extent().x1
    shares = bench.plot.overhead_figure(results["overhead"]).axes
    assert [label.get_text() for label in shares[1].get_xticklabels()] == ["16", "64"]
    lines = bench.plot.decode_figure(results["decode"]).axes[-1].get_legend_handles_labels()
    styles = {label: handle.lines[0].get_marker() for handle, label in zip(*lines, strict=True)}
    alike = {styles[name] for name in ("hf:eager", "hf:grouped_mm", "hf:batched_mm")}
    assert len(alike) == 3, "told apart by dashes alone, which one point does not have"


def test_options_that_do_not_go_together_are_refused(bench, capsys):
    for arguments, message in (
        (["--device", "cpu", "--backend", "cuda"], "--backend is not an option of --device cpu"),
        (["--device", "cuda", "--trial", "--shapes", "tiny"], "--shapes is not an option"),
        (["--device", "cpu", "--only", "sanitizer"], "no section sanitizer; it has training"),
    ):
        with pytest.raises(SystemExit):
            bench.run.parse(arguments)
        assert message in capsys.readouterr().err


def test_a_file_of_something_else_is_not_replaced(bench, tmp_path, capsys):
    path = tmp_path / "mine.json"
    for text in ('{"mine": 1}', "no JSON", "[]"):
        path.write_text(text)
        with pytest.raises(SystemExit):
            bench.run.parse(["--device", "cpu", "--output", str(path)])
        assert "mine.json is not a file of results: give another name" in capsys.readouterr().err
        assert path.read_text() == text
    bench.result_files.write(path, {"environment": {}})
    assert bench.run.parse(["--device", "cpu", "--output", str(path)]).output == path


def test_only_a_whole_run_replaces_the_results_of_the_pages(bench):
    def written(*arguments):
        return bench.run.parse([*arguments]).output

    results = bench.result_files.RESULTS
    assert written("--device", "cpu") == results / bench.cpu.RESULTS
    for part in (["--only", "steps"], ["--shapes", "small"], ["--models", "tiny"]):
        assert written("--device", "cpu", *part) == Path("out/bench/cpu-part.json")
    assert written("--device", "cpu", "--trial") == Path("out/bench/cpu-trial.json")
    assert written("--device", "cuda", "--trial") == Path("out/bench/gpu-triton-trial.json")


def test_an_error_is_recorded_and_the_rest_still_runs(bench, monkeypatch, tmp_path, capsys):
    def jobs(args):
        yield lambda: 1 / 0

    sections = bench.run.SECTIONS["cpu"]
    monkeypatch.setitem(sections, "steps", jobs)
    path = tmp_path / "part.json"
    arguments = ["--device", "cpu", "--trial", "--rounds", "1", "--output", str(path)]
    assert bench.run.main([*arguments, "--only", "steps", "added_steps"]) == 1
    results = json.loads(path.read_text())
    assert "ZeroDivisionError" in results["errors"]["steps"][0]
    assert [verdict["number"] for verdict in results["targets"]] == [13]
    assert "steps: an error" in capsys.readouterr().out


def test_nothing_starts_after_the_deadline(bench, tmp_path, capsys):
    path = tmp_path / "part.json"
    arguments = ["--device", "cpu", "--trial", "--deadline", "-1", "--output", str(path)]
    assert bench.run.main([*arguments, "--only", "steps"]) == 2
    assert "not measured: steps 0: no time was left" in capsys.readouterr().out


def test_an_added_expert_that_computes_wrongly_meets_no_target(bench, monkeypatch):
    """The target is (1 + s) times the base's time, where s is the added expert's share of rows."""
    share = bench.targets.ADDED_SHARE
    arguments = ["--shapes", "small", "--device", "cpu", "--only", "added", "--rounds", "1"]
    measure = next(bench.sections_cpu.added(bench.run.parse(arguments)))

    def judged(record):
        return bench.targets.judge({"added": [record]}, "cpu")

    case = measure.args[0]
    assert case.num_image == pytest.approx(share * case.rows, abs=1)
    forward, idle_forward, both, idle, *of_block = judged(measure())
    assert [forward["limit"], both["limit"]] == [1.05, 1 + share]
    assert idle_forward["within_spread"] and idle["within_spread"]
    assert both["measured"]["count"] == 1
    assert [(each["limit"], each["within_spread"]) for each in of_block] == [
        (each["limit"], each["within_spread"]) for each in (forward, idle_forward, both, idle)
    ]
    assert all(each["measured"]["count"] == 1 for each in of_block)

    moe_mlp = bench.ours.moe_mlp

    def with_a_wrong_expert(*args, extra_down_proj=None, **keywords):
        if extra_down_proj is not None:
            extra_down_proj = extra_down_proj * 1.1
        return moe_mlp(*args, extra_down_proj=extra_down_proj, **keywords)

    monkeypatch.setattr(bench.ours, "moe_mlp", with_a_wrong_expert)
    record = measure()
    assert "relative RMS error" in record["providers"]["ours_added:cpu"]["error"]
    assert record["providers"]["ours_added_text:cpu"]["error"] is None
    assert judged(record)[0]["met"] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_has_its_router_and_its_added_expert(bench, case, monkeypatch, dtype):
    problem = bench.cases.make_problem(replace(case, dtype=dtype))
    set_up, ids = bench.providers.set_up_provider, problem.inputs.modality_ids
    block = bench.ours.Block(problem, "reference", added=True)
    assert block.error(ids) is None and block.error(torch.zeros_like(ids)) is None
    context = bench.ours.context_of(block.layer.mlp.experts)
    with context.running(torch.zeros_like(ids)):  # text alone
        _, _, chosen = block.layer.mlp.gate(block.hidden_states)
    assert (chosen < case.shape.E).all() and 0 < ids.sum() < len(ids)
    with context.running(ids):
        _, _, chosen = block.layer.mlp.gate(block.hidden_states)
    assert torch.equal((chosen == case.shape.E).any(1), ids == 1)
    for name, trained in (("block", 0), ("block_added", 5)):
        runner = set_up(f"{name}:reference", problem)
        assert runner.check() is None and len(runner.leaves) == 1 + trained
        assert all(leaf.grad is not None for leaf in runner.leaves)

    monkeypatch.setattr(bench.ours, "_ADDED_LOGIT", -9.0)
    unused = set_up("block_added:reference", problem)
    assert "sent to the added expert" in unused.check()
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda ids: forward(ids) * 1.1)
    assert "relative RMS" in block.error(ids)


def tries_an_activation(hidden_states):
    """Return whether patching finds out what an activation is: rows are a gate and an up."""
    return hidden_states.shape[1] == 2


def test_peft_is_compared_with_itself_accelerated(bench, case, monkeypatch):
    """Kernels compute the accelerated experts, PEFT the others; both train the same adapters."""
    calls, moe_mlp = [], ops.moe_mlp

    def counted(hidden_states, *args, **keywords):
        if not tries_an_activation(hidden_states):
            calls.append(1)
        return moe_mlp(hidden_states, *args, **keywords)

    monkeypatch.setattr(ops, "moe_mlp", counted)
    problem = bench.cases.make_problem(case)
    oracle = bench.check.Oracle(problem)
    for name, called in (("peft:eager", 0), ("peft_accelerated:reference", 1)):
        runner = bench.providers.set_up_provider(name, problem)
        assert oracle.error(runner) is None
        assert len(calls) == called and runner.adapted == "all"
    calls.clear()
    record = bench.training.run(bench.steps.MODELS["tiny"], bench.runs.Options(rounds=1))
    entry = record["providers"]["peft_accelerated"]
    assert entry["error"] is None and calls
    assert bench.records.compare(record, "peft:grouped_mm", "peft_accelerated", "step").count == 1


def test_a_wrong_accelerated_step_meets_no_target(bench, monkeypatch):
    moe_mlp = ops.moe_mlp

    def wrong(hidden_states, *args, **keywords):
        out = moe_mlp(hidden_states, *args, **keywords)
        return out if tries_an_activation(hidden_states) else 1.01 * out

    monkeypatch.setattr(ops, "moe_mlp", wrong)
    record = bench.training.run(bench.steps.MODELS["tiny"], bench.runs.Options(rounds=1))
    assert "relative RMS" in record["providers"]["peft_accelerated"]["error"]
    verdicts = bench.targets.judge({"steps": [record]}, "cpu")
    assert [(v["number"], v["met"]) for v in verdicts if v["number"] == 14] == [(14, None)]


def test_steps_with_added_experts_start_from_the_same_model(bench, monkeypatch):
    program, options = bench.added_experts, bench.runs.Options(rounds=1)
    tiny = bench.steps.MODELS["tiny"]
    record = program.run(tiny, options)
    assert record["providers"]["ours"]["error"] is None and len(record["extended"]) == 1
    trained = {name: entry["trained"] for name, entry in record["providers"].items()}
    experts = 3 * tiny.hidden_size * tiny.intermediate_size
    assert trained["full:eager"] == tiny.layers * tiny.experts * (experts + tiny.hidden_size)
    calibration = 2 * 16 * (tiny.experts + 1)
    assert trained["ours"] == experts + tiny.hidden_size + calibration
    assert "full:eager" in program._too_slow(bench.steps.MODELS["olmoe"])


@pytest.mark.parametrize("what", ["another model", "text", "unused"])
def test_steps_with_added_experts_that_are_wrong_meet_no_target(bench, monkeypatch, what):
    program, options = bench.added_experts, bench.runs.Options(rounds=1)
    extend, text_logits, shut = program._extend, program._text_logits, ExitStack()

    def disturbed(extender, *batch):
        extend(extender, *batch)
        if what == "unused":
            shut.enter_context(extender.disabled())
        else:
            with torch.no_grad():
                extender.model.lm_head.weight[0, 0].mul_(1.01)

    monkeypatch.setattr(program, "_extend", disturbed)
    if what == "another model":
        monkeypatch.setattr(program, "_text_logits", lambda *args: text_logits(*args) * 1.01)
    with shut:
        record = program.run(bench.steps.MODELS["tiny"], options)
    wrong = {"another model": "relative RMS", "text": "text logits", "unused": "no image row"}
    assert wrong[what] in record["providers"]["ours"]["error"]
    (verdict,) = bench.targets.judge({"added_steps": [record]}, "cpu")
    assert verdict["number"] == 13 and verdict["met"] is None


def test_pages_of_results_older_than_added_experts(bench, monkeypatch, tmp_path):
    """A page says that added experts were not measured, or shows a run of that part alone."""
    monkeypatch.setattr(bench.result_files, "RESULTS", tmp_path)
    assert bench.pages.BLOCKS["added"]({}) == "Not measured yet.\n"
    arguments = ["--only", "added", "added_steps", "--shapes", "small", "--models", "tiny"]
    path = tmp_path / bench.cpu.ADDED_ALONE
    bench.run.main([*arguments, "--device", "cpu", "--rounds", "1", "--output", str(path)])
    shown = bench.pages.BLOCKS["added"]({})
    assert "13. training tokens/s" in shown and "small fp32 balanced" in shown
    assert bench.result_files.read(path)["environment"]["processor"] in shown


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_cost_model(bench, share):
    """Without image rows only the base's GEMMs are counted; no count is below the floor."""
    model, case = bench.costs, bench.cases.Case.named("olmoe", image_share=share)
    for mode in ("forward", "backward"):
        costs, floor = [*getattr(model, mode)(case)], model.floor(case, mode)
        low_rank = sum(cost.flops for cost in costs) / case.forward_flops - 1
        shape = case.shape
        expected = share * shape.r * (2 * shape.H + 3 * shape.I) / (3 * shape.H * shape.I)
        combine = shape.H / (3 * shape.H * shape.I)
        assert low_rank == pytest.approx((1 + (mode == "backward")) * expected + combine)
        assert sum(cost.bytes for cost in costs) > floor.bytes > case.expert_bytes * shape.E
    assert "gate_up" in model.table(case, 3.0, 800.0)


@pytest.mark.parametrize(("rank", "fewer"), [(16, 0.625), (32, 0.75), (64, 1.0)])
def test_one_pass_over_dY_moves_less(bench, rank, fewer):
    """dY and du alone take 2 + r / 32 bytes an element, not 4, at the widths of a layer."""
    case = bench.cases.Case.named("olmoe", r=rank, image_share=1.0)
    dY = case.rows * 2 * case.shape.I
    names = "dB1, du1 and dA2", "finish dB1, du1 and dA2", "du1"
    costs = [c for c in bench.costs.backward(case, "cuda") if c.kernel in names]
    sizes = bench.costs.sizes_of(case)
    of_A2 = sizes.a_act + 2 * sizes.u + 4 * case.shape.E * rank * case.shape.I
    known = of_A2 + sizes.lora_gate_up + 2 * 4 * case.shape.E * rank * case.shape.I
    moved, avoidable = (sum(c.bytes for c in costs) - known, sum(c.avoidable for c in costs))
    assert moved - 2 * sizes.u == pytest.approx(4 * fewer * dY)
    assert moved - avoidable == pytest.approx(2 * dY + 2 * sizes.u)  # dY once, and du
    assert sum(c.launches for c in costs) == (3 if fewer == 1 else 2)


def test_the_cost_model_counts_launches(bench):
    """Compare with what tests/gpu counts."""
    case = bench.cases.Case.named("olmoe")
    found = {mode: [*getattr(bench.costs, mode)(case)] for mode in COUNTS}
    assert {mode: sum(c.launches for c in costs) for mode, costs in found.items()} == COUNTS
    of_engine = [*bench.costs.forward(case, engine=True)]
    assert sum(c.launches for c in of_engine) == ENGINE_COUNTS["forward"]
    sizes = bench.costs.sizes_of(case)  # act is not read again; parts count as avoidable
    bytes_of = [sum(c.useful_bytes for c in costs) for costs in (of_engine, found["forward"])]
    assert bytes_of[1] - bytes_of[0] == sizes.a_act + sizes.u
    folded, passes = [*bench.costs.backward(case, "cuda", engine=True)], found["backward"]
    assert sum(c.launches for c in folded) == ENGINE_COUNTS["backward"]
    assert sum(c.flops for c in folded) == sum(c.flops for c in passes)
    bytes_of = [sum(c.useful_bytes for c in costs) for costs in (passes, folded)]
    # d_pre is not read again, and the activation neither written nor read.
    saved = sizes.a_pre + 2 * sizes.a_act
    assert bytes_of[0] - bytes_of[1] == pytest.approx(saved, rel=0.02)


def test_the_cost_model_has_the_parts_of_the_kernels(bench):
    triton, cuda = bench.costs.PARTS_OF_DU["triton"], bench.costs.PARTS_OF_DU["cuda"]
    kernels = pytest.importorskip("moe_kernels.ops.triton_launches")
    columns = kernels.wgrad_blocks(16, 4096, torch.bfloat16, with_du=True, capability=90)[1]
    assert triton == (kernels.MAX_RANK_WITH_DU, columns)
    if _native.is_available():
        names = "MAX_RANK_WITH_DU", "COLUMNS_OF_PART"
        assert cuda == tuple(map(_native.cuda_limit, names))
        rank, columns = bench.costs.PARTS_OF_U2
        most = 2**28 // (4 * rank)  # rows in one part
        for inter, r in ((columns, rank), (columns + 8, rank), (columns, rank + 1)):
            given = _native.gives_u2(most, 1, inter, 1, r)
            assert given == (inter <= columns and r <= rank)
        rank, rows, columns = bench.costs.FOLDED
        assert [_native.folds_gradients(2**12, 1, 1, 64, r, r) for r in (rank, rank + 1)] == [1, 0]


def test_the_engine_is_predicted_from_its_tiles(bench):
    # 65,536 rows of 64 experts, H = 2048, I = 1024
    case = bench.cases.Case.named("olmoe", T=8192, image_share=0.0)
    found = {tiles.kernel: tiles for tiles in bench.costs.engine(case)}
    assert [tiles.number for tiles in found.values()] == 4 * [512 * 8]
    operations = [tiles.number * tiles.flops for tiles in found.values()]
    costs = (*bench.costs.forward(case, engine=True), *bench.costs.backward(case, "cuda"))
    assert operations == [c.flops for c in costs if c.kernel in found]
    gate_up = found["gate_up"]
    assert gate_up.milliseconds(700, 128, 0) == pytest.approx(operations[0] / 700e9)
    # One tile more takes a whole turn, and the edges come once.
    more = gate_up._replace(number=gate_up.number + 1)
    turn = gate_up.flops * 128 / 700e9
    assert more.milliseconds(700, 128, 5) == pytest.approx(operations[0] / 700e9 + turn + 0.005)
    assert "| 128 x 256 | 4096" in bench.costs.engine_table(case, 700, 132, 10)
    # Of a tile's 128 rows and 256 columns, clusters of two read the columns half as often.
    assert gate_up.from_l2(gate_up.cluster) == pytest.approx(gate_up.from_l2(1) * 2 / 3)
    few = next(bench.costs.engine(bench.cases.Case.named("olmoe", T=8191, image_share=0.0)))
    assert (few.cluster, few.number) == (1, gate_up.number)


def test_the_cost_model_says_which_course_a_few_tokens_take(bench):
    case = bench.cases.Case.named("olmoe", T=1, image_share=1.0)
    printed = bench.costs.table(case, 3.0, 800.0, "cuda")
    default, switched = (
        next(line for line in printed.splitlines() if f"all of inference{name}" in line).split("|")
        for name in (", the default course", " in two kernels, MOE_KERNELS_DECODE=1")
    )
    assert [int(default[2]), int(switched[2])] == [COUNTS["inference"], COUNTS["decoding"]]
    assert float(default[4]) < 120  # MB: of the experts that one token chooses
    assert "inference" not in bench.costs.table(case, 3.0, 800.0, "triton")


@pytest.mark.parametrize(("tokens", "experts"), [(1, 8), (8, 42)])
def test_decoding_reads_the_experts_that_tokens_choose(bench, tokens, experts):
    case = bench.cases.Case.named("olmoe", T=tokens, image_share=1.0)
    costs, floor = [*bench.costs.decoding(case)], bench.costs.floor(case, "decoding")
    moved = sum(cost.bytes for cost in costs)
    assert floor.bytes < moved < 1.01 * floor.bytes
    assert 0.99 < floor.bytes / (experts * (case.expert_bytes + 4 * 16 * 7168)) < 1.01
    assert bench.costs.is_decoded(case)
    assert not bench.costs.is_decoded(bench.cases.Case.named("olmoe", T=17))


def test_the_kernels_that_are_compiled_have_all_pairs_of_values(bench):
    pytest.importorskip("triton")
    from check_gpu_code import cover

    keys = [*itertools.product((80, 90, 100), ("bf16", "fp32"), (1, 2), (False, True, None))]
    chosen = cover(keys)
    assert len(chosen) < len(keys) / 3 and chosen == cover(keys)
    pairs = {pair for key in keys for pair in itertools.combinations(enumerate(key), 2)}
    assert pairs == {p for key in chosen for p in itertools.combinations(enumerate(key), 2)}


def test_which_cuda_kernels_must_have_matrix_instructions(bench):
    pytest.importorskip("triton")
    from check_gpu_code import _MATRIX, _OF_WARPGROUP
    from check_gpu_code import needs_matrix_instructions as needs

    code = "HMMA.16816.F32 R4, R8 ; HFMA2.MMA R6, -RZ, RZ, 0, 0 ; HGMMA.64x8x16.F32 R24 ;"
    assert len(_MATRIX.findall(code)) == 2 and len(_OF_WARPGROUP.findall(code)) == 1
    half, mangled = "_kernel<__half, float, 2, true>", "_kernelINS1_5ShapeI13__nv_bfloat16fEE"
    for name in ("grouped_gemm", "wgrad", "shrink", "add_low_rank", "decode_down"):
        assert needs(name + half, 80) and needs(f"_ZN12moe_kernels12{name}{mangled}", 100)
        assert not needs(f"{name}_kernel<float, float, 2, true>", 90)
    assert not needs(f"combine{half}", 90) and not needs(f"_ZN19finish_wgrad{mangled}", 90)
    assert needs(f"engine{half}", 90) and not needs(f"engine{half}", 100)


# --- several ranks


def test_the_memory_of_loading_follows_the_formulas(bench):
    """The page applies them to Mixtral."""
    pages = bench.ranks
    records = bench.result_files.read(bench.result_files.RESULTS / pages.RESULTS)["records"]
    assert {record["case"] for record in records} == set(pages.WAYS)
    for record in records:
        sizes, ranks = record, record["ranks"]
        most, own = pages.measured(record)
        for found, formula in zip(most, pages.peaks(record["case"], sizes, ranks), strict=True):
            assert found == pytest.approx(formula, rel=0.15), record["case"]
        assert own == pytest.approx(pages.patching(record["case"], sizes, ranks), rel=0.15)


def test_memory_of_another_process_is_seen(bench):
    code = "import sys; kept = b'1' * (50 << 20); print('ready', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.readline()
        assert bench.loading.held(process.pid)["anonymous"] > 50 << 20
        process.stdin.close()


def test_the_slowest_rank(bench):
    """A step lasts as long as on the rank with most of the modality."""
    of = bench.collectives
    shares, cost = [0.0, 0.25, 1.0, 0.75], 0.2
    seconds = [1 + cost * share for share in shares]
    lost = max(seconds) / (sum(seconds) / 4) - 1
    assert of.waiting(max(shares), 0.5, cost) == pytest.approx(lost)
    drawn = torch.binomial(torch.full((20000, 16), 8.0), torch.tensor(0.5)).amax(1) / 8
    assert of.expected_most(8, 0.5, 16) == pytest.approx(drawn.mean().item(), abs=0.01)
    assert of.expected_most(8, 0.5, 1) == pytest.approx(0.5)


def test_the_program_of_arithmetic(bench, capsys):
    with pytest.raises(SystemExit):
        bench.scaling.main(["--ranks", "12"])
    assert "--ranks must be multiples of --per-node 8" in capsys.readouterr().err
    assert bench.scaling.main(["--ranks", "8", "16"]) == 0
    assert "ZeRO-3" in capsys.readouterr().out


# --- targets, files and pages


def test_a_target_is_met_or_missed_or_unknown(bench):
    def met(values, **settings):
        stats = bench.timing.summarize(values) if values else None
        return bench.targets.Target("cpu", 1, "", "", None, 1.2, **settings).met(stats)

    assert met([1.1, 1.2, 1.3]) is True
    assert met([1.1, 1.3, 1.3]) is False
    assert met([1.1, 1.21, 1.3], within_spread=True) is True
    assert met([1.1, 1.3, 1.3], within_spread=True) is False
    assert met([1.1, 1.3, 1.3], at_least=True) is True
    assert met([]) is None


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("cpu", "cpu"),
        ("cpu-again", "cpu"),
        ("cpu-added", "cpu"),
        ("cpu-peft", "cpu"),
        ("gpu-h100", "cuda"),
    ],
)
def test_committed_verdicts_are_those_of_the_judge(bench, name, device):
    """The limits have not moved since the run."""
    results = bench.result_files.read(bench.result_files.RESULTS / f"{name}.json")

    def values(verdicts):
        return sorted(str({**verdict, "case": None}) for verdict in verdicts)

    assert values(bench.targets.judge(results, device)) == values(results["targets"])


def test_results_are_written_whole_or_not_at_all(bench, tmp_path):
    path = tmp_path / "folder" / "a.json"
    bench.result_files.write(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        bench.result_files.write(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        bench.result_files.write(path, {"a": object()})
    assert bench.result_files.read(path) == {"a": 1}
    bench.result_files.write(path, {"a": 1, "b": [{"c": []}, {"c": [2]}]})
    assert path.read_text() == '{\n"a": 1,\n"b": [\n{"c":[]},\n{"c":[2]}\n]\n}\n'
    assert list(path.parent.iterdir()) == [path]


def test_the_pages_tables_are_those_of_the_results(bench):
    """Run ``python benchmarks/tables.py`` to write them anew."""
    for name, pages in bench.pages.PAGES.items():
        results = bench.result_files.read(bench.result_files.RESULTS / name)
        for page in pages:
            text = (ROOT / page).read_text()
            assert bench.pages.render(text, results) == text


def test_a_call_in_a_graph(bench, monkeypatch):
    """The time is that of a replay over the captured calls; the first call is not captured."""
    sections, calls = bench.sections_gpu, []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext(calls.append("graph")))
    monkeypatch.setattr(sections, "_median", lambda function, device: 3e-4)
    assert sections._seconds_in_a_graph(lambda: calls.append(1), "cuda") == pytest.approx(1.5e-5)
    assert calls == [1, "graph", *[1] * 20]
    assert sections._seconds_in_a_graph(lambda: calls.append(1), "cpu") == 3e-4


def test_targets_of_the_cuda_launches(bench):
    """combine moves 2 of 3 TB/s; bytes of partial sums of du do not count as useful work."""
    args = bench.run.parse(["--trial", "--device", "cuda", "--backend", "cuda"])
    case = bench.gpu_checks.layer_case(args, *args.layers[0])
    costs = [*bench.costs.forward(case), *bench.costs.backward(case, "cuda")]
    moved = sum(cost.bytes for cost in costs if cost.kernel.startswith("combine"))
    low_rank = [c for c in costs if re.match("shrink|du|dB|finish", c.kernel)]
    assert sum(cost.bytes for cost in low_rank) > sum(cost.useful_bytes for cost in low_rank)
    wgrad_ms = sum(cost.useful_bytes for cost in low_rank) / 2.7e12 * 1e3
    launches = {"case": case.describe(), "backend": "cuda"}
    results = {
        "ceilings": {"copy_TBps": 3.0},
        "dispatch": {"us": {"reference": 200.0, "cuda": 40.0}, **launches},
        "kernels": {
            "kernels": [
                ["combine_kernel<bf16>", 2, moved / 2e12 * 1e3], ["wgrad_kernel", 4, wgrad_ms],
                ["gate_up", 1, 1],
            ],
            **launches,
        }
    }  # fmt: skip

    def judged():
        return [
            (v["number"], v["measured"] and v["measured"]["median"], v["met"])
            for v in bench.targets.judge(results, "cuda")
        ]

    assert judged() == [
        (9, 40.0, False),
        (9, 5.0, True),
        (10, pytest.approx(2 / 3), False),
        (11, pytest.approx(0.9), True),
    ]
    results["kernels"]["kernels"] = [["gate_up", 1, 1]]
    assert judged()[-1] == (11, None, None)  # no time was seen
    results["kernels"]["backend"] = results["dispatch"]["backend"] = "triton"
    assert judged() == []
