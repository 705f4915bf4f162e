"""Figures out of the JSON of redundancy.py that its tables, verdicts and plots share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moe_kernels.analysis import RoutingStatistics
from studies.report import NotMeasured, Results, seeds_of, test_nll

GW = "gromov_wasserstein"
_CONTROLS = ("plora", "init-gaussian", "init-mean", "init-permuted")
_VARIANTS = ("cosine", "euclidean", "exact", "embedding", "head")
# Runs that differ in their start; those named after GW are compared with the others.
STARTS = {
    "rows": (*_CONTROLS, f"init-{GW}"),
    "variants": (*_CONTROLS, *(f"init-{GW}-{variant}" for variant in _VARIANTS)),
    "few": ("few-normal", "few-gaussian", "few-permuted", f"few-{GW}"),
    "emoji": ("emoji-plora", "emoji-permuted", f"emoji-{GW}"),
    "adapters": ("plora", "lora-permuted", f"lora-{GW}"),
}


def steps(result: Results) -> float:
    """Steps to the fixed loss; NaN where it was not reached or training diverged later."""
    found = result["steps_to_fixed_loss"]
    return found if found is not None and math.isfinite(test_nll(result)) else math.nan


def log_gradient(result: Results) -> float:
    return math.log(result["largest_gradient_norm"])


def looks(data: Results, when: str) -> list[Results]:
    """Routing and similarity of experts "before" or "after" training, one a seed."""
    return [result[f"look_{when}"] for result in seeds_of(data, "plora").values()]


def routing(look: Results) -> RoutingStatistics:
    return RoutingStatistics.from_dict(look["routing"])


def divergence(several: Sequence[Results]) -> np.ndarray:
    """Divergence of text and image loads in bits, the mean of layers, one number a seed."""
    return np.array([float(routing(look).divergence("text", "image").mean()) for look in several])


def similarity(several: Sequence[Results], modality: str) -> np.ndarray:
    """Similarity of experts, the mean of pairs and layers, one number a seed."""
    return np.array([np.nanmean(look["similarity"][modality]) for look in several])


def layer_similarity(data: Results, modality: str) -> np.ndarray:
    """Similarity of experts before training, (seeds, layers)."""
    return np.array([look["similarity"][modality] for look in looks(data, "before")])


def layer_losses(data: Results) -> np.ndarray:
    """Image loss where one layer was adapted alone, (seeds, layers).

    Raises:
        NotMeasured: not every layer was.
    """
    layers = range(layer_similarity(data, "text").shape[1])
    if any(f"layer-{layer}" not in data["runs"] for layer in layers):
        raise NotMeasured("every layer adapted alone")
    losses = [[test_nll(r) for r in seeds_of(data, f"layer-{layer}").values()] for layer in layers]
    return np.array(losses).T
