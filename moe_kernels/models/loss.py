"""The loss of a patched model, whose logits have as many columns as there are tokens now."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_kernels import env
from moe_kernels.models.context import Switches


class LossOverColumns:
    """Loss of a patched model, over as many classes as the logits have columns.

    transformers passes the vocabulary's size, which all threads share, while one of them may have
    left out the added tokens. Where the head has computed a fused loss, that is the loss.

    Attributes:
        switches: those of the model.
        loss: the loss before patching.
        before: what the model itself had as its loss then; None: nothing.
    """

    def __init__(self, switches: Switches, loss: Callable, before: Callable | None):
        self.switches, self.loss, self.before = switches, loss, before
        self.__name__ = getattr(loss, "__name__", type(loss).__name__)
        self._unchanged = False

    def __call__(self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs) -> Tensor:
        call = self.switches.call
        if call is not None and call.fused_loss is not None:
            self._check_unchanged(logits, call.fused_loss.value)
            return logits
        columns = logits.shape[-1]
        reads = not labels.is_cuda or env.check_values()
        if columns < vocab_size and reads and (labels >= columns).any():
            raise ValueError(
                f"labels has id {int(labels.max())} of an added token, which has no logit within "
                f"text_only() (ids below {columns}): leave it for this batch"
            )
        return self.loss(logits=logits, labels=labels, vocab_size=columns, **kwargs)

    def _check_unchanged(self, found: Tensor, value: Tensor) -> None:
        """Raise unless the head's output came here unchanged.

        Hooks of engines give another tensor with its value. Reading values waits for a GPU, so that
        one forward has to do.
        """
        if found is value or self._unchanged:
            return
        if found.shape != () or not torch.allclose(found, value, rtol=0, atol=0, equal_nan=True):
            raise RuntimeError(
                "the model's forward changes the logits that its head gives, which fused_loss "
                "does not compute: set fused_loss = False"
            )
        self._unchanged = bool(value.isfinite() & (value != 0))
