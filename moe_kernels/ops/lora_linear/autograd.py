"""The registered ops ``moe_kernels::linear_dispatch``, ``lora_linear`` and its backward.

The base GEMM is torch's, over all rows, so its bits follow from the shape alone; the low-rank term
is added in place, on the rows of added modalities only. Saved for backward are hidden_states,
u = x A^T (unscaled) and the dispatch.
"""

import torch
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops import checks
from moe_kernels.ops.dtypes import on_device, without_autocast
from moe_kernels.ops.gradients import (
    OpArguments,
    by_element,
    check_saved,
    in_dtype_of,
    is_plain,
    no_second_derivative,
    plain_function,
    refuse_batched_gradient,
    register_formulas,
    select,
    transformed_function,
    way,
)
from moe_kernels.ops.lora_linear.rows import (
    LinearDispatch,
    check_dispatch_fits,
    dispatch_shapes,
)
from moe_kernels.ops.lora_weights import LoraWeights


def _linear_dispatch(
    modality_ids: Tensor, num_modalities: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of :class:`LinearDispatch` for (T,) int64 ids."""
    checks.id_ranges(None, 0, modality_ids, num_modalities, backend)
    with on_device(modality_ids.device):
        return tuple(
            backends.implementation("lora_linear", backend).dispatch(
                modality_ids.contiguous(), num_modalities
            )
        )


linear_dispatch_op = torch.library.custom_op(
    "moe_kernels::linear_dispatch", _linear_dispatch, mutates_args=()
)


@linear_dispatch_op.register_fake
def _(modality_ids, num_modalities, backend):
    shapes = dispatch_shapes(modality_ids.shape[0], num_modalities, backend)
    return tuple(modality_ids.new_empty(shape) for shape in shapes)


linear_dispatch_op.register_vmap(by_element(linear_dispatch_op))


def sort_rows(modality_ids: Tensor, num_modalities: int, backend: str) -> LinearDispatch:
    """Return the rows of (T,) int64 ids by modality, around the dispatcher for plain tensors."""
    plain = is_plain(modality_ids)
    compute = _linear_dispatch if plain else torch.ops.moe_kernels.linear_dispatch
    return LinearDispatch(*compute(modality_ids, num_modalities, backend))


def _lora_linear(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    perm: Tensor,
    segment_offsets: Tensor,
    tiles: Tensor,
    groups: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    save_for_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return out (T, out), and u (T, r), or (0, r) unless ``save_for_backward``."""
    dispatched, rows = LinearDispatch(perm, segment_offsets, tiles, groups), hidden_states.shape[0]
    check_dispatch_fits(dispatched, rows, lora_A.shape[0], backend)
    with on_device(hidden_states.device), without_autocast(hidden_states.device):
        hidden_states = hidden_states.contiguous()
        out = torch.nn.functional.linear(hidden_states, weight, bias)
        u = backends.implementation("lora_linear", backend).forward(
            out,
            hidden_states,
            dispatched,
            LoraWeights(lora_A, lora_B, scaling),
            save_for_backward,
        )
    return out, u


_FORWARD = OpArguments(_lora_linear, differentiable=("hidden_states", "lora_A", "lora_B"))
lora_linear_op = torch.library.custom_op("moe_kernels::lora_linear", _lora_linear, mutates_args=())


@lora_linear_op.register_fake
def _(*arguments):
    named = _FORWARD.by_name(arguments)
    hidden_states, rank = named["hidden_states"], named["lora_A"].shape[1]
    rows = hidden_states.shape[0]
    return (
        hidden_states.new_empty(rows, named["weight"].shape[0]),
        hidden_states.new_empty(rows if named["save_for_backward"] else 0, rank),
    )


def _lora_linear_backward(
    grad_out: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    u: Tensor,
    perm: Tensor,
    segment_offsets: Tensor,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """Return the gradients that ``needs`` asks for, of hidden_states, lora_A and lora_B."""
    with on_device(hidden_states.device), without_autocast(hidden_states.device):
        grad_out = grad_out.contiguous()
        grad_hidden = grad_out @ weight if needs[0] else None
        params = backends.implementation("lora_linear", backend).backward(
            grad_out,
            hidden_states.contiguous(),
            u,
            perm,
            segment_offsets,
            LoraWeights(lora_A, lora_B, scaling),
            grad_hidden,
            needs[1:],
        )
    grads = [in_dtype_of(grad, lora_A) for grad in params]
    return [grad_hidden, *grads] if needs[0] else grads


lora_linear_backward_op = torch.library.custom_op(
    "moe_kernels::lora_linear_backward", _lora_linear_backward, mutates_args=()
)


@lora_linear_backward_op.register_fake
def _(
    grad_out,
    hidden_states,
    weight,
    lora_A,
    lora_B,
    scaling,
    u,
    perm,
    segment_offsets,
    needs,
    backend,
):
    candidates = (hidden_states, lora_A, lora_B)
    return [
        tensor.new_empty(tensor.shape)
        for tensor, need in zip(candidates, needs, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output):
    named, (_, u) = _FORWARD.by_name(inputs), output
    ctx.mark_non_differentiable(u)
    check_saved(_NAME, named["save_for_backward"], ctx.needs_input_grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        named["hidden_states"],
        named["weight"],
        *select(LoraWeights, named),
        u,
        named["perm"],
        named["segment_offsets"],
    )
    ctx.backend = named["backend"]


def _backward(ctx, grad_out, *_):
    if grad_out is None:
        return _FORWARD.gradients()
    refuse_batched_gradient(_NAME, grad_out)
    needs, saved = _FORWARD.needs(ctx.needs_input_grad), ctx.saved_tensors
    # With a graph of the backward pass the op must be seen, to say that it has no derivative.
    plain = not torch.is_grad_enabled() and is_plain(grad_out, *saved)
    registered = torch.ops.moe_kernels.lora_linear_backward
    compute = _lora_linear_backward if plain else way(registered, _transformed_backward)
    return _FORWARD.gradients(compute(grad_out, *saved, needs, ctx.backend), needs)


_NAME = "moe_kernels.ops.lora_linear"
_SECOND = no_second_derivative(_NAME)
register_formulas(lora_linear_op, _NAME, _setup_context, _backward)
register_formulas(lora_linear_backward_op, _NAME, **_SECOND)
_plain = plain_function("LoraLinear", _lora_linear, _setup_context, _backward)
_transformed = transformed_function(_NAME, _lora_linear, _setup_context, _backward)
_transformed_backward = transformed_function(_NAME, _lora_linear_backward, **_SECOND)


def run(*arguments: Tensor | bool | str | None) -> Tensor:
    """Return the first output of :func:`_lora_linear`, around the dispatcher for plain tensors.

    Then no ``TorchFunctionMode`` sees the op either.
    """
    *tensors, save_for_backward, _ = arguments
    if not is_plain(*tensors):
        return way(torch.ops.moe_kernels.lora_linear, _transformed)(*arguments)[0]
    if save_for_backward:
        return _plain(*arguments)
    return _lora_linear(*arguments)[0]
