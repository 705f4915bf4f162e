"""The loss of a patched model, whose logits have as many columns as there are tokens now."""

from collections.abc import Callable

from torch import Tensor

from moe_kernels import env


class LossOverColumns:
    """Loss of a patched model, over as many classes as the logits have columns.

    transformers passes the vocabulary's size, which all threads share, while one of them may have
    left out the added tokens.

    Attributes:
        loss: the loss before patching.
        before: what the model itself had as its loss then; None: nothing.
    """

    def __init__(self, loss: Callable, before: Callable | None):
        self.loss, self.before = loss, before
        self.__name__ = getattr(loss, "__name__", type(loss).__name__)

    def __call__(self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs) -> Tensor:
        columns = logits.shape[-1]
        reads = not labels.is_cuda or env.check_values()
        if columns < vocab_size and reads and (labels >= columns).any():
            raise ValueError(
                f"labels has id {int(labels.max())} of an added token, which has no logit within "
                f"text_only() (ids below {columns}): leave it for this batch"
            )
        return self.loss(logits=logits, labels=labels, vocab_size=columns, **kwargs)
