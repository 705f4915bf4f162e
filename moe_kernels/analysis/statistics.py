"""Statistics of routing counts: load, entropy, divergence of modalities, specialisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from moe_kernels import schema
from moe_kernels.schema import Maybe

_SCHEMA = {
    "modalities": [str],
    "layers": [str],
    "counts": [[[int]]],
    "rows": [[int]],
    "entropy_sum": [[float]],
    "num_experts": Maybe([int]),
}


@dataclass(frozen=True)
class ExpertKinds:
    """Numbers of experts per layer that serve one modality, both, or none; each (L,) int64."""

    only_first: torch.Tensor
    only_second: torch.Tensor
    agnostic: torch.Tensor
    unused: torch.Tensor


@dataclass(frozen=True)
class RoutingStatistics:
    """Sums over recorded rows, for L layers, M modalities and at most E experts a layer.

    Attributes:
        modalities: their names, the base modality first.
        layers: names of the layers.
        counts: (L, M, E) int64, number of times a row of the modality chose the expert.
        rows: (L, M) int64, number of rows of the modality that the router received.
        entropy_sum: (L, M) float64, the sum over rows of the entropy of softmax(router logits), in
            nats.
        num_experts: number of experts in each layer; None: E in every layer. In a layer with fewer
            than E experts the remaining counts are zeros.
    """

    modalities: tuple[str, ...]
    layers: tuple[str, ...]
    counts: torch.Tensor
    rows: torch.Tensor
    entropy_sum: torch.Tensor
    num_experts: tuple[int, ...] | None = None

    def __post_init__(self):
        expected = (len(self.layers), len(self.modalities))
        if tuple(self.counts.shape[:2]) != expected or tuple(self.rows.shape) != expected:
            raise ValueError(
                f"{len(self.layers)} layers and {len(self.modalities)} modalities do not fit "
                f"counts {tuple(self.counts.shape)} and rows {tuple(self.rows.shape)}"
            )
        if self.num_experts is None:
            object.__setattr__(self, "num_experts", (self.counts.shape[-1],) * len(self.layers))

    def seen(self) -> tuple[str, ...]:
        """Return the names of the modalities that have at least one row."""
        has_rows = self.rows.sum(0) > 0
        return tuple(name for name, seen in zip(self.modalities, has_rows, strict=True) if seen)

    def exists(self) -> torch.Tensor:
        """Return a mask of the experts that each layer has, (L, E) bool."""
        numbers = torch.tensor(self.num_experts, device=self.counts.device).unsqueeze(1)
        return torch.arange(self.counts.shape[-1], device=numbers.device) < numbers

    def load(self) -> torch.Tensor:
        """Return f(e|m), the share of modality m's choices that fell on expert e.

        (L, M, E) float64. It sums to 1 over experts; a modality without rows has zeros.
        """
        total = self.counts.sum(-1, keepdim=True)
        return self.counts.double() / total.clamp(min=1)

    def entropy(self) -> torch.Tensor:
        """Return the router's mean entropy in nats, (L, M); log(E) where all logits are equal."""
        return self.entropy_sum / self.rows.clamp(min=1)

    def divergence(self, first: str, second: str) -> torch.Tensor:
        """Return the Jensen-Shannon divergence of two modalities' loads in bits, (L,).

        0: both modalities load the experts equally; 1: they use disjoint experts.

        Raises:
            ValueError: no row of a modality was recorded.
        """
        p, q = self._load_of(first), self._load_of(second)
        middle = (p + q) / 2
        nats = (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).nan_to_num(nan=0.0).sum(
            -1
        ) / 2
        return (nats / math.log(2)).clamp(min=0)

    def summary(self) -> dict[str, float]:
        """Return the means over layers of figures for a log, of the modalities that have rows.

        ``<modality>_largest_load`` is the load of the expert that is chosen most, times E: 1 if
        routing is even. ``<modality>_divergence`` is that of an added modality from the base one.

        Example:
            >>> sorted(recorder.statistics().summary())
            ['image_divergence', 'image_largest_load', 'text_largest_load']
        """
        numbers = self.counts.new_tensor(self.num_experts, dtype=torch.float64)
        largest = (self.load().amax(-1) * numbers.unsqueeze(1)).mean(0)
        base, *_ = self.modalities
        seen, found = self.seen(), {}
        for number, name in enumerate(self.modalities):
            if name in seen:
                found[f"{name}_largest_load"] = float(largest[number])
            if name in seen and base in seen and number:
                found[f"{name}_divergence"] = float(self.divergence(base, name).mean())
        return found

    def specialisation(self, first: str, second: str) -> torch.Tensor:
        """Return f(e|second) / (f(e|first) + f(e|second)), (L, E).

        0: the expert serves the first modality only; 1: the second only; NaN: neither chose it.

        Raises:
            ValueError: no row of a modality was recorded.
        """
        p, q = self._load_of(first), self._load_of(second)
        return q / (p + q)

    def unused(self, first: str, second: str, *, below: float = 0.1) -> torch.Tensor:
        """Return a mask of the experts whose load from each modality is less than ``below`` / E.

        (L, E) bool; 1/E is the load of every expert under even routing.

        Raises:
            ValueError: no row of a modality was recorded.
        """
        p, q = self._load_of(first), self._load_of(second)
        numbers = self.counts.new_tensor(self.num_experts, dtype=torch.float64)
        even = 1 / numbers.unsqueeze(1)
        return (torch.maximum(p, q) < below * even) & self.exists()

    def expert_kinds(
        self, first: str, second: str, *, exclusive: float = 0.9, unused_below: float = 0.1
    ) -> ExpertKinds:
        """Count the experts of each layer by specialisation.

        Args:
            first: a modality.
            second: another modality.
            exclusive: an expert serves ``second`` only if its specialisation is at least this, and
                ``first`` only if it is at most 1 minus this.
            unused_below: ``below`` of :meth:`unused`.

        Raises:
            ValueError: no row of a modality was recorded.
        """
        unused = self.unused(first, second, below=unused_below)
        share = self.specialisation(first, second)
        only_first = ~unused & (share <= 1 - exclusive)
        only_second = ~unused & (share >= exclusive)
        agnostic = ~(unused | only_first | only_second) & self.exists()
        return ExpertKinds(*(kind.sum(-1) for kind in (only_first, only_second, agnostic, unused)))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain lists, for JSON."""
        return {
            "modalities": list(self.modalities),
            "layers": list(self.layers),
            "counts": self.counts.tolist(),
            "rows": self.rows.tolist(),
            "entropy_sum": self.entropy_sum.tolist(),
            "num_experts": list(self.num_experts),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RoutingStatistics:
        """Make statistics from the result of :meth:`to_dict`; older ones lack num_experts.

        Raises:
            ValueError: a field is missing, or of another type or shape.
        """
        schema.check(values, _SCHEMA, "routing statistics")
        return cls(
            tuple(values["modalities"]),
            tuple(values["layers"]),
            torch.tensor(values["counts"], dtype=torch.int64, device="cpu"),
            torch.tensor(values["rows"], dtype=torch.int64, device="cpu"),
            torch.tensor(values["entropy_sum"], dtype=torch.float64, device="cpu"),
            tuple(values["num_experts"]) if "num_experts" in values else None,
        )

    def _load_of(self, modality: str) -> torch.Tensor:
        if modality not in self.seen():
            raise ValueError(
                f"no row of modality {modality!r} was recorded; recorded modalities: "
                f"{', '.join(self.seen()) or 'none'}"
            )
        return self.load()[:, self.modalities.index(modality)]
