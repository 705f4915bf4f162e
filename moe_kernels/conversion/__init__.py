"""Conversion of dense models to Mixtures of Experts, and distillation that repairs the result.

docs/methods_specification.md A1 has the mathematics, docs/conversion.md explains the use.
"""

from moe_kernels.conversion.convert import dense_to_moe
from moe_kernels.conversion.healing import HealingReport, heal
from moe_kernels.conversion.perplexity import perplexity
from moe_kernels.conversion.refit import refit
from moe_kernels.conversion.split import balanced_kmeans, random_labels

__all__ = [
    "HealingReport",
    "balanced_kmeans",
    "dense_to_moe",
    "heal",
    "perplexity",
    "random_labels",
    "refit",
]
