"""Questions about pictures, and the program that measures added experts, on tiny budgets."""

import collections
import dataclasses
import json
import math
import re
import types

import numpy as np
import pytest
import torch
from support.programs import STUDIES, imported

RESULTS = STUDIES.parent / "docs" / "results"


@pytest.fixture(scope="module")
def program():
    with imported("moextend"):
        from studies.moextend import study

        yield study


@pytest.fixture(scope="module")
def asking(program):
    from moe_kernels.programs.shared import questions

    return questions


@pytest.fixture
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
        patch.setattr(program, "WIDE_LEARNING_RATES", (1e-3, 3e-3))
        yield


NAMES = [
    "gated", "sequence", "published", "no-gate", "lora-sequence", "lora-all-tokens", "projector",
    "full-slow", "layers-random-a", "two-experts", "code-gated", "code-full",
]  # fmt: skip
CHANGE_TEXT = {"published", "no-gate", "lora-all-tokens", "full-slow", "code-full"}


@pytest.fixture
def learning(program, monkeypatch):
    """Every training is watched: what trains moves, and nothing else does."""
    from studies.moextend import runs

    def learn(setup, run, extender, *rest):
        before = {name: p.clone() for name, p in extender.model.named_parameters()}
        history = original(setup, run, extender, *rest)
        for name, parameter in extender.model.named_parameters():
            moved = not torch.equal(parameter, before[name])
            assert moved <= parameter.requires_grad, (run, name)
            trained[run].append((parameter.requires_grad, moved))
        return history

    original, trained = runs.learn, collections.defaultdict(list)
    monkeypatch.setattr(runs, "learn", learn)
    return trained


@pytest.mark.slow
def test_a_sweep_writes_its_page_and_a_second_one_computes_nothing(
    program, tiny, tmp_path, monkeypatch, learning
):
    command = ["--quick", "--seeds", "0", "--runs", *NAMES, "--out", str(tmp_path), "--no-cost"]
    assert program.main("", command) == 0
    data = json.loads((tmp_path / "moextend.json").read_text())
    assert data["runs"].keys() == set(NAMES)
    for run, parameters in learning.items():
        trains = sum(requires for requires, _ in parameters)
        # Biases without a gradient, such as of experts that nobody chose, have no decay either.
        assert trains > 0 and sum(moved for _, moved in parameters) > 0.8 * trains, run
    check_scores(program, data["setups"]["0"], tmp_path)
    runs = {name: run["seeds"]["0"] for name, run in data["runs"].items()}
    for name, result in runs.items():
        changed = result["text"]["logits_changed_by_training"]
        assert (changed > 0) == (name in CHANGE_TEXT), name
        for kind, plain in result["plain"].items():
            assert (plain["logits_changed"] > 0) == (name in CHANGE_TEXT), (name, kind)
            assert (plain["nll_after"] != plain["nll_before"]) == (name in CHANGE_TEXT), (
                name,
                kind,
            )
        assert math.isfinite(result["test_nll"])
        (stage,) = (tmp_path / "stages").glob(f"run-0-{name}-????????????")
        assert len(json.loads((stage / "stage.json").read_text())["result"]["loss"]) == 3
    for one, other in (("sequence", "no-gate"), ("lora-sequence", "lora-all-tokens")):
        assert runs[one]["layers"] == runs[other]["layers"]
        assert runs[one]["test_nll"] == pytest.approx(runs[other]["test_nll"], abs=1e-5)
    assert runs["full-slow"]["trained_parameters"] > runs["two-experts"]["trained_parameters"]
    assert runs["two-experts"]["trained_parameters"] > runs["gated"]["trained_parameters"]
    for name in ("gated", "sequence", "code-gated"):
        assert runs[name]["disturbance"]["text"]["changed_rows"] == 0, name
        assert runs[name]["disturbance"]["task"]["changed_rows"] > 0, name
    assert runs["published"]["disturbance"]["text"]["changed_rows"] > 0
    tuned = data["tuning"]["choice_nll"]
    assert list(tuned["pictures: added experts, as published"]) == ["0.001", "0.003"]
    assert list(tuned["pictures: added experts, gated by sequence"]) == ["0.001"]
    assert "pictures: lora" not in tuned and "pictures: full" not in tuned
    for figures in data["tuning"]["figures"]["pictures: all tokens"].values():
        assert figures["text"]["logits_changed_by_training"] > 0 and figures["test_nll"] > 0
    text = (tmp_path / "moextend.md").read_text()
    assert "| gated | 0 |" in text and "<!-- study:text-kept -->holds | 7 runs on" in text
    assert text.count("| lr 0.001 |") == 2 and "\n| pictures: all tokens | 0.003 |" in text
    for name in ("scores", "layers", "trade", "rates"):
        assert (tmp_path / f"moextend-{name}.png").read_bytes().startswith(b"\x89PNG"), name

    def fail(*_):
        raise AssertionError("a finished run was computed again")

    monkeypatch.setattr(program, "measure_run", fail)
    assert program.main("", command) == 0
    assert json.loads((tmp_path / "moextend.json").read_text()) == data


