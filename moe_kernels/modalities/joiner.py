"""Join features of several modalities and text, at placeholders in the text."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_kernels import arguments, env
from moe_kernels.modalities.placeholders import (
    check_placeholders,
    check_side,
    expand,
    items_of,
)
from moe_kernels.modalities.sequence import assemble, check_table
from moe_kernels.models import projectors
from moe_kernels.models.handle import PatchState, get_patched
from moe_kernels.modes import removing_hooks

Features = Mapping[str, Sequence[Tensor] | Tensor]


def join_placeholders(
    model: PreTrainedModel,
    input_ids: Tensor,
    features: Features,
    placeholders: Mapping[str, int],
    *,
    feature_masks: Mapping[str, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    padding_side: str = "right",
) -> dict[str, Tensor]:
    """Put features at the placeholders of a text, and return arguments of the model's forward.

    A placeholder takes all features of one item, such as a picture. Padding is moved to one side
    and gets modality -1; what stands there, NaN included, has no say. Gradients reach the projector
    of each modality. Beside features of one of the model's ``sequence_modalities``, text of the row
    gets that modality too. The ids are read by the host: to train, let a :class:`ModalityCollator`
    do so in the data loader.

    Args:
        model: patched for the modalities.
        input_ids: (B, S) text with placeholders. Tokens that were added for a modality keep it.
        features: modality -> a list of (n, d), one for each placeholder of the batch, in the order
            of reading, row by row; or padded, (N, L, d). Where the modality has a projector
            (:meth:`moe_kernels.moextend.ExpertExtender.add_projector`), d is the encoder's width,
            and they are projected here; where it has none, d is H, the model's.
        placeholders: modality -> token id, of :func:`add_placeholders`.
        feature_masks: modality -> (N, L), 0 on padding of padded features.
        attention_mask: (B, S), 0 on padding of the text; None: no padding.
        labels: (B, S), of the text, -100 where nothing is learnt; None: ``input_ids``. Features are
            never predicted, nor is padding, nor the first token.
        padding_side: "right", or "left", which ``generate`` needs.

    Returns:
        inputs_embeds (B, S', H), modality_ids, attention_mask and labels, each (B, S') int64.

    Raises:
        TypeError: features are no floats, placeholders or ids no integers.
        ValueError: the model is not patched, a modality is unknown, placeholders and features
            differ in number, an id is no token of the model, features have several widths or
            another than the projector or the model takes, shapes do not fit, or FSDP2 has sharded
            the table.

    Example:
        >>> import torch
        >>> from moe_kernels import ModalityLoraConfig, patch_model
        >>> from moe_kernels.modalities import add_placeholders, join_placeholders
        >>> from moe_kernels.testing import tiny_model, tiny_tokenizer
        >>> model, tokenizer = tiny_model(), tiny_tokenizer()  # H is 16
        >>> patched = patch_model(model, ModalityLoraConfig(modalities=("image", "audio")))
        >>> placeholders = add_placeholders(model, tokenizer)
        >>> ids = tokenizer("<audio> a <image> leaf", return_tensors="pt").input_ids
        >>> features = {"image": [torch.randn(3, 16)], "audio": [torch.randn(2, 16)]}
        >>> batch = join_placeholders(model, ids, features, placeholders)
        >>> batch["modality_ids"]
        tensor([[2, 2, 0, 1, 1, 1, 0]])
        >>> model(**batch).logits.shape
        torch.Size([1, 7, 64])
    """
    patched = get_patched(model)
    placeholders = check_placeholders(patched, placeholders)
    check_side(padding_side)
    check_table(model)
    arguments.tensors("(B, S)", input_ids=input_ids, attention_mask=attention_mask, labels=labels)
    if not isinstance(features, Mapping):
        raise TypeError(f"features must map modalities to features; got {type(features).__name__}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    labels = input_ids if labels is None else labels
    if input_ids.ndim != 2 or not input_ids.shape == mask.shape == labels.shape:
        raise ValueError(
            "input_ids, attention_mask and labels must be (B, S), got "
            f"{tuple(input_ids.shape)}, {tuple(mask.shape)} and {tuple(labels.shape)}"
        )
    if input_ids.is_floating_point() or labels.is_floating_point():
        raise TypeError(f"ids and labels must be integers, got {input_ids.dtype}, {labels.dtype}")
    masks = feature_masks or {}
    _check_names(placeholders, features, masks)
    items = {name: items_of(name, each, masks.get(name)) for name, each in features.items()}
    kept = mask != 0
    rows = [row[each].tolist() for row, each in zip(input_ids, kept, strict=True)]
    _check_counts(placeholders, rows, items)
    _check_ids(patched, placeholders, {token_id for row in rows for token_id in row})
    for name, each in items.items():
        _check_width(model, name, each[0].shape[-1] if each else None)
    batch = expand(
        rows,
        [row[each].tolist() for row, each in zip(labels, kept, strict=True)],
        {name: [len(item) for item in each] for name, each in items.items()},
        placeholders,
        pad_token_id=0,
        padding_side=padding_side,
    )
    batch = {name: each.to(input_ids.device) for name, each in batch.items()}
    joined = {name: torch.cat(each) for name, each in items.items() if each}
    return _join(model, placeholders, features=joined, **batch)


@contextmanager
def joining_placeholders(model: PreTrainedModel, placeholders: Mapping[str, int]) -> Iterator[None]:
    """Let the model's forward take batches of a :class:`ModalityCollator` within.

    Features are projected in the forward, so that gradients reach their projectors in any training
    loop, transformers' ``Trainer`` and DDP included. Calls without ``features`` are as before. For
    ``generate``, call :func:`join_placeholders`.

    Args:
        model: patched for the modalities; not its wrapper.
        placeholders: modality -> token id, of :func:`add_placeholders`.

    Raises:
        TypeError, ValueError: see :func:`join_placeholders`; for placeholders at once, for batches
            in a forward.

    Example:
        >>> import torch
        >>> from moe_kernels import patch_model
        >>> from moe_kernels.modalities import (
        ...     ModalityCollator, add_placeholders, joining_placeholders)
        >>> from moe_kernels.moextend import ExpertExtender
        >>> from moe_kernels.testing import tiny_model, tiny_tokenizer
        >>> model, tokenizer = tiny_model(), tiny_tokenizer()
        >>> patched = patch_model(model)
        >>> projector = ExpertExtender(model).add_projector(4)  # of an encoder of width 4
        >>> placeholders = add_placeholders(model, tokenizer)
        >>> sample = tokenizer("<image> a leaf") | {"features": {"image": [torch.randn(3, 4)]}}
        >>> batch = ModalityCollator(placeholders, tokenizer.pad_token_id)([sample])
        >>> with joining_placeholders(model, placeholders):
        ...     model(**batch).loss.backward()
        >>> projector.layers[0].weight.grad.shape
        torch.Size([16, 4])
    """
    hook = _JoinInForward(model, check_placeholders(get_patched(model), placeholders))
    check_table(model)
    with removing_hooks() as handles:
        handles.append(model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
        yield


class _JoinInForward:
    """Pre-hook of the model that joins what a collator has laid out.

    An object, not a closure: a deepcopy of the model must use the copy's projectors.
    """

    def __init__(self, model: PreTrainedModel, placeholders: dict[str, int]):
        self.model, self.placeholders = model, placeholders

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple, dict[str, Any]] | None:
        # torch gives no kwargs where another thread, whose hook this is, adds or removes it now.
        if kwargs is None or "features" not in kwargs:
            return None
        check_table(self.model)  # an engine may have sharded it since
        ids, mask, labels, features = (kwargs.get(name) for name in _TAKEN)
        features = {} if features is None else features
        self._check(kwargs, features)
        mask = torch.ones_like(ids) if mask is None else mask
        # On a GPU this would wait for the device, and a graph cannot; the collator has counted.
        if env.check_values() or not (ids.is_cuda or torch.compiler.is_compiling()):
            self._check_places(ids[mask != 0], features)
        joined = _join(
            self.model,
            self.placeholders,
            input_ids=ids,
            attention_mask=mask,
            labels=labels,
            features=features,
        )
        rest = {name: each for name, each in kwargs.items() if name not in _TAKEN}
        return args, rest | {name: each for name, each in joined.items() if each is not None}

    def _check(self, kwargs: dict[str, Any], features: Any) -> None:
        """Raise TypeError or ValueError for what no values are needed to see."""
        get_patched(self.model)
        ids = kwargs.get("input_ids")
        if ids is None or kwargs.get("modality_ids") is not None:
            raise TypeError(
                "features need input_ids by keyword, as ModalityCollator gives them, and no "
                "modality_ids, which follow from the placeholders"
            )
        if kwargs.get("adapter") is not None:
            raise TypeError(
                "features are joined before the forward knows its adapter: give no adapter=, but "
                "call the model within patched.adapter(name)"
            )
        beside = (kwargs.get(name) for name in ("attention_mask", "labels"))
        if any(each is not None and each.shape != ids.shape for each in beside):
            raise ValueError(
                "beside features, attention_mask and labels must be as large as input_ids, "
                f"{tuple(ids.shape)}: collate the batch by ModalityCollator"
            )
        _check_rows(features)
        _check_names(self.placeholders, features, {})
        for name, each in features.items():
            _check_width(self.model, name, each.shape[-1])

    def _check_places(self, ids: Tensor, features: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless real ids have a place for each row of features, and are known."""
        for name, token_id in self.placeholders.items():
            wanted, found = int((ids == token_id).sum()), len(features.get(name, ()))
            if wanted != found:
                raise ValueError(
                    f"the batch has {wanted} places for features of {name!r} and {found} features: "
                    "collate it by ModalityCollator; for generate, call join_placeholders"
                )
        _check_ids(get_patched(self.model), self.placeholders, set(ids.tolist()))


