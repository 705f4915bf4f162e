"""Which experts serve which modality: routing statistics, metrics, and a plot of them."""

from moe_kernels.analysis.plots import plot_expert_load
from moe_kernels.analysis.recorder import RoutingRecorder, modality_by_token_id
from moe_kernels.analysis.statistics import ExpertKinds, RoutingStatistics

__all__ = [
    "ExpertKinds",
    "RoutingRecorder",
    "RoutingStatistics",
    "modality_by_token_id",
    "plot_expert_load",
]
