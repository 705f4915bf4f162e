"""Routing statistics by modality, redundancy of experts, and plots of both."""

from moe_kernels.analysis.plots import (
    plot_divergence,
    plot_expert_load,
    plot_redundancy,
    plot_specialisation,
)
from moe_kernels.analysis.recorder import RoutingRecorder
from moe_kernels.analysis.redundancy import ExpertRedundancy, expert_redundancy, linear_cka
from moe_kernels.analysis.rows import modality_by_token_id
from moe_kernels.analysis.statistics import ExpertKinds, RoutingStatistics

__all__ = [
    "ExpertKinds",
    "ExpertRedundancy",
    "RoutingRecorder",
    "RoutingStatistics",
    "expert_redundancy",
    "linear_cka",
    "modality_by_token_id",
    "plot_divergence",
    "plot_expert_load",
    "plot_redundancy",
    "plot_specialisation",
]
