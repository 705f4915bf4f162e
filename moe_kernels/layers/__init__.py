"""Modules on top of the ops."""

from moe_kernels.layers.modality_lora import ModalityLora

__all__ = ["ModalityLora"]
