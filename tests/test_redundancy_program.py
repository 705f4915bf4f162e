"""The program that measures the claims, on tiny budgets; its verdicts; the page from the JSON."""

import dataclasses
import json
import math

import pytest
from programs import PROGRAMS, imported

RESULTS = PROGRAMS.parent / "docs" / "results"


@pytest.fixture(scope="module")
def program():
    with imported("redundancy") as module:
        yield module


@pytest.fixture(scope="module")
def page(program):
    import _redundancy_page

    return _redundancy_page


@pytest.fixture(scope="module")
def tiny(program):
    """A sweep of seconds."""
    text = dataclasses.replace(program.QUICK.text, hidden_size=32, text_steps=3)
    budget = dataclasses.replace(
        program.QUICK, text=text, images=120, held_out=40, digit_codes=16, steps=4, batch=4,
        heal_steps=2, dense_neurons=64, samples_per_caption=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        import _redundancy_cost

        patch.setattr(program, "QUICK", budget)
        patch.setattr(program, "LEARNING_RATES", (1e-3,))
        patch.setattr(_redundancy_cost, "ROUNDS", 1)
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
    for name in ("parameters", "routing", "divergence", "similarity", "samples"):
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
def test_verdicts_follow_paired_differences(page, ours, says):
    # Paired: seeds differ by more than the methods do.
    theirs = [1.2, 1.3, 1.4, 1.55, 1.6]
    assert page.verdict(data_of(a=ours, b=theirs), "a", "b", "a beats b").startswith(says)


def test_one_seed_decides_nothing(page):
    assert page.verdict(data_of(a=[1.0], b=[9.0]), "a", "b", "a").startswith("**Undecided:**")


def test_steps_to_a_fixed_loss_are_of_the_running_mean(page):
    window, loss = page.WINDOW, page.FIXED_LOSS["digits"]
    high, low = loss + 1, loss - 1
    # The mean is at the loss once half of the window is low.
    result = {"loss": [high] * 100 + [low] * 100}
    assert page.steps_to_fixed_loss(result) == 100 + window / 2
    assert math.isnan(page.steps_to_fixed_loss({"loss": [high] * 100}))


@pytest.mark.skipif(
    not (RESULTS / "redundancy.json").exists(), reason="runs once `make results` has written it"
)
def test_the_page_is_the_one_that_the_json_gives(page):
    data = json.loads((RESULTS / "redundancy.json").read_text())
    assert page.page(data) == (RESULTS / "redundancy.md").read_text()
