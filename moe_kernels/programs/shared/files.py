"""Files and folders that are replaced whole, so that an interruption leaves the old ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_kernels.files import replacing
from moe_kernels.programs.shared.outputs import files_of_users

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUICK_NOTE = "--quick: too short to learn; it shows only that the program runs"


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str | Path) -> str:
    """Return the text of a file in UTF-8, without a byte-order mark.

    Raises:
        ValueError: it is not in UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or is not JSON: {error}") from error


def write_json(path: Path, data: Any, indent: int | None = 2) -> None:
    """Write JSON, with paths as strings."""
    write_text(path, json.dumps(data, indent=indent, default=str) + "\n")


def copy_whole(source: Path, target: Path) -> None:
    """Copy a folder, and replace ``target`` only once the copy is complete.

    Raises:
        ValueError: ``target`` has a file that ``source`` does not have, and it would be lost.
    """
    if lost := sorted(set(files_of_users(target)) - set(files_of_users(source))):
        raise ValueError(
            f"{target / lost[0]} would be lost with the old {target.name}: move it elsewhere"
        )
    with replacing(target) as temporary:
        shutil.copytree(source, temporary)


def save_figure(figure: Figure, path: Path, note: str = "") -> None:
    """Write a figure as PNG; note: a line below it."""
    tight = {}
    if note:
        figure.text(0.5, -0.1 / figure.get_figheight(), note, ha="center", va="top", color="0.3")
        tight = {"bbox_inches": "tight"}  # takes in what lies outside of the figure
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, **tight)
