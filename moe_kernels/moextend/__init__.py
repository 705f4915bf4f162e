"""New experts in a pretrained Mixture of Experts, with text unchanged (MoExtend, 2408.03511)."""

from moe_kernels.layers import ModalityProjector
from moe_kernels.modalities import join_features_and_text
from moe_kernels.models.config import ExtensionConfig
from moe_kernels.moextend.disturbance import Disturbance
from moe_kernels.moextend.extender import ExpertExtender
from moe_kernels.moextend.plots import plot_layer_scores
from moe_kernels.moextend.scores import LayerScores

__all__ = [
    "Disturbance",
    "ExpertExtender",
    "ExtensionConfig",
    "LayerScores",
    "ModalityProjector",
    "join_features_and_text",
    "plot_layer_scores",
]
