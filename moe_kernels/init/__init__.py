"""Initial values of added tokens and adapters: Gromov-Wasserstein couplings, and controls.

All functions take and return tensors and know no model. POT is imported when a coupling is solved.
"""

from moe_kernels.init.lora import gromov_wasserstein_lora
from moe_kernels.init.rows import GromovWassersteinDiagnostics, gromov_wasserstein_rows

__all__ = ["GromovWassersteinDiagnostics", "gromov_wasserstein_lora", "gromov_wasserstein_rows"]
