"""Memory of a training step on one device, term by term, by formula.

The sizes are those of a patched model on the device meta. Activations are what autograd keeps of
the layers of Mixtral and its like (attention with q, k, v and o, experts on the kernels), in 16
bits, beside two copies of hidden states in float32 for the norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moe_kernels.models.config import ATTENTION_LAYOUTS, ModalityLoraConfig
from moe_kernels.models.offload import device_of_model
from moe_kernels.models.parts import LayerParts
from moe_kernels.models.patch import PatchedModel, patch_model
from moe_kernels.models.tokens import add_modality_tokens

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight: a code, and scales that are packed too
_SCALES = 4 / 64  # bytes of a weight: its scale, expanded
_CHUNK = 2**25  # logits that the fused loss holds at a time
GB = 1e9
# Bytes for the model on a card of so many GB: less 2 GiB for the driver, workspaces and gaps.
CARDS = {80: 78 * 2**30, 24: 22 * 2**30}
TOKENS, RANK, NUM_TOKENS = 4096, 16, 8194  # of a step on a card, of adapters, added
# What is said of a model in short -> settings of :func:`terms`.
IN_SHORT: Mapping[str, Mapping] = {
    "one card, bf16": {},
    "one card, experts in NF4": {"nf4": True},
    "each of 8 cards, bf16 under FSDP2": {"ranks": 8},
}
_FIELDS = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
    "num_experts_per_tok", "intermediate_size",
)  # fmt: skip
_LOGIT = 2 + 4 + 4 + 4  # bytes: in 16 bits, in float32, of log_softmax, of its gradient


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights and widths of a patched model.

    Attributes:
        experts: weights of all stacks of experts.
        others: the base's other weights.
        trained: adapters and added rows.
        layers: decoder layers.
        hidden: H.
        kept: bytes that autograd keeps of a layer for each token.
        working: bytes that the backward pass of a layer needs for each token beside these.
        columns: of the logits, with added tokens.
    """

    experts: int
    others: int
    trained: int
    layers: int
    hidden: int
    kept: int
    working: int
    columns: int


def sizes_of(patched: PatchedModel) -> Sizes:
    """Return the sizes of a patched model, which may be on the device meta.

    Raises:
        ValueError: its layers are of another layout than the formula's.
    """
    if problem := why_no_estimate(patched.model, patched.parts):
        raise ValueError(f"no estimate for {type(patched.model).__name__}: {problem}")
    model, config = patched.model, patched.model.config.get_text_config()
    trained = sum(p.numel() for p in patched.trainable_parameters())
    every = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if _is_stack(n, p))
    hidden, rank, targets = config.hidden_size, patched.config.r, patched.config.target_modules
    inter = getattr(config, "moe_intermediate_size", config.intermediate_size)
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    chosen = config.num_experts_per_tok
    pairs = 4 * rank * ("attention" in targets) + 2 * chosen * rank * ("experts" in targets)
    # Norms, in float32; inputs of attention and experts; q, k, v and what attention gives.
    kept = 2 * 4 * hidden + 2 * 2 * hidden + 2 * (2 * q + 2 * kv) + 2 * pairs
    kept += chosen * (2 * 2 * inter + 16)  # pre-activations and dispatch
    working = chosen * 2 * (4 * inter + 2 * hidden)  # activations, their gradients, rows of experts
    columns = model.get_input_embeddings().num_embeddings + sum(patched.added_tokens.values())
    layers = config.num_hidden_layers
    return Sizes(
        experts, every - trained - experts, trained, layers, hidden, kept, working, columns
    )


def why_no_estimate(model: PreTrainedModel, parts: Sequence[LayerParts]) -> str | None:
    """Return why the formula does not hold for a model, or None."""
    config = model.config.get_text_config()
    if missing := [name for name in _FIELDS if not isinstance(getattr(config, name, None), int)]:
        return f"the formula needs {', '.join(missing)}, which its configuration does not have"
    if any(tuple(each.attention) != ATTENTION_LAYOUTS[0] for each in parts):
        return "the formula is of layers like Mixtral's, with q, k, v and o in each"
    return None