def check_scores(program, found, folder):
    """Check which tokens each score counted."""
    from studies.moextend.runs import Setup

    from moe_kernels.programs.shared.stages import Stages

    setup = Setup(program.QUICK, 0, Stages(folder / "stages"))
    top_k = program.QUICK.text.experts_per_token
    asked = setup.held_out["choice"].questions
    assert len(asked) == 40
    for name, half in (("scores", asked[:20]), ("scores_again", asked[20:])):
        pictures = 16 * sum(len(question.pictures) for question in half)
        items = [setup.held_out["choice"][asked.index(question)] for question in half]
        tokens = pictures + sum(len(item["input_ids"]) for item in items)
        counted = {"pictures-modality": pictures, "pictures-sequence": tokens}
        counted["code-modality"] = 4 * program.QUICK.code_block
        assert found[name].keys() == counted.keys()
        scores = dict(found[name])
        if name == "scores":
            counted |= {"pictures-none": tokens, "code-none": counted["code-modality"]}
            # Runs computed these, for the starts of experts without a gate.
            for task in ("pictures", "code"):
                scores[f"{task}-none"] = setup.scores(task, "none").to_dict()
        for each, count in counted.items():
            score = scores[each]
            assert score["count"] == ("all" if each.endswith("none") else "modality")
            for counts in (score["before"], score["after"]):
                assert [sum(row) for row in counts] == [count * top_k] * 2, each


def scores_that_disagree(gates):
    """Four layers, whose most selected expert is another one after tuning."""
    from moe_kernels.moextend import LayerScores

    before, after = torch.tensor([[5, 9, 1, 2]] * 4), torch.tensor([[5, 1, 9, 2]] * 4)
    after[1], before[3] = torch.tensor([0, 0, 16, 1]), torch.tensor([0, 17, 0, 0])

    def scores(task, gate):
        gates.append((task, gate))
        return LayerScores((0, 1, 2, 3), before, after, (4,) * 4, None, "all")

    return scores


@pytest.mark.parametrize(
    ("name", "gate", "copied"),
    [
        ("published", "none", 2), ("code-published", "none", 2), ("no-gate", "none", 1),
        ("sequence", "sequence", 1), ("gated", "modality", 1),
    ],
)  # fmt: skip
def test_added_experts_start_by_scores_of_their_own_gate(program, name, gate, copied):
    from studies.moextend import runs
    from support.model_zoo import make_model

    from moe_kernels.moextend import ExpertExtender

    run, gates = program.RUNS[name], []
    setup = types.SimpleNamespace(seed=0, scores=scores_that_disagree(gates))
    modality = "task" if run.task == "code" else "image"
    extender = ExpertExtender(make_model("olmoe", num_hidden_layers=4), (modality,))
    added = runs.add(setup, run, extender)
    assert gates == [(run.task, gate)]
    assert added == {"layers": (1, 3), "sources": ((copied,), (copied,))}


