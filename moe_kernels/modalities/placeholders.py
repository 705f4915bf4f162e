"""Placeholders: tokens such as ``<image>`` at which a text takes features of a modality."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_kernels.arguments import as_integer
from moe_kernels.imaging import IGNORE_INDEX
from moe_kernels.imaging.arrays import as_tensor
from moe_kernels.models.handle import PatchState, get_patched
from moe_kernels.models.tokens import check_tokenizer
from moe_kernels.models.undo import all_or_nothing

SIDES = ("left", "right")


def add_placeholders(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    modalities: Iterable[str] | None = None,
) -> dict[str, int]:
    """Give the tokenizer a special token ``<modality>`` for each modality, and return their ids.

    The model gets no rows for them, since features take their places before it sees the ids. A
    token that the tokenizer has already keeps its id. Call ``add_modality_tokens`` or
    ``load_adapter`` with the tokenizer first, as their ids follow the model's own. From now on the
    model's forward refuses features outside of :func:`joining_placeholders`: it would ignore them.

    Args:
        model: patched for the modalities.
        tokenizer: of the model.
        modalities: names; default: all that the model is patched for.

    Returns:
        The placeholders: modality -> token id.

    Raises:
        TypeError: this is no tokenizer, or ``modalities`` is a string.
        ValueError: the model is not patched for a modality, or a placeholder would get the id of a
            token that was added to the model. The tokenizer has not changed.

    Example:
        >>> from moe_kernels import ModalityLoraConfig, patch_model
        >>> from moe_kernels.modalities import add_placeholders
        >>> from moe_kernels.testing import tiny_model, tiny_tokenizer
        >>> model, tokenizer = tiny_model(), tiny_tokenizer()
        >>> patched = patch_model(model, ModalityLoraConfig(modalities=("image", "audio")))
        >>> placeholders = add_placeholders(model, tokenizer)
        >>> placeholders
        {'image': 7, 'audio': 8}
        >>> tokenizer("a red <image> leaf").input_ids
        [2, 3, 7, 6]
    """
    patched = get_patched(model)
    check_tokenizer(tokenizer)
    if isinstance(modalities, str):
        raise TypeError(f"modalities must be names, got the string {modalities!r}")
    names = patched.config.modalities if modalities is None else tuple(modalities)
    grown = copy.deepcopy(tokenizer)  # what is added to a tokenizer cannot be removed
    texts = [f"<{name}>" for name in names]
    # A text that is in the vocabulary alone keeps its id, and is one token from now on.
    known = grown.get_added_vocab()
    grown.add_tokens([text for text in texts if text not in known], special_tokens=True)
    ids = grown.convert_tokens_to_ids(texts)
    placeholders = check_placeholders(patched, dict(zip(names, ids, strict=True)))
    with all_or_nothing(model, tokenizer):
        if _refuse_features not in model._forward_pre_hooks.values():
            hook = model.register_forward_pre_hook(_refuse_features, with_kwargs=True)
            patched.hooks.append(hook)
        vars(tokenizer).update(vars(grown))
        return placeholders


def _refuse_features(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise TypeError for features that nothing has joined; a hook of the model.

    Forwards of transformers ignore keywords that they do not know.
    """
    if kwargs.get("features") is not None:
        raise TypeError(
            "this batch has features, which the model takes within joining_placeholders(model, "
            "placeholders) alone; or join them by join_placeholders"
        )


def check_placeholders(patched: PatchState, placeholders: Mapping[str, int]) -> dict[str, int]:
    """Return the placeholders of a model, modality -> token id.

    Raises:
        TypeError: this is no mapping from names to integers.
        ValueError: an unknown modality, one id for two, or that of an added token.
    """
    placeholders = as_placeholders(placeholders)
    for modality, token_id in placeholders.items():
        patched.modality_id(modality)
        if patched.base_vocabulary <= token_id < patched.vocabulary:
            raise ValueError(
                f"the placeholder of {modality!r} has id {token_id}, which is a token that was "
                f"added to the model ({patched.base_vocabulary}..{patched.vocabulary - 1}): give "
                "the tokenizer to add_modality_tokens or load_adapter, then call add_placeholders"
            )
    return placeholders


