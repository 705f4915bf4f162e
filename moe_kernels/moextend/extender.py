"""``ExpertExtender``: new experts in a pretrained Mixture of Experts, in place (MoExtend)."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_kernels.layers import ModalityProjector
from moe_kernels.models import (
    ModalityLoraConfig,
    PatchedModel,
    added_experts,
    patch_model,
    projectors,
    sharding,
)
from moe_kernels.models.config import ExtensionConfig, as_layer_index
from moe_kernels.models.handle import get_patched, is_patched
from moe_kernels.models.routers import RoutingFinder
from moe_kernels.models.undo import all_or_nothing
from moe_kernels.moextend import disturbance, starts, tuning
from moe_kernels.moextend.disturbance import Disturbance
from moe_kernels.moextend.scores import LayerScores

LAYER_CHOICES = ("top-half", "all", "interval", "first-half", "second-half")


class ExpertExtender:
    """Add experts, their router columns and a calibration to a model; all else stays frozen.

    Args:
        model: a Mixture of Experts that :func:`moe_kernels.patch_model` can patch. A plain one is
            patched here, without low-rank updates.
        modalities: names of the added modalities, the m-th with modality id m; a task may be one.
            Default: those that the model was patched for, or ("image",).
        sequence_modalities: the modalities that belong to a whole sequence, such as a task; see
            :class:`moe_kernels.ModalityLoraConfig`.
        backend: for a plain model, see :class:`moe_kernels.ModalityLoraConfig`.

    Attributes:
        patched: the model's handle, with ``trainable_parameters``, ``save_adapter`` and so on.
        scores: the last result of ``score_layers``, or None.

    Raises:
        TypeError, ValueError: see ``patch_model``; or the model was patched for other modalities,
            with other ``sequence_modalities`` or another backend.

    Example:
        >>> extender = ExpertExtender(model, modalities=("image",))
        >>> scores = extender.score_layers(held_out, steps=100)
        >>> extender.extend()
        >>> optimizer = torch.optim.AdamW(extender.patched.trainable_parameters())
    """

    def __init__(
        self,
        model: PreTrainedModel,
        modalities: Sequence[str] | None = None,
        *,
        sequence_modalities: Sequence[str] | None = None,
        backend: str | None = None,
    ):
        settings = {
            "modalities": modalities,
            "sequence_modalities": sequence_modalities,
            "backend": backend,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        self.scores: LayerScores | None = None
        if is_patched(model):
            self.patched = cast(PatchedModel, get_patched(model))  # the class of every handle
            _check_same(self.patched.config, settings)
        else:
            self.patched = patch_model(model, ModalityLoraConfig(target_modules=(), **settings))

    @property
    def model(self) -> PreTrainedModel:
        """The model, patched in place."""
        return self.patched.model

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers with experts."""
        return tuple(self.patched.moe_layers)

    def score_layers(
        self,
        dataloader: Iterable[Mapping[str, Any]],
        steps: int,
        *,
        modality: str | None = None,
        lr: float = 1e-3,
        count: str = "modality",
        progress: bool = True,
    ) -> LayerScores:
        """Score each layer by the shift of its router's choices when the routers alone are tuned.

        A change to each router's weight (not to low-rank updates or added columns) is tuned with
        AdamW on the model's loss, one batch a step, and discarded. The experts that the routers
        select are counted before and after, on the same batches, without gradients. The model
        keeps every bit, and every ``grad``.

        Where torch.distributed is initialised, all ranks call it, each on its own data: the counts
        are summed over them, so that all get the same scores and choose the same layers.

        Args:
            dataloader: keyword arguments of the model's forward, on held-out data of the modality.
                At most ``steps`` batches are taken; if there are fewer, they repeat. Missing
                ``labels`` are the ``input_ids``, without padding: what the
                ``attention_mask`` leaves out, or -1 in ``modality_ids``.
            steps: number of tuning steps.
            modality: the modality to count tokens of; required if the model has several.
            lr: learning rate.
            count: "modality": count its tokens; "all": every real token, as published.
            progress: show a bar.

        Returns:
            The scores, which :meth:`extend` uses from now on.

        Raises:
            TypeError: a batch that is not a mapping.
            ValueError: no steps, no batch, a batch without ids, no token of the modality, or
                routers that are not supported.
            RuntimeError: the loss became infinite or NaN, or ``torch.inference_mode`` is on.
        """
        self.patched.check_in_place()
        self.scores = tuning.score_layers(
            self.patched,
            dataloader,
            steps,
            modality=self._modality(modality),
            lr=lr,
            count=count,
            progress=progress,
        )
        return self.scores

    def extend(
        self,
        layers: str | Iterable[int] | None = None,
        experts_per_layer: int | Mapping[int, int] = 1,
        *,
        init: str | int = "most_selected",
        modality: str | None = None,
        modality_gate: bool = True,
        calibration: str | None = "additive",
        calibration_hidden: int = 16,
        freeze_earlier: bool | None = None,
        scores: LayerScores | None = None,
        seed: int = 0,
    ) -> ExtensionConfig:
        """Add trainable experts to some layers; each token is still sent to K experts.

        Args:
            layers: "top-half" (by the scores, the default), "all", "interval" (every second one),
                "first-half", "second-half", or indices of decoder layers. None beside a mapping:
                its layers.
            experts_per_layer: n, or layer -> n.
            init: "most_selected": the i-th new expert of a layer copies FFN and router column of
                the expert that is selected i-th most; "most_selected_tuned": the same by the counts
                after tuning, as published; "mean": the mean of the base's experts; "random":
                normal, with the ``initializer_range`` of the model; or the id of an expert to copy.
            modality: the modality whose tokens may choose the new experts; required if the model
                has several.
            modality_gate: True: tokens of other modalities cannot choose the new experts and are
                not calibrated, so text keeps its bits. False: all tokens compete for them, as
                published.
            calibration: "additive" (the published code), "multiplicative" (the paper) or None.
            calibration_hidden: hidden size of the calibration.
            freeze_earlier: freeze the experts and projectors that were added before. None: freeze
                them too, with a warning that names those that trained until now.
            scores: used instead of those of :meth:`score_layers`; of the same modality.
            seed: of the initial values.

        Returns:
            The extension, which is appended to ``patched.extensions`` too.

        Warns:
            UserWarning: something that trained until now is frozen, and ``freeze_earlier`` is None.

        Raises:
            ValueError: layers or experts that do not exist, scores that are missing or of another
                modality, a router that is not supported, a calibration or init that is unknown, or
                a gate beside an extension without one; a sharded model, or one whose experts have
                adapters of PEFT. Nothing has changed.
        """
        self.patched.check_in_place()
        added_experts.check_beside(self.patched)
        sharding.check_whole(self.patched.model, "extend")
        scores = scores or self.scores
        if modality_gate or modality is not None:
            modality = self._modality(modality)
        numbers = self._numbers(layers, experts_per_layer, scores)
        init = starts.settle_init(init, scores)
        if _uses_scores(layers, experts_per_layer, init):
            _check_modality(scores, modality)
        config = ExtensionConfig(
            numbers,
            modality=modality if modality_gate else None,
            calibration=calibration,
            calibration_hidden=calibration_hidden,
            init=str(init),
        )
        find = RoutingFinder()
        added_experts.check(self.patched, config, self.patched.extensions, find)
        sources = starts.sources(init, self.patched.moe_layers, config.experts, scores)
        config = dataclasses.replace(config, sources=sources)
        new = self._start(config, init, seed)
        frozen = {} if freeze_earlier is False else self._trained()
        with all_or_nothing(self.model):
            added_experts.attach(self.patched, config, new, find)
            if frozen and freeze_earlier is None:
                warnings.warn(_FROZEN.format(", ".join(frozen)), stacklevel=2)
            for module in frozen.values():
                module.requires_grad_(False)
            return config

    def add_projector(
        self,
        in_features: int,
        *,
        modality: str | None = None,
        hidden_features: int | None = None,
        num_layers: int = 2,
    ) -> ModalityProjector:
        """Give the model a trainable projector, which is saved with the adapter.

        Args:
            in_features: d, of the encoder's features.
            modality: of the encoder; required if the model has several.
            hidden_features: see :class:`ModalityProjector`.
            num_layers: see :class:`ModalityProjector`.

        Raises:
            ValueError: an unknown modality, one that has a projector, or a size below 1.
        """
        self.patched.check_in_place()
        modality = self._modality(modality)
        projectors.check(self.patched, modality)
        settings = {"in_features": in_features, "num_layers": num_layers}
        settings["hidden_features"] = hidden_features
        projector = projectors.build(self.patched, settings)
        with all_or_nothing(self.model):
            projectors.attach(self.patched, modality, projector)
            return projector

    def projector(self, modality: str | None = None) -> ModalityProjector:
        """Return the projector of a modality, made here or loaded with an adapter.

        Raises:
            ValueError: there is none.
        """
        modality = self._modality(modality)
        found = projectors.projectors(self.model).get(modality)
        if found is None:
            raise ValueError(
                f"the model has no projector for {modality!r}: add_projector makes one"
            )
        return found

    def disturbance(self, batches: Iterable[Mapping[str, Any]]) -> dict[str, Disturbance]:
        """Compare the model with the same model without its added experts, by modality.

        Right after :meth:`extend` this is the disturbance at step 0. With a gate, every figure for
        text is 0, provided that no other modality precedes it in its sequence.

        Args:
            batches: keyword arguments of the model's forward.

        Returns:
            "text" and each added modality -> :class:`Disturbance`.

        Raises:
            ValueError: no experts were added, or there are no batches; or a context leaves nothing
                to compare: :meth:`disabled`, or ``adapters_disabled`` if there is a gate.
        """
        self.patched.check_in_place()
        if not self.patched.extensions:
            raise ValueError("no experts were added: call extend first")
        if not added_experts.can_be_chosen(self.patched):
            raise ValueError(
                "no row can choose an added expert within disabled() or adapters_disabled(): "
                "measure the disturbance outside of it"
            )
        return disturbance.measure(self.patched, batches)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Let no token choose an added expert, gate or not; may be nested."""
        self.patched.check_in_place()
        with added_experts.disabled(self.patched):
            yield

    def _modality(self, name: str | None) -> str:
        names = self.patched.config.modalities
        if name is None and len(names) > 1:
            raise ValueError(f"the model has modalities {names}: choose one by modality=")
        name = names[0] if name is None else name
        self.patched.modality_id(name)
        return name

    def _numbers(
        self,
        layers: str | Iterable[int] | None,
        experts_per_layer: int | Mapping[int, int],
        scores: LayerScores | None,
    ) -> dict[int, int]:
        """Return the number of new experts by layer, in the layers' order."""
        if not isinstance(experts_per_layer, Mapping):
            chosen = self._choose("top-half" if layers is None else layers, scores)
            return dict.fromkeys(chosen, experts_per_layer)
        numbers = {as_layer_index(layer): n for layer, n in experts_per_layer.items()}
        numbers = dict(sorted(numbers.items()))
        if layers is not None and (chosen := self._choose(layers, scores)) != list(numbers):
            raise ValueError(f"experts_per_layer has layers {list(numbers)}, layers are {chosen}")
        return numbers

    def _choose(self, layers: str | Iterable[int], scores: LayerScores | None) -> list[int]:
        available = list(self.layers)
        half = max(1, len(available) // 2)
        if not isinstance(layers, str):
            return _indices(layers)
        if layers == "top-half":
            if scores is None:
                raise ValueError('layers="top-half" needs scores: call score_layers first')
            if set(scores.layers) != set(available):
                raise ValueError(f"the scores are of layers {scores.layers}, not of {available}")
            return sorted(scores.order[:half])
        if layers not in LAYER_CHOICES:
            raise ValueError(
                f"unknown layers {layers!r}; give indices, or one of {', '.join(LAYER_CHOICES)}"
            )
        slices = {
            "all": available,
            "interval": available[::2],
            "first-half": available[:half],
            "second-half": available[-half:],
        }
        return slices[layers]

    def _start(self, config: ExtensionConfig, init: str | int, seed: int) -> dict[int, Any]:
        generator = torch.Generator().manual_seed(seed)
        std = getattr(self.model.config, "initializer_range", 0.02)
        layers = self.patched.moe_layers
        new = added_experts.build(self.patched, config, self.patched.extensions)
        for index, module in new.items():
            copied = config.sources[index] if config.sources else None
            starts.fill(module, layers[index], init, copied, std, generator)
        return new

    def _trained(self) -> dict[str, nn.Module]:
        """Return the added experts and projectors that train, by what a message calls them."""
        found: dict[str, nn.Module] = {}
        of_layer = {
            index: iter(added_experts.added_experts(parts.layer))
            for index, parts in self.patched.moe_layers.items()
        }
        for number, config in enumerate(self.patched.extensions, 1):
            whose = "all rows" if config.modality is None else repr(config.modality)
            modules = nn.ModuleList(next(of_layer[layer]) for layer in config.experts)
            layers = ", ".join(map(str, config.experts))
            found[f"the experts of {whose} in layers {layers} (extension {number})"] = modules
        for modality, projector in projectors.projectors(self.model).items():
            found[f"the projector of {modality!r}"] = projector
        return {
            name: module
            for name, module in found.items()
            if any(parameter.requires_grad for parameter in module.parameters())
        }


_FROZEN = (
    "extend has frozen what was added before, so that of these the new experts train alone: {}. "
    "freeze_earlier=False lets all of it train on; freeze_earlier=True freezes without this warning"
)


def _indices(layers: Iterable[int]) -> list[int]:
    """Return the indices in ascending order."""
    if not isinstance(layers, Iterable):
        raise ValueError(f"layers must be a name or indices, got {layers!r}")
    chosen = [as_layer_index(layer) for layer in layers]
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"layers has an index twice: {chosen}")
    return sorted(chosen)


def _uses_scores(
    layers: str | Iterable[int] | None, experts_per_layer: int | Mapping[int, int], init: str | int
) -> bool:
    by_score = layers is None and not isinstance(experts_per_layer, Mapping)
    by_score |= isinstance(layers, str) and layers == "top-half"
    return by_score or starts.copies_most_selected(init)


def _check_modality(scores: LayerScores, modality: str | None) -> None:
    """Raise ValueError if the scores are known to be of another modality; None: all rows."""
    if None not in (modality, scores.modality) and modality != scores.modality:
        raise ValueError(
            f"the scores are of modality {scores.modality!r}, the new experts are for "
            f"{modality!r}: call score_layers(..., modality={modality!r}), or give scores="
        )


def _check_same(config: ModalityLoraConfig, settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless a patched model has these settings."""
    for name, value in settings.items():
        present = getattr(config, name)
        value = value if isinstance(value, str) else tuple(value)
        if present != value:
            raise ValueError(
                f"the model was patched with another configuration: {name}={present!r}, not "
                f"{value!r}; unpatch() it first, or leave {name} out"
            )
