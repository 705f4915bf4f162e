"""How added tokens and adapters start: Gromov-Wasserstein couplings, and controls.

Functions of tensors, below the models; POT is imported when a coupling is solved.
"""

from moe_kernels.init.lora import gromov_wasserstein_lora
from moe_kernels.init.rows import GromovWassersteinDiagnostics, gromov_wasserstein_rows

__all__ = ["GromovWassersteinDiagnostics", "gromov_wasserstein_lora", "gromov_wasserstein_rows"]
