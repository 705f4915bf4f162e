"""Estimate the memory that fine-tuning a full-size model takes: weights, adapters, optimiser.

    python python/estimate_memory.py                  # OLMoE, Mixtral, Qwen-MoE
    python python/estimate_memory.py --model FOLDER   # another model's config

Models are built from their published sizes on the "meta" device, so nothing is downloaded and no
memory is used. Activations come on top: they depend on batch, length and checkpointing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from shared.cli import Options, exit_code, option, parse
from shared.full_size import MODELS, patched_on_meta
from shared.models import load_config
from shared.tables import markdown_table

from moe_kernels import ModalityLoraConfig

GIB = 2**30


@dataclass(kw_only=True)
class EstimateOptions(Options):
    """Model and adapters."""

    r: int = option(16, "rank of the updates", at_least=1)
    num_tokens: int = option(8194, "added image tokens", at_least=1)
    model: str | None = option(None, "folder or hub id of another model's config")


def estimate(config, lora: ModalityLoraConfig, num_tokens: int) -> dict[str, float]:
    """Return 1e9 base weights, 1e6 trained ones, and GiB with bf16 weights and AdamW."""
    patched = patched_on_meta(config, lora, num_tokens)
    trained = sum(p.numel() for p in patched.trainable_parameters())
    base = sum(p.numel() for p in patched.model.parameters()) - trained
    # A trained parameter takes 16 bytes: weight, gradient and two moments of AdamW in fp32.
    return {"base": base / 1e9, "trained": trained / 1e6, "gib": (2 * base + 16 * trained) / GIB}


def run(options: EstimateOptions) -> None:
    name = options.model
    models = {name: load_config(name)} if name else MODELS
    head = ("model", "base weights", "trained (experts + attention)", "trained (attention)")
    rows = []
    for name, config in models.items():
        cells = []
        for targets in (("experts", "attention"), ("attention",)):
            lora = ModalityLoraConfig(r=options.r, target_modules=targets)
            result = estimate(config, lora, options.num_tokens)
            cells.append(f"{result['trained']:.0f} M, {result['gib']:.0f} GiB")
        rows.append((name, f"{result['base']:.1f} B", *cells))
    print(markdown_table(head, rows))


def main(arguments: list[str] | None = None) -> int:
    options = parse(EstimateOptions, arguments, __doc__)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
