"""The folder under --out: a program writes into it only where all files are its own."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

# Both with their earlier names.
ADAPTER = (
    "adapter/modality_adapter_config.json", "adapter/modality_adapter.safetensors",
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
)  # fmt: skip
IMAGE_TOKENIZER = (
    "image_tokenizer/image_tokenizer.safetensors", "image_tokenizer/image_tokenizer_config.json",
    "image_tokenizer/codebook.safetensors", "image_tokenizer/tokenizer_config.json",
)  # fmt: skip
# What a killed run leaves beside a file that it was replacing (moe_kernels.files); and did before.
_LEFT = re.compile(r"\..+(-[a-z0-9_]{8}\.partial|\.tmp)")
_STAGE = re.compile(r"stages/[^/]+-[0-9a-f]{12}(\.partial)?/.+")
# What systems put into folders that people look at.
_OF_THE_SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini")
_SHOWN = 5


def check_outputs(out: Path, files: Sequence[str], marker: str | None = None) -> None:
    """Raise unless every file in a folder is one that the program has written.

    A folder is the program's if it has a finished or unfinished stage, or the marker. In such a
    folder, the files of stages and those with the given names are the program's.

    Args:
        files: patterns of the paths below ``out`` that the program writes
        marker: a file that the program writes first, where it has no stages

    Raises:
        ValueError: there are other files; says which.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    found = sorted(files_of_users(out))
    own = [name for name in found if _STAGE.fullmatch(name)]
    if own or marker in found:
        own += [name for name in found if any(fnmatch.fnmatchcase(name, each) for each in files)]
    if others := sorted(set(found) - set(own)):
        more = f" and {len(others) - _SHOWN:,} more" if len(others) > _SHOWN else ""
        raise ValueError(
            f"--out {out} has files that this program did not write, and it could replace them: "
            f"{', '.join(others[:_SHOWN])}{more}. Give another --out, or move them"
        )


def files_of_users(out: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, but for what killed runs and systems leave."""
    for path in out.rglob("*"):
        is_file = path.is_symlink() or not path.is_dir()
        parts = path.relative_to(out).parts
        if is_file and path.name not in _OF_THE_SYSTEM and not any(map(_LEFT.fullmatch, parts)):
            yield "/".join(parts)
