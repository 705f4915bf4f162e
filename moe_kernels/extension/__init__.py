"""New experts in a pretrained Mixture of Experts, text kept (MoExtend, arXiv 2408.03511)."""

from moe_kernels.extension.disturbance import Disturbance
from moe_kernels.extension.extender import ExpertExtender
from moe_kernels.extension.plots import plot_layer_scores
from moe_kernels.extension.scores import LayerScores
from moe_kernels.extension.sequence import join_features_and_text
from moe_kernels.layers import ModalityProjector
from moe_kernels.models.extensions import ExtensionConfig

__all__ = [
    "Disturbance",
    "ExpertExtender",
    "ExtensionConfig",
    "LayerScores",
    "ModalityProjector",
    "join_features_and_text",
    "plot_layer_scores",
]
