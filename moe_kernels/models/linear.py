"""Masked low-rank updates of linear layers, in attention and routers."""

from collections.abc import Callable

from torch import Tensor, nn

from moe_kernels import ops
from moe_kernels.layers import ModalityLora
from moe_kernels.models.context import MISSING, ModalityContext
from moe_kernels.models.instance_forward import reset_forward, set_forward


def masked_linear(module: nn.Module, hidden_states: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return ``W x + b`` of an attached module, plus the low-rank update on modality rows.

    ``hidden_states`` is (B, S, in) or (B S, in); the result has its leading shape. ``weight``
    replaces the module's, in another dtype.
    """
    context: ModalityContext = module.__dict__["_modality_context"]
    if context.modality_ids is None:
        raise RuntimeError(MISSING)
    rows, expected = hidden_states.shape[:-1].numel(), context.modality_ids.numel()
    if rows != expected:
        raise ValueError(
            f"hidden_states have {rows} rows, the modality_ids of this forward {expected}: pass "
            "hidden states of all its positions, or call the patched model itself on others"
        )
    context.module_ran(module.__dict__["_modality_name"])
    lora = context.weights(module.__dict__["_modality_lora"])
    num_modalities = int(lora.lora_A.shape[0])  # torch.jit.trace makes sizes tensors
    weight = module.weight if weight is None else weight
    dispatched, backend = context.linear_dispatch(num_modalities, weight)
    bias = getattr(module, "bias", None)
    return ops.lora_linear(
        hidden_states,
        weight,
        bias if bias is None else bias.to(weight.dtype),
        lora,
        dispatched=dispatched,
        backend=backend,
    )


def attach(
    module: nn.Module,
    context: ModalityContext,
    lora: ModalityLora | None,
    name: str,
    forward: Callable = masked_linear,
) -> None:
    """Make this one instance add the low-rank update on the rows of added modalities.

    ``name`` is unique in its layer, which awaits it in each forward from now on.
    """
    context.await_module(name)
    module.__dict__["_modality_name"] = name
    module.__dict__["_modality_context"] = context
    module.__dict__["_modality_lora"] = lora
    set_forward(module, forward)


def detach(module: nn.Module) -> None:
    """Undo :func:`attach`, if it was called."""
    if "_modality_context" in module.__dict__:
        own = module.__dict__
        own["_modality_context"].await_module(own["_modality_name"], awaited=False)
        for name in ("_modality_context", "_modality_lora", "_modality_name"):
            del own[name]
        reset_forward(module)
