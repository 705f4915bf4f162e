"""Cross-entropy of a frozen head and added rows, without the logits of all tokens at once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from moe_kernels.ops.dtypes import acc_dtype, without_autocast

# Logits that exist at a time: 128 MiB in float32, 800 tokens of a vocabulary of 40,000. On a CPU a
# quarter, which caches hold better.
CHUNK, CPU_CHUNK = 2**25, 2**23


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> Tensor:
    """Return the sum of the tokens' cross-entropies, as cross_entropy of the joined logits is.

    The logits exist for a few tokens at a time, and so do their gradients, which are made in the
    forward pass: the backward pass reads no weight, so it does not matter whether one is sharded
    by then. Gradients go to ``hidden_states`` and ``rows`` alone, once.

    Args:
        hidden_states: (T, H).
        weight: (V, H), frozen.
        bias: (V,), frozen, or None.
        rows: (n, H) the head's added rows, or None.
        labels: (T,) integers below V + n, or ``ignore_index``.
        ignore_index: the label of tokens that do not count.
        chunk: the number of logits that may exist at a time; None: as the device suits.

    Returns:
        The sum, in float32, or float64 for hidden states in float64.

    Raises:
        ValueError: ``weight`` or ``bias`` requires grad, or (on the CPU) a label is out of range.
    """
    for name, each in (("weight", weight), ("bias", bias)):
        if each is not None and each.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"the head's {name} requires grad, and the fused loss gives gradients to hidden "
                "states and added rows alone: freeze it, or set fused_loss = False"
            )
    columns = weight.shape[0] + (0 if rows is None else rows.shape[0])
    _check_labels(labels, ignore_index, columns)
    device = hidden_states.device
    if torch.is_autocast_enabled(device.type):  # once, not in each chunk
        dtype = torch.get_autocast_dtype(device.type)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    rows = weight[:0] if rows is None else rows
    chunk = chunk or (CPU_CHUNK if device.type == "cpu" else CHUNK)
    # A GPU would have to wait for the number of tokens that are left, and a graph has none.
    if device.type == "cpu" and not torch.compiler.is_compiling():
        counts = labels != ignore_index
        hidden_states, labels = hidden_states[counts], labels[counts]
    with without_autocast(device):
        return _LinearCrossEntropy.apply(
            hidden_states, rows, weight, bias, labels, ignore_index, max(1, chunk // columns)
        )


def _check_labels(labels: Tensor, ignore_index: int, columns: int) -> None:
    """Raise ValueError for labels without a logit; on a GPU the kernel that gathers asserts it."""
    if labels.is_cuda or torch.compiler.is_compiling():
        return
    real = labels[labels != ignore_index]
    if real.numel() and not 0 <= int(real.min()) <= int(real.max()) < columns:
        raise ValueError(
            f"labels must be below {columns}, the number of logits, or {ignore_index}: got "
            f"{int(real.min())}..{int(real.max())} (within text_only() added tokens have no logit)"
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies over chunks of ``step`` tokens."""

    @staticmethod
    def forward(ctx, hidden_states, rows, weight, bias, labels, ignore_index, step):
        dtype = acc_dtype(hidden_states.dtype)
        needs = ctx.needs_input_grad[:2]
        own = rows.to(weight.dtype)
        total = torch.zeros((), dtype=dtype, device=hidden_states.device)
        gradients = [
            torch.empty_like(hidden_states) if needs[0] else None,
            torch.zeros_like(rows, dtype=dtype) if needs[1] else None,
        ]
        for start in range(0, hidden_states.shape[0], step):
            part = slice(start, start + step)
            chunk = _Chunk(hidden_states[part], labels[part], ignore_index)
            total += chunk.loss(weight, bias, own, dtype)
            if needs[0]:
                gradients[0][part] = chunk.hidden_gradient(weight, own)
            if needs[1]:
                gradients[1] += chunk.row_gradient()
        ctx.save_for_backward(*gradients)
        ctx.row_dtype = rows.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, rows = ctx.saved_tensors
        return (
            None if hidden is None else (hidden * grad).to(hidden.dtype),
            None if rows is None else (rows * grad).to(ctx.row_dtype),
            *(None,) * 5,
        )


class _Chunk:
    """Some tokens, their loss and its gradients."""

    def __init__(self, hidden_states: Tensor, labels: Tensor, ignore_index: int):
        self.hidden_states = hidden_states
        self.real = (labels != ignore_index)[:, None]
        self.labels = labels.masked_fill(labels == ignore_index, 0)[:, None]

    def loss(self, weight: Tensor, bias: Tensor | None, own: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sum of losses, and keep the gradients of the logits in their place."""
        hidden, sizes = self.hidden_states, [weight.shape[0], own.shape[0]]
        logits = hidden.new_empty(hidden.shape[0], sum(sizes), dtype=dtype)
        self.text, self.added = logits.split(sizes, dim=1)
        self.text.copy_(F.linear(hidden, weight, bias))
        self.added.copy_(F.linear(hidden, own))
        normaliser = logits.logsumexp(1, keepdim=True)
        loss = torch.where(self.real, normaliser - logits.gather(1, self.labels), 0).sum()
        logits.sub_(normaliser).exp_().mul_(self.real)
        logits.scatter_add_(1, self.labels, -self.real.to(dtype))
        return loss

    def hidden_gradient(self, weight: Tensor, own: Tensor) -> Tensor:
        """Return (tokens, H)."""
        return self.text.to(weight.dtype) @ weight + self.added.to(own.dtype) @ own

    def row_gradient(self) -> Tensor:
        """Return (n, H), in the dtype of accumulation."""
        return self.added.T @ self.hidden_states.to(self.added.dtype)


@dataclass
class FusedLoss:
    """The loss of one forward, which the head computes in place of logits.

    Attributes:
        labels: (B, S), not shifted.
        arguments: of the forward, those of the loss among them: ``shift_labels``,
            ``num_items_in_batch``, ``ignore_index``.
        value: the loss, once the head has run.
    """

    labels: Tensor
    arguments: dict[str, Any]
    value: Tensor | None = None

    def __call__(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        """Return the loss, a scalar, of hidden states (B, S, H)."""
        labels, ignore = self._targets(), self.arguments.get("ignore_index", -100)
        if labels.shape != hidden_states.shape[:-1]:
            raise ValueError(
                f"the fused loss needs hidden states of all labels, {tuple(labels.shape)}, got "
                f"{tuple(hidden_states.shape[:-1])}: leave out logits_to_keep"
            )
        labels = labels.to(hidden_states.device).reshape(-1)
        total = linear_cross_entropy(
            hidden_states.flatten(0, -2), weight, bias, rows, labels, ignore_index=ignore
        )
        count = self.arguments.get("num_items_in_batch")
        count = (labels != ignore).sum() if count is None else count
        count = count.to(total.device) if isinstance(count, Tensor) else count
        self.value = total / count
        return self.value

    def _targets(self) -> Tensor:
        """Return each token's next one, as transformers' loss does."""
        if (shifted := self.arguments.get("shift_labels")) is not None:
            return shifted
        ignore = self.arguments.get("ignore_index", -100)
        return F.pad(self.labels, (0, 1), value=ignore)[..., 1:]


def check_loss(loss: object) -> None:
    """Raise RuntimeError unless a model's loss is the one that is fused."""
    if loss is not ForCausalLMLoss:
        raise RuntimeError(
            f"fused_loss computes transformers' ForCausalLMLoss, and the model's loss is "
            f"{getattr(loss, '__name__', loss)}, which needs logits: set fused_loss = False"
        )
