"""Added parameters in the checkpoints of transformers: they keep their names and values.

``save_pretrained`` gives parameters the names and layouts of the released checkpoint: it makes
``llm`` of ``language_model``, and two tensors of one. It finds them by parts of their names, and
would take added parameters for some of them. ``Trainer`` would not find these when it resumes.
"""

import re
from typing import Self

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from moe_kernels.models.parameters import is_added

_HIDDEN = "moe_kernels-"


def keep_added(model: PreTrainedModel) -> None:
    """Make this object's ``save_pretrained`` write added parameters as they are."""
    if conversions := _conversions(model):
        # They are undone from the last to the first.
        model._weight_conversions = [_Show(), *conversions, _Hide(), _Keep()]


def _conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """Return the conversions that transformers would undo, as it finds them."""
    found = getattr(model, "_weight_conversions", None)
    if found is not None:
        return found
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    return [each for each in mapping if not isinstance(each, PrefixChange)]


class _Renaming(WeightRenaming):
    """A renaming by a function in place of patterns."""

    __slots__ = ()

    def __init__(self):
        super().__init__("unused", "unused")

    def reverse_transform(self) -> Self:
        return self

    def rename_source_key(self, source_key: str) -> tuple[str, None]:
        return self.rename(source_key), None


class _Hide(_Renaming):
    """Write the name of an added parameter in digits, which no other renaming matches."""

    __slots__ = ()

    def rename(self, name: str) -> str:
        return f"{_HIDDEN}{name.encode().hex()}" if is_added(name) else name


class _Show(_Renaming):
    """Give a hidden name back, without a prefix that another renaming has put before it."""

    __slots__ = ()

    def rename(self, name: str) -> str:
        hidden = re.search(f"{_HIDDEN}([0-9a-f]+)", name)
        return bytes.fromhex(hidden[1]).decode() if hidden else name


class _Keep(WeightConverter):
    """Take added parameters before another converter does, and leave them as they are."""

    __slots__ = ()

    def __init__(self):
        super().__init__("unused", "unused", [Chunk()])  # it needs one; none runs

    def reverse_transform(self) -> Self:
        return self

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return source_key, self.source_patterns[0] if is_added(source_key) else None

    def convert(self, layer_name: str, *args, **kwargs) -> dict[str, list[Tensor]]:
        (tensors,) = self.materialize_tensors().values()
        return {layer_name: tensors}
