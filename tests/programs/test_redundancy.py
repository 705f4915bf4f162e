"""The program that measures the claims, on tiny budgets; its verdicts; the page from the JSON."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.programs import PROGRAMS, imported

RESULTS = PROGRAMS.parent / "docs" / "results"


@pytest.fixture(scope="module")
def program():
    with imported("redundancy") as module:
        yield module


@pytest.fixture(scope="module")
def page(program):
    from studies.redundancy import page

    return page


@pytest.fixture(scope="module")
def shared(program):
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
    assert program.main(command) == 0
    data = json.loads((tmp_path / "redundancy.json").read_text())
    assert data["runs"].keys() == set(NAMES)
    runs = {name: run["seeds"]["0"] for name, run in data["runs"].items()}
    for name, result in runs.items():
        changed = result["text"]["logits_changed_by_training"]
        assert (changed > 0) == (name == "full"), name
        assert len(result["loss"]) == 4 and math.isfinite(result["test_nll"])
    assert runs["full"]["trained_parameters"] > runs["plora"]["trained_parameters"]
    for method, rounds in data["cost"].items():
        assert len(rounds) == 1 and rounds[0]["tokens_per_second"] > 0, method
    text = (tmp_path / "redundancy.md").read_text()
    assert "| plora | 0 |" in text and "leaves every text logit its bits" in text
    for name in ("parameters", "routing-before", "routing-after", "similarity", "samples"):
        assert (tmp_path / f"redundancy-{name}.png").read_bytes().startswith(b"\x89PNG"), name

    def fail(*_):
        raise AssertionError("a finished run was computed again")

    monkeypatch.setattr(program, "measure_run", fail)
    assert program.main(command) == 0
    assert json.loads((tmp_path / "redundancy.json").read_text()) == data


def data_of(**losses):
    return {
        "runs": {
            name: {"seeds": {str(seed): {"test_nll": x} for seed, x in enumerate(numbers)}}
            for name, numbers in losses.items()
        }
    }


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        ([1.0, 1.1, 1.2, 1.3, 1.4], "**Holds here:**"),
        ([1.4, 1.5, 1.6, 1.7, 1.8], "**Does not hold here:**"),
        ([1.3, 1.1, 1.5, 1.2, 1.7], "**Undecided:**"),
    ],
)
def test_verdicts_follow_paired_differences(shared, ours, says):
    # Paired: seeds differ by more than the methods do.
    theirs = [1.2, 1.3, 1.4, 1.55, 1.6]
    assert shared.verdict(data_of(a=ours, b=theirs), "a", "b", "a beats b").startswith(says)


def test_one_seed_decides_nothing(shared):
    assert shared.verdict(data_of(a=[1.0], b=[9.0]), "a", "b", "a").startswith("**Undecided:**")


def test_steps_to_a_fixed_loss_are_of_the_running_mean(page):
    window, loss = page.WINDOW, page.FIXED_LOSS["digits"]
    high, low = loss + 1, loss - 1
    # The mean is at the loss once half of the window is low.
    result = {"loss": [high] * 100 + [low] * 100, "test_nll": low}
    assert page.steps_to_fixed_loss(result) == 100 + window / 2
    assert math.isnan(page.steps_to_fixed_loss({"loss": [high] * 100, "test_nll": high}))
    # One that diverged has failed, wherever it was before.
    assert math.isnan(page.steps_to_fixed_loss(result | {"test_nll": math.nan}))


def test_differences_are_over_the_seeds_that_both_runs_have(shared):
    data = data_of(a=[1.0, 2.0, 3.0], b=[0.5, 1.0])
    assert shared.paired(data, "a", "b").tolist() == [0.5, 1.0]
    assert shared.difference(data, "a", "a") == "" and shared.difference(data, "a", "b") != ""


def test_all_verdicts_are_listed_once_and_counted(shared):
    sections = [
        f"text\n\n{shared.HOLDS} one (x, p 0.01).\n\n{shared.FAILS} two (x, p 0.02).",
        f"{shared.HOLDS} three.",
    ]
    said = shared.in_short(sections)
    # The third one has no p.
    assert "2 of these verdicts" in said and f"{0.05 / 2:.4f}" in said
    holds, fails = said.split(shared.HOLDS)[1].split(shared.FAILS)
    assert "- one (x, p 0.01)." in holds and "- three." in holds and "- two (x, p 0.02)." in fails
    assert shared.in_short(["nothing"]) == ""


def test_similarity_of_layers_is_told_from_depth(page):
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


def test_every_run_of_a_table_is_one_that_is_made_and_described(program, page):
    tables = [*page.BASES.values(), page.SOURCE, page.OWN_RATE, page.RANKS]
    for name in itertools.chain(*tables):
        assert name in program.RUNS and page.described(name), name
    assert set(itertools.chain(*page.STARTS.values())) <= program.RUNS.keys()
    assert set(program.QUICK_RUNS) <= program.RUNS.keys()


def test_a_rate_that_diverges_is_not_chosen(program, tmp_path, monkeypatch):
    from studies import sweep

    def measured(ground, run, lr, place):
        if lr == 1.0:
            raise FloatingPointError("training stopped")
        return {"choice_nll": math.nan if lr == 2.0 else lr}

    monkeypatch.setattr(program, "measure_run", measured)
    monkeypatch.setattr(program, "LEARNING_RATES", (1.0, 2.0, 5.0, 4.0))
    made = program.program_for(None, "", None)
    tuned = sweep.Sweep(made, program.QUICK, tmp_path).tune(["plora", "rows"])
    for losses in tuned.values():
        assert losses == {"1": math.inf, "2": math.inf, "5": 5.0, "4": 4.0}
        assert min(losses, key=losses.get) == "4"


def test_an_interrupted_stage_is_not_taken_for_another_rate(program, tmp_path):
    from shared.stages import Stages

    def build(workspace):
        (workspace.folder / "begun").touch()
        raise KeyboardInterrupt

    stages = Stages(tmp_path)
    for rate in (0.001, 0.003):
        with pytest.raises(KeyboardInterrupt):
            stages.run(f"tune-{rate:g}", {"lr": rate}, build)
    assert len(list(tmp_path.glob("*.partial/begun"))) == 2


def test_memory_is_that_of_the_process_and_not_of_its_parent(program):
    """The peak of a large parent, which getrusage hands on, is not counted."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from studies.step_cost import peak_bytes, reset_peak\n"
        "before = reset_peak(); taken = bytearray(64 << 20)\n"
        "del taken; print(peak_bytes() - before)"
    )
    large = b"x" * (600 << 20)
    command = [sys.executable, "-c", code, str(PROGRAMS)]
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


