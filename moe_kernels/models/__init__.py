"""In-place patching of Hugging Face models."""

from moe_kernels.models.callback import SaveAdapter
from moe_kernels.models.combining import combine_adapters
from moe_kernels.models.config import ModalityLoraConfig
from moe_kernels.models.loading import load
from moe_kernels.models.lora_init import LoraInitDiagnostics, initialise_lora
from moe_kernels.models.patch import PatchedModel, patch_model
from moe_kernels.models.peft_experts import AcceleratedPeft, accelerate_peft, get_accelerated
from moe_kernels.models.sharding import shard_evenly
from moe_kernels.models.text_check import TextCheck
from moe_kernels.models.tokens import add_modality_tokens

__all__ = [
    "AcceleratedPeft",
    "LoraInitDiagnostics",
    "ModalityLoraConfig",
    "PatchedModel",
    "TextCheck",
    "SaveAdapter",
    "accelerate_peft",
    "add_modality_tokens",
    "combine_adapters",
    "get_accelerated",
    "initialise_lora",
    "load",
    "patch_model",
    "shard_evenly",
]
