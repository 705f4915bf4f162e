"""Masked low-rank updates on attention's linear layers."""

import types

from torch import Tensor, nn

from moe_kernels import ops
from moe_kernels.layers import ModalityLora
from moe_kernels.models.context import MISSING, ModalityContext


def attach(linear: nn.Linear, context: ModalityContext, lora: ModalityLora) -> None:
    """Make this one instance add the low-rank update on the rows of added modalities."""
    linear.__dict__["_modality_context"] = context
    linear.__dict__["_modality_lora"] = lora
    linear.forward = types.MethodType(_forward, linear)


def detach(linear: nn.Linear) -> None:
    """Undo :func:`attach`, if it was done."""
    if "_modality_context" in linear.__dict__:
        for name in ("_modality_context", "_modality_lora", "forward"):
            del linear.__dict__[name]


def _forward(self: nn.Linear, hidden_states: Tensor) -> Tensor:
    context: ModalityContext = self.__dict__["_modality_context"]
    if context.modality_ids is None:
        raise RuntimeError(MISSING)
    return ops.lora_linear(
        hidden_states,
        self.weight,
        self.bias,
        self.__dict__["_modality_lora"].weights(),
        modality_ids=context.modality_ids,
        backend=context.backend,
    )
