"""Projectors of a patched model, one a modality: from an encoder's features to embeddings."""

from torch import nn

from moe_kernels.layers import ModalityProjector
from moe_kernels.models import offload, sharding
from moe_kernels.models.handle import PatchState
from moe_kernels.models.parts import trainable_dtype

PROJECTORS = "modality_projectors"


def projectors(model: nn.Module) -> dict[str, ModalityProjector]:
    """Return the model's projectors by modality."""
    return dict(getattr(model, PROJECTORS, {}).items())


def check(patched: PatchState, modality: str) -> None:
    """Raise ValueError unless the model can get a projector for this modality."""
    patched.modality_id(modality)
    patched.check_one_adapter("a projector")
    if modality in projectors(patched.model):
        raise ValueError(
            f"the model has a projector for {modality!r} already: train that, or unpatch() and "
            "patch the model anew"
        )


def build(patched: PatchState, settings: dict, device: str | None = None) -> ModalityProjector:
    """Make a projector: float32 beside a table in 16 bits, else of the table's dtype.

    ``device``: None: that of the table.
    """
    module = patched.model.get_input_embeddings()
    table = module.weight
    return ModalityProjector(
        out_features=sharding.whole_shape(table)[1],
        device=device or offload.device_of(module, table),
        dtype=trainable_dtype(table),
        **settings,
    )


def attach(patched: PatchState, modality: str, projector: ModalityProjector) -> None:
    """Make a projector part of the model, to be trained and saved with it."""
    if not hasattr(patched.model, PROJECTORS):
        setattr(patched.model, PROJECTORS, nn.ModuleDict())
    getattr(patched.model, PROJECTORS)[modality] = projector
    sharding.shard_beside(projector, patched.model.get_input_embeddings().weight)


def detach(model: nn.Module) -> None:
    """Remove all projectors."""
    model._modules.pop(PROJECTORS, None)
