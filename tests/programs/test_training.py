"""Training of the programs: what interruptions, full disks and damaged checkpoints may cost."""

import errno
import shutil
import threading

import pytest
import torch
from support.model_zoo import make_model
from support.programs import imported
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

STEPS = 7  # not a whole number of epochs, which have 3


@pytest.fixture(scope="module")
def training():
    with imported("shared.training") as module:
        yield module


@pytest.fixture
def stages(training, tmp_path):
    from moe_kernels.programs.shared.stages import Stages

    return Stages(tmp_path / "stages")


def rows(count=6):
    ids = torch.randint(0, 64, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": each, "labels": each} for each in ids]


def learn(training, stages, save):
    """Run a stage that trains a small model and calls save(model, folder); return the stage."""

    def build(workspace):
        model = make_model("olmoe", vocab_size=64)
        history = training.train(
            model, rows(), lambda model: 1.0, workspace, max_steps=STEPS,
            per_device_train_batch_size=2, learning_rate=1e-2, save_steps=3, seed=0, use_cpu=True,
        )  # fmt: skip
        save(model, workspace.folder)
        return {"history": history}

    return stages.run("learn", {}, build)


def save_weights(model, folder):
    torch.save(model.state_dict(), folder / "weights.pt")


def weights_of(stage):
    return torch.load(stage.folder / "weights.pt")


def full_disk(model, folder):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_that_fails_costs_no_step(training, stages, tmp_path, monkeypatch):
    from moe_kernels.programs.shared.stages import Stages

    whole = learn(training, Stages(tmp_path / "whole"), save_weights)
    with pytest.raises(OSError, match="No space left"):
        learn(training, stages, full_disk)
    (partial,) = stages.root.glob("learn-*.partial")
    assert (partial / "checkpoints" / f"checkpoint-{STEPS}").is_dir()

    def fail(*_, **__):
        raise AssertionError("a step was made again")

    monkeypatch.setattr(training.CheckedTrainer, "training_step", fail)
    stage = learn(training, stages, save_weights)
    expected = weights_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(stage).items())
    for kind in ("loss", "held_out", "grad_norm"):
        assert stage.result["history"][kind] == whole.result["history"][kind]
    assert stage.result["history"]["samples_per_second"] > 0
    assert not list(stages.root.rglob("checkpoint-*")), "checkpoints of a finished stage"


def test_a_result_that_cannot_be_written_costs_no_step(training, stages, monkeypatch):
    from moe_kernels.programs.shared import stages as module

    def fail(path, text):
        return full_disk(None, None) if path.name == "stage.json" else write(path, text)

    write = module.write_text
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(module, "write_text", fail)
        learn(training, stages, save_weights)
    assert list(stages.root.glob(f"learn-*.partial/checkpoints/checkpoint-{STEPS}"))
    learn(training, stages, save_weights)
    assert not list(stages.root.rglob("checkpoint-*"))


def test_checkpoints_that_a_killed_run_left_are_removed(training, stages):
    stage = learn(training, stages, save_weights)
    (stage.folder / "checkpoints" / "checkpoint-7").mkdir(parents=True)
    learn(training, stages, full_disk)
    assert not (stage.folder / "checkpoints").exists()


FILES = ("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")


@pytest.fixture(scope="module")
def checkpoints(training, tmp_path_factory):
    """Return a folder with the whole checkpoints of steps 6 and 7."""
    from moe_kernels.programs.shared.stages import Stages

    root = tmp_path_factory.mktemp("checkpoints")
    with pytest.raises(OSError, match="No space left"):
        learn(training, Stages(root), full_disk)
    return next(root.glob("learn-*.partial/checkpoints"))


@pytest.mark.parametrize("harm", ["missing", "cut off", "empty"])
@pytest.mark.parametrize("name", [*FILES, "weights.safetensors"])
def test_a_checkpoint_without_all_of_its_files_is_not_resumed(
    training, checkpoints, name, harm, tmp_path, capsys
):
    from moe_kernels.programs.shared.checkpoints import last_checkpoint, problem_of

    folder = tmp_path / "checkpoints"
    shutil.copytree(checkpoints, folder)
    file = folder / f"checkpoint-{STEPS}" / name
    assert problem_of(file.parent, training.CheckedTrainer.weights) is None
    content = file.read_bytes()
    file.unlink()
    if harm != "missing":
        file.write_bytes(content[: len(content) // 2] if harm == "cut off" else b"")
    found = last_checkpoint(folder, training.CheckedTrainer.weights)
    assert found == folder / "checkpoint-6"
    said = capsys.readouterr().out
    assert f"checkpoint-{STEPS} is not whole" in said and name in said
    aside = f"set-aside-checkpoint-{STEPS}"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-6", aside]
    shutil.move(folder / "checkpoint-6", folder / f"checkpoint-{STEPS + 1}")  # a newer one
    last_checkpoint(folder, training.CheckedTrainer.weights)
    assert [path.name for path in folder.iterdir()] == [f"checkpoint-{STEPS + 1}"]


def test_damage_is_damage_whatever_it_raises(training, checkpoints, tmp_path):
    """Parts of an archive before its beginning raise OSError, odd flags NotImplementedError."""
    from moe_kernels.programs.shared.checkpoints import problem_of

    folder = tmp_path / "checkpoint-6"
    shutil.copytree(checkpoints / "checkpoint-6", folder)
    content = (folder / "scheduler.pt").read_bytes()
    problems = []
    for place in range(len(content) - 300, len(content), 2):
        damaged = content[:place] + bytes([255 - content[place]]) + content[place + 1 :]
        (folder / "scheduler.pt").write_bytes(damaged)
        problems.append(problem_of(folder, training.CheckedTrainer.weights))
    assert set(problems) == {None, "scheduler.pt is damaged"}


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "weights.safetensors"])
def test_a_checkpoint_that_cannot_be_read_now_is_kept(
    training, checkpoints, name, tmp_path, monkeypatch
):
    from moe_kernels.programs.shared import checkpoints as module

    folder = tmp_path / "checkpoints"
    shutil.copytree(checkpoints, folder)
    read = module._read

    def too_many_open_files(file):
        if file.name == name:
            raise OSError(errno.EMFILE, "Too many open files")
        read(file)

    monkeypatch.setattr(module, "_read", too_many_open_files)
    with pytest.raises(OSError, match="Too many open files"):
        module.last_checkpoint(folder, training.CheckedTrainer.weights)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-6", f"checkpoint-{STEPS}"]


