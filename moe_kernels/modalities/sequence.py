"""Join features and text into one sequence of the model: with features at one place of it."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moe_kernels.imaging import IGNORE_INDEX
from moe_kernels.modalities.placeholders import check_side
from moe_kernels.models.handle import get_patched


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
    -1. Gradients reach ``features``, and through them their projector. Features of several
    modalities, or at several places, are joined by
    :func:`moe_kernels.modalities.join_placeholders`.

    Args:
        model: patched for the modality.
        features: (B, N, H), from a :class:`moe_kernels.moextend.ModalityProjector`.
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
    labels = input_ids if labels is None else labels
    real = torch.cat([feature_mask.to(device) != 0, text_mask.to(device) != 0], dim=1)
    order = _order(real, shape[1], at, padding_side)

    def arrange(of_features: Tensor, of_text: Tensor) -> Tensor:
        return torch.cat([of_features, of_text.to(device)], dim=1).gather(1, order)

    rows = torch.arange(shape.numel(), device=device).view(shape)
    none = torch.full_like(rows, IGNORE_INDEX)
    return assemble(
        model,
        arrange(torch.zeros_like(rows), input_ids),
        real.gather(1, order),
        arrange(none, labels),
        [features.flatten(0, 1)],
        arrange(rows, torch.full_like(input_ids, -1)),
        torch.full_like(order, modality_id),
    )


def assemble(
    model: PreTrainedModel,
    input_ids: Tensor,
    real: Tensor,
    labels: Tensor | None,
    features: list[Tensor],
    row_of: Tensor,
    feature_modality: Tensor,
) -> dict[str, Tensor]:
    """Return arguments of the model's forward for sequences whose layout is known.

    Whatever stands at padding, in ids or features, is not read.

    Args:
        model: patched for the modalities.
        input_ids: (B, S).
        real: (B, S) bool, False on padding.
        labels: (B, S), or None.
        features: (rows, H) each, one after another.
        row_of: (B, S) int64, the row of the features at each position; -1: text.
        feature_modality: (B, S) int64, the modality of features, where ``row_of`` has a row.

    Returns:
        inputs_embeds (B, S, H), modality_ids, attention_mask and labels (or None), each (B, S).
    """
    is_feature = real & (row_of >= 0)
    ids = input_ids.masked_fill(is_feature | ~real, 0)
    text = model.get_input_embeddings()(ids)
    rows = torch.cat([text.flatten(0, 1), *(each.to(text) for each in features)])
    places = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    index = torch.where(is_feature, row_of + ids.numel(), places)
    modality_ids = torch.where(is_feature, feature_modality, get_patched(model).modality_of(ids))
    if labels is not None:
        # Nothing predicts a token that follows padding.
        first = torch.ones_like(real[:, :1])
        predicted = real & ~is_feature & torch.cat([first, real[:, :-1]], dim=1)
        labels = labels.masked_fill(~predicted, IGNORE_INDEX)
    return {
        "inputs_embeds": rows.index_select(0, index.flatten()).view_as(text),
        "modality_ids": modality_ids.masked_fill(~real, -1),
        "attention_mask": real.long(),
        "labels": labels,
    }


def check_table(model: PreTrainedModel) -> None:
    """Raise ValueError if the embedding table cannot be read outside of the model's forward."""
    if isinstance(model.get_input_embeddings().weight, DTensor):
        raise ValueError(
            "joining features and text reads the embedding table outside of the model's forward, "
            "and FSDP2 makes it whole within: train with DDP or DeepSpeed, or give the model "
            "inputs_embeds that need no text"
        )


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
    check_table(model)
    hidden = model.get_input_embeddings().embedding_dim
    if (
        features.ndim != 3
        or input_ids.ndim != 2
        or features.shape[::2] != (input_ids.shape[0], hidden)
    ):
        raise ValueError(
            f"features must be (B, N, {hidden}) and input_ids (B, S), got "
            f"{tuple(features.shape)} and {tuple(input_ids.shape)}"
        )
    check_side(padding_side)
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