def test_a_page_does_not_lose_runs_to_a_smaller_sweep(program, tmp_path, capsys, monkeypatch):
    runs = {"plora": {"seeds": {"0": {}, "7": {}}}}
    (tmp_path / "redundancy.json").write_text(json.dumps({"runs": runs}))
    command = ["--seeds", "0", "--runs", "plora", "--out", str(tmp_path / "out")]
    assert program.main([*command, "--results", str(tmp_path)]) == 1
    assert "plora of seed 7" in capsys.readouterr().out and not (tmp_path / "out").exists()

    # Without --results it goes where the runs are.
    from studies import sweep

    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    monkeypatch.setattr(sweep.Sweep, "everything", lambda *_: {"runs": {}})
    monkeypatch.setattr(program, "write_page", lambda file, folder: None)
    assert program.main(command) == 0
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

    def measured(ground, run, lr, place):
        assert lr == 0.5
        return result(loss, changed)

    monkeypatch.setattr(program, "measure_run", measured)
    command = ["--remake", "--results", str(tmp_path), "--out", str(tmp_path / "out")]
    assert program.main(command) == code


def published():
    return json.loads((RESULTS / "redundancy.json").read_text())


@pytest.mark.skipif(
    not (RESULTS / "redundancy.json").exists(), reason="runs once `make results` has written it"
)
def test_the_page_is_the_one_that_the_json_gives(page):
    assert page.page(published()) == (RESULTS / "redundancy.md").read_text()


@pytest.mark.skipif(
    not (RESULTS / "redundancy.json").exists(), reason="runs once `make results` has written it"
)
@pytest.mark.parametrize(
    "names",
    [
        ("source-dense", "source-8x6", "source-16x4", "source-copy"),
        ("own-rate-experts", "own-rate-copy", "own-rate-added-experts"),
    ],
)
def test_what_is_compared_as_equal_trains_as_many_parameters(shared, names):
    counts = [float(shared.parameters(published(), name).replace(",", "")) for name in names]
    # Added experts come whole, with their calibration.
    assert max(counts) < 1.04 * min(counts)


@pytest.mark.skipif(
    not (RESULTS / "redundancy.json").exists(), reason="runs once `make results` has written it"
)
def test_rows_of_their_own_rate_have_the_one_that_was_tuned(program):
    data = published()
    row_lr = data["runs"]["own-rate-plora"]["settings"]["row_lr"]
    assert row_lr == data["tuning"]["learning_rate"]["rows"]
