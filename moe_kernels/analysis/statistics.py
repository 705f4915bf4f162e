"""What routing counts say: load, entropy, divergence of modalities, specialised experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ExpertKinds:
    """How many experts of each layer serve one modality, both, or none; each (L,) int64."""

    only_first: torch.Tensor
    only_second: torch.Tensor
    agnostic: torch.Tensor
    unused: torch.Tensor


@dataclass(frozen=True)
class RoutingStatistics:
    """Sums over the rows that a recorder saw. L layers, M modalities, at most E experts.

    counts: (L, M, E) int64, how often a row of the modality chose the expert
    rows: (L, M) int64, how many rows of the modality the router saw
    entropy_sum: (L, M) float64, the sum over rows of the entropy of softmax(router logits), in nats
    num_experts: how many each layer has; None: E in all. Counts beyond them are zeros.
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
        """The modalities that any row had."""
        some = self.rows.sum(0) > 0
        return tuple(name for name, rows in zip(self.modalities, some, strict=True) if rows)

    def exists(self) -> torch.Tensor:
        """Whether a layer has an expert of this number, (L, E) bool."""
        return torch.arange(self.counts.shape[-1]) < torch.tensor(self.num_experts).unsqueeze(1)

    def load(self) -> torch.Tensor:
        """f(e|m): the share of a modality's choices that fell on an expert, (L, M, E) float64.

        Sums to 1 over experts; zeros for a modality that was never seen.
        """
        total = self.counts.sum(-1, keepdim=True)
        return self.counts.double() / total.clamp(min=1)

    def entropy(self) -> torch.Tensor:
        """The router's mean entropy in nats, (L, M); log(E) where it does not choose at all."""
        return self.entropy_sum / self.rows.clamp(min=1)

    def divergence(self, first: str, second: str) -> torch.Tensor:
        """Jensen-Shannon divergence of two modalities' loads in bits, (L,).

        0: the same experts, 1: disjoint ones. This and the following refuse a modality of which no
        row was seen, with ValueError.
        """
        p, q = self._load_of(first), self._load_of(second)
        middle = (p + q) / 2
        nats = (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).nan_to_num(nan=0.0).sum(
            -1
        ) / 2
        return (nats / math.log(2)).clamp(min=0)

    def specialisation(self, first: str, second: str) -> torch.Tensor:
        """f(e|second) / (f(e|first) + f(e|second)), (L, E); NaN for an expert that neither chose.

        0: the expert serves the first modality only, 1: the second only.
        """
        p, q = self._load_of(first), self._load_of(second)
        return q / (p + q)

    def unused(self, first: str, second: str, *, below: float = 0.1) -> torch.Tensor:
        """Experts to which each modality gives less than this part of 1/E, (L, E) bool."""
        p, q = self._load_of(first), self._load_of(second)
        even = 1 / torch.tensor(self.num_experts, dtype=torch.float64).unsqueeze(1)
        return (torch.maximum(p, q) < below * even) & self.exists()

    def expert_kinds(
        self, first: str, second: str, *, exclusive: float = 0.9, unused_below: float = 0.1
    ) -> ExpertKinds:
        """Sorts experts by specialisation.

        Args:
            first: a modality.
            second: another.
            exclusive: a specialisation of at least this counts as serving one modality only.
            unused_below: see :meth:`unused`.
        """
        unused = self.unused(first, second, below=unused_below)
        share = self.specialisation(first, second)
        only_first = ~unused & (share <= 1 - exclusive)
        only_second = ~unused & (share >= exclusive)
        agnostic = ~(unused | only_first | only_second) & self.exists()
        return ExpertKinds(*(kind.sum(-1) for kind in (only_first, only_second, agnostic, unused)))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
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
        return cls(
            tuple(values["modalities"]),
            tuple(values["layers"]),
            torch.tensor(values["counts"], dtype=torch.int64),
            torch.tensor(values["rows"], dtype=torch.int64),
            torch.tensor(values["entropy_sum"], dtype=torch.float64),
            tuple(values["num_experts"]) if "num_experts" in values else None,
        )

    def _load_of(self, modality: str) -> torch.Tensor:
        if modality not in self.seen():
            raise ValueError(
                f"no row of modality {modality!r} was recorded; there were "
                f"{', '.join(self.seen()) or 'none at all'}"
            )
        return self.load()[:, self.modalities.index(modality)]
