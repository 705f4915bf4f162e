"""What added experts change, by modality: outputs, and the experts that rows are sent to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moe_kernels.analysis.rows import RowModality, find_moe_blocks, watch_routers
from moe_kernels.models.extensions import disabled
from moe_kernels.models.patch import PatchedModel


@dataclass(frozen=True)
class Disturbance:
    """A model with its added experts against the same without them, on rows of one modality.

    Attributes:
        modality: the rows'.
        rows: how many.
        output_change: ||with - without|| / ||without|| of the logits; NaN without rows.
        changed_rows: share of rows with another bit in their logits.
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
        """Plain values, for JSON."""
        return asdict(self) | {"rerouted_by_layer": list(self.rerouted_by_layer)}


class _Sums:
    """Of one modality."""

    def __init__(self, layers: int):
        self.rows = self.changed = self.rerouted = 0
        self.difference = self.norm = 0.0
        self.by_layer = torch.zeros(layers, dtype=torch.int64)

    def add(self, expected: Tensor, actual: Tensor, rerouted: Tensor) -> None:
        """(rows, V) logits without and with added experts; (L, rows) bool."""
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
def measure(patched: PatchedModel, batches: Iterable[Mapping[str, Any]]) -> dict[str, Disturbance]:
    """See :meth:`moe_kernels.moextend.ExpertExtender.disturbance`."""
    model = patched.model
    rows_of = RowModality(model)
    sums: list[_Sums] = []
    training = model.training
    model.eval()
    try:
        for batch in batches:
            batch = {name: value for name, value in batch.items() if name != "labels"}
            with disabled(patched):
                expected, experts, modality = _forward(patched, batch, rows_of)
            actual, others, _ = _forward(patched, batch, rows_of)
            rerouted = (experts != others).any(-1)
            sums = sums or [_Sums(len(experts)) for _ in rows_of.names]
            for number, each in enumerate(sums):
                at = modality == number
                each.add(expected[at], actual[at], rerouted[:, at])
    finally:
        model.train(training)
    if not sums:
        raise ValueError("there were no batches")
    return {name: each.result(name) for name, each in zip(rows_of.names, sums, strict=True)}


def _forward(
    patched: PatchedModel, batch: Mapping[str, Any], rows_of: RowModality
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (T, V), the experts of each row in ascending order (L, T, K), modality ids (T,)."""
    chosen, modality = [], []

    def add(layer: str, inputs: Tensor, logits: Tensor, indices: Tensor) -> None:
        chosen.append(indices.sort(-1).values)
        modality.append(rows_of.current)

    with watch_routers(find_moe_blocks(patched.model), rows_of, add):
        logits = patched.model(**batch).logits
    return logits.flatten(0, 1), torch.stack(chosen), modality[-1].to(logits.device)
