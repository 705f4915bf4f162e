"""The program that adds experts for questions about pictures, on a tiny model and few pictures."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.model_zoo import make_model
from support.programs import imported, save_byte_tokenizer
from support.saved_adapters import WEIGHTS


@pytest.fixture(scope="module")
def program():
    """Import the program, with 120 of the 5,000 digits."""
    with imported("extend_experts") as module, pytest.MonkeyPatch.context() as patch:
        encoder = sys.modules["moe_kernels.programs.shared.encoder"]
        few = encoder.digits().take(np.arange(0, 4800, 40))
        patch.setattr(encoder, "digits", lambda: few)
        yield module


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_byte_tokenizer(folder)
    make_model("mixtral", vocab_size=256).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def command(model_folder):
    return [
        str(model_folder), "--held-out", "40", "--encoder-steps", "8", "--align-steps", "4",
        "--score-steps", "2", "--steps", "6", "--batch", "4", "--lr", "2e-2",
        "--test-questions", "8", "--shown", "4", "--text-tokens", "128", "--text-block", "32",
        "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(program, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert program.main([*command, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def report(finished):
    return json.loads((finished / "report.json").read_text())


def scores_of(out):
    (stage,) = out.glob("stages/score-*/stage.json")
    return json.loads(stage.read_text())["result"]


def test_text_keeps_its_bits_and_pictures_do_not(report):
    text, disturbance = report["text"], report["disturbance"]
    assert text["logits_changed_by_training"] == 0
    assert text["nll_before_training"] == text["nll_after_training"]
    for state in ("step_0", "tuned"):
        assert disturbance[state]["text"]["rows"] == 128
        for name in ("output_change", "changed_rows", "rerouted_rows"):
            assert disturbance[state]["text"][name] == 0
        assert disturbance[state]["pictures"]["changed_rows"] > 0
    change = {state: each["pictures"]["output_change"] for state, each in disturbance.items()}
    assert change["tuned"] > change["step_0"] > 0


def test_what_trained(report, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    hidden, experts = config["hidden_size"], config["num_local_experts"]
    (number,) = report["extension"]["experts"].values()
    assert number == 1
    added = 3 * hidden * config["intermediate_size"] + hidden + 2 * 16 * (experts + 1)
    assert report["parameters"]["added"] == added
    assert report["parameters"]["base"] == sum(
        tensor.numel() for tensor in load_file(model_folder / "model.safetensors").values()
    )


def test_every_state_was_asked(report):
    states = report["answers"]["states"]
    nll = [states[name]["nll"] for name in list(states)]
    start, aligned, _, tuned, shut = nll
    assert tuned < aligned < start
    assert shut == pytest.approx(aligned, rel=1e-5), "fine-tuning changed more than the experts"
    assert all(each["accuracy"].keys() == {"digit", "sum"} for each in states.values())
    assert [each["question"] for each in report["shown"]] == [
        *["Which digit is this?"] * 2, *["What is their sum?"] * 2,
    ]  # fmt: skip
    assert [len(each["pictures"]) for each in report["shown"]] == [1, 1, 2, 2]


def test_an_answer_is_that_of_its_pictures(program, report, command):
    options = program.parse(program.ExtendOptions, command, "")
    pictures = program.read_pictures(options.encoder)
    test = program.split_pictures(pictures, options.held_out, options.seed)["test"]
    for each in report["shown"]:
        labels = [int(test.labels[number]) for number in each["pictures"]]
        assert each["answer"] == program.questions.NUMBERS[sum(labels)]


def test_pages(finished, report):
    from matplotlib.image import imread

    for name in ("answers.png", "scores.png", "training.png"):
        pixels = imread(finished / name)[..., :3]
        assert (pixels < 0.9).any(-1).mean() > 0.02, f"{name} is blank"
    page = (finished / "report.md").read_text()
    assert f"{report['text']['nll_after_training']:.6f} after" in page
    (layer,) = report["extension"]["experts"]
    assert f"| {layer} | {report['scores'][layer]:.4f} | 1 |" in page
    assert not list(finished.glob("**/.*")), "a temporary file stayed"


@pytest.mark.parametrize("quick", [False, True])
def test_quick_figures_say_that_they_are_too_short_to_learn(
    program, finished, report, quick, tmp_path, monkeypatch
):
    from moe_kernels.programs.shared.reports import extend_experts

    notes = {}

    def save_figure(figure, path, note=""):
        notes[path.name] = note

    monkeypatch.setattr(extend_experts, "save_figure", save_figure)
    scores, pictures = program.LayerScores.from_dict(scores_of(finished)), np.zeros((40, 28, 28))
    by_layer = {int(layer): score for layer, score in report["scores"].items()}
    changed = {"settings": report["settings"] | {"quick": quick}, "scores": by_layer}
    program.write_pages(report | changed, scores, pictures, tmp_path)
    assert notes.keys() == {"answers.png", "scores.png", "training.png"}
    assert {"too short to learn" in note for note in notes.values()} == {quick}


def test_the_page_says_how_to_load_the_adapter(program, finished, report):
    code = (finished / "report.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    from moe_kernels.programs.shared import encoder

    questions, loaded = program.questions, encoder.load_encoder(finished / "encoder")
    extender = program.ExpertExtender(names["model"])
    viewer = questions.Viewer(extender, whole_sequences=True)
    pictures = encoder.split_pictures(encoder.read_pictures(encoder.EncoderSettings()), 40, 0)
    with torch.no_grad():
        features = loaded(encoder.as_input(pictures["test"].images))
    labels = torch.from_numpy(pictures["test"].labels).long()
    encoded = encoder.EncodedPictures(features, labels, pictures["test"].names)
    tokenizer = program.load_tokenizer(report["base"])
    asked = [questions.ask(encoded, task, 8, seed) for seed, task in enumerate(("digit", "sum"))]
    graded = viewer.grade(questions.QuestionSet(encoded, sum(asked, []), tokenizer))
    expected = report["answers"]["states"]["experts tuned"]
    assert graded["accuracy"] == expected["accuracy"]
    assert graded["nll"] == pytest.approx(expected["nll"], rel=1e-5)


def test_a_second_run_computes_nothing_again(program, command, finished, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a finished stage was built again")

    before = (finished / "report.json").read_text()
    for name in ("load_causal_lm", "train_encoder"):
        monkeypatch.setattr(program, name, fail)
    for name in ("align", "fine_tune"):
        monkeypatch.setattr(program.questions, name, fail)
    assert program.main([*command, "--out", str(finished)]) == 0
    assert (finished / "report.json").read_text() == before


def test_stopped_twice_it_goes_on_to_the_same_bits(
    program, command, finished, tmp_path, monkeypatch
):
    from moe_kernels.programs.shared import training

    original, stops = training.Monitor.on_step_end, {"align": 2, "tune": 3}

    def stop(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == stops.get(self.workspace.folder.name.split("-")[0]):
            control.should_save = control.should_training_stop = True

    monkeypatch.setattr(training.Monitor, "on_step_end", stop)
    for stage, step in tuple(stops.items()):
        assert program.main([*command, "--out", str(tmp_path)]) == 130
        assert list(tmp_path.glob(f"stages/{stage}-*.partial/checkpoints/checkpoint-{step}"))
        del stops[stage]
    assert program.main([*command, "--out", str(tmp_path)]) == 0
    expected = load_file(finished / "adapter" / WEIGHTS)
    actual = load_file(tmp_path / "adapter" / WEIGHTS)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_the_scores_count_the_rows_that_may_choose(finished):
    scores = scores_of(finished)
    assert (scores["modality"], scores["count"]) == ("image", "modality")


@pytest.mark.slow  # a run of its own
def test_without_a_gate_text_changes(program, command, tmp_path):
    extra = [
        "--gate", "none", "--layers", "0", "1", "--init", "1", "--calibration", "none",
        "--tasks", "digit",
    ]  # fmt: skip
    assert program.main([*command, *extra, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["text"]["logits_changed_by_training"] > 0
    assert report["disturbance"]["step_0"]["text"]["changed_rows"] > 0
    assert report["extension"]["sources"] == {"0": [1], "1": [1]}
    assert scores_of(tmp_path)["count"] == "all"
    assert "no gate" in (tmp_path / "report.md").read_text()


@pytest.mark.slow  # pretrains
def test_without_a_model_a_small_one_learns_first(program, tmp_path):
    options = ["--quick", "--text-steps", "3", "--align-steps", "2", "--steps", "2"]
    options += ["--gate", "pictures", "--held-out", "40", "--test-questions", "8"]
    assert program.main([*options, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["text"]["logits_changed_by_training"] == 0
    assert report["settings"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--lr", "nan"], "--lr must be above 0"),
        (["--data", "emoji"], '"emoji:FOLDER"'),
        (["--data", "digits:x"], '"emoji:FOLDER"'),
        (["--data", "cats"], '"emoji:FOLDER"'),
        (["--tasks", "category"], "'category' of digits"),
        (["--layers", "top-half", "3"], "--layers must be one of top-half"),
        (["--init", "best"], "--init must be one of most_selected"),
        (["--text", "nowhere.txt"], "is not a file"),
        (["--backend", "triton"], "triton"),
    ],
)
def test_refuses_options_before_any_work(program, command, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        program.main([*command, *options, "--out", str(tmp_path / "out")])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0", "7"], "layers [7] cannot be extended"),
        (["--layers", "1", "1"], "layers has an index twice"),
        (["--init", "99"], "not 99"),
        (["--data", "emoji:."], "npm pack"),
        (["--held-out", "120"], "cannot be held out"),
        (["--text-block", "1000000"], "less than one block"),
    ],
)
def test_refuses_what_the_model_or_the_data_lacks(
    program, command, options, message, tmp_path, capsys
):
    assert program.main([*command, *options, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_refuses_a_dense_model_and_a_folder_that_is_not_there(program, command, tmp_path, capsys):
    from transformers import GPT2Config, LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "dense")
    GPT2Config().save_pretrained(tmp_path / "other")
    messages = {
        "dense": " is a dense 'llama' model: no layer has experts: moe_kernels.conversion",
        "other": "Qwen3ForCausalLM alone",
    }
    for folder, message in (*messages.items(), ("no", "there is no folder")):
        out = tmp_path / "out"
        assert program.main([str(tmp_path / folder), *command[1:], "--out", str(out)]) == 1
        assert message in capsys.readouterr().out
        assert not out.exists()
