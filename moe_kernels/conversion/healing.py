"""``heal``: distil a dense model into the Mixture of Experts converted from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe_kernels import arguments
from moe_kernels.conversion import checkpoints
from moe_kernels.conversion.whole import whole_experts
from moe_kernels.modes import ending_with, evaluating, training_only
from moe_kernels.progress import bar

CHECKPOINT = "healing.pt"
TRAIN = ("router", "router+experts")
_ROUTERS = (".mlp.gate.", ".mlp.shared_expert_gate.")
_EXPERTS = (".mlp.experts.", ".mlp.shared_expert.")
_WARMUP = 0.05  # of all steps
_MAX_GRAD_NORM = 1.0


@dataclass
class HealingReport:
    """Record of a healing, summed over all runs that continued the same checkpoint.

    Attributes:
        losses: KL divergence in nats per token, before each step.
        seconds: duration of steps and checkpoints.
        tokens: number of tokens read.
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
    temperature: float = 1.0,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    save_every: int = 50,
    progress: bool = True,
    stop: Callable[[], bool] | None = None,
) -> HealingReport:
    """Distil the dense model's next-token distributions into a converted model, in place.

    The loss is KL(dense || moe), averaged over a batch's tokens (docs/methods_specification.md,
    A1). The optimiser is AdamW without weight decay, with gradients clipped to norm 1. The learning
    rate warms up over a twentieth of the steps, then decays linearly to zero. Both models run in
    eval mode (no dropout), so a step depends only on the weights, the batch and the optimiser's
    state, and an interrupted run that is resumed ends with the same bits.

    Args:
        moe: a model that :func:`dense_to_moe` returned, in float32 or float64.
        dense: its source, of any dtype, on the same device; not changed.
        batches: (B, S) int64 token ids without padding; shuffled anew in each epoch.
        steps: total number of steps, including those of earlier runs with the same checkpoint.
        train: "router", or "router+experts". All other parameters stay frozen.
        lr: the largest learning rate.
        temperature: T, which divides the logits of both models in the loss; the loss is then
            multiplied by T^2, which keeps the size of its gradient (arXiv 1503.02531, section 2.1).
        autocast: dtype of the matrix products of both models (torch.autocast), such as
            torch.bfloat16, which is several times as fast on processors that multiply it; weights,
            loss and optimiser stay as they are. Routed experts of which a token chooses fewer than
            half stay in the weights' dtype unless ``moe`` computes them by "eager", as
            transformers' grouped_mm ignores autocast. None: the weights' own dtype.
        seed: seed of the order of the batches.
        checkpoint: a folder for ``healing.pt``. If the file exists, this run continues it: pass
            the models with the weights and configurations that the run began with. (``moe`` may
            hold the weights of the checkpoint instead.) The file is replaced as a whole every
            ``save_every`` steps, and only by weights whose loss was finite. None: no checkpoint.
        save_every: steps between checkpoints.
        progress: show a bar or, where there is no terminal, a line every half minute.
        stop: called at each step; if it returns True, save, then raise KeyboardInterrupt.

    Returns:
        The report of all steps, including those of earlier runs.

    Raises:
        TypeError: a batch is no tensor, or a number of steps no integer.
        ValueError: a setting is out of range, the vocabularies differ, the weights to train are in
            half precision, there are no batches, or the checkpoint is damaged, of an older version
            or of another run (the error says what differs). Nothing has changed then.
        FloatingPointError: a loss, gradient or weight is not finite; names the step.
        KeyboardInterrupt: ``stop`` returned True. After this, any other interrupt and the error
            above, the model holds the last checkpoint, if there is one.
    """
    steps, save_every = arguments.integers(steps=steps, save_every=save_every)
    _check(moe, dense, batches, steps, train, lr, save_every)
    _check_arithmetic(temperature, autocast)
    settings = {"steps": steps, "train": train, "lr": float(lr), "seed": seed}
    settings |= {"temperature": float(temperature), "autocast": str(autocast).rpartition(".")[-1]}
    run = _Run(moe, dense, batches, checkpoint, autocast, settings)
    with (
        ending_with(run.optimizer.zero_grad),
        training_only(moe, run.parameters.values()),
        evaluating(moe, dense),
        whole_experts(moe),
    ):
        try:
            run.resume()
            _train(run, steps, save_every, progress, stop)
            run.finish()
        except BaseException:
            run.return_to_checkpoint()
            raise
    return run.report


def _train(
    run: _Run, steps: int, save_every: int, progress: bool, stop: Callable[[], bool] | None
) -> None:
    with bar(total=steps, initial=run.step, desc="healing", shown=progress) as shown:
        while run.step < steps:
            loss = run.forward()
            shown.set_postfix(KL=f"{float(loss.detach()):.4f}", refresh=False)
            stopping = stop is not None and stop()
            # Before the update: what is saved has just shown a finite loss.
            if stopping or (run.step and run.step % save_every == 0):
                run.save()
            if stopping:
                raise KeyboardInterrupt
            run.update(loss)
            shown.update()


