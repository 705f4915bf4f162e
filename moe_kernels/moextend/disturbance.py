"""Disturbance by added experts: changed outputs and changed routing, by modality."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moe_kernels.analysis.rows import RowModality, watch_routers
from moe_kernels.models.added_experts import disabled
from moe_kernels.models.handle import PatchState
from moe_kernels.models.parts import find_moe_blocks
from moe_kernels.modes import evaluating


@dataclass(frozen=True)
class Disturbance:
    """Comparison of a model with and without its added experts, on rows of one modality.

    Attributes:
        modality: of the rows.
        rows: the number of rows.
        output_change: ||with - without|| / ||without|| of the logits; NaN without rows.
        changed_rows: share of rows whose logits changed in any bit.
        rerouted_rows: share of rows that some layer sends to other experts.
        rerouted_by_layer: that share in each layer with experts.
    """

    modality: str
    rows: int
    output_change: float
    changed_rows: float
    rerouted_rows: float
    rerouted_by_layer: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"rerouted_by_layer": list(self.rerouted_by_layer)}


class _Sums:
    """Running sums for one modality."""

    def __init__(self, layers: int):
        self.rows = self.changed = self.rerouted = 0
        self.difference = self.norm = 0.0
        self.by_layer = torch.zeros(layers, dtype=torch.int64, device="cpu")

    def add(self, expected: Tensor, actual: Tensor, rerouted: Tensor) -> None:
        """Add logits (rows, V) without and with added experts, and ``rerouted`` (L, rows) bool."""
        self.rows += expected.shape[0]
        self.changed += int((expected != actual).any(-1).sum())
        self.difference += float((actual.double() - expected.double()).square().sum())
        self.norm += float(expected.double().square().sum())
        self.rerouted += int(rerouted.any(0).sum())
        self.by_layer += rerouted.sum(1).cpu()

    def result(self, modality: str) -> Disturbance:
        rows = max(self.rows, 1)
        change = (self.difference / self.norm) ** 0.5 if self.norm else torch.nan
        by_layer = tuple((self.by_layer.double() / rows).tolist())
        return Disturbance(
            modality, self.rows, change, self.changed / rows, self.rerouted / rows, by_layer
        )


@torch.no_grad()
def measure(patched: PatchState, batches: Iterable[Mapping[str, Any]]) -> dict[str, Disturbance]:
    """See :meth:`moe_kernels.moextend.ExpertExtender.disturbance`."""
    model = patched.model
    row_modality = RowModality(model)
    sums: list[_Sums] = []
    with evaluating(model):
        for batch in batches:
            batch = {name: value for name, value in batch.items() if name != "labels"}
            with disabled(patched):
                expected, experts_without, modality = _forward(patched, batch, row_modality)
            actual, experts_with, _ = _forward(patched, batch, row_modality)
            rerouted = (experts_with != experts_without).any(-1)
            sums = sums or [_Sums(len(experts_with)) for _ in row_modality.names]
            for number, each in enumerate(sums):
                at = modality == number
                each.add(expected[at], actual[at], rerouted[:, at])
    if not sums:
        raise ValueError("the disturbance needs at least one batch, got none")
    return {name: each.result(name) for name, each in zip(row_modality.names, sums, strict=True)}


def _forward(
    patched: PatchState, batch: Mapping[str, Any], row_modality: RowModality
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (T, V), each row's experts in ascending order (L, T, K), modality ids (T,)."""
    chosen, modality = [], []

    def add(layer: str, inputs: Tensor, logits: Tensor, indices: Tensor) -> None:
        chosen.append(indices.sort(-1).values)
        modality.append(row_modality.current)

    with watch_routers(find_moe_blocks(patched.model), row_modality, add):
        logits = patched.model(**batch).logits
    return logits.flatten(0, 1), torch.stack(chosen), modality[-1].to(logits.device)