def test_methods_that_are_compared_train_as_many_parameters(program):
    from studies.moextend import runs
    from studies.sweep import trained_parameters
    from transformers import OlmoeConfig, OlmoeForCausalLM

    text = program.Budget().text
    config = OlmoeConfig(
        vocab_size=text.vocab_size, hidden_size=text.hidden_size, num_experts=text.experts,
        intermediate_size=text.intermediate_size, num_hidden_layers=text.layers,
        num_attention_heads=text.heads, num_key_value_heads=text.heads, pad_token_id=0,
        num_experts_per_tok=text.experts_per_token, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    setup = types.SimpleNamespace(seed=0, scores=lambda task, gate: None)

    def parameters(**settings):
        # Of code, as questions about pictures have a projector besides, which is frozen.
        run = program.Run(task="code", init="mean", **settings)
        model = OlmoeForCausalLM(config)
        extender, _ = runs.start(setup, run, model)
        runs.add(setup, run, extender)
        return trained_parameters(model)

    one = parameters(layers="interval")
    for method in ("lora", "all_tokens"):
        assert parameters(method=method) == pytest.approx(one, rel=0.05)
    two = parameters(layers="interval", experts=2)
    assert two == pytest.approx(parameters(layers="all"), rel=0.05) and two > 1.8 * one


def test_what_shares_a_learning_rate_computes_the_same_or_differs_in_layers_alone(program):
    shared = collections.defaultdict(set)
    for name, run in program.RUNS.items():
        if run.lr is None:
            shared[run.decides].add(name)
            assert run.decides.trains == run.trains
            wide = run.decides.changes_text
            assert len(program.learning_rates(run.decides)) == (5 if wide else 3)
    assert len({run.trains for run in shared}) == len(shared)
    together = [names for names in shared.values() if len(names) > 1]
    assert sorted(together, key=len) == [
        {"lora-sequence", "lora-all-tokens"}, {"code-lora", "code-lora-all-tokens"},
        {"code-gated", "code-no-gate", "code-layers-random"},
        {"sequence", "no-gate"} | {
            f"layers-{each}" for each in ("interval", "first-half", "second-half", "random-a",
                                          "random-b", "random-c")
        },
    ]  # fmt: skip
    # No choice of layers is at home where the rate is tuned, but for all and as published.
    home = {run.layers for run in shared if run.method == "extension" and run.gate != "none"}
    assert home == {"interval", "all"}


def test_what_a_step_costs_is_of_what_trains(program, tmp_path, monkeypatch):
    from studies import step_cost
    from support.model_zoo import make_model

    monkeypatch.setattr(step_cost, "WARM_UP", 1)
    monkeypatch.setattr(step_cost, "STEPS", 1)
    trained = {}
    for method in step_cost.METHODS["moextend"]:
        model = make_model("olmoe", num_hidden_layers=2, experts="grouped_mm")
        monkeypatch.setattr(step_cost, "load_text_model", lambda *_, model=model: (model, None))
        before = {name: p.clone() for name, p in model.named_parameters()}
        cost = step_cost.cost_of("moextend", method, tmp_path)
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
    from support.programs import save_byte_tokenizer
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def viewer(asking):
    from support.model_zoo import make_model

    from moe_kernels.moextend import ExpertExtender

    torch.manual_seed(0)
    extender = ExpertExtender(make_model("olmoe", vocab_size=256), ("image",))
    extender.add_projector(8)
    return asking.Viewer(extender)


def test_no_picture_is_in_two_parts(asking):
    from moe_kernels.programs.shared import encoder

    settings = encoder.EncoderSettings(held_out=100)
    pictures = encoder.read_pictures(settings)
    parts = encoder.split_pictures(pictures, settings.held_out, 3)
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
    from support.model_zoo import make_model

    from moe_kernels.moextend import ExpertExtender
    from moe_kernels.programs.shared.stages import Workspace

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
        asking.align(viewer, asked, held_out, Workspace(folder), **options)
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
    ("ours", "outcome"), [([0.1, 0.2, 0.3], "holds"), ([1.1, 1.2, 1.1], "does not hold")]
)
def test_forgetting_has_verdicts_of_its_own(program, ours, outcome):
    from studies.moextend import verdicts

    def run(change):
        return {"text": {"nll_before_training": 4.0, "nll_after_training": 4.0 + change}}

    runs = {
        "a": {"seeds": {str(seed): run(change) for seed, change in enumerate(ours)}},
        "b": {"seeds": {str(seed): run(change) for seed, change in enumerate([0.4, 0.6, 0.5])}},
    }
    found = verdicts.VERDICTS["forgets-less"]({"runs": runs}, "a", "b")
    assert found.outcome == outcome
    assert found.evidence.startswith("difference of changes of text loss: ")


