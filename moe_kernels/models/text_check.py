"""Comparison of a patched model's text with that of the model before, bit by bit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_kernels.models import offload, sharding
from moe_kernels.models.handle import PatchState
from moe_kernels.models.intact import modalities_of_peft
from moe_kernels.modes import evaluating

_DIGEST = 16  # bytes


@dataclass(frozen=True, repr=False)
class TextCheck:
    """Result of :meth:`moe_kernels.PatchedModel.check_text`; printing it shows a table.

    A token counts as changed if one bit of one of its logits is another. Differences are over the
    logits of all tokens that are no padding.

    Attributes:
        tokens: number of tokens that were compared.
        vocabulary: V, the number of logits of each.
        changed_by_adapters: tokens that the low-rank updates change; 0 is what is promised.
        changed_since: tokens that changed since the reference; 0 is what is promised. None: no
            reference was given.
        changed_by_patching: tokens whose logits the unpatched model rounds otherwise.
        relative_rms: RMS of the difference from the unpatched model, over the RMS of its logits.
        largest_difference: from a logit of the unpatched model.
        same_next_token: share of tokens whose largest logit is that of the unpatched model.
        digests: of the batches, then of the logits of each token; the next check takes them as its
            reference, also in another process.
    """

    tokens: int
    vocabulary: int
    changed_by_adapters: int
    changed_since: int | None
    changed_by_patching: int
    relative_rms: float
    largest_difference: float
    same_next_token: float
    digests: tuple[bytes, ...]

    def __repr__(self) -> str:
        of = f"of {self.tokens:,}"
        lines = [
            f"text of {self.tokens:,} tokens, {self.vocabulary:,} logits each",
            f"tokens changed by the adapters      {self.changed_by_adapters:,} {of}",
        ]
        if self.changed_since is not None:
            lines.append(f"tokens changed since the reference  {self.changed_since:,} {of}")
        return "\n".join(
            [
                *lines,
                f"tokens that patching rounds anew    {self.changed_by_patching:,} {of}",
                f"  relative RMS of the rounding      {self.relative_rms:.2g}",
                f"  largest difference of a logit     {self.largest_difference:.2g}",
                f"  same likeliest next token         {self.same_next_token:.2%}",
            ]
        )


def check(
    patched: PatchState,
    unpatched: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    since: TextCheck | None,
) -> TextCheck:
    """Compare text in up to four states of a model; see ``PatchedModel.check_text``.

    Args:
        patched: the handle of the model.
        unpatched: a second model of the same frozen weights, without what was added.
        batches: of text.
        since: an earlier check.
    """
    if not isinstance(since, TextCheck | None):
        raise TypeError(
            f"since must be what an earlier check_text returned; got {type(since).__name__}"
        )
    seen, digests, parts = hashlib.blake2b(digest_size=_DIGEST), [], []
    with evaluating(patched.model, unpatched), torch.no_grad(), patched.text_only():
        for inputs, real in _inputs(patched, batches):
            for tensor in inputs.values():
                seen.update(f"{tuple(tensor.shape)}".encode() + _bytes(tensor))
            logits = _logits(patched.model, inputs, real)
            with patched.adapters_disabled():
                without = _logits(patched.model, inputs, real)
            found = _digests(logits)
            digests += found
            by_adapters = _differing(found, _digests(without))
            parts.append(_compare(logits, _logits(unpatched, inputs, real), by_adapters))
    if not parts:
        raise ValueError("check_text got no batch, or no token that is not padding")
    found = (seen.digest(), *digests)
    if since is not None and since.digests[0] != found[0]:
        raise ValueError(
            "the reference was made of other batches: check_text needs the same ids, in batches of "
            "the same shapes, because other shapes round otherwise"
        )
    return _joined(parts, found, since)


def check_possible(patched: PatchState) -> None:
    """Raise ValueError, before any work, if a model's text cannot be compared as it is now."""
    model = patched.model
    if sharding.is_model_sharded(model) or offload.offloaded(model):
        raise ValueError(
            "check_text runs a second model of the same weights, and those of this one are sharded "
            "or offloaded: load the adapter into a whole model (load_adapter), and check that"
        )
    if not patched.adapters_enabled:
        raise ValueError(
            "check_text compares the model with its adapters on and off, and they are off here: "
            "call it outside adapters_disabled(), with adapters_enabled = True"
        )
    if modalities_of_peft(patched.links):
        raise ValueError(
            "check_text knows no unpatched model of one that PEFT has adapted too: compare logits "
            "of text by hand, before accelerate_peft and after training"
        )
    if "_original_forward" in model.__dict__:
        raise ValueError(
            "check_text would run under the autocast that accelerate left on model.forward, which "
            "rounds otherwise: call accelerator.unwrap_model(model, keep_fp32_wrapper=False) first"
        )


