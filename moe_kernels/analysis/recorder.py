"""Counting, while a model runs, which experts its routers choose for rows of each modality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType

import torch
from torch import Tensor, nn

from moe_kernels.analysis.rows import RowModality, find_moe_blocks, watch_routers
from moe_kernels.analysis.statistics import RoutingStatistics


class RoutingRecorder:
    """While open, sums up the choices of every router of ``model``, in constant memory.

        with torch.no_grad(), RoutingRecorder(model) as recorder:
            model(input_ids=..., attention_mask=...)
        recorder.statistics().divergence("text", "image")

    The modality of each row is, in this order: what ``observe`` was given for this forward; the
    call's own ``modality_ids``; ``modality_of(input_ids)``; that of the token's id in a model that
    :func:`moe_kernels.patch_model` has patched; in any other model the base modality. Padding (-1,
    or 0 in a 2-D ``attention_mask``) is not counted. Routers are the ``gate`` or ``router`` of
    every module that has ``experts``; their forward returns (logits, scores, indices), one row for
    each token. Under activation checkpointing a forward runs twice and counts twice: record without
    gradients. Nothing synchronises with a GPU; modality ids are checked on the CPU, and on a GPU
    with ``MOE_KERNELS_CHECK=1`` (else ids without a name are not counted).

    Args:
        model: any Mixture of Experts of transformers, patched or not, wrapped (DDP) or not.
        modality_of: (B, S) token ids -> (B, S) modality ids; see :func:`modality_by_token_id`.
        modalities: their names, the base modality first. Default: "text", then those that a patched
            model was patched for, or "image" beside a ``modality_of``.

    Raises:
        ValueError: the model has no router; in a forward: the modality of its rows is unknown, or
            of another shape than its tokens, or without a name.
    """

    def __init__(
        self,
        model: nn.Module,
        modality_of: Callable[[Tensor], Tensor] | None = None,
        *,
        modalities: Sequence[str] | None = None,
    ):
        self.model = model
        self._rows_of = RowModality(model, modality_of, modalities)
        self.modalities = self._rows_of.names
        self._blocks = find_moe_blocks(model)
        self._counts: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        self._entropy_sum: dict[str, Tensor] = {}
        self._hooks: AbstractContextManager | None = None

    def __enter__(self) -> RoutingRecorder:
        if self._hooks is not None:
            raise RuntimeError("this recorder is open already")
        self._hooks = watch_routers(self._blocks, self._rows_of, self._add)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        hooks, self._hooks = self._hooks, None
        hooks.__exit__(kind, error, trace)

    def observe(self, modality_ids: Tensor) -> None:
        """Gives the modality of the next forward's rows, (B, S) or (B * S,); -1: not counted."""
        self._rows_of.observed = modality_ids

    def statistics(self) -> RoutingStatistics:
        """Of everything seen so far."""
        if not self._counts:
            raise RuntimeError("nothing was recorded: no forward ran while the recorder was open")
        layers = tuple(name for name in self._blocks if name in self._counts)
        widths = tuple(self._counts[name].shape[-1] for name in layers)
        counts = torch.zeros(len(layers), len(self.modalities), max(widths), dtype=torch.int64)
        for layer, (name, width) in enumerate(zip(layers, widths, strict=True)):
            counts[layer, :, :width] = self._counts[name].cpu()
        rows, entropy_sum = (
            torch.stack([sums[name].cpu() for name in layers])
            for sums in (self._rows, self._entropy_sum)
        )
        return RoutingStatistics(self.modalities, layers, counts, rows, entropy_sum, widths)

    @torch.no_grad()
    def _add(self, layer: str, inputs: Tensor, logits: Tensor, indices: Tensor) -> None:
        """inputs: (T, H); logits: (T, E); indices: (T, K)"""
        kinds, experts, device = len(self.modalities), logits.shape[-1], logits.device
        if layer not in self._counts:
            self._counts[layer] = torch.zeros(kinds, experts, dtype=torch.int64, device=device)
            self._rows[layer] = torch.zeros(kinds, dtype=torch.int64, device=device)
            self._entropy_sum[layer] = torch.zeros(kinds, dtype=torch.float64, device=device)
        modality = self._rows_of.current.to(device, non_blocking=True)
        # Padding goes to a bin behind the last modality, which is cut off. Neither boolean indexing
        # nor bincount: both wait for the device.
        bins = torch.where((modality < 0) | (modality >= kinds), kinds, modality)
        cells = (bins.unsqueeze(1) * experts + indices).flatten()
        sums = torch.zeros((kinds + 1) * experts, dtype=torch.int64, device=device)
        sums.scatter_add_(0, cells, torch.ones_like(cells))
        self._counts[layer] += sums[: kinds * experts].view(kinds, experts)

        members = bins == torch.arange(kinds, device=device).unsqueeze(1)  # (kinds, T)
        self._rows[layer] += members.sum(1)
        # entr(0) is 0: a router may shut an expert off with a logit of -inf.
        entropy = torch.special.entr(logits.double().softmax(-1)).sum(-1)
        self._entropy_sum[layer] += torch.where(members, entropy, 0.0).sum(1)