def made_up_result(run, rng):
    """Return a record as a run leaves it, with meaningless figures."""
    changed = 7 * run.changes_text
    nll = {"nll": rng.uniform(1, 2)}
    if run.task == "pictures":
        nll["accuracy"] = {"digit": rng.uniform(), "sum": rng.uniform()}
    result = {
        "layers": [], "trained_parameters": 100, "test": nll, "test_nll": nll["nll"], "lr": 0.001,
        "seconds": 20.0, "max_abs_logit_difference_by_patching": 3e-6,
        "text_nll_at_step_0": 4.0 + rng.uniform() * changed,
        "text": {
            "nll_before_training": 4.0, "nll_after_training": 4.0 + rng.uniform() * changed,
            "held_out_tokens": 50, "logits_changed_by_training": changed,
        },
        "words": {"accuracy": {"digit": rng.uniform(), "sum": rng.uniform()}},
        "plain": {
            kind: {"tokens": 30, "logits_changed": changed, "nll_before": 3.0,
                   "nll_after": 3.0 + rng.uniform() * changed}
            for kind in ("code", "words")
        },
    }  # fmt: skip
    if run.method == "extension":
        change = {key: rng.uniform() for key in ("output_change", "changed_rows", "rerouted_rows")}
        result |= {"layers": sorted(rng.choice(6, 3, replace=False).tolist())}
        result |= {"disturbance": {"text": change, "task": change}}
    return result


def made_up_setup(rng):
    from moe_kernels.moextend import LayerScores

    def scores():
        counts = [torch.from_numpy(rng.integers(1, 99, (6, 4))) for _ in range(2)]
        return LayerScores(tuple(range(6)), *counts, (4,) * 6).to_dict()

    names = ("pictures-modality", "pictures-sequence", "code-modality")
    accuracy = {"digit": rng.uniform(), "sum": rng.uniform()}
    return {
        "scores": {name: scores() for name in names},
        "scores_again": {name: scores() for name in names}, "encoder_accuracy": {"test": 0.9},
        "words": {"accuracy": accuracy}, "words_learnt": 0.98, "code_nll": 5.0,
        "prompts_learnt": {"digit": 40, "sum": 1600}, "test": {"nll": 2.0, "accuracy": accuracy},
        "most_common_answer": accuracy,
    }  # fmt: skip


def made_up_data(program, seeds=3):
    """A whole JSON of a page."""
    from studies import step_cost

    rng, runs = np.random.default_rng(), program.RUNS
    tuned = {run.trains: run.decides for run in runs.values() if run.lr is None}
    figures = {
        trains: {f"{lr:g}": made_up_result(run, rng) for lr in program.learning_rates(run)}
        for trains, run in tuned.items()
    }
    return {
        "budget": dataclasses.asdict(program.Budget()) | {"core_hours": program.CORE_HOURS},
        "tuning": {"seed": 1000, "figures": figures, "choice_nll": {
            trains: {lr: each["test_nll"] for lr, each in rates.items()}
            for trains, rates in figures.items()
        }},
        "setups": {str(seed): made_up_setup(rng) for seed in range(seeds)},
        "runs": {
            name: {"settings": dataclasses.asdict(run),
                   "seeds": {str(seed): made_up_result(run, rng) for seed in range(seeds)}}
            for name, run in runs.items()
        },
        "seconds": 100.0, "threads": 1, "versions": {"torch": "2"}, "cost": {
            method: [{"tokens_per_second": rng.uniform(1, 9), "peak_bytes": 2**21,
                      "trained_parameters": 100} for _ in range(3)]
            for method in step_cost.METHODS["moextend"]
        },
    }  # fmt: skip


