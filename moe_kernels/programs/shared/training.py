"""Training through transformers' Trainer that can be interrupted and resumed."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_model, save_model
from torch.nn import functional as F
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from moe_kernels import PatchedModel
from moe_kernels.imaging import IGNORE_INDEX
from moe_kernels.modes import evaluating
from moe_kernels.programs.shared.checkpoints import STATE, last_checkpoint, step_of
from moe_kernels.programs.shared.cli import console
from moe_kernels.programs.shared.stages import Workspace
from moe_kernels.progress import bar
from moe_kernels.training import AdapterTrainer

_SECONDS = "seconds of steps"  # their key in the Trainer's state


@contextmanager
def stop_after_step() -> Iterator[threading.Event]:
    """Yield an event that the first ctrl-C or SIGTERM sets; a second one interrupts at once."""
    stop = threading.Event()

    def request_stop(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        console.print("stopping after this step; press again to stop at once")

    in_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    before = {number: signal.signal(number, request_stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Monitor(TrainerCallback):
    """Callback for the progress bar, the held-out loss, and the duration of steps."""

    def __init__(
        self, steps: int, held_out: Callable[[PreTrainedModel], float], workspace: Workspace,
        stop: threading.Event, held_out_at: Collection[int] | None = None,
    ):  # fmt: skip
        self.held_out, self.workspace, self.stop = held_out, workspace, stop
        every = range(0, steps, math.ceil(steps / 6))
        self.held_out_at = {*every, steps} if held_out_at is None else held_out_at
        self.steps, self.progress = steps, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.progress = bar(total=self.steps, initial=state.global_step, desc="training")
        if state.global_step == 0:
            self._evaluate_if_due(state, model)

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if hasattr(dataset := train_dataloader.dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_started = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # In the Trainer's state, which its checkpoints carry: the seconds of all steps so far.
        seconds = time.perf_counter() - self.step_started
        earlier = state.stateful_callbacks.get(_SECONDS, 0.0)
        state.stateful_callbacks[_SECONDS] = earlier + seconds
        self.progress.update()
        self._evaluate_if_due(state, model)
        if self.stop.is_set():
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.progress.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    def close(self) -> None:
        """End the bar, also of a training that did not begin or did not end."""
        if self.progress is not None:
            self.progress.close()

    def on_save(self, args, state, control, **kwargs):
        self.workspace.save_seconds()

    def _evaluate_if_due(self, state, model) -> None:
        if state.global_step in self.held_out_at:
            # Kept in the Trainer's own history, which its checkpoints carry.
            state.log_history.append({"step": state.global_step, "held_out": self.held_out(model)})


def steps_per_second(state: TrainerState) -> float:
    """Return the speed of the steps of all runs, without evaluation and checkpoints."""
    return state.global_step / max(state.stateful_callbacks.get(_SECONDS, 0.0), 1e-9)


class _Checked:
    """Part of a Trainer that stops when the loss is not finite, and saves no such weights.

    ``weights`` has the names of the files of a checkpoint that hold the model.
    """

    weights: tuple[str, ...]

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            self._stop(f"the loss is {float(loss)}")
        return loss

    def _save_checkpoint(self, *args, **kwargs):
        trained = (p for p in self.model.parameters() if p.requires_grad)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in trained):
            self._stop("the weights are not finite after this step")
        super()._save_checkpoint(*args, **kwargs)

    def go_on(self) -> None:
        """Train from the last whole checkpoint to the last step."""
        checkpoint = last_checkpoint(Path(self.args.output_dir), self.weights)
        if checkpoint is not None and step_of(checkpoint) >= self.args.max_steps:
            # All steps are made, and the Trainer would make one more.
            self.state = TrainerState.load_from_json(str(checkpoint / STATE))
            self._load_from_checkpoint(str(checkpoint))
        else:
            self.train(resume_from_checkpoint=checkpoint and str(checkpoint))

    def _stop(self, reason: str):
        last = get_last_checkpoint(self.args.output_dir)
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise FloatingPointError(
            f"training stopped at step {self.state.global_step + 1}: {reason}; {kept}; "
            "lower the learning rate (which starts a new run)"
        )


class CheckedTrainer(_Checked, Trainer):
    """Trainer of a whole model whose checkpoints hold the tensors under the model's own names.

    Those of transformers' Trainer name experts as ``save_pretrained`` does, and resuming from them
    would load no expert.
    """

    weights = ("weights.safetensors",)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / self.weights[0]))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_model(self.model, str(Path(resume_from_checkpoint) / self.weights[0]))


class CheckedAdapterTrainer(_Checked, AdapterTrainer):
    """Trainer of what was added to a patched model."""

    weights = AdapterTrainer.adapter_files


def train(
    model: PreTrainedModel | PatchedModel, dataset: torch.utils.data.Dataset,
    held_out: Callable[[PreTrainedModel], float], workspace: Workspace, *,
    collator: Callable | None = None, optimizer: torch.optim.Optimizer | None = None,
    rows_lr: float | None = None, every: int = 5, held_out_at: Collection[int] | None = None,
    callbacks: Sequence[TrainerCallback] = (), **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train with transformers' Trainer, from the last complete checkpoint in the workspace.

    The checkpoints stay until the stage is finished. What the result holds does not depend on
    interruptions, except for rounding and the time of a step that was made twice.

    Args:
        held_out: returns the held-out loss of a model
        optimizer: replaces the Trainer's, for several learning rates
        rows_lr: learning rate of added rows, of a PatchedModel; default: that of all
        every: steps that a loss of the result is the mean of
        held_out_at: steps after which the held-out loss is computed; 0 is before the first.
            Default: seven, evenly spaced
        callbacks: called after the time of a step is taken
        arguments: of `TrainingArguments`

    Returns:
        [step, value] pairs of loss, held_out and grad_norm; and samples_per_second.

    Raises:
        FloatingPointError: a loss or the weights are not finite.
        KeyboardInterrupt: training was interrupted, after a checkpoint.
    """
    defaults = dict(
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.05},
        adam_beta2=0.95, weight_decay=0.01, max_grad_norm=1.0, save_steps=50,
        # A loss that is logged later would be a mean over fewer steps after an interruption.
        logging_steps=1,
        save_total_limit=2, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    arguments = TrainingArguments(output_dir=str(workspace.checkpoints), **defaults | arguments)
    if arguments.n_gpu > 1:
        raise ValueError(
            f"transformers' Trainer would spread the model over {arguments.n_gpu} GPUs by "
            "nn.DataParallel: choose one of them by CUDA_VISIBLE_DEVICES"
        )
    with stop_after_step() as stop:
        monitor = Monitor(arguments.max_steps, held_out, workspace, stop, held_out_at)
        options = dict(
            train_dataset=dataset, data_collator=collator, callbacks=[monitor, *callbacks],
            optimizers=(optimizer, None),
        )  # fmt: skip
        if isinstance(model, PatchedModel):
            trainer = CheckedAdapterTrainer(model, arguments, rows_lr=rows_lr, **options)
        else:
            trainer = CheckedTrainer(model, arguments, **options)
        trainer.remove_callback(transformers.PrinterCallback)
        try:
            trainer.go_on()
        finally:
            monitor.close()
    if trainer.state.global_step < arguments.max_steps:
        raise KeyboardInterrupt
    history = curves(trainer.state.log_history, every)
    for step, loss in history["held_out"]:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the held-out loss is {loss} at step {step}: lower the learning rate (which "
                "starts a new run)"
            )
    speed = arguments.per_device_train_batch_size * steps_per_second(trainer.state)
    return history | {"samples_per_second": speed}


def curves(log: Sequence[dict[str, float]], every: int) -> dict[str, list[list[float]]]:
    """Return [step, value] pairs of loss, held_out and grad_norm from a Trainer's log of each step.

    A loss is the mean of ``every`` steps; the last one, of those that are left.
    """
    found = {
        kind: [[entry["step"], entry[kind]] for entry in log if kind in entry]
        for kind in ("loss", "held_out", "grad_norm")
    }
    groups = in_batches(found["loss"], every)
    found["loss"] = [[each[-1][0], sum(loss for _, loss in each) / len(each)] for each in groups]
    found["grad_norm"] = [each[-1] for each in in_batches(found["grad_norm"], every)]
    return found


def in_batches(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def mean_nll(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """Return the mean loss in nats a token, over tokens that have a label.

    Raises:
        ValueError: no token has one.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")[:, 1:].flatten()
            logits = model(**batch).logits[:, :-1].float().flatten(0, 1)
            nll = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
            total += float(nll)
            count += int((labels != IGNORE_INDEX).sum())
    if not count:
        raise ValueError("no token has a label, so there is no mean loss")
    return total / count
