"""Groups of what trains, as an optimizer of torch takes them."""

import math
from typing import Any

from moe_kernels import arguments
from moe_kernels.models import parameters
from moe_kernels.models.handle import PatchState


def adapters_and_rows(
    patched: PatchState, lr: float, rows_lr: float | None
) -> list[dict[str, Any]]:
    """Return a group of adapters and one of added rows; see ``PatchedModel.parameter_groups``."""
    rates = arguments.floats(lr=lr, rows_lr=lr if rows_lr is None else rows_lr)
    for name, rate in zip(("lr", "rows_lr"), rates, strict=True):
        if not 0 <= rate < math.inf:
            raise ValueError(f"{name} must be a finite number from 0 on, got {rate}")
    rows, others = [], []
    for name, parameter in parameters.named_adapter_parameters(patched.model):
        if parameter.requires_grad:
            (rows if parameters.is_row(name) else others).append(parameter)
    if not rows and not others:
        raise ValueError("nothing that was added to the model trains: all of it is frozen")
    if rows_lr is not None and not rows:
        raise ValueError(
            "rows_lr is for added rows, and the model has none that train: call "
            "add_modality_tokens(model, modality, num_tokens) first, or leave rows_lr out"
        )
    groups: list[dict[str, Any]] = [{"params": others, "lr": lr}] if others else []
    if rows:
        groups.append(
            {"params": rows, "lr": lr if rows_lr is None else rows_lr, "weight_decay": 0.0}
        )
    return groups
