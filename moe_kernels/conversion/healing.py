"""``heal``: a converted model learns to predict what its dense source predicts."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

CHECKPOINT = "healing.pt"
TRAIN = ("router", "router+experts")
_ROUTERS = (".mlp.gate.", ".mlp.shared_expert_gate.")
_EXPERTS = (".mlp.experts.", ".mlp.shared_expert.")
_WARMUP = 0.05  # of all steps
_MAX_GRAD_NORM = 1.0


@dataclass
class HealingReport:
    """What :func:`heal` did, over all the runs that it took.

    Attributes:
        losses: KL divergence in nats a token, before each step.
        seconds: of the steps and checkpoints.
        tokens: that were read.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0


def heal(
    moe: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Sequence[Tensor],
    *,
    steps: int,
    train: str = "router",
    lr: float = 3e-4,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    save_every: int = 50,
    progress: bool = True,
    stop: Callable[[], bool] | None = None,
) -> HealingReport:
    """Distil the dense model's next-token distributions into a converted model, in place.

    The loss is KL(dense || moe), mean over a batch's tokens (docs/methods.md A1). AdamW without
    weight decay, gradients clipped to norm 1, a twentieth of the steps as warm-up, then linear to
    zero. Both models run in eval mode (no dropout), so a step is a function of the weights, the
    batch and the optimiser's state: a run that was interrupted ends with the same bits.

    Args:
        moe: what :func:`dense_to_moe` returned, in float32 or float64.
        dense: its source, of any dtype, on the same device; not changed.
        batches: (B, S) int64 token ids without padding; gone through in a new order each epoch.
        steps: in all, those of earlier runs with the same checkpoint included.
        train: "router", or "router+experts". Everything else stays as it is.
        lr: the largest learning rate.
        seed: of the order of the batches.
        checkpoint: a folder for ``healing.pt``. If it is there, this run goes on from it; it is
            replaced as a whole, every ``save_every`` steps, and only by weights whose loss was
            finite. None: nothing is kept.
        save_every: steps between checkpoints.
        progress: show a tqdm bar.
        stop: asked at each step; True: save, then raise KeyboardInterrupt.

    Returns:
        The losses of all steps, also of earlier runs.

    Raises:
        ValueError: settings out of range, another vocabulary, half-precision weights to train, no
            batches, or a checkpoint of another run (it says what differs). Nothing is changed then.
        FloatingPointError: loss or gradient is not finite; names the step. The model then holds the
            last good checkpoint, if there is one.
        KeyboardInterrupt: ``stop`` said so.
    """
    _check(moe, dense, batches, steps, train, lr, save_every)
    run = _Run(moe, batches, checkpoint, steps=steps, train=train, lr=lr, seed=seed)
    with _only_trained(moe, run.parameters), _in_eval_mode(moe, dense):
        run.resume()
        bar = tqdm(total=steps, initial=run.step, desc="healing", unit="step", disable=not progress)
        with bar:
            while run.step < steps:
                loss = run.forward(moe, dense)
                bar.set_postfix(KL=f"{float(loss.detach()):.4f}", refresh=False)
                stopping = stop is not None and stop()
                # Before the update: what is saved has just shown a finite loss.
                if stopping or (run.step and run.step % save_every == 0):
                    run.save()
                if stopping:
                    raise KeyboardInterrupt
                run.update(loss)
                bar.update()
        run.finish()
    return run.report


