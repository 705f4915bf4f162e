"""Measures of how varied and how new generated pictures are.

Pass real pictures through the tokenizer before comparing generated ones with them, since encoding
alone changes a picture.
"""

from __future__ import annotations

import torch


def count_distinct(codes: torch.Tensor) -> int:
    """Return the number of different pictures among codes (N, tokens)."""
    return len(torch.unique(codes, dim=0))


def mean_pairwise_distance(images: torch.Tensor, groups: torch.Tensor) -> float:
    """Return the mean Euclidean distance of two different pictures of the same group.

    It is 0 if no group has two pictures.

    Args:
        images: (N, ...) float.
        groups: (N,), such as the digit in each picture's caption.
    """
    total, pairs = 0.0, 0
    for group in groups.unique():
        members = images[groups == group].flatten(1).double()
        distances = torch.pdist(members)
        total, pairs = total + float(distances.sum()), pairs + len(distances)
    return total / max(pairs, 1)


def nearest_distances(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean distance of each picture to its nearest reference picture.

    A copy has distance exactly 0, since distances are not computed as |a|^2 - 2ab + |b|^2.

    Args:
        images: (N, ...).
        reference: (R, ...).

    Returns:
        (N,) float32.
    """
    return _nearest(images, reference)[0]


def nearest_indices(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the index of each picture's nearest reference picture.

    Args:
        images: (N, ...).
        reference: (R, ...).

    Returns:
        (N,) int64.
    """
    return _nearest(images, reference)[1]


def _nearest(images: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    reference = reference.flatten(1).float()
    found = [
        torch.cdist(chunk, reference, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        for chunk in images.flatten(1).float().split(256)
        if len(chunk)
    ]
    if not found:
        return reference.new_empty(0), reference.new_empty(0, dtype=torch.int64)
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])
