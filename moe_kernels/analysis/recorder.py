"""Counting, while a model runs, which experts its routers choose for rows of each modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import torch
from torch import nn

from moe_kernels.analysis.statistics import RoutingStatistics

_PADDING = -1


def modality_by_token_id(token_ids: Mapping[str, range]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from token ids, any shape, to modality ids: m in the m-th range, else 0."""

    def modality_of(input_ids: torch.Tensor) -> torch.Tensor:
        modality = torch.zeros_like(input_ids)
        for number, ids in enumerate(token_ids.values(), start=1):
            modality = modality.masked_fill(
                (input_ids >= ids.start) & (input_ids < ids.stop), number
            )
        return modality

    return modality_of


class RoutingRecorder:
    """While open, sums up the choices of every router of ``model``, in constant memory.

        with RoutingRecorder(model, modality_by_token_id({"image": token_ids})) as recorder:
            model(input_ids=..., attention_mask=...)
        recorder.statistics().divergence("text", "image")

    The modality of each row is, in this order: what ``observe`` was given for this forward; the
    call's own ``modality_ids``; ``modality_of(input_ids)``. Padding (-1, or 0 in a 2-D
    ``attention_mask``) is not counted. Routers are the ``gate`` or ``router`` of every module that
    has ``experts``; their forward returns (logits, scores, indices), one row for each token. Under
    activation checkpointing a forward runs twice and counts twice: record without gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        modality_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        modalities: Sequence[str] = ("text", "image"),
    ):
        self.model, self.modality_of, self.modalities = model, modality_of, tuple(modalities)
        self._routers = _find_routers(model)
        if not self._routers:
            raise ValueError(
                f"{type(model).__name__} has no router: "
                "no module with `experts` beside a `gate` or `router`"
            )
        self._counts: dict[str, torch.Tensor] = {}
        self._rows: dict[str, torch.Tensor] = {}
        self._entropy_sum: dict[str, torch.Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._observed: torch.Tensor | None = None
        self._current: torch.Tensor | None = None

    def __enter__(self) -> RoutingRecorder:
        if self._handles:
            raise RuntimeError("this recorder is open already")
        self._handles.append(
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        )
        for name, router in self._routers.items():
            self._handles.append(router.register_forward_hook(_RouterHook(self, name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._observed = self._current = None

    def observe(self, modality_ids: torch.Tensor) -> None:
        """Gives the modality of each row of the next forward, (B, S) or (B * S,); -1 is padding."""
        self._observed = modality_ids

    def statistics(self) -> RoutingStatistics:
        """Of everything seen so far."""
        if not self._counts:
            raise RuntimeError("nothing was recorded: no forward ran while the recorder was open")
        layers = tuple(name for name in self._routers if name in self._counts)
        counts, rows, entropy_sum = (
            torch.stack([sums[name].cpu() for name in layers])
            for sums in (self._counts, self._rows, self._entropy_sum)
        )
        return RoutingStatistics(self.modalities, layers, counts, rows, entropy_sum)

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        modality = self._observed if self._observed is not None else kwargs.get("modality_ids")
        self._observed = None
        # At a decode step `generate` passes the one new id beside the prompt's modality ids.
        if modality is None or (input_ids is not None and modality.numel() != input_ids.numel()):
            if input_ids is None or self.modality_of is None:
                raise ValueError(
                    "the modality of these rows is unknown: give modality_of (with input_ids), "
                    "modality_ids, or call observe() before the forward"
                )
            modality = self.modality_of(input_ids)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and modality.ndim == 2:
            modality = modality.masked_fill(mask[:, -modality.shape[1] :] == 0, _PADDING)
        highest = int(modality.max()) if modality.numel() else 0
        if highest >= len(self.modalities):
            raise ValueError(f"modality id {highest} has no name; modalities are {self.modalities}")
        self._current = modality.reshape(-1)

    @torch.no_grad()
    def _add(self, layer: str, logits: torch.Tensor, indices: torch.Tensor) -> None:
        """logits: (T, E); indices: (T, K)"""
        modality = self._current
        logits, indices = (
            logits.reshape(-1, logits.shape[-1]),
            indices.reshape(-1, indices.shape[-1]),
        )
        if modality is None or len(modality) != len(logits):
            seen = 0 if modality is None else len(modality)
            raise RuntimeError(
                f"{layer} routes {len(logits)} rows, but the modality of {seen} rows is known"
            )
        kinds, experts = len(self.modalities), logits.shape[-1]
        if layer not in self._counts:
            device = logits.device
            self._counts[layer] = torch.zeros(kinds, experts, dtype=torch.int64, device=device)
            self._rows[layer] = torch.zeros(kinds, dtype=torch.int64, device=device)
            self._entropy_sum[layer] = torch.zeros(kinds, dtype=torch.float64, device=device)
        # Padding goes to a bin behind the last modality, which is cut off: no boolean indexing.
        bins = torch.where(modality < 0, kinds, modality).to(logits.device)
        cells = (bins.unsqueeze(1) * experts + indices).flatten()
        self._counts[layer] += torch.bincount(cells, minlength=(kinds + 1) * experts)[
            : kinds * experts
        ].view(kinds, -1)
        self._rows[layer] += torch.bincount(bins, minlength=kinds + 1)[:kinds]
        log_probabilities = logits.double().log_softmax(-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        sums = torch.zeros(kinds + 1, dtype=torch.float64, device=logits.device).index_add_(
            0, bins, entropy
        )
        self._entropy_sum[layer] += sums[:kinds]


class _RouterHook:
    """A forward hook that knows its layer."""

    def __init__(self, recorder: RoutingRecorder, layer: str):
        self.recorder, self.layer = recorder, layer

    def __call__(self, module: nn.Module, args: tuple, output: tuple) -> None:
        if not (
            isinstance(output, tuple) and len(output) == 3 and not output[2].is_floating_point()
        ):
            raise TypeError(
                f"{self.layer} ({type(module).__name__}) does not return (logits, scores, indices)"
            )
        self.recorder._add(self.layer, output[0], output[2])


def _find_routers(model: nn.Module) -> dict[str, nn.Module]:
    routers = {}
    for name, module in model.named_modules():
        router = getattr(module, "gate", None) or getattr(module, "router", None)
        if hasattr(module, "experts") and isinstance(router, nn.Module):
            routers[name] = router
    return routers
