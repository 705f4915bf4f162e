"""How well a language model predicts a text."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Iterable[Tensor]) -> float:
    """The exponential of the mean negative log-likelihood of a token, given those before it.

    Each row is a text of its own: its first token is given, not predicted.

    Args:
        model: a causal language model; evaluated in eval mode, and left in the mode it had.
        batches: of (B, S) int64 token ids without padding, S at least 2.

    Raises:
        ValueError: there is no token to predict.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for ids in batches:
            ids = ids.to(model.device)
            logits, labels = model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            count += labels.numel()
    finally:
        model.train(was_training)
    if not count:
        raise ValueError("no token to predict: batches must hold rows of at least two tokens")
    return math.exp(total / count)
