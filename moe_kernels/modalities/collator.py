"""Collator of samples whose text has placeholders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_kernels import arguments
from moe_kernels.imaging.arrays import as_tensor
from moe_kernels.modalities.placeholders import as_placeholders, check_side, expand, items_of


@dataclass(frozen=True)
class ModalityCollator:
    """``data_collator`` for the Trainer, for texts with placeholders and features of any length.

    A sample has ``input_ids`` (S,), ``features`` (modality -> list of (n, d), one for each of its
    placeholders, in their order; may be missing where there is none), and if wanted ``labels`` (S,)
    and ``attention_mask`` (S,). Without labels all text is learnt. Train within
    :func:`joining_placeholders`, with ``TrainingArguments(remove_unused_columns=False)``.

    A batch has ``input_ids``, ``attention_mask`` and ``labels``, (B, S') int64 each, in which a
    placeholder stands once for each of its features, and ``features``: modality -> (rows, d), those
    of all placeholders one after another. Labels are -100 on features, padding and the first token.
    A batch cannot be cut by samples: an iterable data set that accelerate dispatches to several
    processes needs ``dispatch_batches=False``.

    Attributes:
        placeholders: modality -> token id, of :func:`add_placeholders`.
        pad_token_id: id of the padding; see :func:`moe_kernels.imaging.padding_id`.
        padding_side: "right", or "left".

    Raises:
        TypeError: placeholders or a padding that are no integers; features or ids that are no
            numbers, or features that are not given by modality.
        ValueError: a setting is impossible. In a call: a sample has more placeholders than
            features, or features without a placeholder, of a modality without one, or of several
            widths.

    Example:
        >>> import torch
        >>> from moe_kernels.modalities import ModalityCollator
        >>> collate = ModalityCollator({"image": 7, "audio": 8}, pad_token_id=0)
        >>> batch = collate([
        ...     {"input_ids": [2, 7, 5], "features": {"image": [torch.ones(3, 4)]}},
        ...     {"input_ids": [8, 3, 7], "features": {
        ...         "image": [torch.ones(1, 4)], "audio": [torch.ones(2, 6)]}},
        ... ])
        >>> batch["input_ids"]
        tensor([[2, 7, 7, 7, 5],
                [8, 8, 3, 7, 0]])
        >>> batch["labels"]
        tensor([[-100, -100, -100, -100,    5],
                [-100, -100,    3, -100, -100]])
        >>> batch["features"]["image"].shape
        torch.Size([4, 4])
    """

    placeholders: Mapping[str, int]
    pad_token_id: int
    padding_side: str = "right"

    def __post_init__(self):
        object.__setattr__(self, "placeholders", as_placeholders(self.placeholders))
        arguments.integers(pad_token_id=self.pad_token_id)
        check_side(self.padding_side)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows, labels = [], []
        items: dict[str, list[Tensor]] = {name: [] for name in self.placeholders}
        for index, sample in enumerate(samples):
            ids, of_sample = _real(sample, index)
            found = self._features(sample, index, ids)
            for modality, each in found.items():
                items[modality] += each
            rows.append(ids)
            labels.append(of_sample)
        for modality, each in items.items():
            items_of(modality, each)  # one width in all samples
        batch = expand(
            rows,
            labels,
            {modality: [len(item) for item in each] for modality, each in items.items()},
            self.placeholders,
            pad_token_id=self.pad_token_id,
            padding_side=self.padding_side,
        )
        return batch | {"features": {name: torch.cat(each) for name, each in items.items() if each}}

    def _features(
        self, sample: Mapping[str, Any], index: int, ids: list[int]
    ) -> dict[str, list[Tensor]]:
        """Return a sample's features by modality, as many as it has placeholders."""
        given = sample.get("features")
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise TypeError(
                f"features of sample {index} must map modalities to lists of (n, d); got "
                f"{type(given).__name__}"
            )
        if unknown := sorted(set(given) - set(self.placeholders)):
            raise ValueError(
                f"sample {index} has features of {', '.join(map(repr, unknown))}, which has no "
                f"placeholder; those with one are {', '.join(map(repr, self.placeholders))}"
            )
        found = {name: items_of(name, each) for name, each in given.items() if each is not None}
        for modality, token_id in self.placeholders.items():
            wanted, present = ids.count(token_id), len(found.get(modality, ()))
            if wanted != present:
                hint = (
                    ""
                    if "features" in sample
                    else ". It has no 'features', which Trainer drops unless "
                    "TrainingArguments(remove_unused_columns=False)"
                )
                raise ValueError(
                    f"sample {index} has {wanted} placeholders of {modality!r} (id {token_id}) "
                    f"and features of {present}{hint}"
                )
        return found


def _real(sample: Mapping[str, Any], index: int) -> tuple[list[int], list[int]]:
    """Return ids and labels of a sample, without padding."""
    ids = as_tensor(sample["input_ids"], "input_ids")
    kept = torch.ones_like(ids, dtype=torch.bool)
    if (mask := sample.get("attention_mask")) is not None:
        kept = as_tensor(mask, "attention_mask") != 0
    labels = ids if sample.get("labels") is None else as_tensor(sample["labels"], "labels")
    if ids.ndim != 1 or not ids.shape == labels.shape == kept.shape:
        raise ValueError(
            f"input_ids, labels and attention_mask of sample {index} must be (S,), got "
            f"{tuple(ids.shape)}, {tuple(labels.shape)} and {tuple(kept.shape)}"
        )
    if ids.numel() and (ids.is_floating_point() or labels.is_floating_point()):
        raise TypeError(f"input_ids and labels of sample {index} must be integers")
    return ids[kept].tolist(), labels[kept].tolist()
