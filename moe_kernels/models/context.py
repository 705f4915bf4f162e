"""Modality ids on their way from the model's forward to the layers.

The patched model's ``forward`` resolves (B, S) modality ids and passes them down as a keyword. A
pre-hook on each ``self_attn`` takes them: it runs before the MoE block of the same layer, and again
when activation checkpointing recomputes the layer, which a global or a hook on the layer would not.
"""

import contextlib
from collections.abc import Iterator
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
            modalities, backend and grad mode: autograd cannot save tensors of inference mode.
            Made when the first module asks, dropped when the layer's experts have run.
    """

    modality_ids: Tensor
    linear_dispatches: dict[tuple[int, str, bool], LinearDispatch] = field(default_factory=dict)


class ModalityContext:
    """One layer's modality ids, shared by its experts and attention projections.

    Attributes:
        backend: passed to the ops.
        call: all state of the forward that is running, or ran last; None before the first.
    """

    def __init__(self, backend: str | None):
        self.backend = backend
        self.call: LayerCall | None = None

    @property
    def modality_ids(self) -> Tensor | None:
        """(B, S) int64 of the forward that is running or ran last, or None before the first."""
        return None if self.call is None else self.call.modality_ids

    def start(self, modality_ids: Tensor) -> None:
        """Begin a forward: nothing of the one before is kept."""
        self.call = LayerCall(modality_ids)

    def finish(self) -> None:
        """End a forward: only its modality ids are kept."""
        if self.call is not None:
            self.call.linear_dispatches.clear()

    @contextlib.contextmanager
    def running(self, modality_ids: Tensor) -> Iterator[None]:
        """Begin a forward of a part of the layer alone, and restore the call before at the end."""
        before = self.call
        self.start(modality_ids)
        try:
            yield
        finally:
            self.call = before

    def linear_dispatch(self, num_modalities: int, weight: Tensor) -> tuple[LinearDispatch, str]:
        """Return this forward's rows sorted by modality, and the backend they are for.

        Args:
            num_modalities: M.
            weight: of the linear module; its device and dtype choose the backend.
        """
        backend = backends.select(self.backend, weight.device, weight.dtype)
        dispatches = self.call.linear_dispatches
        key = num_modalities, backend, torch.is_grad_enabled()
        if key not in dispatches:
            ids = self.call.modality_ids.reshape(-1)
            dispatches[key] = linear_dispatch(ids, num_modalities, backend=backend)
        return dispatches[key], backend


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


class DropDispatches:
    """Hook of the last part of a decoder layer, which ends the forward of its context.

    Checkpointing recomputes the parts, without a hook of the layer itself. It stops by an
    exception, after which the hook must run too.
    """

    def __init__(self, context: ModalityContext):
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        self.context.finish()


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
