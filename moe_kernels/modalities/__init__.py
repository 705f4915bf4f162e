"""Features of several modalities at placeholders in the text, and beside it."""

from moe_kernels.modalities.collator import ModalityCollator
from moe_kernels.modalities.joiner import join_placeholders, joining_placeholders
from moe_kernels.modalities.placeholders import add_placeholders
from moe_kernels.modalities.sequence import join_features_and_text

__all__ = [
    "ModalityCollator",
    "add_placeholders",
    "join_features_and_text",
    "join_placeholders",
    "joining_placeholders",
]
