"""Modules on top of the ops."""

from moe_kernels.layers.added_experts import CALIBRATIONS, AddedExperts, Calibration
from moe_kernels.layers.modality_lora import ModalityLora
from moe_kernels.layers.modality_projector import ModalityProjector

__all__ = ["CALIBRATIONS", "AddedExperts", "Calibration", "ModalityLora", "ModalityProjector"]
