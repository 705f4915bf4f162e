"""The program that measures the claims, on tiny budgets; its verdicts; the page from the JSON."""

import dataclasses
import importlib
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.programs import STUDIES, imported

RESULTS = STUDIES.parent / "docs" / "results"


@pytest.fixture(scope="module")
def program():
    with imported("redundancy"):
        from studies.redundancy import study

        yield study


@pytest.fixture(scope="module")
def report(program):
    from studies import report

    return report


@pytest.fixture(scope="module")
def tiny(program):
    """A sweep of seconds."""
    text = dataclasses.replace(program.QUICK.text, hidden_size=32, text_steps=3)
    budget = dataclasses.replace(
        program.QUICK, text=text, images=120, held_out=40, digit_codes=16, steps=4, batch=4,
        heal_steps=2, dense_neurons=64, samples_per_caption=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        from studies import step_cost

        patch.setattr(program, "QUICK", budget)
        patch.setattr(program, "LEARNING_RATES", (1e-3,))
        patch.setattr(step_cost, "ROUNDS", 1)
        yield


NAMES = [
    "plora",
    "own-rate-plora",
    "copy",
    "full",
    "added-experts",
    "source-dense",
    "source-8x6",
    "layer-0",
    "layer-1",
    "rank-4",
]


@pytest.mark.slow
def test_a_sweep_writes_its_page_and_a_second_one_computes_nothing(
    program, tiny, tmp_path, monkeypatch
):
    command = ["--quick", "--seeds", "0", "--runs", *NAMES, "--out", str(tmp_path)]
    assert program.main("", command) == 0
    data = json.loads((tmp_path / "redundancy.json").read_text())
    assert data["runs"].keys() == set(NAMES)
    runs = {name: run["seeds"]["0"] for name, run in data["runs"].items()}
    for name, result in runs.items():
        changed = result["text"]["logits_changed_by_training"]
        assert (changed > 0) == (name == "full"), name
        assert math.isfinite(result["test_nll"])
        (stage,) = (tmp_path / "stages").glob(f"run-0-{name}-????????????")
        assert len(json.loads((stage / "stage.json").read_text())["result"]["loss"]) == 4
    assert runs["full"]["trained_parameters"] > runs["plora"]["trained_parameters"]
    for method, rounds in data["cost"].items():
        assert len(rounds) == 1 and rounds[0]["tokens_per_second"] > 0, method
    text = (tmp_path / "redundancy.md").read_text()
    assert "| plora | 0 |" in text and "9 runs, each on" in text
    assert "not measured: run rank-32" in text and "not measured: run rank-4" not in text
    for name in ("parameters", "routing-before", "routing-after", "similarity", "samples"):
        assert (tmp_path / f"redundancy-{name}.png").read_bytes().startswith(b"\x89PNG"), name

    def fail(*_):
        raise AssertionError("a finished run was computed again")

    monkeypatch.setattr(program, "measure_run", fail)
    assert program.main("", command) == 0
    assert json.loads((tmp_path / "redundancy.json").read_text()) == data


def data_of(**losses):
    return {
        "runs": {
            name: {"seeds": {str(seed): {"test_nll": x} for seed, x in enumerate(numbers)}}
            for name, numbers in losses.items()
        }
    }


@pytest.mark.parametrize(
    ("ours", "outcome"),
    [
        ([1.0, 1.1, 1.2, 1.3, 1.4], "holds"),
        ([1.4, 1.5, 1.6, 1.7, 1.8], "does not hold"),
        ([1.3, 1.1, 1.5, 1.2, 1.7], "undecided"),
    ],
)
def test_verdicts_follow_paired_differences(report, ours, outcome):
    # Paired: seeds differ by more than the methods do.
    theirs = [1.2, 1.3, 1.4, 1.55, 1.6]
    verdict = report.lower(data_of(a=ours, b=theirs), "a", "b")
    assert verdict.outcome == outcome and str(verdict).startswith(f"{outcome} | test loss: ")


def test_one_seed_decides_nothing(report):
    assert report.lower(data_of(a=[1.0], b=[9.0]), "a", "b").outcome == "undecided"


def test_steps_to_a_fixed_loss_are_of_the_running_mean(program):
    from studies.redundancy import verdicts

    window, loss = program.WINDOW, program.FIXED_LOSS["digits"]
    high, low = loss + 1, loss - 1
    # The mean is at the loss once half of the window is low.
    steps = program.steps_to_fixed_loss([high] * 100 + [low] * 100, loss)
    assert steps == 100 + window / 2
    assert verdicts.steps({"steps_to_fixed_loss": steps, "test_nll": low}) == steps
    assert program.steps_to_fixed_loss([high] * 100, loss) is None
    assert math.isnan(verdicts.steps({"steps_to_fixed_loss": None, "test_nll": high}))
    # A run that diverged has failed, wherever it was before.
    assert math.isnan(verdicts.steps({"steps_to_fixed_loss": steps, "test_nll": math.nan}))


def test_differences_are_over_the_seeds_that_both_runs_have(report):
    data = data_of(a=[1.0, 2.0, 3.0], b=[0.5, 1.0])
    assert report.paired(data, "a", "b").tolist() == [0.5, 1.0]
    assert report.difference(data, "a", "a") == "" and report.difference(data, "a", "b") != ""


PAGE = """# Title

| claim | verdict | difference | p |
|---|---|---|---|
| a learns more than b | <!-- study:lower.a.b --><!-- /study:lower.a.b --> |
| c learns more than b | <!-- study:lower.c.b -->stale<!-- /study:lower.c.b --> |
| c forgets | <!-- study:forgets.c --><!-- /study:forgets.c --> |

A base of <!-- study:base --><!-- /study:base -->, <!-- study:seeds --><!-- /study:seeds --> seeds.

<!-- study:joint -->
<!-- /study:joint -->
<!-- study:rates --><!-- /study:rates -->
<!-- study:hours --><!-- /study:hours --> <!-- study:versions-used --><!-- /study:versions-used -->
"""


@pytest.fixture
def small_page(report):
    text = {"layers": 4, "hidden_size": 8, "experts": 2, "intermediate_size": 3}
    data = data_of(a=[1.0, 1.1, 1.2], b=[2.0, 2.1, 2.3]) | {
        "budget": {"text": text | {"experts_per_token": 1}}, "seeds": 3, "cost": {}, "seconds": 1,
        "tuning": {"choice_nll": {}}, "versions": {},
    }  # fmt: skip
    return lambda page: report.render(page, data, {})


def test_verdicts_fill_their_rows_and_are_summed_up(small_page):
    page = small_page(PAGE)
    assert "| a learns more than b | <!-- study:lower.a.b -->holds | test loss: -1.033 (" in page
    # Without runs there is no verdict, and no old one either.
    assert "-->*not measured: run c*<!--" in page and "stale" not in page
    assert "1 verdicts have a p, and 1 of them are decided" in page
    joint = page.split("<!-- study:joint -->")[1]
    assert "| a learns more than b | holds |" in joint and "c learns" not in joint
    assert small_page(page) == page


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("study:seeds -->", "study:sseeds -->", "unknown marker study:sseeds"),
        ("<!-- study:base --><!-- /study:base -->", "", "no marker for base"),
        ("<!-- /study:seeds -->", "", "followed by"),
    ],
)
def test_a_marker_that_is_unknown_or_missing_is_refused(small_page, old, new, problem):
    with pytest.raises(ValueError, match=problem):
        small_page(PAGE.replace(old, new))


