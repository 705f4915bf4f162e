"""Projectors of a patched model: from a frozen encoder's features to embeddings, by modality."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from moe_kernels.layers import ModalityProjector

if TYPE_CHECKING:
    from moe_kernels.models.patch import PatchedModel

PROJECTORS = "modality_projectors"


def projectors(model: nn.Module) -> dict[str, ModalityProjector]:
    """Those that the model has, by modality."""
    return dict(getattr(model, PROJECTORS, {}).items())


def check(patched: "PatchedModel", modality: str) -> None:
    """Raise ValueError unless the model can get a projector for this modality."""
    if modality not in patched.config.modalities:
        raise ValueError(
            f"the model is patched for {patched.config.modalities}, not for {modality!r}"
        )
    if modality in projectors(patched.model):
        raise ValueError(f"the model has a projector for {modality!r} already")


def build(patched: "PatchedModel", settings: dict) -> ModalityProjector:
    """float32 beside a table in 16 bits, else the table's dtype, as adapters."""
    table = patched.model.get_input_embeddings().weight
    half = table.dtype in (torch.bfloat16, torch.float16)
    return ModalityProjector(
        out_features=table.shape[1],
        device=table.device,
        dtype=torch.float32 if half else table.dtype,
        **settings,
    )


def attach(patched: "PatchedModel", modality: str, projector: ModalityProjector) -> None:
    """Make it the model's, to be trained and saved with it."""
    if not hasattr(patched.model, PROJECTORS):
        setattr(patched.model, PROJECTORS, nn.ModuleDict())
    getattr(patched.model, PROJECTORS)[modality] = projector


def detach(model: nn.Module) -> None:
    """Take all of them away."""
    model._modules.pop(PROJECTORS, None)
