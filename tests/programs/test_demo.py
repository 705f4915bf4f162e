"""The demo on tiny settings: what it writes, and that an interruption costs nothing."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from support.programs import imported

OPTIONS = ["--quick", "--steps", "6"]


@pytest.fixture(scope="module")
def demo():
    with imported("demo") as module:
        yield module


@pytest.fixture(scope="module", autouse=True)
def tiny(demo):
    """Even smaller than --quick."""
    before = dict(demo.QUICK)
    text_model = dataclasses.replace(demo.QUICK["text_model"], hidden_size=32, text_steps=6)
    demo.QUICK.update(
        text_model=text_model, images=200, held_out_images=50, num_codes=16, samples_per_caption=2
    )
    yield
    demo.QUICK.clear()
    demo.QUICK.update(before)


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory):
    """The folder of a whole run."""
    out = tmp_path_factory.mktemp("demo")
    assert demo.main([*OPTIONS, "--out", str(out)]) == 0
    return out


def stage(out, name):
    (folder,) = (out / "stages").glob(f"{name}-*")
    return folder


def trained(out):
    """Every tensor that training produced: the text model's and the adapter's."""
    return load_file(stage(out, "pretrain") / "model" / "model.safetensors") | load_file(
        stage(out, "teach") / "adapter" / "adapter_model.safetensors"
    )


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


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

    stages = {"pretrain", "tokenize", "teach", "generate", "measure"}
    assert report["seconds"].keys() == stages | {"total"}
    assert all(rate > 0 for rate in report["tokens_per_second"].values())
    assert report["settings"]["steps"] == 6
    assert len(report["routing"]["jensen_shannon_divergence_bits"]) == 2
    assert report["backend"] and report["versions"]["torch"] == torch.__version__


def test_a_second_run_computes_nothing_again(demo, finished, monkeypatch):
    before = (finished / "report.json").read_text()

    def fail(*_):
        raise AssertionError("a finished stage was built again")

    for name in ("pretrain", "describe_codebook", "train", "generate_image_codes", "measure_model"):
        monkeypatch.setattr(demo, name, fail)
    assert demo.main([*OPTIONS, "--out", str(finished)]) == 0
    assert (finished / "report.json").read_text() == before


def interrupt(monkeypatch, monitor, step, how):
    """Calls ``how`` after a training step, once."""
    original, calls = monitor.on_step_end, []

    def on_step_end(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step and not calls:
            calls.append(step)
            how(self, control)

    monkeypatch.setattr(monitor, "on_step_end", on_step_end)


def test_stopped_in_both_trainings_it_ends_with_the_same_bits(
    demo, finished, tmp_path, monkeypatch
):
    from shared import training

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


def test_killed_without_warning_it_goes_on_from_the_last_whole_checkpoint(
    demo, finished, tmp_path, monkeypatch
):
    from shared import training
    from shared.stages import Stages, Workspace

    class Killed(BaseException):
        pass

    def kill(self, control):
        raise Killed

    def save_often(*args, **kwargs):
        return original(*args, **kwargs | {"save_steps": 2})

    original = training.TrainingArguments
    monkeypatch.setattr(training, "TrainingArguments", save_often)
    options = demo.parse(demo.DemoOptions, OPTIONS, "", quick=demo.QUICK)
    stages = Stages(tmp_path / "stages")
    interrupt(monkeypatch, training.Monitor, 5, kill)

    with pytest.raises(Killed):
        demo.learn_text(options, stages)
    checkpoints = stage(tmp_path, "pretrain") / "checkpoints"
    # As if it had been killed while the next checkpoint was being written.
    (checkpoints / "checkpoint-6").mkdir()
    (checkpoints / "checkpoint-6" / "trainer_state.json").write_text('{"global_st')
    last = training.last_checkpoint(Workspace(checkpoints.parent))
    assert last == str(checkpoints / "checkpoint-4")
    folder = demo.learn_text(options, stages).folder
    assert_same_bits(
        load_file(folder / "model" / "model.safetensors"),
        load_file(stage(finished, "pretrain") / "model" / "model.safetensors"),
    )


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"seed": 1}, []),
        ({"images": 4000}, ["pretrain"]),
        ({"steps": 1}, ["pretrain", "tokenize"]),
        ({"temperature": 0.8}, ["pretrain", "tokenize", "teach"]),
    ],
)
def test_settings_decide_what_is_computed_again(demo, tmp_path, changed, kept):
    before, after = (
        stage_folders(demo, demo.DemoOptions(out=tmp_path, **more)) for more in ({}, changed)
    )
    assert before.keys() == {"pretrain", "tokenize", "teach", "generate", "measure"}
    assert [name for name in before if before[name] == after[name]] == kept


def stage_folders(demo, options):
    """The stages' folders by name; no stage is computed."""
    from types import SimpleNamespace

    from shared.stages import Stage, Stages

    class Named(Stages):
        def run(self, name, inputs, build, after=()):
            self.finished[name] = Stage(self.folder(name, inputs, after), {}, 0.0)
            return self.finished[name]

    stages, setup = Named(options.out), SimpleNamespace(options=options, tokens=None)
    text, tokenized = demo.learn_text(options, stages), demo.tokenize(options, stages)
    taught = demo.teach(setup, stages, after=[text, tokenized])
    generated = demo.generate(setup, stages, taught)
    demo.measure(setup, stages, taught, generated)
    return {name: stage.folder for name, stage in stages.finished.items()}


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