_TAKEN = ("input_ids", "attention_mask", "labels", "features")


def _join(
    model: PreTrainedModel,
    placeholders: Mapping[str, int],
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor | None,
    features: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Project features (rows, d) and put them, in their order, where placeholders are real."""
    patched = get_patched(model)
    device, real = input_ids.device, attention_mask != 0
    row_of = torch.full_like(input_ids, -1)
    feature_modality = torch.zeros_like(input_ids)
    parts: list[Tensor] = []
    first = 0
    for name, token_id in placeholders.items():
        rows = _projected(model, name, features.get(name))
        here = real & (input_ids == token_id)
        ranks = here.flatten().cumsum(0).view_as(here) - 1
        row_of = torch.where(here, ranks + first, row_of)
        feature_modality = torch.where(here, patched.modality_id(name), feature_modality)
        if rows is not None:
            parts.append(rows.to(device))
            first += len(rows)
    joined = assemble(model, input_ids, real, labels, parts, row_of, feature_modality)
    modality_ids = joined["modality_ids"]
    for name in patched.config.sequence_modalities:
        own = patched.modality_id(name)
        whole = (modality_ids == own).any(dim=1, keepdim=True) & (modality_ids == 0)
        modality_ids = modality_ids.masked_fill(whole, own)
    return joined | {"modality_ids": modality_ids}


def _projected(model: PreTrainedModel, name: str, features: Tensor | None) -> Tensor | None:
    """Return rows (n, H) of a modality; without features, none, but of its projector.

    A projector that no batch of this rank uses must take part in the step all the same: DDP waits
    for its gradient.
    """
    projector = projectors.projectors(model).get(name)
    if projector is None:
        return features
    weight = next(projector.parameters())
    if features is None:
        features = torch.zeros(0, projector.in_features, device=weight.device)
    return projector(features.to(weight.device))


def _check_rows(features: Any) -> None:
    if not isinstance(features, Mapping) or not all(
        isinstance(each, Tensor) and each.ndim == 2 for each in features.values()
    ):
        raise TypeError(
            "within joining_placeholders, features must map modalities to (rows, d), as "
            "ModalityCollator gives them; join_placeholders takes lists"
        )


def _check_names(
    placeholders: Mapping[str, int], features: Features, masks: Mapping[str, Tensor]
) -> None:
    if unknown := sorted({*features, *masks} - set(placeholders)):
        raise ValueError(
            f"there are features of {', '.join(map(repr, unknown))}, which has no placeholder; "
            f"those with one are {', '.join(map(repr, placeholders))}"
        )
    if alone := sorted(set(masks) - set(features)):
        raise ValueError(f"there is a mask of {', '.join(map(repr, alone))}, but no features")


def _check_counts(
    placeholders: Mapping[str, int], rows: list[list[int]], items: Mapping[str, list[Tensor]]
) -> None:
    for name, token_id in placeholders.items():
        counts = [row.count(token_id) for row in rows]
        if sum(counts) != (found := len(items.get(name, ()))):
            places = [index for index, count in enumerate(counts) if count]
            raise ValueError(
                f"input_ids have {sum(counts)} placeholders of {name!r} (id {token_id}, in rows "
                f"{places}) and there are features of {found}"
            )


def _check_ids(patched: PatchState, placeholders: Mapping[str, int], ids: set[int]) -> None:
    unknown = {each for each in ids if not 0 <= each < patched.vocabulary}
    if unknown := sorted(unknown.difference(placeholders.values())):
        raise ValueError(
            f"the text has ids {unknown}, and the model has rows for 0..{patched.vocabulary - 1}: "
            f"they are no placeholders of this call either, which are {dict(placeholders)}"
        )


def _check_width(model: PreTrainedModel, name: str, width: int | None) -> None:
    """Raise ValueError unless features have the width that their projector, or the model, takes."""
    projector = projectors.projectors(model).get(name)
    if projector is not None and width not in (None, projector.in_features):
        raise ValueError(
            f"features of {name!r} must have the width {projector.in_features} of its projector, "
            f"which is applied here; they have {width}"
        )
    hidden = model.get_input_embeddings().embedding_dim
    if projector is None and width not in (None, hidden):
        raise ValueError(
            f"features of {name!r} must have the width {hidden} of the model, as it has no "
            f"projector; they have {width}: ExpertExtender(model).add_projector({width}, "
            f"modality={name!r}) makes one"
        )