class _Run:
    """State of a healing: trained parameters, optimiser, step, report and checkpoint file."""

    def __init__(
        self,
        moe: PreTrainedModel,
        dense: PreTrainedModel,
        batches: Sequence[Tensor],
        checkpoint: str | Path | None,
        autocast: torch.dtype | None,
        settings: dict[str, Any],
    ):
        self.moe, self.dense, self.autocast = moe, dense, autocast
        self.settings, self.batches = settings, batches
        self.parameters = trained_parameters(moe, settings["train"])
        self.optimizer = torch.optim.AdamW(self.parameters.values(), settings["lr"], weight_decay=0)
        self.step = 0
        self.report = HealingReport()
        self.file = None if checkpoint is None else Path(checkpoint) / CHECKPOINT
        self.saved_step: int | None = None
        self.description: dict[str, Any] = {}
        if self.file is not None:
            described = checkpoints.describe(moe, dense, batches, self.parameters)
            self.description = settings | described
        self._clock = time.perf_counter()

    def forward(self) -> Tensor:
        ids, device = self._batch().to(self.moe.device), self.moe.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            with torch.no_grad():
                target_logits = self.dense(input_ids=ids, use_cache=False).logits
            logits = self.moe(input_ids=ids, use_cache=False).logits
        loss = kl_divergence(logits, target_logits, self.settings["temperature"])
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
        state = {
            "described": self.description,
            "step": self.step,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "report": vars(self.report),
        }
        checkpoints.save(self.file, state)
        self.saved_step = self.step

    def resume(self) -> None:
        if self.file is None or not self.file.exists():
            return
        state = checkpoints.read(self.file)
        checkpoints.check(self.file, state, self.description, self.parameters, self.optimizer)
        self.step = self.saved_step = state["step"]
        self.report = HealingReport(**state["report"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._restore(state)

    def return_to_checkpoint(self) -> None:
        """Put the weights of the last checkpoint into the model, if there is one."""
        if self.saved_step is not None and self.file is not None:
            self._restore(checkpoints.read(self.file))

    def _batch(self) -> Tensor:
        epoch, index = divmod(self.step, len(self.batches))
        # The order depends on seed and epoch alone, so a checkpoint needs no generator state.
        generator = torch.Generator().manual_seed(self.settings["seed"] * 1_000_003 + epoch)
        order = torch.randperm(len(self.batches), generator=generator, device="cpu")
        return self.batches[int(order[index])]

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.report.seconds += now - self._clock
        self._clock = now

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])

    def _fail(self, quantity: str) -> NoReturn:
        outcome = "there is no checkpoint to return to"
        if self.saved_step is not None:
            outcome = f"the model holds the checkpoint of step {self.saved_step} in {self.file}"
        raise FloatingPointError(
            f"{quantity} is not finite at step {self.step} of {self.settings['steps']}; {outcome}. "
            "Try a lower lr, in another folder"
        )


def trained_parameters(moe: PreTrainedModel, train: str) -> dict[str, nn.Parameter]:
    """Return the parameters that :func:`heal` trains, by name."""
    parts = _ROUTERS if train == "router" else _ROUTERS + _EXPERTS
    return {
        name: parameter
        for name, parameter in moe.named_parameters()
        if parameter.numel() and any(part in name for part in parts)
    }


def kl_divergence(logits: Tensor, target_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(target || prediction) at temperature T in nats, averaged over tokens.

    (B, S, V), (B, S, V) -> (), in float32 or a wider dtype of ``logits``.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    student, teacher = (
        F.log_softmax(t.to(dtype).flatten(0, -2) / temperature, -1) for t in (logits, target_logits)
    )
    loss = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return loss * temperature**2


def _check(moe, dense, batches, steps, train, lr, save_every) -> None:
    if train not in TRAIN:
        raise ValueError(f"train must be one of {TRAIN}; got {train!r}")
    if steps < 1 or save_every < 1:
        raise ValueError(f"steps and save_every must be at least 1; got {steps} and {save_every}")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be positive and finite; got {lr}")
    if not len(batches):
        raise ValueError("batches is empty: pass at least one batch of token ids")
    arguments.token_batches("batches", batches)
    if moe.config.vocab_size != dense.config.vocab_size:
        raise ValueError(
            f"the models have different vocabularies: {moe.config.vocab_size} tokens in the "
            f"Mixture of Experts, {dense.config.vocab_size} in the dense model"
        )
    parameters = trained_parameters(moe, train)
    if not parameters:
        raise ValueError(
            f"{type(moe).__name__} has no routers under mlp.gate: pass a model that dense_to_moe "
            "returned"
        )
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {parameter.dtype}, too coarse for small updates: heal in float32 "
                "(model.float()), and convert to half precision afterwards"
            )


def _check_arithmetic(temperature: float, autocast: torch.dtype | None) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite; got {temperature}")
    if autocast not in (None, torch.bfloat16):
        raise ValueError(f"autocast must be torch.bfloat16 or None; got {autocast}")


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, round(_WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