def as_placeholders(placeholders: Mapping[str, int]) -> dict[str, int]:
    """Return placeholders with ids of Python.

    Raises:
        TypeError: this is no mapping from names to integers.
        ValueError: there is none, an id below 0, or one id for two modalities.
    """
    if not isinstance(placeholders, Mapping):
        raise TypeError(
            "placeholders must map modalities to token ids, as add_placeholders returns them; got "
            f"{placeholders!r}"
        )
    ids = {name: as_integer(each) for name, each in placeholders.items()}
    if None in ids.values():
        raise TypeError(f"placeholders must be integers, one a modality; got {placeholders!r}")
    if not ids or min(ids.values()) < 0 or len(set(ids.values())) < len(ids):
        raise ValueError(
            f"placeholders must be distinct ids of at least 0, at least one; got {placeholders!r}"
        )
    return ids


def check_side(padding_side: str) -> None:
    """Raise ValueError for an unknown side."""
    if padding_side not in SIDES:
        raise ValueError(f'padding_side must be "left" or "right", got {padding_side!r}')


def items_of(modality: str, features: Any, mask: Tensor | None = None) -> list[Tensor]:
    """Return the features of a modality by item, (n, d) each, without padding.

    Args:
        modality: its name, for messages.
        features: a sequence of (n, d), or padded (N, L, d).
        mask: (N, L), 0 on padding of padded features.

    Raises:
        TypeError: the features are no floats.
        ValueError: other shapes, several widths, or an item without features.
    """
    name = f"features of {modality!r}"
    if isinstance(features, Tensor):
        if features.ndim != 3:
            raise ValueError(
                f"{name} must be a list of (n, d), or padded (N, L, d); got one tensor "
                f"{tuple(features.shape)}: put it into a list"
            )
        if mask is not None and mask.shape != features.shape[:2]:
            raise ValueError(
                f"the mask of {name} must be {tuple(features.shape[:2])}, got {tuple(mask.shape)}"
            )
        items = list(features)
        if mask is not None:
            kept = mask.to(features.device) != 0
            items = [item[each] for item, each in zip(items, kept, strict=True)]
    elif mask is not None:
        raise ValueError(f"{name} have a mask, and are not padded (N, L, d): give a list alone")
    else:
        items = [as_tensor(item, name) for item in features]
    for place, item in enumerate(items):
        if not item.is_floating_point():
            raise TypeError(f"{name} must be floats; item {place} is {item.dtype}")
        if item.ndim != 2 or not len(item) or item.shape[1] != items[0].shape[-1]:
            raise ValueError(
                f"{name} must be (n, d) with n of at least 1 and one d for all; item {place} is "
                f"{tuple(item.shape)}, item 0 is {tuple(items[0].shape)}"
            )
    return items


def expand(
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    lengths: Mapping[str, Sequence[int]],
    placeholders: Mapping[str, int],
    *,
    pad_token_id: int,
    padding_side: str,
) -> dict[str, Tensor]:
    """Repeat each placeholder once for each feature of its item, and pad.

    The first token of a row, placeholders and padding get label -100: no token predicts the first,
    and features are not predicted.

    Args:
        rows: B rows of token ids, without padding.
        labels: B rows of labels, as long.
        lengths: numbers of features by modality, of all items in the order of their placeholders.
        placeholders: modality -> token id.
        pad_token_id: id of the padding.
        padding_side: "right" or "left".

    Returns:
        input_ids, attention_mask and labels, (B, S') int64 each, on the CPU.
    """
    modality_of = {token_id: modality for modality, token_id in placeholders.items()}
    remaining = {modality: iter(each) for modality, each in lengths.items()}
    all_ids, all_labels = [], []
    for row, of_row in zip(rows, labels, strict=True):
        new_ids: list[int] = []
        new_labels: list[int] = []
        for token_id, label in zip(row, of_row, strict=True):
            modality = modality_of.get(token_id)
            number = 1 if modality is None else next(remaining[modality])
            new_ids += [token_id] * number
            new_labels += [label if modality is None else IGNORE_INDEX] * number
        new_labels[:1] = [IGNORE_INDEX] * len(new_labels[:1])
        all_ids.append(torch.tensor(new_ids, dtype=torch.int64, device="cpu"))
        all_labels.append(torch.tensor(new_labels, dtype=torch.int64, device="cpu"))

    def padded(each: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(each, True, value, padding_side)

    return {
        "input_ids": padded(all_ids, pad_token_id),
        "attention_mask": padded([torch.ones_like(each) for each in all_ids], 0),
        "labels": padded(all_labels, IGNORE_INDEX),
    }