class _Part(NamedTuple):
    """Sums over the tokens of a batch."""

    tokens: int
    vocabulary: int
    by_adapters: int
    by_patching: int
    squares: float
    squares_of_plain: float
    largest: float
    same: int


def _inputs(
    patched: PatchState, batches: Iterable[Mapping[str, Tensor] | Tensor]
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield the inputs of each batch on the model's device, and a mask (B, S) of its tokens."""
    device = offload.device_of_model(patched.model)
    for number, batch in enumerate([batches] if isinstance(batches, Mapping | Tensor) else batches):
        given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise ValueError(f"batch {number}: check_text needs input_ids, a tensor (B, S)")
        given.pop("labels", None)
        inputs = {name: tensor.to(device) for name, tensor in given.items()}
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        _check_text_alone(patched, number, ids, inputs.pop("modality_ids", None))
        known = mask is not None and mask.shape == ids.shape
        real = mask.bool() if known else torch.ones_like(ids, dtype=torch.bool)
        if real.any():
            yield inputs, real


def _check_text_alone(
    patched: PatchState, number: int, ids: Tensor, modality_ids: Tensor | None
) -> None:
    """Raise ValueError if a batch has tokens of an added modality."""
    given = modality_ids is not None and bool((modality_ids > 0).any())
    if given or (patched.modality_of(ids) > 0).any():
        raise ValueError(
            f"batch {number} has tokens of {' or '.join(patched.config.modalities)}: check_text "
            "compares text alone, since text after them may change"
        )


def _logits(model: nn.Module, inputs: dict[str, Tensor], real: Tensor) -> Tensor:
    """Return the logits (tokens, V) of the tokens that are no padding."""
    return model(**inputs, use_cache=False).logits[real]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _digests(logits: Tensor) -> list[bytes]:
    """Return a digest of each token's logits."""
    rows = logits.contiguous().cpu().view(torch.uint8).numpy()
    return [hashlib.blake2b(row.data, digest_size=_DIGEST).digest() for row in rows]


def _differing(first: Iterable[bytes], second: Iterable[bytes]) -> int:
    return sum(one != other for one, other in zip(first, second, strict=True))


def _compare(logits: Tensor, plain: Tensor, by_adapters: int) -> _Part:
    rounding, wide = (logits.float() - plain.float()), plain.float()
    return _Part(
        tokens=len(logits),
        vocabulary=logits.shape[-1],
        by_adapters=by_adapters,
        by_patching=int((logits != plain).any(-1).sum()),
        squares=float(rounding.square().sum(dtype=torch.float64)),
        squares_of_plain=float(wide.square().sum(dtype=torch.float64)),
        largest=float(rounding.abs().max()),
        same=int((logits.argmax(-1) == plain.argmax(-1)).sum()),
    )


def _joined(parts: list[_Part], digests: tuple[bytes, ...], since: TextCheck | None) -> TextCheck:
    tokens = sum(part.tokens for part in parts)
    squares = sum(part.squares for part in parts)
    of_plain = sum(part.squares_of_plain for part in parts)
    return TextCheck(
        tokens=tokens,
        vocabulary=parts[0].vocabulary,
        changed_by_adapters=sum(part.by_adapters for part in parts),
        changed_since=None if since is None else _differing(digests, since.digests),
        changed_by_patching=sum(part.by_patching for part in parts),
        relative_rms=math.sqrt(squares / of_plain) if of_plain else math.sqrt(squares),
        largest_difference=max(part.largest for part in parts),
        same_next_token=sum(part.same for part in parts) / tokens,
        digests=digests,
    )
