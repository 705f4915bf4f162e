"""State of a patched model, which hangs on the model itself: see :func:`get_patched`."""

import contextlib
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_kernels.init.rows import GromovWassersteinDiagnostics
from moe_kernels.models.config import ExtensionConfig, ModalityLoraConfig
from moe_kernels.models.context import Switches
from moe_kernels.models.intact import Link, check_links
from moe_kernels.models.parts import LayerParts
from moe_kernels.models.projections import Projection

HANDLE = "_modality_patch"


class PatchState:
    """State of a patched model; users see it as :class:`moe_kernels.PatchedModel`.

    Attributes:
        model: the model that was patched, in place.
        config: the configuration that it was patched with.
        parts: the parts of each decoder layer.
        projections: the frozen weights that have low-rank pairs.
        init_diagnostics: reports of Gromov-Wasserstein inits, by modality, then by "embedding" and
            "head".
        extensions: the experts that were added, in order; see :mod:`moe_kernels.moextend`.
        switches: the parts that forwards leave out, by thread.
        hooks: handles of all hooks that patching registered.
        links: the places of the patched modules in the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: ModalityLoraConfig,
        parts: Sequence[LayerParts],
        projections: Sequence[Projection],
    ):
        self.model = model
        self.config = config
        self.parts = tuple(parts)
        self.projections = tuple(projections)
        self.switches = Switches()
        self.init_diagnostics: dict[str, dict[str, GromovWassersteinDiagnostics]] = {}
        self.extensions: list[ExtensionConfig] = []
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.links: tuple[Link, ...] = ()

    @property
    def moe_layers(self) -> dict[int, LayerParts]:
        """The decoder layers with experts, by index."""
        return {i: parts for i, parts in enumerate(self.parts) if parts.experts is not None}

    def modality_id(self, modality: str) -> int:
        """Return m of the m-th added modality, from 1 on.

        Raises:
            ValueError: the model is not patched for it.
        """
        modalities = self.config.modalities
        if modality not in modalities:
            raise ValueError(f"the model is patched for {modalities}, not for {modality!r}")
        return modalities.index(modality) + 1

    @property
    def adapters_enabled(self) -> bool:
        """True if forwards of this thread add low-rank updates; setting it is for all threads."""
        return self.switches.uses_adapters()

    @adapters_enabled.setter
    def adapters_enabled(self, enabled: bool) -> None:
        if self.switches.adapters_enabled and not self.switches.uses_adapters():
            raise RuntimeError(
                "adapters_enabled is for all threads and cannot be set within adapters_disabled(), "
                "which is for this one: set it outside"
            )
        self.switches.adapters_enabled = enabled

    def adapters_disabled(self) -> contextlib.AbstractContextManager[None]:
        """Disable low-rank updates and modality gates for this thread's forwards within.

        Added token rows stay, and so do experts that were added without a gate. A thread that is
        started within is not affected: enter the context inside it, or set ``adapters_enabled``.
        """
        return self.switches.without_adapters()

    def check_in_place(self) -> None:
        """Check that this is the handle of the model, and that the model is as it was patched.

        Raises:
            ValueError: the model was unpatched since, or patched anew.
            RuntimeError: a module of the model was replaced since.
        """
        if self.model.__dict__.get(HANDLE) is not self:
            raise ValueError(
                "this handle was unpatched: use the one that patch_model returned last"
            )
        check_links(self.links)


def is_patched(model: object) -> bool:
    """Return whether :func:`moe_kernels.patch_model` has patched this very module."""
    return HANDLE in getattr(model, "__dict__", {})


def get_patched(model: nn.Module) -> PatchState:
    """Return the :class:`moe_kernels.PatchedModel` of a patched model, or of a deepcopy of one.

    Raises:
        ValueError: the model is not patched.
    """
    if not is_patched(model):
        raise ValueError(
            f"this {type(model).__name__} is not patched: call patch_model(model) first"
        )
    return model.__dict__[HANDLE]
