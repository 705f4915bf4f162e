"""Figures out of the looks that runs took at their experts, before and after training."""

from __future__ import annotations

import numpy as np

from moe_kernels.analysis import RoutingStatistics
from studies import report
from studies.report import Results, mean_and_spread

MODALITIES = ("text", "image")
WHEN = ("before", "after")


def routings(data: Results, run: str, when: str) -> list[RoutingStatistics]:
    """Routing of a run "before" or "after" training, one a seed."""
    results = report.seeds_of(data, run).values()
    return [RoutingStatistics.from_dict(result[f"look_{when}"]["routing"]) for result in results]


def layer_divergence(data: Results, run: str, when: str) -> np.ndarray:
    """Divergence of text and image loads in bits, (seeds, layers)."""
    found = [each.divergence("text", "image").tolist() for each in routings(data, run, when)]
    return np.array(found, dtype=float)


def divergence(data: Results, run: str, when: str) -> np.ndarray:
    """Divergence of text and image loads in bits, the mean of layers, one number a seed."""
    found = [each.divergence("text", "image").mean() for each in routings(data, run, when)]
    return np.array(found, dtype=float)


def layer_similarity(data: Results, run: str, modality: str, when: str) -> np.ndarray:
    """Similarity of experts, the mean of pairs, (seeds, layers)."""
    results = report.seeds_of(data, run).values()
    return np.array([result[f"look_{when}"]["similarity"][modality] for result in results])


def similarity(data: Results, run: str, modality: str, when: str) -> np.ndarray:
    """Similarity of experts, the mean of pairs and layers, one number a seed."""
    return np.nanmean(layer_similarity(data, run, modality, when), axis=1)


def specialised(data: Results, run: str, when: str) -> np.ndarray:
    """Number of experts that serve one modality alone, one a seed."""
    kinds = [each.expert_kinds("text", "image") for each in routings(data, run, when)]
    return np.array([float(each.only_first.sum() + each.only_second.sum()) for each in kinds])


def routing_row(data: Results, run: str, when: str) -> str:
    """Divergence, experts by kind, and similarity on text and on image rows."""
    kinds = [each.expert_kinds("text", "image") for each in routings(data, run, when)]
    numbers = (
        np.array([float(getattr(each, kind).sum()) for each in kinds])
        for kind in ("only_first", "only_second", "agnostic", "unused")
    )
    alike = (similarity(data, run, modality, when) for modality in MODALITIES)
    return " | ".join((
        mean_and_spread(divergence(data, run, when)),
        *(mean_and_spread(each, 1) for each in numbers),
        *(mean_and_spread(each) for each in alike),
    ))  # fmt: skip


def loads_part(data: Results, run: str) -> np.ndarray:
    """Divergence after less before, above zero where loads grow apart, one number a seed."""
    return divergence(data, run, "after") - divergence(data, run, "before")


def outputs_part(data: Results, run: str) -> np.ndarray:
    """Similarity on image rows after less before, one number a seed."""
    return similarity(data, run, "image", "after") - similarity(data, run, "image", "before")
