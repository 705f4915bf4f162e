"""Training through transformers' Trainer that can be interrupted and resumed."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from moe_kernels import PatchedModel
from moe_kernels.imaging import IGNORE_INDEX
from shared.cli import console
from shared.stages import Workspace


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
        stop: threading.Event,
    ):  # fmt: skip
        self.held_out, self.workspace, self.stop = held_out, workspace, stop
        self.evaluate_every = math.ceil(steps / 6)
        self.timed_steps, self.timed_seconds = 0, 0.0
        self.progress = Progress(
            TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self.task = self.progress.add_task("training", total=steps, loss="")

    @property
    def steps_per_second(self) -> float:
        """Speed of this run's steps, without evaluation and checkpoints."""
        return self.timed_steps / max(self.timed_seconds, 1e-9)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.progress.start()
        self.progress.update(self.task, completed=state.global_step)
        if state.global_step == 0:
            self._evaluate(state, model)

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if hasattr(dataset := train_dataloader.dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_started = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.timed_steps += 1
        self.timed_seconds += time.perf_counter() - self.step_started
        self.progress.update(self.task, completed=state.global_step)
        if state.global_step % self.evaluate_every == 0 or state.global_step == state.max_steps:
            self._evaluate(state, model)
        if self.stop.is_set():
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.progress.update(self.task, loss=f"loss {float(logs['loss']):.3f}")

    def on_save(self, args, state, control, **kwargs):
        self.workspace.save_seconds()

    def _evaluate(self, state, model) -> None:
        # Kept in the Trainer's own history, which its checkpoints carry.
        state.log_history.append({"step": state.global_step, "held_out": self.held_out(model)})


class CheckedTrainer(Trainer):
    """Trainer that stops when the loss is not finite, and saves no weights that are not finite."""

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

    def _stop(self, reason: str):
        last = get_last_checkpoint(self.args.output_dir)
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise FloatingPointError(
            f"training stopped at step {self.state.global_step + 1}: {reason}; {kept}; "
            "lower the learning rate (which starts a new run)"
        )


class AdapterTrainer(CheckedTrainer):
    """Trainer of a patched model whose checkpoints hold the adapter, not the frozen base.

    ``patched.load_adapter`` reads such a checkpoint.
    """

    def __init__(self, patched: PatchedModel, *args, **kwargs):
        super().__init__(patched.model, *args, **kwargs)
        self.patched = patched

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.patched.save_adapter(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.patched.load_adapter(resume_from_checkpoint)


def train(
    model: PreTrainedModel | PatchedModel, dataset: torch.utils.data.Dataset,
    held_out: Callable[[PreTrainedModel], float], workspace: Workspace, *,
    collator: Callable | None = None, optimizer: torch.optim.Optimizer | None = None,
    **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train with transformers' Trainer, from the last complete checkpoint in the workspace.

    Args:
        held_out: returns the held-out loss of a model; computed seven times
        optimizer: replaces the Trainer's, for several learning rates
        arguments: of `TrainingArguments`

    Returns:
        [step, value] pairs of loss, held_out and grad_norm; and samples_per_second.

    Raises:
        FloatingPointError: the loss or the weights are not finite.
        KeyboardInterrupt: training was interrupted, after a checkpoint.
    """
    defaults = dict(
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.05},
        adam_beta2=0.95, weight_decay=0.01, max_grad_norm=1.0, logging_steps=5, save_steps=50,
        save_total_limit=2, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(workspace.folder / "checkpoints"), **defaults | arguments
    )
    with stop_after_step() as stop:
        monitor = Monitor(arguments.max_steps, held_out, workspace, stop)
        trainer = (AdapterTrainer if isinstance(model, PatchedModel) else CheckedTrainer)(
            model, arguments, train_dataset=dataset, data_collator=collator, callbacks=[monitor],
            optimizers=(optimizer, None),
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=last_checkpoint(workspace))
        finally:
            monitor.progress.stop()
    if trainer.state.global_step < arguments.max_steps:
        raise KeyboardInterrupt
    shutil.rmtree(workspace.folder / "checkpoints", ignore_errors=True)
    log = trainer.state.log_history
    history: dict[str, Any] = {
        kind: [[entry["step"], entry[kind]] for entry in log if kind in entry]
        for kind in ("loss", "held_out", "grad_norm")
    }
    speed = arguments.per_device_train_batch_size * monitor.steps_per_second
    return history | {"samples_per_second": speed}


def last_checkpoint(workspace: Workspace) -> str | None:
    """Return the newest complete checkpoint, and remove incomplete ones."""
    whole = []
    for checkpoint in workspace.folder.glob("checkpoints/checkpoint-*"):
        try:
            # The Trainer writes its state last.
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            whole.append((state["global_step"], checkpoint))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return str(max(whole)[1]) if whole else None


def in_batches(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def mean_nll(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """Return the mean loss in nats a token, over tokens that have a label."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        total += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
        )
        count += int((labels != IGNORE_INDEX).sum())
    model.train(was_training)
    return total / count
