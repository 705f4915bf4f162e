"""Memory of a training step on one device, term by term, by formula.

The sizes are those of a patched model on the device meta. Activations are what autograd keeps of
the layers of Mixtral and its like (attention with q, k, v and o, experts on the kernels), in 16
bits, beside two copies of hidden states in float32 for the norms.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_kernels import PatchedModel

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight: a code, and scales that are packed too
_SCALES = 4 / 64  # bytes of a weight: its scale, expanded
_CHUNK = 2**25  # logits that the fused loss holds at a time
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
    """Return the sizes of a patched model, which may be on the device meta."""
    model, config = patched.model, patched.model.config
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