def test_verdicts_that_hold_together_are_those_of_holms_procedure(report):
    def verdict(p):
        return report.Verdict(report.HOLDS, "", p)

    claims = {"a": verdict(0.03), "b": verdict(0.01), "c": verdict(0.02)}
    assert report.hold_together(claims) == ["b", "c", "a"]
    # b stands below a third of 0.05, c not below a half.
    claims["c"], claims["a"] = verdict(0.026), verdict(0.04)
    assert report.hold_together(claims) == ["b"]


def test_similarity_of_layers_is_told_from_depth(program):
    from studies.redundancy import verdicts as page

    rng = np.random.default_rng(0)
    depth, own = np.arange(4.0), rng.normal(size=(5, 4))
    # Both follow depth, and nothing else: orders of layers that seeds share say so little.
    between, p = page.joint_rank_correlation(depth + 0.01 * own, depth + 0.01 * own[::-1])
    assert between == 1 and p == 1 / 24
    within, p_within = page.residual_correlation(depth + own, depth + rng.normal(size=(5, 4)), 999)
    assert abs(within) < 0.5 and p_within > 0.05
    within, p_within = page.residual_correlation(depth + own, 2 * own - depth, 999)
    assert within > 0.999 and p_within < 0.01
    within, p_within = page.residual_correlation(depth + own, -own, 999)
    assert within < -0.999 and p_within < 0.01
    assert page.residual_correlation(np.ones((5, 4)), own, 99) == (0.0, 1.0)


