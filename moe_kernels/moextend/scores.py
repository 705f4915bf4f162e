"""Scores for where to add experts: the shift of a router's choices under a short tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_kernels import schema
from moe_kernels.schema import Maybe, Nullable

COUNTS = ("modality", "all")
_SCHEMA = {
    "layers": [int],
    "before": [[int]],
    "after": [[int]],
    "num_experts": [int],
    "modality": Maybe(Nullable(str)),
    "count": Maybe(Nullable(str)),
}


def check_count(count: str) -> None:
    """Raise ValueError for an unknown ``count``."""
    if count not in COUNTS:
        raise ValueError(f'count must be "modality" or "all", got {count!r}')


def check_num_experts(layer: int, number: int) -> None:
    """Raise ValueError for a layer whose choices cannot move."""
    if number < 2:
        raise ValueError(f"layer {layer} has no score: num_experts is {number}, must be at least 2")


@dataclass(frozen=True)
class LayerScores:
    """Selections of each expert by the routers, before and after the routers were tuned.

    L layers with experts, at most E experts.

    Attributes:
        layers: indices of the decoder layers, ascending.
        before: (L, E) int64, selections by the untuned routers (kappa).
        after: (L, E) int64, selections by the tuned routers (kappa'), for the same tokens.
        num_experts: number of experts in each layer; counts beyond it are zeros.
        modality: the modality whose data the routers were tuned on; None: unknown.
        count: "modality": only its tokens were counted; "all": every real token; None: unknown.

    Raises:
        ValueError: counts of other shapes, an unknown ``count``, a layer with fewer than two
            experts or without selections, which has no score.
    """

    layers: tuple[int, ...]
    before: Tensor
    after: Tensor
    num_experts: tuple[int, ...]
    modality: str | None = None
    count: str | None = None

    def __post_init__(self):
        shape = (len(self.layers), max(self.num_experts, default=0))
        if not (tuple(self.before.shape) == tuple(self.after.shape) == shape) or len(
            self.num_experts
        ) != len(self.layers):
            raise ValueError(
                f"counts must be {shape} for layers {self.layers} with {self.num_experts} experts, "
                f"got {tuple(self.before.shape)} and {tuple(self.after.shape)}"
            )
        if self.count is not None:
            check_count(self.count)
        selected = (self.before.sum(1) > 0) & (self.after.sum(1) > 0)
        for layer, number, any_selected in zip(
            self.layers, self.num_experts, selected.tolist(), strict=True
        ):
            check_num_experts(layer, number)
            if not any_selected:
                raise ValueError(f"layer {layer} has no score: no selection was counted")

    @property
    def shift(self) -> Tensor:
        """Shift (L, E) float64 of the experts' shares of selections, before - after; sums to 0."""
        before, after = (
            counts.double() / counts.sum(1, keepdim=True) for counts in (self.before, self.after)
        )
        return before - after

    @property
    def d(self) -> Tensor:
        """MoExtend's score (L,) float64: sample standard deviation of the shift over the experts.

        It is large where tuning for the modality changes the choices.
        """
        pairs = zip(self.shift, self.num_experts, strict=True)
        return torch.stack([row[:number].std() for row, number in pairs])

    @property
    def order(self) -> tuple[int, ...]:
        """Layers by d, largest first."""
        ranks = self.d.argsort(descending=True, stable=True)
        return tuple(self.layers[rank] for rank in ranks.tolist())

    def most_selected(self, layer: int, *, tuned: bool = False) -> list[int]:
        """Return a layer's experts by number of selections, before or after tuning, most first."""
        row = self.layers.index(layer)
        counts = (self.after if tuned else self.before)[row, : self.num_experts[row]]
        return counts.argsort(descending=True, stable=True).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists for JSON; ``d`` and ``order`` are included for human readers."""
        return {
            "layers": list(self.layers),
            "before": self.before.tolist(),
            "after": self.after.tolist(),
            "num_experts": list(self.num_experts),
            "modality": self.modality,
            "count": self.count,
            "d": self.d.tolist(),
            "order": list(self.order),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerScores:
        """Make scores from the result of :meth:`to_dict`; older ones lack modality and count.

        Raises:
            ValueError: a field is missing, or of another type or shape.
        """
        schema.check(values, _SCHEMA, "layer scores")
        return cls(
            tuple(values["layers"]),
            torch.tensor(values["before"], dtype=torch.int64, device="cpu"),
            torch.tensor(values["after"], dtype=torch.int64, device="cpu"),
            tuple(values["num_experts"]),
            values.get("modality"),
            values.get("count"),
        )
