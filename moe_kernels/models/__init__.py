"""In-place patching of Hugging Face models."""

from moe_kernels.models.config import ModalityLoraConfig
from moe_kernels.models.patch import PatchedModel, patch_model
from moe_kernels.models.tokens import add_modality_tokens

__all__ = ["ModalityLoraConfig", "PatchedModel", "add_modality_tokens", "patch_model"]
