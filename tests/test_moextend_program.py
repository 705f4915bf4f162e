"""Questions about pictures, and the program that measures added experts, on tiny budgets."""

import dataclasses
import json
import math

import pytest
import torch
from programs import PROGRAMS, imported

RESULTS = PROGRAMS.parent / "docs" / "results"


@pytest.fixture(scope="module")
def program():
    with imported("moextend") as module:
        yield module


@pytest.fixture(scope="module")
def asking(program):
    import _questions

    return _questions


@pytest.fixture(scope="module")
def page(program):
    import _moextend_page

    return _moextend_page


@pytest.fixture(scope="module")
def tiny(program):
    """A sweep of seconds."""
    text = dataclasses.replace(program.QUICK.text, hidden_size=32, layers=2, text_steps=3)
    encoder = dataclasses.replace(program.QUICK.encoder, steps=3, held_out=60, features=8)
    budget = dataclasses.replace(
        program.QUICK, text=text, encoder=encoder, word_questions=500, align_steps=2, steps=3,
        score_steps=2, held_out_questions=20, held_out_blocks=8,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "QUICK", budget)
        patch.setattr(program, "LEARNING_RATES", (1e-3,))
        yield


NAMES = [
    "gated", "sequence", "published", "lora", "lora-all-tokens", "projector", "full",
    "layers-random", "two-experts", "code-gated", "code-full",
]  # fmt: skip
CHANGE_TEXT = {"published", "lora-all-tokens", "full", "code-full"}


@pytest.mark.slow
def test_a_sweep_writes_its_page_and_a_second_one_computes_nothing(
    program, tiny, tmp_path, monkeypatch
):
    command = ["--quick", "--seeds", "0", "--runs", *NAMES, "--out", str(tmp_path), "--no-cost"]
    assert program.main(command) == 0
    data = json.loads((tmp_path / "moextend.json").read_text())
    assert data["runs"].keys() == set(NAMES)
    runs = {name: run["seeds"]["0"] for name, run in data["runs"].items()}
    for name, result in runs.items():
        changed = result["text"]["logits_changed_by_training"]
        assert (changed > 0) == (name in CHANGE_TEXT), name
        assert len(result["loss"]) == 3 and math.isfinite(result["test_nll"])
    assert runs["full"]["trained_parameters"] > runs["two-experts"]["trained_parameters"]
    assert runs["two-experts"]["trained_parameters"] > runs["gated"]["trained_parameters"]
    for name in ("gated", "sequence", "code-gated"):
        assert runs[name]["disturbance"]["text"]["changed_rows"] == 0, name
        assert runs[name]["disturbance"]["task"]["changed_rows"] > 0, name
    assert runs["published"]["disturbance"]["text"]["changed_rows"] > 0
    text = (tmp_path / "moextend.md").read_text()
    assert "| gated | 0 |" in text and "**Holds here:** experts behind a gate, masked" in text
    for name in ("scores", "layers", "trade"):
        assert (tmp_path / f"moextend-{name}.png").read_bytes().startswith(b"\x89PNG"), name

    def fail(*_):
        raise AssertionError("a finished run was computed again")

    monkeypatch.setattr(program, "measure_run", fail)
    assert program.main(command) == 0
    assert json.loads((tmp_path / "moextend.json").read_text()) == data


def test_what_a_step_costs_is_of_what_trains(program, tmp_path, monkeypatch):
    import _moextend_cost
    import _redundancy_cost
    from model_zoo import make_model

    monkeypatch.setattr(_redundancy_cost, "WARM_UP", 1)
    monkeypatch.setattr(_redundancy_cost, "STEPS", 1)
    trained = {}
    for method in _moextend_cost.METHODS:
        model = make_model("olmoe", num_hidden_layers=2, experts="grouped_mm")
        monkeypatch.setattr(
            _moextend_cost, "load_text_model", lambda *_, model=model: (model, None)
        )
        before = {name: p.clone() for name, p in model.named_parameters()}
        cost = _moextend_cost.cost_of(method, tmp_path)
        trained[method] = cost["trained_parameters"]
        assert cost["tokens_per_second"] > 0
        after = dict(model.named_parameters())
        moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
        if method in ("gated", "published"):
            assert not moved
        elif method == "experts":
            assert moved and all("layers.0.mlp" in name for name in moved)
        else:
            assert any("self_attn" in name for name in moved)
    assert trained["gated"] == trained["published"] < trained["experts"] < trained["full"]


