"""List what NVRTC may read of the extension's CUDA sources, with a digest of each file.

``setup.py`` runs this file by its path, so it imports the standard library alone.
"""

import hashlib
from pathlib import Path

_PATTERNS = ("*.cu", "*.h", "no_toolkit/*.h", "no_toolkit/std/*")


def manifest(folder: Path) -> str:
    """Return a line "digest path" for each source below ``folder``, which is ``csrc/cuda``."""
    paths = sorted(path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file())
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.relative_to(folder).as_posix()}\n"
        for path in paths
    )


def changed(folder: Path, built_from: str) -> list[str]:
    """Return the paths of sources that are new, gone or other than in an earlier manifest."""
    lines = set(manifest(folder).splitlines()) ^ set(built_from.splitlines())
    return sorted({line.partition(" ")[2] for line in lines})
