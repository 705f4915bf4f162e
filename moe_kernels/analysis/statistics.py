"""What routing counts say: load, entropy, divergence of modalities, specialised experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """Sums over the rows that a recorder saw. L layers, M modalities, E experts.

    counts: (L, M, E) int64, how often a row of the modality chose the expert
    rows: (L, M) int64, how many rows of the modality the router saw
    entropy_sum: (L, M) float64, the sum over rows of the entropy of softmax(router logits), in nats
    """

    modalities: tuple[str, ...]
    layers: tuple[str, ...]
    counts: torch.Tensor
    rows: torch.Tensor
    entropy_sum: torch.Tensor

    def __post_init__(self):
        expected = (len(self.layers), len(self.modalities))
        if tuple(self.counts.shape[:2]) != expected or tuple(self.rows.shape) != expected:
            raise ValueError(
                f"{len(self.layers)} layers and {len(self.modalities)} modalities do not fit "
                f"counts {tuple(self.counts.shape)} and rows {tuple(self.rows.shape)}"
            )

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

        0: the same experts, 1: disjoint ones.
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

    def expert_kinds(
        self, first: str, second: str, *, exclusive: float = 0.9, unused_below: float = 0.1
    ) -> ExpertKinds:
        """Sorts experts by specialisation.

        Args:
            first: a modality.
            second: another.
            exclusive: a specialisation of at least this counts as serving one modality only.
            unused_below: an expert is unused when each modality gives it less than this part of an
                even load, 1/E.
        """
        p, q = self._load_of(first), self._load_of(second)
        unused = torch.maximum(p, q) < unused_below / p.shape[-1]
        share = self.specialisation(first, second)
        only_first = ~unused & (share <= 1 - exclusive)
        only_second = ~unused & (share >= exclusive)
        agnostic = ~(unused | only_first | only_second)
        return ExpertKinds(*(kind.sum(-1) for kind in (only_first, only_second, agnostic, unused)))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {
            "modalities": list(self.modalities),
            "layers": list(self.layers),
            "counts": self.counts.tolist(),
            "rows": self.rows.tolist(),
            "entropy_sum": self.entropy_sum.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RoutingStatistics:
        return cls(
            tuple(values["modalities"]),
            tuple(values["layers"]),
            torch.tensor(values["counts"], dtype=torch.int64),
            torch.tensor(values["rows"], dtype=torch.int64),
            torch.tensor(values["entropy_sum"], dtype=torch.float64),
        )

    def _load_of(self, modality: str) -> torch.Tensor:
        return self.load()[:, _index(self.modalities, modality)]


def _index(modalities: Sequence[str], name: str) -> int:
    if name not in modalities:
        raise ValueError(f"no modality {name!r}; recorded were {', '.join(modalities)}")
    return modalities.index(name)
