"""A short training of the programs, in a process that a signal reaches at a file operation."""

import os
import sys
from pathlib import Path

import torch
from support.model_zoo import make_model
from support.programs import imported

_STEPS = 7
_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def train(folder: Path, number: int | None = None, signal: int | None = None) -> None:
    """Train in ``folder``, from its last checkpoint; leave the weights and a count there.

    Args:
        folder: of the training.
        number: of the operation on a file in ``folder`` before which the signal is sent.
        signal: the signal; None sends none.
    """
    torch.set_num_threads(1)
    count = 0

    def see(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in _OPERATIONS and str(arguments[0]).startswith(str(folder / "stages")):
            if count == number:
                os.kill(os.getpid(), signal)
            count += 1

    sys.addaudithook(see)
    with imported("shared.training") as training:
        from moe_kernels.programs.shared.stages import Stages

        Stages(folder / "stages").run("learn", {}, lambda workspace: _learn(training, workspace))
    (folder / "operations").write_text(str(count))


def _learn(training, workspace) -> dict:
    ids = torch.randint(0, 64, (6, 8), generator=torch.Generator().manual_seed(1))
    model = make_model("olmoe", vocab_size=64)
    history = training.train(
        model, [{"input_ids": each, "labels": each} for each in ids], lambda model: 1.0, workspace,
        max_steps=_STEPS, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=3, seed=0,
        use_cpu=True,
    )  # fmt: skip
    torch.save(model.state_dict(), workspace.folder / "weights.pt")
    return {"loss": history["loss"]}
