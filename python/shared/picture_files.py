"""Pictures in files, and the metadata that list them: what is read, and what is set aside."""

from __future__ import annotations

import csv
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

METADATA = ("metadata.csv", "metadata.jsonl")
# No format that starts another program, as EPS does.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
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
        seen = f"it has {', '.join(columns)}" if rows else "it has no rows"
        raise ValueError(f"{listing} must have the columns file_name and text; {seen}")
    return listing, rows


def _csv_rows(listing: Path, text: str) -> list[Row]:
    reader, rows = csv.DictReader(io.StringIO(text, newline="")), []
    try:
        for row in reader:
            rows.append((f"{listing.name} line {reader.line_num}", row))
    except csv.Error as error:
        raise ValueError(f"{listing} line {reader.line_num + 1}: {error}") from error
    return rows


def _json_rows(listing: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{listing} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{listing} line {number} is not a JSON object")
        rows.append((f"{listing.name} line {number}", row))
    return rows


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
    """Return the file of a row.

    Raises:
        SetAside: the row names none, or one that lies outside of ``root``.
    """
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise SetAside("the row names no file")
    try:
        path = (root / name).resolve()
        is_inside, is_file = path.is_relative_to(root.resolve()), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, a zero byte
        raise SetAside(f"it cannot be opened: {error}") from error
    if not is_inside:
        raise SetAside(f"it lies outside of {root}")
    if not is_file:
        raise SetAside("there is no such file")
    return path


# --- pictures


def read_picture(path: Path, size: int) -> np.ndarray:
    """Return a picture as (size, size, 3) uint8.

    It is turned as its EXIF data say, and scaled up or down until its longer side is ``size``. It
    stands in the middle of a white square, and white is behind its transparent pixels. Greys of 16
    bits, and floats in 0..1, are scaled to 0..255. Of an animation the first frame is taken.

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
    return _on_white(_as_rgba(upright), size)


def _as_rgba(picture: Image.Image) -> Image.Image:
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        return _from_greys(picture, 65535, "16-bit greys, 0..65535")
    if picture.mode == "F":
        return _from_greys(picture, 1, "float greys, 0..1")
    if picture.mode not in _COLOURS:
        raise SetAside(f"its colours are of mode {picture.mode}: save it in RGB")
    return picture.convert("RGBA")


def _from_greys(picture: Image.Image, most: int, expected: str) -> Image.Image:
    values = np.asarray(picture).astype(np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= most):  # NaN is refused too
        raise SetAside(f"its values are {low:g}..{high:g}; expected {expected}")
    return Image.fromarray((values * (255 / most)).round().astype(np.uint8)).convert("RGBA")


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
