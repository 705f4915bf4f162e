"""State of a patched model, which hangs on the model itself: see :func:`get_patched`."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_kernels.init.rows import GromovWassersteinDiagnostics
from moe_kernels.layers.modality_lora import BASE, DEFAULT
from moe_kernels.models import offload, sharding
from moe_kernels.models.config import ExtensionConfig, ModalityLoraConfig
from moe_kernels.models.context import CopiedAlone, Forwards, Switches
from moe_kernels.models.intact import (
    Link,
    check_engine,
    check_experts,
    check_links,
    check_offload,
    check_peft,
    without_wrappers,
)
from moe_kernels.models.parts import LayerParts, find_decoder
from moe_kernels.models.projections import Projection

HANDLE = "_modality_patch"
_FOR_ALL_THREADS = (
    "{} is for all threads and cannot be set within {}, which is for this one: set it outside"
)


class PatchState(CopiedAlone):
    """State of a patched model; users see it as :class:`moe_kernels.PatchedModel`.

    Attributes:
        model: the model that was patched, in place.
        config: the configuration that it was patched with.
        decoder: the module with the decoder layers: the text model of a multimodal model.
        parts: the parts of each decoder layer.
        projections: the frozen weights that have low-rank pairs.
        init_diagnostics: reports of Gromov-Wasserstein inits, by modality, then by "embedding" and
            "head".
        extensions: the experts that were added, in order; see :mod:`moe_kernels.moextend`.
        switches: the parts that forwards leave out, by thread.
        forwards: those that run now, by thread.
        hooks: handles of all hooks that patching registered.
        links: the places of the patched modules in the model.
        base_shapes: the shapes of the model's own parameters, by name.
        base_vocabulary: V, the number of the model's own tokens.
        added_tokens: the number of added tokens by modality, in the order of their ids, from V on.
        adapter_names: those of the adapters; the first is "default".
        frozen_if_active: for each adapter that is not active, the names of its parameters that do
            not train when it is.
        fused_loss: True: forwards with labels in training mode compute the loss in chunks, without
            logits of all tokens at once; ``logits`` of their output is None.
        compare_ranks: True: the first training forward compares the patch with that of other ranks.
            False: the ranks train models of their own.
        warned: modalities of which a training forward has warned that their adapters are idle; the
            empty name if it has warned that all is frozen.
        warned_of_saving: True: ``save_pretrained`` has said what ``from_pretrained`` leaves out.
        checked: the numbers of extensions and of modalities with tokens, and the active adapter, at
            which a training forward has found no fault.
        compared_at: the places where ranks compare what they have at these.
        shared_batches: the kinds of batches of which all ranks had the same, where they must.
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
        self.decoder = find_decoder(model)
        self.parts = tuple(parts)
        self.projections = tuple(projections)
        self.switches = Switches()
        self.forwards = Forwards()
        self.init_diagnostics: dict[str, dict[str, GromovWassersteinDiagnostics]] = {}
        self.extensions: list[ExtensionConfig] = []
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.links: tuple[Link, ...] = ()
        tied = offload.tied_copies(model)
        self.base_shapes = {
            without_wrappers(name): tuple(sharding.whole_shape(parameter))
            for name, parameter in model.named_parameters()
            if name not in tied
        }
        self.base_vocabulary: int = model.get_input_embeddings().num_embeddings
        self.added_tokens: dict[str, int] = {}
        self.adapter_names: list[str] = [DEFAULT]
        self.frozen_if_active: dict[str, frozenset[str]] = {}
        self.fused_loss = False
        self.compare_ranks = True
        self.warned: set[str] = set()
        self.warned_of_saving = False
        self.checked: set[tuple[int, int, str]] = set()
        self.compared_at: dict[tuple[int, int, str], str] = {}
        self.shared_batches: set[tuple] = set()

    @property
    def moe_layers(self) -> dict[int, LayerParts]:
        """The decoder layers with experts, by index."""
        return {i: parts for i, parts in enumerate(self.parts) if parts.experts is not None}

    @property
    def paths(self) -> dict[nn.Module, str]:
        """The names that the patched modules had in the model, and those above them."""
        return {link.module: without_wrappers(link.path) for link in self.links}

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
    def vocabulary(self) -> int:
        """V + n, the number of the model's own tokens and the added ones."""
        return self.base_vocabulary + sum(self.added_tokens.values())

    def modality_token_ids(self, modality: str) -> range:
        """Return the ids of the tokens added for a modality; empty if there are none.

        Example:
            >>> patched.modality_token_ids("image")
            range(64, 74)
        """
        first = self.base_vocabulary
        for name, count in self.added_tokens.items():
            if name == modality:
                return range(first, first + count)
            first += count
        return range(0)

    def modality_of(self, input_ids: Tensor) -> Tensor:
        """Return the modality, int64, of each token id: that of an added or declared token, or 0.

        The ranges of ids are numbers of this handle, not a tensor: ``to_empty`` leaves the values
        of a tensor undefined, and a table of zeros would switch all adapters off.
        """
        modality_ids = torch.zeros_like(input_ids, dtype=torch.int64)
        first = self.base_vocabulary
        for modality, count in self.added_tokens.items():
            modality_ids = torch.where(input_ids >= first, self.modality_id(modality), modality_ids)
            first += count
        for modality, ids in self.config.token_ids.items():
            for each in ids:
                declared = self.modality_id(modality)
                modality_ids = torch.where(input_ids == each, declared, modality_ids)
        return modality_ids

    @property
    def adapters_enabled(self) -> bool:
        """True if forwards of this thread add low-rank updates; setting it is for all threads."""
        return self.switches.uses_adapters() and self.switches.chosen().updates

    @adapters_enabled.setter
    def adapters_enabled(self, enabled: bool) -> None:
        self._check_current()
        if self.switches.adapters_enabled and not self.switches.uses_adapters():
            raise RuntimeError(_FOR_ALL_THREADS.format("adapters_enabled", "adapters_disabled()"))
        self.switches.adapters_enabled = enabled

    @property
    def added_tokens_enabled(self) -> bool:
        """True if forwards of this thread give logits of added tokens; setting it is for all."""
        return self.switches.uses_added_tokens()

    @added_tokens_enabled.setter
    def added_tokens_enabled(self, enabled: bool) -> None:
        self._check_current()
        if self.switches.added_tokens_enabled and not self.switches.uses_added_tokens():
            raise RuntimeError(_FOR_ALL_THREADS.format("added_tokens_enabled", "text_only()"))
        self.switches.added_tokens_enabled = enabled

    def adapters_disabled(self) -> contextlib.AbstractContextManager[None]:
        """Disable low-rank updates and modality gates for this thread's forwards within.

        They are those of every adapter, also of one that a call or ``adapter(...)`` names. Added
        token rows stay, and so do experts that were added without a gate. A thread that is started
        within is not affected: enter the context inside it, or set ``adapters_enabled``. Coroutines
        of one thread have contexts of their own; but not under torch.compile, where none may await
        within.

        Example:
            >>> with patched.adapters_disabled():
            ...     logits = model(text_and_image).logits
            >>> torch.equal(logits, model(text_and_image).logits)
            False
        """
        self._check_current()
        return self.switches.without_adapters()

    def text_only(self) -> contextlib.AbstractContextManager[None]:
        """Give logits of the base vocabulary alone, (B, S, V), in this thread's forwards within.

        Softmax, loss and perplexity of text are then those of the text model: without it, they
        are normalised over V + n, and training the added rows moves them, although it moves no
        logit of text. ``generate`` keeps V + n columns, which ``config.vocab_size`` promises, and
        gives those of added tokens the lowest number of their dtype. Prompts may hold added tokens.
        For all threads, set ``added_tokens_enabled = False``. Coroutines are as in
        :meth:`adapters_disabled`.

        Example:
            >>> model(text).logits.shape
            torch.Size([1, 6, 74])
            >>> with patched.text_only():
            ...     model(text).logits.shape
            torch.Size([1, 6, 64])
        """
        self._check_current()
        return self.switches.without_added_tokens()

    def adapter(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Use the adapter of this name in this thread's forwards within; "base" uses none.

        The innermost context counts, and a forward that is given ``adapter=`` uses that. Threads
        and coroutines are as in :meth:`adapters_disabled`. Without it, all use
        :attr:`active_adapter`.

        Raises:
            ValueError: the model has no adapter of this name.

        Example:
            >>> with patched.adapter("sketches"):
            ...     logits = model(input_ids).logits
        """
        self._check_current()
        if name != BASE:
            self.check_adapter(name)
        return self.switches.with_adapter(name)

    @property
    def active_adapter(self) -> str:
        """Name of the adapter of forwards that name no other; see ``set_adapter``."""
        return self.switches.adapter

    def check_adapter(self, name: str) -> None:
        """Raise ValueError unless the model has an adapter of this name."""
        if name not in self.adapter_names:
            raise ValueError(
                f"the model has no adapter {name!r}; it has {', '.join(self.adapter_names)}"
            )

    def check_one_adapter(self, what: str) -> None:
        """Raise ValueError if the model has several adapters, and something goes with one alone."""
        if len(self.adapter_names) > 1:
            raise ValueError(
                f"{what} goes with one adapter alone, and the model has "
                f"{', '.join(self.adapter_names)}: delete_adapter those that are not needed"
            )

    def check_in_place(self) -> None:
        """Check that this is the handle of the model, and that the model is as it was patched.

        Raises:
            ValueError: the model was unpatched since, or patched anew.
            RuntimeError: a module of the model was replaced since, or accelerate runs it in a way
                that leaves out what was added.
        """
        self._check_current()
        check_links(self.links)
        check_offload(self.model)

    def check_computed(self) -> None:
        """Check, as each forward does, that the model computes with all that was added to it.

        Raises:
            ValueError: the model was unpatched since, or patched anew.
            RuntimeError: a module of the model, or the implementation of its experts, was replaced
                since, or PEFT has adapted others of its modules, or accelerate or an engine that is
                refused has taken its parameters.
        """
        self.check_in_place()
        check_peft(self.model, self.links)
        check_experts(self.parts)
        check_engine(self.model, self.links)

    def _check_current(self) -> None:
        if self.model.__dict__.get(HANDLE) is not self:
            raise ValueError(
                "this handle was unpatched: use the one that patch_model returned last"
            )


def is_patched(model: object) -> bool:
    """Return whether :func:`moe_kernels.patch_model` has patched this very module."""
    return HANDLE in getattr(model, "__dict__", {})


def get_patched(model: nn.Module) -> PatchState:
    """Return the :class:`moe_kernels.PatchedModel` of a patched model, or of a deepcopy of one.

    Raises:
        TypeError: this is the handle.
        ValueError: the model is not patched.
    """
    if isinstance(model, PatchState):
        raise TypeError("this is the handle of a patched model: pass its model, handle.model")
    if not is_patched(model):
        raise ValueError(
            f"this {type(model).__name__} is not patched: call patch_model(model) first"
        )
    return model.__dict__[HANDLE]
