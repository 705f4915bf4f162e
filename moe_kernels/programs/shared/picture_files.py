"""Pictures in files, and the metadata that list them: what is read, and what is set aside."""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

METADATA = ("metadata.csv", "metadata.jsonl")
# No format that starts another program, as EPS does.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_CAPTION = 2000  # characters; a batch is as long as its longest caption
_COLOURS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")

Row = tuple[str, dict[Any, Any]]  # where a row stands, and its values by column


class SetAside(ValueError):
    """Raised for a row or a file that cannot be used; the message is the reason."""


# --- metadata


def read_listing(folder: Path) -> tuple[Path, list[Row]]:
    """Return the metadata.csv or .jsonl of a folder, and its rows.

    Raises:
        ValueError: there is no such file, there are two, or it cannot be read; says where.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{folder} has neither {' nor '.join(METADATA)}")
    if len(found) > 1:
        raise ValueError(f"{folder} has both {' and '.join(METADATA)}: keep one of them")
    (listing,) = found
    try:
        with listing.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{listing} is not in UTF-8: {error}") from error
    rows = (_csv_rows if listing.suffix == ".csv" else _json_rows)(listing, text)
    columns = dict.fromkeys(str(name) for _, row in rows for name in row if name is not None)
    if not {"file_name", "text"} <= columns.keys():
        seen = f"it has {', '.join(columns)}{_hint(columns)}" if rows else "it has no rows"
        raise ValueError(f"{listing} must have the columns file_name and text; {seen}")
    return listing, rows


def _hint(columns: Iterable[str]) -> str:
    """Return what is probably wrong with a header."""
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if any(separator in column for column in columns):
            return f", with {name}: separate the columns by commas"
    if {"file_name", "text"} <= {column.strip().lower() for column in columns}:
        return ": write these names in small letters, without spaces"
    return ""


def _csv_rows(listing: Path, text: str) -> list[Row]:
    """Return the rows of a metadata.csv.

    A row is one line: a quote that is not closed would make one caption of all lines up to the next
    quote, and nothing tells it from a caption with line breaks.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, rows, last = None, [], 0
    try:
        for values in reader:
            first, last = last + 1, reader.line_num
            if first < last:
                raise ValueError(
                    f"{listing}: lines {first} to {last} are one row: close the quote in line "
                    f"{first}, or use metadata.jsonl, where captions may have line breaks"
                )
            if header is None and values:
                header = values
                _check_distinct(header, f"{listing} line {first}")
            elif values:
                padded = values + [None] * (len(header) - len(values))
                row: dict[Any, Any] = dict(zip(header, padded, strict=False))
                if len(values) > len(header):
                    row[None] = values[len(header) :]
                rows.append((f"{listing.name} line {first}", row))
    except csv.Error as error:
        raise ValueError(
            f"{listing}: in the row that starts in line {last + 1}: {error}"
        ) from error
    return rows


def _check_distinct(names: Iterable[str], place: str) -> None:
    """Raise ValueError if a column that is used is named twice."""
    counts = Counter(names)
    for name in ("file_name", "text"):
        if counts[name] > 1:
            raise ValueError(f"{place} names {name} {counts[name]} times: keep one of them")


