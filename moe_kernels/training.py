"""Training of what was added to a model: a Trainer of transformers, and Muon for stacks."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput

from moe_kernels.analysis import RoutingRecorder
from moe_kernels.layers.modality_lora import split_name
from moe_kernels.models import PatchedModel, sharding
from moe_kernels.models.adapter_files import NAMES
from moe_kernels.models.intact import modalities_of_peft
from moe_kernels.models.parameters import is_added

__all__ = ["AdapterTrainer", "MatrixMuon", "use_reference"]

_ELSE = "use transformers.Trainer(model=patched.model, callbacks=[SaveAdapter(patched)]) instead"


class _OfTraining(RoutingRecorder):
    """Recorder that leaves out forwards in eval mode."""

    def _add(self, *args: Any) -> None:
        if self.model.training:
            super()._add(*args)


class AdapterTrainer(Trainer):
    """Trainer of a patched model, with checkpoints of the adapter, the optimizer and the progress.

    The frozen base is in no checkpoint. ``patched.load_adapter`` reads each of them, and the folder
    that ``save_model`` wrote. Resuming and ``load_best_model_at_end`` load the adapter into the
    model that the script has made. It trains in one process or under DDP, where the first process
    saves and each of them loads. All else is as in ``transformers.Trainer``.

    Args:
        patched: the handle that :func:`moe_kernels.patch_model` returned, tokens added.
        args: as of ``transformers.Trainer``.
        rows_lr: learning rate of added rows, which then get no weight decay; the schedule scales
            it as it does ``args.learning_rate``. Default: rows train as all else does.
        log_routing: write into each log of the loss how evenly the experts were chosen since the
            last one, by modality: ``routing/`` before the names of
            :meth:`moe_kernels.analysis.RoutingStatistics.summary`. Evaluation is left out, and
            activation checkpointing counts once. Under DDP it is of the process that logs.
        **options: further arguments of ``transformers.Trainer``, ``model`` excepted.

    Raises:
        TypeError: ``patched`` is not a handle.
        ValueError: the model was unpatched. FSDP or DeepSpeed shards it, or PEFT has adapted it
            too: their checkpoints are of another kind. ``rows_lr`` is given beside an optimizer.
            In ``train``: a parameter that was not added to the model trains too, which no
            checkpoint would hold; or no added row trains, and ``rows_lr`` is given.

    Example:
        >>> import os, torch
        >>> from transformers import TrainingArguments
        >>> from moe_kernels import add_modality_tokens, patch_model
        >>> from moe_kernels.testing import tiny_model
        >>> from moe_kernels.training import AdapterTrainer
        >>> patched = patch_model(tiny_model())
        >>> ids = add_modality_tokens(patched.model, "image", 10)
        >>> row = torch.tensor([5, 6, *ids])  # two tokens of text, and an image
        >>> args = TrainingArguments(
        ...     "out", learning_rate=3e-3, max_steps=2, save_steps=1, use_cpu=True,
        ...     report_to="none", disable_tqdm=True,
        ... )
        >>> trainer = AdapterTrainer(
        ...     patched, args, rows_lr=2e-2, train_dataset=[{"input_ids": row, "labels": row}] * 8
        ... )
        >>> trainer.train().global_step
        {'train_runtime': ...}
        2
        >>> sorted(os.listdir("out/checkpoint-1"))[:2]
        ['modality_adapter.safetensors', 'modality_adapter_config.json']
        >>> trainer.train(resume_from_checkpoint="out/checkpoint-1").global_step
        {'train_runtime': ...}
        2
    """

    adapter_files = (NAMES.weights, NAMES.config)  # of a checkpoint

    def __init__(
        self,
        patched: PatchedModel,
        args: TrainingArguments | None = None,
        *,
        rows_lr: float | None = None,
        log_routing: bool = False,
        **options: Any,
    ):
        if not isinstance(patched, PatchedModel):
            raise TypeError(
                "AdapterTrainer takes the handle that patch_model(model) returned, got "
                f"{type(patched).__name__}"
            )
        patched.check_in_place()
        if rows_lr is not None and options.get("optimizers", (None, None))[0] is not None:
            raise ValueError(
                "rows_lr is for the optimizer that the Trainer makes, and one is given: leave one "
                "of them out, or make the optimizer of patched.parameter_groups(lr, rows_lr=...)"
            )
        if modalities_of_peft(patched.links):
            raise ValueError(
                "PEFT has adapted the model too, and AdapterTrainer's checkpoints would not hold "
                f"its adapters: {_ELSE}"
            )
        super().__init__(patched.model, args, **options)
        if engine := self._engine():
            raise ValueError(
                f"{engine} shards the model, and its own checkpoints hold the base too, which "
                f"AdapterTrainer's do not: {_ELSE}"
            )
        self.patched, self.rows_lr = patched, rows_lr
        self._recorder = _OfTraining(patched.model) if log_routing else None

    def _engine(self) -> str | None:
        """Return the name of the engine that shards the model or its optimizer, or None."""
        if self.is_deepspeed_enabled:
            return "DeepSpeed"
        return "FSDP" if self.is_fsdp_enabled or sharding.is_model_sharded(self.model) else None

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as ``transformers.Trainer`` does, if the checkpoints hold all that trains."""
        trained = (name for name, p in self.model.named_parameters() if p.requires_grad)
        if others := [name for name in trained if not is_added(name)]:
            raise ValueError(
                f"{others[0]} trains too (one of {len(others)}), and was not added to the model, "
                f"so that no checkpoint would hold it: freeze it, or {_ELSE}"
            )
        active = self.patched.active_adapter
        names = dict(self.patched.named_trainable_parameters())
        if others := [name for name in names if split_name(name)[1] != active]:
            raise ValueError(
                f"{others[0]} trains too (one of {len(others)}), and checkpoints are of the active "
                f"adapter {active!r} alone: freeze it"
            )
        with self._recorder or nullcontext():
            return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what the Trainer does, and how the experts were chosen if ``log_routing`` is set."""
        if self._recorder is not None and "loss" in logs:
            found = self._recorder.statistics().summary()
            logs |= {f"routing/{name}": round(value, 4) for name, value in found.items()}
            self._recorder.clear()
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer, in which added rows are a group if they have a rate of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.rows_lr is not None:
            groups = self.patched.parameter_groups(self.args.learning_rate, rows_lr=self.rows_lr)
            rows = {id(parameter) for parameter in groups[-1]["params"]}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in rows]
            optimizer.add_param_group(groups[-1])
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        self.patched.save_adapter(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.patched.load_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.patched.load_adapter(self.state.best_model_checkpoint)


def use_reference(trainer: Any, reference: PreTrainedModel, beta: float) -> None:
    """Give TRL's ``GRPOTrainer`` a reference, without loading a second base.

    With ``beta`` in its configuration the trainer loads its reference by the base's name, without
    what was added. So make it with ``beta=0``, which needs no reference, and call this.

    Args:
        trainer: a ``GRPOTrainer`` that has been made with ``beta=0`` and has not trained yet.
        reference: what ``PatchedModel.reference_model()`` returned, before the trainer was made.
        beta: weight of the KL divergence from the reference.

    Raises:
        ValueError: the trainer has a reference or a ``beta`` already, or the reference is the model
            that it trains.

    Example:
        >>> reference = patched.reference_model()
        >>> trainer = GRPOTrainer(patched.model, reward, GRPOConfig("out", beta=0.0), ...)
        >>> use_reference(trainer, reference, beta=0.04)
    """
    if trainer.beta != 0 or trainer.ref_model is not None:
        raise ValueError(
            f"the trainer has beta {trainer.beta} and a reference: make it with beta=0"
        )
    if reference is trainer.accelerator.unwrap_model(trainer.model):
        raise ValueError("the reference is the model that trains: patched.reference_model()")
    # Versions of TRL with a fused head call the reference through it, too.
    add_head = getattr(import_module("trl.trainer.utils"), "add_fused_lm_head", None)
    if add_head is not None:
        in_float32 = trainer.args.cast_lm_head_to_fp32
        add_head(reference, temperature=trainer.temperature, cast_lm_head_to_fp32=in_float32)
    trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
    trainer.beta = beta


class MatrixMuon(torch.optim.Muon):
    """Muon for stacks of matrices: each matrix in them is orthogonalised on its own.

    ``torch.optim.Muon`` takes 2-D parameters alone. The low-rank pairs of experts are
    (M, E, r, in) and (M, E, out, r); this makes the step that Muon would make if the matrix of each
    modality and expert were a parameter. The optimizer's parameters are the stacks, so that
    gradients are clipped, zeroed, accumulated and saved as ever. Matrices are computed one after
    the other, as in ``torch.optim.Muon``. Added rows are a table, which Muon is not made for: give
    them, and vectors, to another optimizer.

    Args:
        params: parameters (..., rows, columns), or groups of them.
        **settings: of ``torch.optim.Muon``.

    Raises:
        ValueError: there is no parameter, or one has fewer than two dimensions, or FSDP2 or ZeRO-3
            has sharded it.

    Example:
        >>> named = dict(patched.named_trainable_parameters())
        >>> pairs = [p for name, p in named.items() if ".modality_lora." in name]
        >>> muon = MatrixMuon(pairs, lr=2e-3, weight_decay=0.0)
    """

    def __init__(self, params: Iterable[Any], **settings: Any):
        # The first parameter is none of ours: torch's class refuses those that are not 2-D.
        super().__init__([torch.zeros(1, 1, requires_grad=True)], **settings)
        self.param_groups.clear()
        given = list(params)
        if not given:
            raise ValueError("MatrixMuon got no parameter, and would train nothing")
        for group in given if given and isinstance(given[0], dict) else [{"params": given}]:
            self.add_param_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as an optimizer of torch does, if each of its parameters is a stack."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.ndim < 2 or sharding.is_sharded(parameter):
                del self.param_groups[-1]
                what = "is sharded" if parameter.ndim >= 2 else "is no matrix, nor a stack of them"
                raise ValueError(
                    f"MatrixMuon orthogonalises whole matrices, and a parameter of shape "
                    f"{tuple(parameter.shape)} {what}: give it to another optimizer"
                )

    def _init_group(
        self,
        group: dict[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
    ) -> bool:
        stacks: tuple[list[Tensor], ...] = ([], [], [])
        has_complex = super()._init_group(group, *stacks)
        found = (params_with_grad, grads, muon_momentum_bufs)
        for matrices, tensors in zip(found, stacks, strict=True):
            for tensor in tensors:
                matrices += _matrices(tensor)
        return has_complex


def _matrices(stack: Tensor) -> list[Tensor]:
    """Return views (rows, columns) of the matrices of a stack, whatever its strides."""
    if stack.ndim == 2:
        return [stack]
    return [matrix for part in stack.unbind() for matrix in _matrices(part)]
