"""Padding among the tokens of one call, as its attention mask says, in any of the mask's forms."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Additive masks leave out a key by minus infinity, the dtype's smallest value, or an older -1e4.
_LEFT_OUT = -1e4


def find_real(attention_mask: Any, num_tokens: int, cache: Any = None) -> Tensor | None:
    """Return which of a call's S tokens are not padding, or None where the mask does not say.

    A mask has columns for the keys: those in the cache, those of this call, and with a static
    cache those to come. A token is padding if its column is 0 in a 2-D mask, or if no query of the
    call may attend to it in a 4-D mask or in flex attention's.

    Args:
        attention_mask: (B, keys) with 0 on padding; (B, heads, queries, keys), bool or additive; a
            ``BlockMask``; a dict of such masks by kind of layer, which agree; or None.
        num_tokens: S.
        cache: of the call, before it has run; None: no earlier tokens.

    Returns:
        (B, S) or (1, S) bool.

    Raises:
        ValueError: a 2-D mask with fewer than S columns.
    """
    if isinstance(attention_mask, Mapping):
        found = (find_real(mask, num_tokens, cache) for mask in attention_mask.values())
        return next((real for real in found if real is not None), None)
    if hasattr(attention_mask, "mask_mod"):
        return _of_block_mask(attention_mask, num_tokens, cache)
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim not in (2, 4):
        return None
    if attention_mask.shape[-1] < num_tokens:
        if attention_mask.ndim == 4:  # one column for all keys
            return None
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns for {num_tokens} tokens: give "
            "(B, S), or with a cache (B, earlier tokens + S)"
        )
    own = attention_mask[..., _own_keys(attention_mask, num_tokens, cache)]
    if own.ndim == 2:
        return own != 0
    attended = own if own.dtype == torch.bool else own > _LEFT_OUT
    return attended.flatten(1, 2).any(1)


def cache_of(keywords: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of a model's forward, or None."""
    cache = keywords.get("cache")  # renamed in transformers 5.24
    return keywords.get("past_key_values") if cache is None else cache


def _own_keys(mask: Any, num_tokens: int, cache: Any) -> slice | Tensor:
    """Return the columns of the call's own tokens: behind the cache, and the last at most.

    They are the last where the layer has a window and forgets earlier keys.
    """
    last, device = mask.shape[-1] - num_tokens, getattr(mask, "device", None)
    seen = 0 if cache is None or last == 0 else cache.get_seq_length()
    if isinstance(seen, Tensor):  # of a static cache: reading it would wait for a GPU
        return seen.to(device).clamp(max=last) + torch.arange(num_tokens, device=device)
    start = min(seen, last)
    return slice(start, start + num_tokens)


def _of_block_mask(mask: Any, num_tokens: int, cache: Any) -> Tensor:
    """Return (B, S): whether each token may attend to itself."""
    device = mask.kv_num_blocks.device
    keys = torch.arange(mask.shape[-1], device=device)[_own_keys(mask, num_tokens, cache)]
    batch = torch.arange(mask.shape[0], device=device)[:, None]
    queries = torch.arange(num_tokens, device=device)[None]
    return mask.mask_mod(batch, torch.zeros_like(batch), queries, keys[None])
