"""Every ``MOE_KERNELS_*`` variable that is read at run time, parsed in one place.

Each is read whenever it is needed, so setting one takes effect at once, unless its entry says "read
once".

``MOE_KERNELS_CHECK=1``
    Check values (ids in range) on CUDA too, at the cost of a synchronisation.
``MOE_KERNELS_POISON=1``
    Fill memory that native ops allocate on the CPU with NaN, so that unwritten elements show.
``MOE_KERNELS_BRGEMM=1``
    Multiply bf16 through PyTorch's brgemm on any CPU with AVX-512 bf16; 0: never. Unset: on a CPU
    with AMX. Read once, when the native extension is loaded.
``MOE_KERNELS_BACKEND=name``
    The backend that ``backend=None`` means.
``MOE_KERNELS_TILES=path``
    The file with the Triton tiles that ``moe-kernels tune`` chose; default
    ``~/.cache/moe_kernels/tiles.json``. Read once.

``MOE_KERNELS_CACHE=path``
    The folder of what is computed once for a machine: CUDA kernels that were compiled at their
    first use. Default: ``moe_kernels`` in ``XDG_CACHE_HOME``, or in ``~/.cache``.
``MOE_KERNELS_DECODE=1``
    Compute at most 16 tokens by two CUDA kernels, under backend "cuda" and where nothing is saved
    for a backward pass. Off by default: they have not yet run on a GPU, and their last bits differ
    from those of a forward that saves.
``MOE_KERNELS_ENGINE=1``
    Multiply with the experts' weights by the extension's own kernels on an sm_90, under backend
    "cuda"; otherwise Triton's do. Off by default: they have not yet run on a GPU.

``setup.py`` describes the variables that it alone reads.
"""

import os
from pathlib import Path

_TRUE = ("1", "true")
_FALSE = ("", "0", "false")


def _boolean(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(f"{name} must be 1, 0, true or false, is {os.environ[name]!r}")


def check_values() -> bool:
    """Return whether values are checked where that synchronises with the device."""
    return _boolean("MOE_KERNELS_CHECK")


def poison() -> bool:
    """Return whether native ops fill new memory with NaN."""
    return _boolean("MOE_KERNELS_POISON")


def brgemm() -> bool | None:
    """Return whether bf16 GEMMs go through brgemm, or None: on a CPU with AMX."""
    value = os.environ.get("MOE_KERNELS_BRGEMM", "").strip()
    return _boolean("MOE_KERNELS_BRGEMM") if value else None


def backend() -> str | None:
    """Return the backend that ``backend=None`` means, or None for the built-in order."""
    value = os.environ.get("MOE_KERNELS_BACKEND", "").strip()
    return value or None


def decode() -> bool:
    """Return whether the backend "cuda" may compute a few tokens by its two kernels of decoding."""
    return _boolean("MOE_KERNELS_DECODE")


def engine() -> bool:
    """Return whether the backend "cuda" multiplies by its own kernels on an sm_90."""
    return _boolean("MOE_KERNELS_ENGINE")


def tiles_path() -> Path:
    """Return the path of the file of tuned Triton tiles, which need not exist."""
    value = os.environ.get("MOE_KERNELS_TILES", "").strip()
    return Path(value) if value else Path.home() / ".cache/moe_kernels/tiles.json"


def cache_path() -> Path:
    """Return the folder for what is computed once for a machine, which need not exist."""
    if value := os.environ.get("MOE_KERNELS_CACHE", "").strip():
        return Path(value)
    value = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(value) if value else Path.home() / ".cache") / "moe_kernels"