def test_every_run_and_comparison_is_on_the_page(program, tmp_path):
    from studies import report
    from studies.moextend import verdicts

    data = made_up_data(program)
    text = report.render((RESULTS / "moextend.md").read_text(), data, program.BLOCKS)
    for block in re.sub("<!--.*?-->", "", text).split("\n\n"):
        if block.strip().startswith("|"):
            assert len({line.count("|") for line in block.strip().split("\n")}) == 1, block
    assert "nan" not in text and "inf" not in text.replace("information", "")
    assert "not measured" not in text
    for run in data["runs"]:
        assert f"\n| {run} | 0 |" in text, run
        assert re.search(rf"<!-- study:(text|question|code)\.{run}[. ]", text), run
    # All that changes text is judged by what it does to text.
    for kind in ("forgets", "forgets-words"):
        judged = set(re.findall(rf"<!-- study:{kind}\.(\S+) -->", text))
        assert judged == {name for name, run in program.RUNS.items() if run.changes_text}
    assert set(re.findall(r"<!-- study:adding-hurts\.(\S+) -->", text)) == {
        name for name, run in program.RUNS.items()
        if run.changes_text and run.method == "extension"
    }  # fmt: skip
    assert "| pictures: full | 0.0001 |" in text and "| pictures: lora | 0.001 |" not in text
    rates = data["tuning"]["figures"]["pictures: full"]
    rates["0.01"], rates["0.003"]["test_nll"] = {}, float("nan")
    assert list(verdicts.tried_rates(data)["pictures: full"]) == ["0.0001", "0.0003", "0.001"]
    program.draw_pictures(data, tmp_path)
    assert len(list(tmp_path.glob("moextend-*.png"))) == 4


def test_claims_of_the_page_are_those_of_its_comparisons(program):
    page = (RESULTS / "moextend.md").read_text()
    for claim, verdict in (
        ("two experts in each of the top half learn more than one in every layer, at equal "
         "parameters", "lower.two-experts.layers-all"),
        ("experts, no gate (as published): text is forgotten", "forgets.published"),
        ("experts, no gate (as published): adding alone makes text worse",
         "adding-hurts.published"),
        ("full fine-tuning, at a low rate: questions in words are forgotten",
         "forgets-words.full-slow"),
        ("masked LoRA by sequence learns more than experts behind a gate by sequence",
         "lower.lora-sequence.sequence"),
        ("full fine-tuning at a low rate learns more than experts behind a gate by sequence",
         "lower.full-slow.sequence"),
        ("on code, the top half by shift learns more than one random half",
         "lower.code-gated.code-layers-random"),
        ("experts, gate by token: the task is learnt beyond the start", "learns.gated"),
    ):  # fmt: skip
        assert f"| {claim} | <!-- study:{verdict} -->" in page, claim


def test_one_changed_logit_of_masked_training_is_told(program):
    from studies.moextend import verdicts

    data = made_up_data(program)
    assert verdicts.VERDICTS["text-kept"](data).outcome == "holds"
    data["runs"]["code-lora"]["seeds"]["1"]["plain"]["words"]["logits_changed"] = 1
    assert verdicts.VERDICTS["text-kept"](data).outcome == "does not hold"


def test_random_halves_come_twice_only_after_all_have_come(program):
    from studies.moextend import runs

    there, draws = tuple(range(6)), runs.DRAWS
    drawn = [tuple(runs.chosen_layers(draw, there, seed)) for seed in range(5) for draw in draws]
    assert len(drawn) == len(set(drawn)) == 15
    assert all(len(set(half)) == 3 and list(half) == sorted(half) for half in drawn)
    assert drawn[0] == tuple(runs.chosen_layers("random-a", there, 0))
    assert runs.chosen_layers("top-half", there, 0) == "top-half"


def test_random_halves_are_averaged_within_a_seed(program):
    from studies.moextend import verdicts

    def runs(*losses):
        return {"seeds": {str(seed): {"test_nll": loss} for seed, loss in enumerate(losses)}}

    data = {"runs": {
        "sequence": runs(1.0, 2.0, 3.0),
        "layers-random-a": runs(1.1, 2.5, 3.0), "layers-random-b": runs(1.5, 2.1, 3.9),
        "layers-random-c": runs(1.3, 2.3, 3.3),
    }}  # fmt: skip
    found = verdicts.VERDICTS["beats-random"](data)
    assert found.outcome == "holds" and "-0.333 (-0.477 to -0.190)" in found.evidence
