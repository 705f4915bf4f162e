"""A callback of transformers' Trainer that saves the adapter."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_kernels.models import sharding
from moe_kernels.models.patch import PatchedModel


class SaveAdapter(TrainerCallback):
    """Save the adapter beside each checkpoint of a ``transformers.Trainer``, and at the end.

    The adapter of step n is in ``output_dir/checkpoint-n/adapter``, from which
    :meth:`moe_kernels.PatchedModel.load_adapter` reads it, and goes with its checkpoint. That of
    the end is in ``output_dir/adapter``; with ``load_best_model_at_end`` it is the best. A sharded
    model is gathered by all ranks (FSDP2, DeepSpeed ZeRO-3); else the main process writes alone.

    Of a model in PEFT's (:func:`moe_kernels.accelerate_peft` with a modality) it is the rows of
    added tokens.

    Args:
        patched: handle of the trained model.
        timeout: seconds that ranks of a sharded model wait for each other.

    Example:
        >>> trainer = Trainer(model=patched.model, callbacks=[SaveAdapter(patched)], ...)
    """

    def __init__(self, patched: PatchedModel, timeout: float = 300.0):
        self.patched, self.timeout = patched, timeout

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save into the folder of the checkpoint that was just written."""
        self._save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "adapter", state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save what the run ends with."""
        self._save(Path(args.output_dir) / "adapter", state)

    def _save(self, folder: Path, state: TrainerState) -> None:
        if state.is_world_process_zero or sharding.is_model_sharded(self.patched.model):
            self.patched.save_adapter(folder, timeout=self.timeout)
