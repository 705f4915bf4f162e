"""Estimates what fine-tuning a full-size model takes: base weights, adapters, optimiser.

Models are built from their published sizes on the "meta" device, so nothing is downloaded and no
memory is used. Activations come on top: they depend on batch, length and checkpointing.
"""

import argparse

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model

GIB = 2**30

MODELS = {
    "OLMoE-1B-7B": OlmoeConfig(intermediate_size=1024),
    "Mixtral-8x7B": MixtralConfig(),
    "Qwen1.5-MoE-A2.7B": Qwen2MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, num_experts=60, num_experts_per_tok=4,
        moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
}  # fmt: skip


def estimate(config, lora: ModalityLoraConfig, num_tokens: int) -> dict[str, float]:
    """Billions of base weights, millions of trained ones, GiB with bf16 weights and AdamW."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        base = sum(p.numel() for p in model.parameters())
        patched = patch_model(model, lora)
        add_modality_tokens(model, lora.modalities[0], num_tokens)
        trained = sum(p.numel() for p in patched.trainable_parameters())
    # fp32 weight, gradient and AdamW's two moments: 16 bytes a trained parameter
    return {"base": base / 1e9, "trained": trained / 1e6, "gib": (2 * base + 16 * trained) / GIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--r", type=int, default=16, help="rank (default: %(default)s)")
    parser.add_argument(
        "--num-tokens", type=int, default=8194, help="added image tokens (default: %(default)s)"
    )
    parser.add_argument("--model", help="folder or hub id of another model's config")
    args = parser.parse_args()
    models = {args.model: AutoConfig.from_pretrained(args.model)} if args.model else MODELS
    print("| model | base weights | trained (experts + attention) | trained (attention) |")
    print("|---|---|---|---|")
    for name, config in models.items():
        cells = []
        for targets in (("experts", "attention"), ("attention",)):
            result = estimate(
                config, ModalityLoraConfig(r=args.r, target_modules=targets), args.num_tokens
            )
            cells.append(f"{result['trained']:.0f} M, {result['gib']:.0f} GiB")
        print(f"| {name} | {result['base']:.1f} B | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