# --- questions


@pytest.fixture(scope="module")
def pictures(asking):
    """Sixty that an encoder could have seen."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 16, 8, generator=generator)
    labels = torch.randint(10, (60,), generator=generator)
    return asking.EncodedPictures(features, labels, asking.DIGITS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from programs import save_byte_tokenizer
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def viewer(asking):
    from model_zoo import make_model

    from moe_kernels.extension import ExpertExtender

    torch.manual_seed(0)
    extender = ExpertExtender(make_model("olmoe", vocab_size=256), ("image",))
    extender.add_projector(8)
    return asking.Viewer(extender)


def test_no_picture_is_in_two_parts(asking):
    settings = asking.EncoderSettings(held_out=100)
    pictures = asking.read_pictures(settings)
    parts = asking.split_pictures(pictures, settings.held_out, 3)
    assert {part: len(each) for part, each in parts.items()} == {
        "train": 4900, "choice": 50, "test": 50
    }  # fmt: skip
    seen = {part: {image.tobytes() for image in each.images} for part, each in parts.items()}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["choice"]
    assert not seen["choice"] & seen["test"]


def test_answers_are_what_the_pictures_are_named(asking, pictures):
    labels = pictures.labels.tolist()
    for question in asking.ask(pictures, "sum", 45, seed=1):
        assert asking.NUMBERS.index(question.answer) == sum(labels[i] for i in question.pictures)
    asked = asking.ask(pictures, "digit", None, seed=1)
    assert sorted(question.pictures for question in asked) == [(i,) for i in range(60)]
    assert all(question.answer == asking.DIGITS[labels[question.pictures[0]]] for question in asked)
    assert asked != asking.ask(pictures, "digit", None, seed=2)


def test_questions_in_words_are_answered_right(asking):
    asked = asking.ask_words(asking.DIGITS, ("digit", "sum"), 200, seed=5)
    assert {question.kind for question in asked} == {"digit", "sum"}
    for question in asked:
        named = [asking.DIGITS.index(w) for w in question.prompt.split("\n")[0].split()]
        if question.kind == "digit":
            assert question.answer == asking.DIGITS[named[0]] and len(set(named)) == 1
        else:
            total = sum(set(named)) * (2 if len(set(named)) == 1 else 1)
            assert question.answer == asking.NUMBERS[total]


def test_an_answer_alone_has_labels_and_pictures_come_first(asking, pictures, tokenizer, viewer):
    questions = asking.ask(pictures, "digit", 3, 0) + asking.ask(pictures, "sum", 3, 0)
    asked = asking.QuestionSet(pictures, questions, tokenizer)
    (batch,) = asked.batches(6)
    joined = viewer.join(batch)
    ids = joined["modality_ids"]
    for row, question in enumerate(questions):
        labels = joined["labels"][row]
        assert tokenizer.decode(labels[labels != -100]) == f" {question.answer}\n"
        features = 16 * len(question.pictures)
        assert (ids[row, :features] == 1).all() and not (ids[row, features:] == 1).any()
        assert torch.equal(ids[row] == -1, joined["attention_mask"][row] == 0)
    whole = dataclasses.replace(viewer, whole_sequences=True).join(batch)["modality_ids"]
    assert torch.equal(whole == 1, joined["attention_mask"] == 1) and (whole != 0).all()


@torch.no_grad()
def always_answers(model, tokenizer, text):
    """Makes each token decide the next one, so that a question's end is followed by ``text``."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj")):
            parameter.zero_()
    model.model.norm.weight.fill_(1.0)
    table, head = model.get_input_embeddings().weight, model.lm_head.weight
    table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
    head.zero_()
    ids = tokenizer(f"?{text}").input_ids
    for token, following in zip(ids, ids[1:], strict=False):
        head[following] += table[token]