class _Run:
    """The state of a healing: parameters, optimiser, step, and its file."""

    def __init__(
        self,
        moe: PreTrainedModel,
        batches: Sequence[Tensor],
        checkpoint: str | Path | None,
        **settings: Any,
    ):
        self.settings, self.batches = settings, batches
        self.parameters = trained_parameters(moe, settings["train"])
        self.optimizer = torch.optim.AdamW(self.parameters.values(), settings["lr"], weight_decay=0)
        self.step = 0
        self.report = HealingReport()
        self.file = None if checkpoint is None else Path(checkpoint) / CHECKPOINT
        self.saved_step: int | None = None
        self.described = settings | {
            "batches": _digest(batches),
            "frozen weights": _digest(
                p.detach() for n, p in moe.named_parameters() if n not in self.parameters
            ),
        }
        self._clock = time.perf_counter()

    def forward(self, moe: PreTrainedModel, dense: PreTrainedModel) -> Tensor:
        ids = self._batch().to(moe.device)
        with torch.no_grad():
            wanted = dense(input_ids=ids, use_cache=False).logits
        loss = kl_divergence(moe(input_ids=ids, use_cache=False).logits, wanted)
        if not torch.isfinite(loss):
            self._fail("the loss")
        return loss

    def update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), _MAX_GRAD_NORM)
        if not torch.isfinite(norm):
            self._fail("the gradient")
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["lr"] * _schedule(self.step, self.settings["steps"])
        self.optimizer.step()
        self.report.losses.append(float(loss.detach()))
        self.report.tokens += self._batch().numel()
        self.step += 1

    def finish(self) -> None:
        if not all(torch.isfinite(parameter).all() for parameter in self.parameters.values()):
            self._fail("a weight")
        if self.saved_step != self.step:
            self.save()

    def save(self) -> None:
        self._count_seconds()
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "described": self.described,
            "step": self.step,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "report": vars(self.report),
        }
        _save_atomically(state, self.file)
        self.saved_step = self.step

    def resume(self) -> None:
        if self.file is None or not self.file.exists():
            return
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        for name, value in self.described.items():
            if state["described"].get(name) != value:
                raise ValueError(
                    f"{self.file} is of another run: {name} was {state['described'].get(name)!r}, "
                    f"is {value!r}; pass what it was, or another folder"
                )
        self._restore(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.report = HealingReport(**state["report"])
        self.step = self.saved_step = state["step"]

    def _batch(self) -> Tensor:
        epoch, index = divmod(self.step, len(self.batches))
        # From seed and epoch alone, so that a resumed run needs no state for it.
        generator = torch.Generator().manual_seed(self.settings["seed"] * 1_000_003 + epoch)
        return self.batches[int(torch.randperm(len(self.batches), generator=generator)[index])]

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.report.seconds += now - self._clock
        self._clock = now

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])

    def _fail(self, what: str) -> None:
        kept = "no checkpoint was kept"
        if self.saved_step is not None:
            self._restore(torch.load(self.file, map_location="cpu", weights_only=True))
            kept = f"the model holds the last good checkpoint again, step {self.saved_step}"
            kept += f" in {self.file}"
        raise FloatingPointError(
            f"{what} is not finite at step {self.step} of {self.settings['steps']}; {kept}. "
            "Try a lower lr, in another folder"
        )


def trained_parameters(moe: PreTrainedModel, train: str) -> dict[str, nn.Parameter]:
    """The parameters that :func:`heal` trains, by name."""
    parts = _ROUTERS if train == "router" else _ROUTERS + _EXPERTS
    return {
        name: parameter
        for name, parameter in moe.named_parameters()
        if parameter.numel() and any(part in name for part in parts)
    }


def kl_divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted || logits) in nats, mean over tokens; (B, S, V) twice -> (), float32 or more."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    student, teacher = (F.log_softmax(t.to(dtype).flatten(0, -2), -1) for t in (logits, wanted))
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def _check(moe, dense, batches, steps, train, lr, save_every) -> None:
    if train not in TRAIN:
        raise ValueError(f"train must be one of {TRAIN}; got {train!r}")
    if steps < 1 or save_every < 1:
        raise ValueError(f"steps and save_every must be at least 1; got {steps} and {save_every}")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be positive; got {lr}")
    if not len(batches):
        raise ValueError("there are no batches to heal on")
    if moe.config.vocab_size != dense.config.vocab_size:
        raise ValueError(
            f"the models have other vocabularies: {moe.config.vocab_size} tokens, "
            f"{dense.config.vocab_size} in the dense one"
        )
    parameters = trained_parameters(moe, train)
    if not parameters:
        raise ValueError(f"{type(moe).__name__} has no routers under mlp.gate: is it converted?")
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {parameter.dtype}, too coarse for small updates: heal in float32 "
                "(model.float()), and store in half precision afterwards"
            )


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, round(_WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def _digest(tensors) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.view(torch.uint8).numpy() if data.numel() else b"")
    return digest.hexdigest()[:16]


def _save_atomically(state: dict[str, Any], file: Path) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    os.close(descriptor)
    try:
        torch.save(state, temporary)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def _only_trained(moe: PreTrainedModel, trained: dict[str, nn.Parameter]) -> Iterator[None]:
    before = {name: parameter.requires_grad for name, parameter in moe.named_parameters()}
    try:
        for name, parameter in moe.named_parameters():
            parameter.requires_grad_(name in trained)
        yield
    finally:
        for name, parameter in moe.named_parameters():
            parameter.requires_grad_(before[name])
            if name in trained:
                parameter.grad = None


@contextmanager
def _in_eval_mode(*models: PreTrainedModel) -> Iterator[None]:
    before = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)
