"""Deprecated name of :mod:`moe_kernels.moextend`; it goes away after version 0.1."""

import warnings

from moe_kernels.moextend import *  # noqa: F403
from moe_kernels.moextend import __all__ as __all__

warnings.warn(
    "moe_kernels.extension is now moe_kernels.moextend; the old name works in version 0.1 only",
    DeprecationWarning,
    stacklevel=2,
)