def test_every_run_is_compared_on_the_page_and_every_run_on_the_page_is_made(program):
    from studies.redundancy import verdicts

    page = (RESULTS / "redundancy.md").read_text()
    rows = "text|method|loss|source-row|start-row"
    named = set(re.findall(rf"<!-- study:(?:{rows}|seeds|setting)\.([\w-]+)", page))
    for pair in re.findall(r"<!-- study:lower\.([\w.-]+)", page):
        named |= set(pair.split("."))
    layers = {f"layer-{i}" for i in re.findall(r"<!-- study:layer\.(\d)", page)}
    shared_rate = {name for name in program.RUNS if name.startswith("shared-rate-")}
    assert named | layers | shared_rate == program.RUNS.keys()
    starts = set(re.findall(r"<!-- study:start\.(\w+\.[\w-]+) -->", page))
    assert starts == {
        f"{where}.{name}" for where, names in verdicts.STARTS.items() for name in names
        if verdicts.GW in name
    }  # fmt: skip
    assert set(program.QUICK_RUNS) <= program.RUNS.keys()


def test_a_rate_that_diverges_is_not_chosen(program, tmp_path, monkeypatch):
    from studies import sweep

    def measured(setup, run, lr, place):
        if lr == 1.0:
            raise FloatingPointError("training stopped")
        return {"choice_nll": math.nan if lr == 2.0 else lr}

    monkeypatch.setattr(program, "measure_run", measured)
    monkeypatch.setattr(program, "LEARNING_RATES", (1.0, 2.0, 5.0, 4.0))
    made = sweep.Sweep(program.study(None, "", None), program.QUICK, tmp_path)
    tuned = made.tune(["plora", "rows"])
    for losses in tuned.values():
        assert losses == {"1": math.inf, "2": math.inf, "5": 5.0, "4": 4.0}
        assert min(losses, key=losses.get) == "4"


def test_an_interrupted_stage_is_not_taken_for_another_rate(program, tmp_path):
    from moe_kernels.programs.shared.stages import Stages

    def build(workspace):
        (workspace.folder / "begun").touch()
        raise KeyboardInterrupt

    stages = Stages(tmp_path)
    for rate in (0.001, 0.003):
        with pytest.raises(KeyboardInterrupt):
            stages.run(f"tune-{rate:g}", {"lr": rate}, build)
    assert len(list(tmp_path.glob("*.partial/begun"))) == 2