def test_checkpoints_of_another_kind_are_kept_but_not_counted(training, checkpoints, tmp_path):
    """Several processes write rng_state_0.pth; the Trainer keeps the two newest checkpoints."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(checkpoints, folder)
    for each in folder.iterdir():
        (each / "rng_state.pth").rename(each / "rng_state_0.pth")
    found = training.last_checkpoint(folder, training.CheckedTrainer.weights)
    assert found is None
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["set-aside-checkpoint-6", f"set-aside-checkpoint-{STEPS}"]
    assert get_last_checkpoint(folder) is None
    rotate_checkpoints(folder, save_total_limit=1)
    assert all((folder / name / "weights.safetensors").is_file() for name in names)


def test_a_full_disk_does_not_hide_an_interruption(training, stages, monkeypatch):
    from moe_kernels.programs.shared.stages import Workspace

    def stop(workspace):
        raise KeyboardInterrupt

    monkeypatch.setattr(Workspace, "save_seconds", lambda self: full_disk(None, None))
    with pytest.raises(KeyboardInterrupt):
        stages.run("stopped", {}, stop)


def test_a_damaged_result_of_a_stage_names_its_file(stages):
    stage = stages.run("one", {}, lambda workspace: {"answer": 1})
    (stage.folder / "stage.json").write_text('{"result": {"answ')
    with pytest.raises(ValueError, match=r"stage.json is damaged .*: remove .*one-"):
        stages.run("one", {}, lambda workspace: {"answer": 1})


def test_losses_are_means_over_the_same_steps_whatever_was_interrupted(training):
    log = [{"step": step, "loss": float(step), "grad_norm": step / 10} for step in range(1, 8)]
    found = training.curves([*log, {"step": 4, "held_out": 2.0}], every=3)
    assert found == {
        "loss": [[3, 2.0], [6, 5.0], [7, 7.0]],
        "held_out": [[4, 2.0]],
        "grad_norm": [[3, 0.3], [6, 0.6], [7, 0.7]],
    }


def test_a_held_out_loss_that_is_not_finite_is_no_result(training, stages, monkeypatch):
    monkeypatch.setattr(training, "mean_nll", lambda *_: float("nan"))

    def build(workspace):
        return training.train(
            make_model("olmoe", vocab_size=64), rows(), training.mean_nll, workspace,
            max_steps=1, per_device_train_batch_size=2, use_cpu=True,
        )  # fmt: skip

    with pytest.raises(FloatingPointError, match="the held-out loss is nan at step 0: lower"):
        stages.run("learn", {}, build)


def test_several_gpus_are_refused(training, stages, monkeypatch):
    monkeypatch.setattr(training.TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="over 2 GPUs .* CUDA_VISIBLE_DEVICES"):
        learn(training, stages, save_weights)


def test_the_held_out_loss_leaves_every_module_its_mode(training):
    model = make_model("olmoe", vocab_size=64).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    loss = training.mean_nll(model, [{name: t[None] for name, t in rows(1)[0].items()}])
    assert 0 < loss < 10
    assert [module.training for module in model.modules()] == modes
    nothing = {"input_ids": torch.ones(1, 4).long(), "labels": torch.full((1, 4), -100)}
    with pytest.raises(ValueError, match="no token has a label"):
        training.mean_nll(model, [nothing])
    assert [module.training for module in model.modules()] == modes


def test_a_training_that_was_resumed_says_in_a_file_how_far_it_is(training, clock, capsys):
    """Nothing was printed, as if it hung."""
    monitor = training.Monitor(10, lambda model: 0.0, None, threading.Event())
    state = TrainerState(global_step=4, max_steps=10)
    monitor.on_train_begin(None, state, None)
    monitor.on_log(None, state, None, logs={"loss": 2.0})
    monitor.on_step_begin(None, state, None)
    clock.seconds += 40
    state.global_step = 5
    monitor.on_step_end(None, state, None)
    monitor.close()
    line = "training: 5 of 10 steps, elapsed 40 s, about 3 min left, loss=2.000\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("chosen", "expected"), [(None, [0, 2, 4, 6, 8, 10, 11]), ([1, 4, 11], [1, 4, 11])]
)
def test_the_held_out_loss_is_computed_after_the_steps_that_are_asked_for(
    training, chosen, expected
):
    """A curve of the first steps needs others than the default's, which are evenly spaced."""
    monitor = training.Monitor(11, lambda model: 0.5, None, threading.Event(), chosen)
    state = TrainerState(global_step=0, max_steps=11)
    monitor.on_train_begin(None, state, None)
    for step in range(1, 12):
        monitor.on_step_begin(None, state, None)
        state.global_step = step
        monitor.on_step_end(None, state, None)
    monitor.close()
    assert [entry["step"] for entry in state.log_history] == expected
