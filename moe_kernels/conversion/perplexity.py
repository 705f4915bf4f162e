"""Perplexity of a language model on a text."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe_kernels import arguments
from moe_kernels.modes import evaluating


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Iterable[Tensor]) -> float:
    """Return the exponential of the mean negative log-likelihood of a token given those before it.

    Every row is a separate text; its first token is not predicted.

    Args:
        model: a causal language model; it runs in eval mode, and gets back the mode it had.
        batches: (B, S) int64 token ids without padding, S at least 2.

    Raises:
        TypeError: a batch is no tensor.
        ValueError: a batch has another shape, or there is no token to predict.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for ids in batches:
            arguments.token_batches("batches", [ids])
            ids = ids.to(model.device)
            logits, labels = model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            count += labels.numel()
    if not count:
        raise ValueError("no token to predict: batches must hold rows of at least two tokens")
    return math.exp(total / count)
