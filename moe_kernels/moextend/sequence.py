"""Join an encoder's features and text into one sequence of the model."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moe_kernels.models.handle import get_patched

IGNORE = -100


def join_features_and_text(
    model: PreTrainedModel,
    features: Tensor,
    input_ids: Tensor,
    *,
    modality: str = "image",
    attention_mask: Tensor | None = None,
    feature_mask: Tensor | None = None,
    labels: Tensor | None = None,
    at: int = 0,
    padding_side: str = "right",
) -> dict[str, Tensor]:
    """Join projected features and text into one sequence, as arguments of the model's forward.

    Padding of both is moved to one side, so that real positions are contiguous, and gets modality
    -1. Gradients reach ``features``, and through them their projector.

    Args:
        model: patched for the modality.
        features: (B, N, H), from a :class:`ModalityProjector`.
        input_ids: (B, S) text. Tokens that were added for a modality keep that modality.
        modality: of the features.
        attention_mask: (B, S), 0 on padding of the text; None: no padding.
        feature_mask: (B, N), 0 on padding of the features; None: no padding. Padding that is not
            finite is harmless here, but its projector's gradient would be NaN: mask its input too.
        labels: (B, S), of the text, -100 where nothing is learnt; None: ``input_ids``. Features
            are never predicted, nor is padding, nor a token that follows padding.
        at: index of the real text token that the features precede; 1: after a begin-of-text token.
        padding_side: "right", or "left", which ``generate`` needs.

    Returns:
        inputs_embeds (B, N+S, H), modality_ids, attention_mask and labels, each (B, N+S) int64.

    Raises:
        ValueError: the model is not patched, the modality is unknown, shapes do not fit, or FSDP2
            has sharded the table.
    """
    modality_id = _check(model, features, input_ids, modality, at, padding_side)
    device, shape = input_ids.device, features.shape[:2]
    text_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    feature_mask = torch.ones(shape, device=device) if feature_mask is None else feature_mask
    for name, mask, expected in (
        ("attention_mask", text_mask, input_ids.shape),
        ("feature_mask", feature_mask, shape),
        ("labels", input_ids if labels is None else labels, input_ids.shape),
    ):
        if mask.shape != expected:
            raise ValueError(f"{name} must be {tuple(expected)}, got {tuple(mask.shape)}")
    text = model.get_input_embeddings()(input_ids)
    labels = input_ids if labels is None else labels
    real = torch.cat([feature_mask.to(device) != 0, text_mask.to(device) != 0], dim=1)
    order = _order(real, shape[1], at, padding_side)

    def arrange(first: Tensor, second: Tensor, padding: int) -> Tensor:
        joined = torch.cat([first, second], dim=1).masked_fill(~real, padding)
        return joined.gather(1, order)

    # Attention multiplies masked values by zero, so what is there must be finite.
    features = features.masked_fill(feature_mask.to(features.device)[..., None] == 0, 0)
    embeddings = torch.cat([features.to(text.dtype), text], dim=1)
    feature_modality = torch.full(shape, modality_id, dtype=torch.int64, device=device)
    feature_labels = torch.full_like(feature_modality, IGNORE)
    attention_mask = real.long().gather(1, order)
    first = torch.ones_like(attention_mask[:, :1])
    follows_padding = torch.cat([first, attention_mask[:, :-1]], dim=1) == 0
    return {
        "inputs_embeds": embeddings.gather(1, order[..., None].expand_as(embeddings)),
        "modality_ids": arrange(feature_modality, get_patched(model).modality_of(input_ids), -1),
        "attention_mask": attention_mask,
        "labels": arrange(feature_labels, labels, IGNORE).masked_fill(follows_padding, IGNORE),
    }


def _check(
    model: PreTrainedModel,
    features: Tensor,
    input_ids: Tensor,
    modality: str,
    at: int,
    padding_side: str,
) -> int:
    """Return the modality's id, after all checks but those of the masks."""
    modality_id = get_patched(model).modality_id(modality)
    table = model.get_input_embeddings().weight
    if isinstance(table, DTensor):
        raise ValueError(
            "join_features_and_text reads the embedding table outside of the model's forward, and "
            "FSDP2 makes it whole within: train with DDP or DeepSpeed, or give the model "
            "inputs_embeds that need no text"
        )
    hidden = table.shape[1]
    if (
        features.ndim != 3
        or input_ids.ndim != 2
        or features.shape[::2] != (input_ids.shape[0], hidden)
    ):
        raise ValueError(
            f"features must be (B, N, {hidden}) and input_ids (B, S), got "
            f"{tuple(features.shape)} and {tuple(input_ids.shape)}"
        )
    if padding_side not in ("left", "right"):
        raise ValueError(f'padding_side must be "left" or "right", got {padding_side!r}')
    if not 0 <= at <= input_ids.shape[1]:
        raise ValueError(f"at must be in 0..{input_ids.shape[1]}, got {at}")
    return modality_id


def _order(real: Tensor, num_features: int, at: int, padding_side: str) -> Tensor:
    """Return (B, N+S) int64: the index in features-then-text that each position takes."""
    place = torch.empty_like(real, dtype=torch.int64)
    place[:, :num_features] = at
    ranks = real[:, num_features:].long().cumsum(1) - 1  # among real text tokens
    place[:, num_features:] = torch.where(ranks < at, ranks, ranks + 1)
    last = real.shape[1] + 1
    place = place.masked_fill(~real, -1 if padding_side == "left" else last)
    return place.argsort(dim=1, stable=True)
