"""Modality ids on their way from the model's forward to the layers.

The patched model's ``forward`` resolves (B, S) modality ids and passes them down as a keyword. A
pre-hook on each ``self_attn`` takes them: it runs before the MoE block of the same layer, and again
when activation checkpointing recomputes the layer, which a global or a hook on the layer would not.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moe_kernels import backends, env
from moe_kernels.ops import LinearDispatch, checks, linear_dispatch

MISSING = (
    "this layer got no modality_ids: call the patched model itself (not its inner model), which "
    "derives them from input_ids or takes modality_ids="
)


@dataclass
class LayerCall:
    """State of one forward of one layer.

    Attributes:
        modality_ids: (B, S) int64.
        linear_dispatches: rows sorted for the layer's adapted linear modules, by number of
            modalities and backend; made when the first of them asks.
    """

    modality_ids: Tensor
    linear_dispatches: dict[tuple[int, str], LinearDispatch] = field(default_factory=dict)


class ModalityContext:
    """One layer's modality ids, shared by its experts and attention projections.

    Attributes:
        backend: passed to the ops.
        call: state of the forward that is running, all of it; None before the first.
    """

    def __init__(self, backend: str | None):
        self.backend = backend
        self.call: LayerCall | None = None

    @property
    def modality_ids(self) -> Tensor | None:
        """(B, S) int64 of the forward that is running, or None before the first."""
        return None if self.call is None else self.call.modality_ids

    @modality_ids.setter
    def modality_ids(self, modality_ids: Tensor | None) -> None:
        self.start(modality_ids)

    def start(self, modality_ids: Tensor | None) -> None:
        """Begin a forward: nothing of the one before is kept."""
        self.call = None if modality_ids is None else LayerCall(modality_ids)

    def linear_dispatch(self, num_modalities: int, weight: Tensor) -> tuple[LinearDispatch, str]:
        """Return this forward's rows sorted by modality, and the backend they are for.

        Args:
            num_modalities: M.
            weight: of the linear module; its device and dtype choose the backend.
        """
        backend = backends.select(self.backend, weight.device, weight.dtype)
        made, key = self.call.linear_dispatches, (num_modalities, backend)
        if key not in made:
            ids = self.call.modality_ids.reshape(-1)
            made[key] = linear_dispatch(ids, num_modalities, backend=backend)
        return made[key], backend


class TakeModalityIds:
    """Pre-hook of ``self_attn``: moves the keyword ``modality_ids`` into the layer's context.

    An object, not a closure: a deepcopy of the model must set the copy's context.
    """

    def __init__(self, context: ModalityContext):
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        if kwargs.get("modality_ids") is None:
            raise RuntimeError(MISSING)
        self.context.start(kwargs.pop("modality_ids"))
        return args, kwargs


def resolve_modality_ids(
    table: Tensor,
    modality_ids: Tensor | None,
    *,
    num_modalities: int,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
) -> Tensor:
    """Return the (B, S) modality of each position: given, or by token id; -1 on padding.

    Args:
        table: (V,) modality of each token id.
        modality_ids: (B, S) as given by the caller, or None.
        num_modalities: M.
        input_ids: (B, S) or None.
        inputs_embeds: (B, S, H) or None.
        attention_mask: (B, at least S) marks padding with 0 in its last S columns; a mask of
            another shape marks none.

    Raises:
        ValueError: embeddings without modality ids, ids of another shape, or (on the CPU) above M.
        TypeError: modality ids that are not integers.
    """
    if input_ids is None and inputs_embeds is None:
        raise ValueError("give input_ids or inputs_embeds")
    shape = input_ids.shape if input_ids is not None else inputs_embeds.shape[:2]
    if modality_ids is None:
        if input_ids is None:
            raise ValueError(
                "inputs_embeds say nothing of the tokens' modality: give modality_ids too, (B, S) "
                "integers, 0 for the base modality, m for the m-th added one, -1 for padding"
            )
        modality_ids = table[input_ids]
    elif modality_ids.is_floating_point() or modality_ids.dtype == torch.bool:
        raise TypeError(f"modality_ids must be integers, got {modality_ids.dtype}")
    elif modality_ids.shape != shape:
        raise ValueError(
            f"modality_ids must be (B, S) = {tuple(shape)}, got {tuple(modality_ids.shape)}"
        )
    elif not torch.compiler.is_compiling() and (not modality_ids.is_cuda or env.check_values()):
        # A graph cannot branch on values, so the ops check those of a compiled model.
        checks.modality_range(modality_ids, num_modalities)
    modality_ids = modality_ids.to(device=table.device, dtype=torch.int64)
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        real = attention_mask[:, -shape[1] :].to(table.device) != 0
        modality_ids = torch.where(real, modality_ids, -1)
    return modality_ids