@pytest.mark.slow
def test_memory_is_that_of_the_process_and_not_of_its_parent(program):
    """The peak of a large parent, which getrusage hands on, is not counted."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from studies.step_cost import peak_bytes, reset_peak\n"
        "before = reset_peak(); taken = bytearray(64 << 20)\n"
        "del taken; print(peak_bytes() - before)"
    )
    large = b"x" * (600 << 20)
    command = [sys.executable, "-c", code, str(STUDIES)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert 60 << 20 < int(output) < 96 << 20
    del large


def test_added_rows_learn_at_the_rate_that_the_run_says(program):
    from studies.redundancy import runs
    from support.model_zoo import make_model

    from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model

    model = make_model("olmoe")
    patched = patch_model(model, ModalityLoraConfig(r=4))
    add_modality_tokens(model, "image", 8)
    assert runs.optimizer_of(model, runs.Run(), 1e-3) is None
    rows, others = runs.optimizer_of(model, runs.OwnRateRun(row_lr=0.5), 1e-3).param_groups
    assert (rows["lr"], others["lr"]) == (0.5, 1e-3)
    assert {tuple(p.shape) for p in rows["params"]} == {(8, model.config.hidden_size)}
    assert len(rows["params"]) == 2
    trained = {id(parameter) for parameter in patched.trainable_parameters()}
    assert {id(p) for group in (rows, others) for p in group["params"]} == trained

    table, head = (
        getattr(module, runs.ROWS)["image"]
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    before = table.detach().clone(), head.detach().clone()
    runs.restart_rows(model, "head", seed=1)
    assert torch.equal(table, before[0]) and not torch.equal(head, before[1])


@pytest.mark.parametrize("command", ["--page", "--remake"])
def test_a_page_of_a_study_that_has_not_run(program, command, tmp_path, capsys):
    place = ["--results", str(tmp_path), "--out", str(tmp_path / "out")]
    assert program.main("", [command, *place]) == 1
    assert "redundancy.json is missing: run the study first" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_page_does_not_lose_runs_to_a_smaller_sweep(program, tmp_path, capsys, monkeypatch):
    runs = {"plora": {"seeds": {"0": {}, "7": {}}}}
    (tmp_path / "redundancy.json").write_text(json.dumps({"runs": runs}))
    command = ["--seeds", "0", "--runs", "plora", "--out", str(tmp_path / "out")]
    assert program.main("", [*command, "--results", str(tmp_path)]) == 1
    assert "plora of seed 7" in capsys.readouterr().out and not (tmp_path / "out").exists()

    # Without --results it goes where the runs are.
    from studies import sweep

    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    monkeypatch.setattr(sweep.Sweep, "everything", lambda *_: {"runs": {}})
    monkeypatch.setattr(sweep, "write_page", lambda study, file, folder: None)
    assert program.main("", command) == 0
    assert json.loads((tmp_path / "out" / "redundancy.json").read_text()) == {"runs": {}}
    assert json.loads((tmp_path / "redundancy.json").read_text()) == {"runs": runs}


@pytest.mark.parametrize(("loss", "changed", "code"), [(1.01, 0, 0), (1.5, 0, 1), (1.0, 3, 1)])
def test_remade_runs_must_come_out_as_published(
    program, tmp_path, monkeypatch, loss, changed, code
):
    def result(loss, changed):
        return {"test_nll": loss, "text": {"logits_changed_by_training": changed}}

    there = {"seeds": {"0": result(1.0, 0) | {"lr": 0.5}}}
    published = {"runs": dict.fromkeys(program.QUICK_RUNS, there)}
    (tmp_path / "redundancy.json").write_text(json.dumps(published))

    def measured(setup, run, lr, place):
        assert lr == 0.5
        return result(loss, changed)

    monkeypatch.setattr(program, "measure_run", measured)
    command = ["--remake", "--results", str(tmp_path), "--out", str(tmp_path / "out")]
    assert program.main("", command) == code


def published():
    return json.loads((RESULTS / "redundancy.json").read_text())


@pytest.mark.parametrize("name", ["redundancy", "moextend", "pathways"])
def test_the_page_is_the_one_that_the_json_gives(report, name):
    tables = importlib.import_module(f"studies.{name}.tables")
    data, page = (json.loads((RESULTS / f"{name}.json").read_text()),
                  (RESULTS / f"{name}.md").read_text())  # fmt: skip
    assert report.render(page, data, tables.BLOCKS) == page
    assert "not measured" not in page
    # Markdown takes a line that begins with a comment for HTML.
    begins = [line for line in page.split("\n") if line.startswith("<!-- ")]
    assert all(re.fullmatch(r"<!-- /?study:[\w.-]+ -->", line) for line in begins)
    # A claim has one verdict, and a verdict one claim.
    verdict = r"^\| (.+?) \| <!-- study:([\w.-]+) -->(?:holds|does not hold|undecided) "
    claims = re.findall(verdict, page, re.M)
    assert len(dict(claims)) == len(set(claims)) == len({name for _, name in claims})


@pytest.mark.parametrize("name", ["redundancy", "moextend", "pathways"])
def test_the_json_has_one_run_a_line(program, name):
    from studies import sweep

    text = (RESULTS / f"{name}.json").read_text()
    data = json.loads(text)
    assert sweep.to_json(data) == text
    lines = [line.rstrip(",") for line in text.split("\n") if '"lr":' in line]
    runs = [result for run in data["runs"].values() for result in run["seeds"].values()]
    kept = [next(iter(json.loads(f"{{{line}}}").values())) for line in lines]
    assert [each for each in kept if "test_nll" in each] == runs


@pytest.mark.parametrize(
    "names",
    [
        ("source-dense", "source-8x6", "source-16x4", "source-copy"),
        ("own-rate-experts", "own-rate-copy", "own-rate-added-experts"),
    ],
)
def test_what_is_compared_as_equal_trains_as_many_parameters(report, names):
    counts = [report.parameters(published(), name) for name in names]
    # Added experts come whole, with their calibration.
    assert max(counts) < 1.04 * min(counts)


def test_rows_of_their_own_rate_have_the_one_that_was_tuned(program):
    data = published()
    row_lr = data["runs"]["own-rate-plora"]["settings"]["row_lr"]
    assert row_lr == data["tuning"]["learning_rate"]["rows"]
