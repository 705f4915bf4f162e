"""Readers: classifiers that tell the caption of a picture, and the shares that they read right."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from moe_kernels.modes import evaluating
from moe_kernels.programs.shared.pictures import CaptionedPictures, TokenizedPictures, grouped
from moe_kernels.progress import bar

Decode = Callable[[torch.Tensor], torch.Tensor]

# Real pictures that every caption needs before a classifier is trained to read them.
_PICTURES_TO_READ = 10
_STEPS, _BATCH, _LR = 900, 128, 2e-3  # of an AttributeReader
_NORMAL_95 = 1.959964  # quantile of the normal distribution for an interval of 95 %


class Reader(ABC):
    """A classifier that tells the caption of a picture, raw or through the image tokenizer.

    Every reader learns from its pictures twice: raw, and as the tokenizer decodes them, since
    drawings come out of its decoder.
    """

    def __init__(self, decode: Decode):
        self.decode = decode

    @abstractmethod
    def read_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return (N,) captions' numbers of pictures (N, H, W[, 3]), floats in 0..1."""

    def read(self, codes: torch.Tensor) -> torch.Tensor:
        """Return (N,) captions' numbers of (N, tokens) codes."""
        return self.read_images(self.decode(codes))

    def read_both(self, pictures: TokenizedPictures) -> dict[str, torch.Tensor]:
        """Return the (N,) captions' numbers that are read from pictures, raw and tokenized."""
        raw = torch.from_numpy(pictures.pictures.images).float() / 255
        return {"raw": self.read_images(raw), "tokenized": self.read(pictures.codes)}


def fit_reader(learnt: TokenizedPictures, decode: Decode, seed: int = 0) -> Reader | None:
    """Return a reader that suits the data; None if there is too little to learn from.

    A network reads pictures whose captions have attributes, since many combinations of these have
    few pictures or none. A support vector machine reads whole captions.
    """
    if learnt.pictures.attributes:
        return AttributeReader.fit(learnt, decode, seed)
    return CaptionReader.fit(learnt, decode)


def _flat(images: Any) -> np.ndarray:
    return np.asarray(images, dtype=np.float32).reshape(len(images), -1)


class CaptionReader(Reader):
    """A support vector machine whose classes are the captions."""

    def __init__(self, classifier: Any, decode: Decode):
        super().__init__(decode)
        self.classifier = classifier

    @classmethod
    def fit(cls, learnt: TokenizedPictures, decode: Decode) -> CaptionReader | None:
        """Fit on real pictures, raw and as decoded by the tokenizer.

        Returns None if a caption has too few pictures to learn from, or there is one caption alone.
        """
        from sklearn.svm import SVC

        counts = np.bincount(learnt.labels, minlength=len(learnt.pictures.names))
        if len(counts) < 2 or counts.min() < _PICTURES_TO_READ:
            return None
        both = [_flat(learnt.pictures.images) / 255, _flat(decode(learnt.codes))]
        return cls(SVC(C=5.0).fit(np.concatenate(both), np.tile(learnt.labels, 2)), decode)

    def read_images(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.classifier.predict(_flat(images))).long()


class AttributeReader(Reader):
    """A convolutional network with a head for each attribute of the captions.

    What it reads is the caption whose attributes are the most probable together.

    values: for each attribute, (captions,) numbers of its values
    """

    def __init__(self, network: nn.Module, values: list[torch.Tensor], decode: Decode):
        super().__init__(decode)
        self.network, self.values = network, values

    @classmethod
    def fit(cls, learnt: TokenizedPictures, decode: Decode, seed: int) -> AttributeReader:
        """Fit on real pictures, raw and as decoded by the tokenizer."""
        attributes = learnt.pictures.attributes.values()
        values = [torch.from_numpy(np.unique(each, return_inverse=True)[1]) for each in attributes]
        decoded = (decode(learnt.codes) * 255).round().to(torch.uint8)
        images = torch.cat([torch.from_numpy(learnt.pictures.images), decoded])
        labels = torch.from_numpy(np.tile(learnt.labels, 2))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _Network(images.shape[-1], [int(each.max()) + 1 for each in values])
            _fit(network, images, [each[labels] for each in values])
        return cls(network, values, decode)

    @torch.no_grad()
    def read_images(self, images: torch.Tensor) -> torch.Tensor:
        read = []
        with evaluating(self.network):
            for some in images.split(500):
                heads = zip(self.network(some), self.values, strict=True)
                scores = sum(logits.log_softmax(1)[:, numbers] for logits, numbers in heads)
                read.append(scores.argmax(1))
        return torch.cat(read)


class _Network(nn.Module):
    """Pictures (N, H, W, channels) in 0..1 to logits, (N, size) for each head."""

    def __init__(self, channels: int, heads: list[int]):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Dropout(0.3),
            nn.Linear(64 * 8 * 8, 128), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(128, size) for size in heads)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        features = self.trunk(1 - images.permute(0, 3, 1, 2))  # white is zero, as padding is
        return [head(features) for head in self.heads]


def _fit(network: nn.Module, images: torch.Tensor, targets: list[torch.Tensor]) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=_STEPS)
    network.train()
    for _ in bar(range(_STEPS), desc="learning to read", unit="steps"):
        some = torch.randint(len(images), (_BATCH,))
        heads = network(images[some].float() / 255)
        pairs = zip(heads, targets, strict=True)
        loss = sum(F.cross_entropy(logits, numbers[some]) for logits, numbers in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


# --- what is read right


def read_right(
    read: torch.Tensor, asked: torch.Tensor, pictures: CaptionedPictures, trained: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Return the shares read right of captions with training pictures, and of those without.

    Args:
        read: (N,) captions' numbers that were read
        asked: (N,) those that are right
        pictures: its captions and their attributes
        trained: numbers of the captions that have training pictures

    Returns:
        {"trained": shares, "held_out": shares}, of which one may be missing. The shares are those
        of the "caption", all attributes together, and of each attribute; see :func:`share_right`.
    """
    groups = {
        name: torch.from_numpy(mine) for name, mine in grouped(asked.numpy(), trained).items()
    }
    kinds = {"caption": pictures.names, **pictures.attributes}
    numbers = {
        kind: torch.from_numpy(np.unique(values, return_inverse=True)[1])
        for kind, values in kinds.items()
    }
    return {
        group: {
            kind: share_right(each[read[mine]] == each[asked[mine]], asked[mine])
            for kind, each in numbers.items()
        }
        for group, mine in groups.items()
    }


def share_right(right: torch.Tensor, asked: torch.Tensor) -> dict[str, Any]:
    """Return a share with its count, Wilson's interval of 95 %, and a standard error.

    The interval takes pictures as independent. Those of one caption are not quite; the standard
    error is that of the mean over captions, None with one caption.

    Args:
        right: (N,) bool
        asked: (N,) captions' numbers
    """
    count, hits = len(right), int(right.sum())
    means = [float(right[asked == label].double().mean()) for label in asked.unique()]
    error = float(np.std(means, ddof=1) / len(means) ** 0.5) if len(means) > 1 else None
    return {
        "right": hits,
        "count": count,
        "share": hits / count,
        "interval_95": wilson_interval(hits, count),
        "standard_error_over_captions": error,
    }


def wilson_interval(hits: int, count: int) -> list[float]:
    """Return Wilson's interval of 95 % of a share, [low, high]."""
    square = _NORMAL_95**2 / count
    share = hits / count
    middle = (share + square / 2) / (1 + square)
    half = (square * (share * (1 - share) + square / 4)) ** 0.5 / (1 + square)
    return [max(0.0, middle - half), min(1.0, middle + half)]
