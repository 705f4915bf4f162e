"""Dense models: which of them can become a Mixture of Experts, and what is said of all."""

from torch import nn

from moe_kernels.models.parts import find_experts

# Class that moe_kernels.conversion takes -> the kind of Mixture of Experts that it becomes.
CONVERTIBLE = {
    "LlamaForCausalLM": "Mixtral, with a shared expert Qwen2-MoE",
    "MistralForCausalLM": "Mixtral, with a shared expert Qwen2-MoE",
    "Qwen2ForCausalLM": "Qwen2-MoE",
    "Qwen3ForCausalLM": "Qwen3-MoE, without a shared expert",
}


def has_experts(model: nn.Module) -> bool:
    """Return whether a model has experts of any layout, stacked or in a list."""
    names = (path.rpartition(".")[2] for path, _ in model.named_modules())
    return "experts" in names or find_experts(model) is not None


def problem(name: str) -> str:
    """Return why a model of this class without experts cannot be patched, and what to do."""
    if name in CONVERTIBLE:
        return (
            "no layer has experts: moe_kernels.conversion.dense_to_moe, or the command "
            "`moe-kernels convert`, makes a Mixture of Experts of it, which can be patched"
        )
    return (
        "no layer has experts, and moe_kernels.conversion.dense_to_moe makes some for "
        f"{', '.join(CONVERTIBLE)} alone: take one of these, or a Mixture of Experts"
    )
