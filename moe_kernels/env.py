"""Every ``MOE_KERNELS_*`` variable that is read at run time, parsed in one place.

Each is read when it is asked for, so that setting one takes effect at once; what is read only once
says so.

``MOE_KERNELS_CHECK=1``
    Check values (ids in range) on CUDA too, at the price of a synchronisation.
``MOE_KERNELS_POISON=1``
    Fill memory that native ops allocate on the CPU with NaN, so that an unwritten element shows.
``MOE_KERNELS_BRGEMM=1``
    Multiply bf16 through PyTorch's brgemm on a CPU with AVX-512 bf16, whether it has AMX or not; 0:
    never. Read once, when the native extension is loaded.
``MOE_KERNELS_BACKEND=name``
    The backend that ``backend=None`` means.
``MOE_KERNELS_TILES=path``
    The file with the Triton tiles that ``python -m moe_kernels.tune`` chose; default
    ``~/.cache/moe_kernels/tiles.json``. Read once.

Those read by ``setup.py`` alone are described there.
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
    """Whether values are checked where that synchronises with the device."""
    return _boolean("MOE_KERNELS_CHECK")


def poison() -> bool:
    """Whether native ops fill new memory with NaN."""
    return _boolean("MOE_KERNELS_POISON")


def brgemm() -> bool | None:
    """Whether bf16 products go through brgemm, or None: where the CPU has AMX."""
    given = os.environ.get("MOE_KERNELS_BRGEMM", "").strip()
    return _boolean("MOE_KERNELS_BRGEMM") if given else None


def backend() -> str | None:
    """The backend that ``backend=None`` means, or None for the built-in order."""
    value = os.environ.get("MOE_KERNELS_BACKEND", "").strip()
    return value or None


def tiles_path() -> Path:
    """The file of tuned Triton tiles, whether it exists or not."""
    given = os.environ.get("MOE_KERNELS_TILES", "").strip()
    return Path(given) if given else Path.home() / ".cache/moe_kernels/tiles.json"