def _json_rows(listing: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            pairs = json.loads(line, object_pairs_hook=_Pairs)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{listing} line {number} is not JSON: {error}") from error
        if not isinstance(pairs, _Pairs):
            raise ValueError(f"{listing} line {number} is not a JSON object")
        _check_distinct((name for name, _ in pairs), f"{listing} line {number}")
        rows.append((f"{listing.name} line {number}", dict(pairs)))
    return rows


class _Pairs(list):
    """A JSON object as (key, value) pairs, since a dict would keep the last of equal keys."""


def caption_of(row: dict[Any, Any]) -> str:
    """Return the caption of a row.

    Raises:
        SetAside: the row has none, or one that is too long or not text.
    """
    caption = row.get("text")
    if None in row:
        raise SetAside("the row has more fields than the header: quote a caption with commas")
    if caption is None or caption == "" or (isinstance(caption, str) and caption.isspace()):
        raise SetAside("the row has no caption")
    if not isinstance(caption, str):
        raise SetAside(f"its caption is not text: {caption!r}")
    if len(caption) > MAX_CAPTION:
        raise SetAside(f"its caption has {len(caption):,} characters, more than {MAX_CAPTION:,}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise SetAside(f"its caption is not text: {error}") from error
    return caption


def file_of(root: Path, row: dict[Any, Any]) -> Path:
    """Return the file of a row. A link that stands in ``root`` is followed, wherever it leads.

    Raises:
        SetAside: the row names none, or one that lies outside of ``root``.
    """
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise SetAside("the row names no file")
    try:
        path = Path(os.path.abspath(root / name))  # without .., whatever is a link
        is_inside = path.resolve().is_relative_to(root.resolve())
        is_inside, is_file = is_inside or path.is_relative_to(os.path.abspath(root)), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, a zero byte
        raise SetAside(f"it cannot be opened: {error}") from error
    if not is_inside:
        raise SetAside(f"it lies outside of {root}")
    if not is_file:
        raise SetAside("there is no such file")
    return path


# --- pictures


def is_picture(path: Path) -> bool:
    """Return whether a file is a picture by its name, of any format that pillow knows."""
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN and path.is_file()


def read_picture(path: Path, size: int) -> np.ndarray:
    """Return a picture as (size, size, 3) uint8.

    It is turned as its EXIF data say, and scaled up or down until its longer side is ``size``. It
    stands in the middle of a white square, and white is behind its transparent pixels. Greys of 12
    or 16 bits, and floats in 0..1, are scaled to 0..255. Of an animation the first frame is taken.

    Raises:
        SetAside: the file is damaged, too large or none of ``FORMATS``, or it has values whose
            range is unknown.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=FORMATS) as picture:
                upright = ImageOps.exif_transpose(picture)
                upright.load()
        except Image.UnidentifiedImageError as error:
            raise SetAside(f"it is damaged, or none of {', '.join(FORMATS)}") from error
        except Exception as error:  # pillow's decoders raise whatever a damaged file leads to
            raise SetAside(f"it cannot be read ({type(error).__name__}: {error})") from error
    return _on_white(_as_rgba(upright, _most(picture), _is_negative(picture)), size)


def _most(picture: Image.Image) -> int | None:
    """Return the value of white in a file of greys with more than 8 bits; None: unknown."""
    if picture.mode == "F":
        return 1
    if picture.mode.startswith("I;16"):
        bits = _tag(picture, 258, (16,))[0]  # a TIFF may have 12
        return 2**bits - 1
    # Pillow makes 32 bits of 16 in these formats, which have no more.
    return 65535 if picture.mode == "I" and picture.format in ("PNG", "PPM") else None


def _is_negative(picture: Image.Image) -> bool:
    """Return whether 0 is white in a file of greys with more than 8 bits; pillow reads it as is."""
    return picture.mode[0] in "FI" and _tag(picture, 262, 1) == 0


def _tag(picture: Image.Image, number: int, default: Any) -> Any:
    return getattr(picture, "tag_v2", {}).get(number, default)


def _as_rgba(picture: Image.Image, most: int | None, is_negative: bool) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _from_greys(picture, most, is_negative)
    if picture.mode not in _COLOURS:
        raise SetAside(f"its colours are of mode {picture.mode}: save it in RGB")
    return picture.convert("RGBA")


def _from_greys(picture: Image.Image, most: int | None, is_negative: bool) -> Image.Image:
    values = np.asarray(picture).astype(np.float64)
    low, high = values.min(), values.max()
    if most is None:
        raise SetAside(
            f"its values are {low:g}..{high:g}, in 32 bits or signed, so it is unknown which of "
            "them is white: save it in 8 or 16 bits without a sign"
        )
    if not (low >= 0 and high <= most):  # NaN is refused too
        kind = "float greys" if picture.mode == "F" else "greys"
        raise SetAside(f"its values are {low:g}..{high:g}; expected {kind}, 0..{most}")
    values = (most - values if is_negative else values) * (255 / most)
    return Image.fromarray(values.round().astype(np.uint8)).convert("RGBA")


def _on_white(picture: Image.Image, size: int) -> np.ndarray:
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    if max(picture.size) < size:  # a thumbnail is never larger than the picture
        scale = size / max(picture.size)
        sides = [max(1, round(side * scale)) for side in picture.size]
        picture = picture.resize(sides, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), "white")
    place = ((size - picture.width) // 2, (size - picture.height) // 2)
    canvas.alpha_composite(picture, place)
    return np.asarray(canvas.convert("RGB"))
