"""The demo on tiny settings: results, repeated runs, interruptions."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.programs import imported
from support.saved_adapters import WEIGHTS

OPTIONS = ["--quick", "--steps", "6"]


@pytest.fixture(scope="module")
def demo():
    with imported("demo") as module:
        yield module


@pytest.fixture(scope="module", autouse=True)
def tiny(demo):
    """Make --quick even smaller."""
    smaller = {"images": 200, "held_out": 50, "num_codes": 16, "samples_per_caption": 2}
    with pytest.MonkeyPatch.context() as patch:
        for name, sizes in (
            ("TEXT_MODEL", {"hidden_size": 32, "text_steps": 6}),
            ("DRAWING", smaller),
        ):
            patch.setattr(demo, f"QUICK_{name}", getattr(demo, f"QUICK_{name}") | sizes)
        yield


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory):
    """Return the folder of a whole run."""
    out = tmp_path_factory.mktemp("demo")
    assert demo.main([*OPTIONS, "--out", str(out)]) == 0
    return out


def stage(out, name):
    (folder,) = (out / "stages").glob(f"{name}-*")
    return folder


def trained(out):
    """Return every trained tensor: the text model's and the adapter's."""
    return load_file(stage(out, "pretrain") / "model" / "model.safetensors") | load_file(
        stage(out, "teach") / "adapter" / WEIGHTS
    )


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_its_figures_say_that_they_are_too_short_to_learn(demo, finished, monkeypatch):
    from matplotlib.figure import Figure

    saved, savefig = [], Figure.savefig

    def noted(figure, *arguments, **options):
        saved.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", noted)
    assert demo.main([*OPTIONS, "--out", str(finished)]) == 0
    assert len(saved) == 3
    for figure in saved:
        written = [text.get_text() for text in figure.texts]
        assert "--quick: too short to learn; it shows only that the program runs" in written
    samples = saved[0].get_suptitle().replace("\n", " ")
    assert "the same classifier on real ones, through the tokenizer: " in samples


def test_writes_pictures_and_a_report(finished):
    for name in ("samples.png", "training.png", "routing.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert not list(finished.glob(".*")), "a temporary file stayed"
    report = json.loads((finished / "report.json").read_text())

    parameters = report["parameters"]
    assert 0 < parameters["trained"] < parameters["total"]
    assert parameters["share"] == parameters["trained"] / parameters["total"]

    text = report["text"]
    assert text["max_abs_logit_difference_by_training"] == 0.0
    assert text["same_bits_before_and_after_training"] is True
    assert text["nll_before_training"] == text["nll_after_training"]
    assert text["nll_unpatched"] == pytest.approx(text["nll_after_training"], rel=1e-5)
    assert text["median_logit_difference_to_unpatched"] < 1e-4

    image = report["image"]
    assert image["nll_end"] < image["nll_start"]
    assert image["nll_end"] < image["nll_adapters_off"]

    samples = report["samples"]
    assert samples["count"] == len(samples["read"]) == 20
    assert 0 <= samples["read_as_their_caption"] <= 1
    assert len(samples["read_by_caption"]) == 10
    assert samples["classifier_held_out_accuracy"]["raw"] > 0.5
    assert 1 <= samples["distinct"] <= 20
    for comparison in ("pairwise_distance", "nearest_training_distance"):
        assert all(samples[comparison][side] > 0 for side in ("generated", "held_out_real"))

    stages = {"pretrain", "tokenize", "teach", "measure", "draw", "judge", "routing"}
    assert report["seconds"].keys() == stages | {"total"}
    assert all(rate > 0 for rate in report["tokens_per_second"].values())
    assert report["settings"]["steps"] == 6
    assert len(report["routing"]["jensen_shannon_divergence_bits"]) == 2
    assert report["backend"] and report["versions"]["torch"] == torch.__version__


def test_a_second_run_computes_nothing_again(demo, finished, monkeypatch):
    before = (finished / "report.json").read_text()

    def fail(*_):
        raise AssertionError("a finished stage was built again")

    from moe_kernels.programs.shared import drawing

    monkeypatch.setattr(demo, "pretrain", fail)
    monkeypatch.setattr(demo, "record_routing", fail)
    for name in ("fit_tokenizer", "train", "measure_model", "draw_codes"):
        monkeypatch.setattr(drawing, name, fail)
    assert demo.main([*OPTIONS, "--out", str(finished)]) == 0
    assert (finished / "report.json").read_text() == before


def interrupt(monkeypatch, monitor, step, how):
    """Call ``how`` once, after a training step."""
    original, calls = monitor.on_step_end, []

    def on_step_end(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step and not calls:
            calls.append(step)
            how(self, control)

    monkeypatch.setattr(monitor, "on_step_end", on_step_end)


@pytest.mark.slow
def test_stopped_in_both_trainings_it_ends_with_the_same_bits(
    demo, finished, tmp_path, monkeypatch
):
    from moe_kernels.programs.shared import training

    def ctrl_c(self, control):
        self.stop.set()
        control.should_save = control.should_training_stop = True

    command = [*OPTIONS, "--out", str(tmp_path)]
    interrupt(monkeypatch, training.Monitor, 3, ctrl_c)
    assert demo.main(command) == 130
    assert not stage(tmp_path, "pretrain").with_suffix("").exists()
    assert list((stage(tmp_path, "pretrain") / "checkpoints").glob("checkpoint-3"))
    monkeypatch.undo()
    interrupt(monkeypatch, training.Monitor, 6, lambda *_: None)
    assert demo.main(command) == 0
    assert_same_bits(trained(tmp_path), trained(finished))
    results = [json.loads((out / "report.json").read_text()) for out in (tmp_path, finished)]
    for field in ("parameters", "text", "image", "samples", "routing", "tokenizer"):
        assert results[0][field] == results[1][field], field
    for name in ("pretrain", "teach"):
        histories = [json.loads((stage(out, name) / "stage.json").read_text())["result"]["history"]
                     for out in (tmp_path, finished)]  # fmt: skip
        for kind in ("loss", "held_out", "grad_norm"):
            assert histories[0][kind] == histories[1][kind], (name, kind)


def test_killed_without_warning_it_goes_on_from_the_last_whole_checkpoint(
    demo, finished, tmp_path, monkeypatch
):
    from moe_kernels.programs.shared import training
    from moe_kernels.programs.shared.stages import Stages

    class Killed(BaseException):
        pass

    def kill(self, control):
        raise Killed

    def save_often(*args, **kwargs):
        return original(*args, **kwargs | {"save_steps": 2})

    original = training.TrainingArguments
    monkeypatch.setattr(training, "TrainingArguments", save_often)
    resumed = []
    load = training.CheckedTrainer._load_from_checkpoint
    monkeypatch.setattr(
        training.CheckedTrainer, "_load_from_checkpoint",
        lambda self, folder, model=None: resumed.append(Path(folder)) or load(self, folder),
    )  # fmt: skip
    options = demo.parse(demo.DemoOptions, OPTIONS, "")
    stages = Stages(tmp_path / "stages")
    interrupt(monkeypatch, training.Monitor, 5, kill)

    with pytest.raises(Killed):
        demo.learn_text(options, stages)
    checkpoints = stage(tmp_path, "pretrain") / "checkpoints"
    # As if it had been killed while the next checkpoint was being written.
    (checkpoints / "checkpoint-6").mkdir()
    (checkpoints / "checkpoint-6" / "trainer_state.json").write_text('{"global_st')
    folder = demo.learn_text(options, stages).folder
    assert resumed == [checkpoints / "checkpoint-4"]
    assert_same_bits(
        load_file(folder / "model" / "model.safetensors"),
        load_file(stage(finished, "pretrain") / "model" / "model.safetensors"),
    )


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"seed": 1}, []),
        ({"images": 400}, ["pretrain"]),
        ({"steps": 1}, ["pretrain", "tokenize"]),
        ({"temperature": 0.8}, ["pretrain", "tokenize", "teach", "measure", "routing"]),
    ],
)
def test_settings_decide_what_is_computed_again(demo, finished, changed, kept):
    before, after = (stage_folders(demo, finished, **more) for more in ({}, changed))
    assert before.keys() == {"pretrain", "tokenize", "teach", "measure", "draw", "judge", "routing"}
    assert [name for name in before if before[name] == after[name]] == kept


def stage_folders(demo, finished, **changed):
    """Return the stages' folders by name; no stage is computed."""
    from moe_kernels.programs.shared import drawing
    from moe_kernels.programs.shared.stages import Stage, Stages

    class Named(Stages):
        def run(self, name, inputs, build, after=()):
            self.finished[name] = Stage(self.folder(name, inputs, after), {}, 0.0)
            return self.finished[name]

    stages = Named(finished)
    own = {name: value for name, value in changed.items() if name in ("seed", "steps")}
    options = demo.DemoOptions(quick=True, **own)
    demo.learn_text(options, stages)
    settings = options.drawing(stage(finished, "pretrain") / "model")
    settings = dataclasses.replace(settings, **changed)
    demo.run_all_stages(drawing.Setup.load(settings, stages))
    return {name: each.folder for name, each in stages.finished.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--backend", "nonsense"], "invalid choice"),
        (["--backend", "triton"], "triton"),
        (["--device", "nonsense"], "nonsense"),
    ],
)
def test_refuses_before_any_work(demo, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        demo.main([*options, "--out", str(tmp_path / "out")])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