def in_short(model: PreTrainedModel, targets: tuple[str, ...]) -> dict[str, str]:
    """Return what training a model takes on one card and on eight, and the cards that it fits.

    The model is patched, which a model on the device meta may be, and unpatched.

    Args:
        model: unpatched.
        targets: ``target_modules`` of the adapters.
    """
    patched = patch_model(model, ModalityLoraConfig(r=RANK, target_modules=targets))
    try:
        with torch.device(device_of_model(model)):
            add_modality_tokens(model, "image", NUM_TOKENS)
        sizes = sizes_of(patched)
    finally:
        patched.unpatch()
    found = {"tokens of a card": f"{TOKENS:,}, with checkpointing and the fused loss"}
    found["trained"] = f"rank {RANK} on {' and '.join(targets)}, {NUM_TOKENS:,} added tokens"
    for said, settings in IN_SHORT.items():
        most = peak(terms(sizes, TOKENS, **{"fused_loss": True} | settings))
        cards = [f"{card} GB" for card, room in sorted(CARDS.items()) if most <= room]
        fits = f"fits cards of {' and '.join(cards)}" if cards else "fits no card of up to 80 GB"
        found[said] = f"{amount(most, BYTES)}, {fits}"
    return found


BYTES = (" bytes", " kB", " MB", " GB")


def amount(number: float, units: tuple[str, ...], step: int = 1000) -> str:
    """Return a number with three digits, in the largest of ``units`` of which it has one.

    Example:
        >>> amount(33_760, ("", " k", " M", " B"))
        '33.8 k'
    """
    power = 0
    while number >= step * 0.9995 and power < len(units) - 1:
        number, power = number / step, power + 1
    return f"{number:.3g}{units[power]}" if number < 999.5 else f"{number:,.0f}{units[power]}"


def _is_stack(name: str, parameter) -> bool:
    return parameter.ndim == 3 and ".experts." in name


def terms(
    sizes: Sizes,
    tokens: int,
    *,
    nf4: bool = False,
    checkpointed: bool = True,
    fused_loss: bool = False,
    ranks: int = 1,
    ddp: bool = False,
) -> dict[str, float]:
    """Return the bytes of a training step by term; see :func:`peak`.

    Args:
        sizes: of the model, with a base in bf16 and adapters in float32, trained by AdamW.
        tokens: of a device's batch.
        nf4: experts are packed by bitsandbytes; a layer's scales are expanded while it computes.
        checkpointed: each layer keeps its input alone, and is computed again.
        fused_loss: ``patched.fused_loss``.
        ranks: over which FSDP2 shards all parameters; 1: none is sharded.
        ddp: gradients are copied into DDP's buckets.
    """
    base = sizes.experts * (NF4 if nf4 else 2) + 2 * sizes.others
    gathered = 4.0 * sizes.trained if ddp else 0.0
    if ranks > 1:  # table and head, the layer that computes, and one that is gathered meanwhile
        ends = 2 * 2 * sizes.columns * sizes.hidden
        gathered = ends + 2 * (base + 4 * sizes.trained - ends) / sizes.layers
    layer = tokens * sizes.kept
    return {
        "base": base / ranks,
        "adapters and AdamW": 12 * sizes.trained / ranks,
        "gradients": 4 * sizes.trained / ranks,
        "gathered or in buckets": gathered,
        "expanded scales": _SCALES * sizes.experts / sizes.layers if nf4 else 0,
        "kept for backward": tokens * 2 * sizes.hidden * sizes.layers
        if checkpointed
        else layer * sizes.layers,
        "one layer's backward": tokens * sizes.working + (layer if checkpointed else 0),
        "logits": _LOGIT * min(tokens * sizes.columns, _CHUNK if fused_loss else float("inf")),
    }


def peak(of: dict[str, float]) -> float:
    """Return the most bytes at one time: at the loss, or in the backward pass of a layer.

    Of the layers it is the last or the first: what was kept goes as gradients appear.
    """
    always = (
        of["base"] + of["adapters and AdamW"] + of["gathered or in buckets"] + of["expanded scales"]
    )
    at_loss = of["kept for backward"] + of["logits"]
    in_layer = max(of["kept for backward"], of["gradients"]) + of["one layer's backward"]
    return always + max(at_loss, in_layer)