def test_right_answers_are_those_that_generation_writes(asking, pictures, tokenizer, viewer):
    questions = asking.ask(pictures, "sum", 60, 0) + asking.ask(pictures, "digit", 20, 0)
    asked = asking.QuestionSet(pictures, questions, tokenizer)
    always_answers(viewer.model, tokenizer, " four\n")
    assert viewer.answer(asked, size=50) == ["four"] * 80
    # "fourteen" begins as "four" does.
    assert {"four", "fourteen"} <= {question.answer for question in questions}
    for kind, right in viewer.grade(asked, size=30)["accuracy"].items():
        answers = [question.answer for question in questions if question.kind == kind]
        assert right == answers.count("four") / len(answers) > 0
    words = asking.ask_words(asking.DIGITS, ("digit",), 50, 0)
    right = [question.answer == "four" for question in words]
    found = asking.grade_words(viewer.model, tokenizer, words, size=20)
    assert found["accuracy"] == {"digit": sum(right) / 50} and 0 < sum(right) < 50


def test_alignment_trains_the_projector_and_goes_on_from_a_checkpoint(
    asking, program, pictures, tokenizer, tmp_path
):
    from _runs import Place
    from model_zoo import make_model

    from moe_kernels.extension import ExpertExtender

    asked = asking.QuestionSet(pictures, asking.ask(pictures, "digit", None, 0), tokenizer)
    options = dict(
        max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, seed=0, use_cpu=True,
        warmup_steps=1, save_steps=2,
    )  # fmt: skip

    def aligned(folder, stop_after=None):
        viewer = asking.Viewer(ExpertExtender(make_model("olmoe", vocab_size=256), ("image",)))
        before = {name: p.clone() for name, p in viewer.model.named_parameters()}
        held_out, evaluations = asked.batches(20)[:1], []

        def join(batch):
            evaluations.append(batch)
            if len(evaluations) == stop_after:
                raise KeyboardInterrupt
            return asking.Viewer.join(viewer, batch)

        if stop_after:
            object.__setattr__(viewer, "join", join)
        asking.align(viewer, asked, held_out, Place(folder), **options)
        after = dict(viewer.model.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in before.items())
        return viewer.extender.projector().state_dict()

    straight = aligned(tmp_path / "straight")
    # Steps join too: a loss at the start, two steps, two losses, and the third step is cut off.
    with pytest.raises(KeyboardInterrupt):
        aligned(tmp_path / "cut", stop_after=6)
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-2").is_dir()
    resumed = aligned(tmp_path / "cut")
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


# --- what the page says


@pytest.mark.parametrize(
    ("ours", "says"), [([0.1, 0.2, 0.3], "**Holds here:**"), ([1.1, 1.2, 1.1], "**Does not")]
)
def test_forgetting_has_verdicts_of_its_own(page, ours, says):
    def run(change):
        return {"text": {"nll_before_training": 4.0, "nll_after_training": 4.0 + change}}

    runs = {
        "a": {"seeds": {str(seed): run(change) for seed, change in enumerate(ours)}},
        "b": {"seeds": {str(seed): run(change) for seed, change in enumerate([0.4, 0.6, 0.5])}},
    }
    found = page.verdict({"runs": runs}, "a", "b", "a forgets less", page.forgotten, "text loss")
    assert found.startswith(says) and "(text loss: " in found


def test_random_layers_are_another_half_for_each_seed(program):
    import _moextend_runs

    there = tuple(range(8))
    found = [_moextend_runs.chosen_layers("random", there, seed) for seed in range(6)]
    assert all(len(set(half)) == 4 and half == sorted(half) for half in found)
    assert len(set(map(tuple, found))) > 1
    assert found[0] == _moextend_runs.chosen_layers("random", there, 0)
    assert _moextend_runs.chosen_layers("top-half", there, 0) == "top-half"


@pytest.mark.skipif(
    not (RESULTS / "moextend.json").exists(), reason="runs once `make results` has written it"
)
def test_the_page_is_the_one_that_the_json_gives(page):
    data = json.loads((RESULTS / "moextend.json").read_text())
    assert page.page(data) == (RESULTS / "moextend.md").read_text()
