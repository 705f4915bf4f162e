"""The registered ops ``moe_kernels::moe_mlp`` and ``moe_mlp_backward``, and their formula.

Saved for backward are hidden_states, topk_weights, the pre-activation, u1 = x A1^T and
u2 = a A2^T (unscaled) and the dispatch, all of shapes that do not depend on the routing.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops import checks
from moe_kernels.ops.dtypes import on_device, without_autocast
from moe_kernels.ops.gradients import (
    OpArguments,
    check_saved,
    in_dtype_of,
    is_plain,
    no_second_derivative,
    plain_function,
    refuse_batched_gradient,
    register_formulas,
    transformed_function,
    way,
)
from moe_kernels.ops.moe_mlp.activation import ExpertForm
from moe_kernels.ops.moe_mlp.tiles import force, forced
from moe_kernels.ops.moe_mlp.weights import (
    TRAINABLE,
    ExpertWeights,
    Saved,
    check_frozen_extra,
    check_scales,
    nothing_saved,
)


def _moe_mlp(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    modality_ids: Tensor | None,
    extra_gate_up_proj: Tensor | None,
    extra_down_proj: Tensor | None,
    gate_up_A: Tensor | None,
    gate_up_B: Tensor | None,
    gate_up_scaling: Tensor | None,
    down_A: Tensor | None,
    down_B: Tensor | None,
    down_scaling: Tensor | None,
    gate_up_bias: Tensor | None,
    gate_up_scales: Tensor | None,
    down_scales: Tensor | None,
    frozen_extra: int,
    act: str,
    gated: bool,
    alpha: float,
    limit: float,
    shift: float,
    interleaved: bool,
    save_for_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out (T, H) and the fields of ``Saved``, without rows unless it saves.

    Only the backward uses ``frozen_extra``.
    """
    arguments = tuple(locals().values())
    out, saved = _compute(*arguments)
    if not save_for_backward:
        saved = nothing_saved(hidden_states, topk_ids, _weights_of(arguments))
    return out, *saved


def _compute(*arguments: Any) -> tuple[Tensor, Saved]:
    """Return what a backend's forward returns for the arguments of :func:`_moe_mlp`."""
    weights, form, others = (of(arguments) for of in (_weights_of, _form_of, _others_of))
    hidden_states, topk_ids, topk_weights, ids, frozen_extra, save_for_backward, backend = others
    check_frozen_extra(frozen_extra, weights.num_extra)
    check_scales(weights)
    checks.id_ranges(topk_ids, weights.num_experts, ids, weights.num_modalities, backend)
    with on_device(hidden_states.device), without_autocast(hidden_states.device):
        return backends.implementation("moe_mlp", backend).forward(
            hidden_states.contiguous(),
            topk_ids.contiguous(),
            topk_weights.contiguous(),
            None if ids is None else ids.contiguous(),
            weights,
            form,
            save_for_backward,
        )


class _Others(NamedTuple):
    """Arguments of :func:`_moe_mlp` beside the experts' weights and form."""

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    modality_ids: Tensor | None
    frozen_extra: int
    save_for_backward: bool
    backend: str


_FORWARD = OpArguments(_moe_mlp, differentiable=("hidden_states", "topk_weights", *TRAINABLE))
_weights_of, _form_of, _others_of = map(_FORWARD.group, (ExpertWeights, ExpertForm, _Others))
moe_mlp_op = torch.library.custom_op("moe_kernels::moe_mlp", _moe_mlp, mutates_args=())


@moe_mlp_op.register_fake
def _(*arguments):
    hidden_states, topk_ids, *_, save_for_backward, _ = _others_of(arguments)
    weights, out = _weights_of(arguments), hidden_states.new_empty(hidden_states.shape)
    if not save_for_backward:
        return out, *nothing_saved(hidden_states, topk_ids, weights)
    rows = topk_ids.numel()
    num_segments = weights.num_experts * (weights.num_modalities + 1)
    return (
        out,
        hidden_states.new_empty(rows, weights.gate_up_proj.shape[1]),
        hidden_states.new_empty(rows, weights.ranks[0]),
        hidden_states.new_empty(rows, weights.ranks[1]),
        topk_ids.new_empty(rows),
        topk_ids.new_empty(rows),
        topk_ids.new_empty(num_segments + 1),
    )


def _moe_mlp_backward(
    grad_out: Tensor,
    hidden_states: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    extra_gate_up_proj: Tensor | None,
    extra_down_proj: Tensor | None,
    gate_up_A: Tensor | None,
    gate_up_B: Tensor | None,
    gate_up_scaling: Tensor | None,
    down_A: Tensor | None,
    down_B: Tensor | None,
    down_scaling: Tensor | None,
    gate_up_bias: Tensor | None,
    gate_up_scales: Tensor | None,
    down_scales: Tensor | None,
    pre_act: Tensor,
    u1: Tensor,
    u2: Tensor,
    perm: Tensor,
    inv_perm: Tensor,
    segment_offsets: Tensor,
    needs: list[bool],
    frozen_extra: int,
    act: str,
    gated: bool,
    alpha: float,
    limit: float,
    shift: float,
    interleaved: bool,
    backend: str,
) -> list[Tensor]:
    """Return the gradients that ``needs`` asks for, each in its tensor's dtype.

    They are those of hidden_states, topk_weights, extra_gate_up_proj, extra_down_proj, gate_up_A,
    gate_up_B, down_A and down_B. For the first ``frozen_extra`` added experts zeros are returned.
    """
    arguments = tuple(locals().values())
    weights, form, saved = (of(arguments) for of in _OF_BACKWARD)
    check_frozen_extra(frozen_extra, weights.num_extra)
    check_scales(weights)
    with on_device(hidden_states.device), without_autocast(hidden_states.device):
        grads = backends.implementation("moe_mlp", backend).backward(
            grad_out.contiguous(),
            hidden_states.contiguous(),
            topk_weights.contiguous(),
            weights,
            form,
            saved,
            needs,
            frozen_extra,
        )
    needed = _needed(hidden_states, topk_weights, weights, needs)
    return list(map(in_dtype_of, grads, needed))


_BACKWARD = OpArguments(_moe_mlp_backward, differentiable=())
_OF_BACKWARD = tuple(map(_BACKWARD.group, (ExpertWeights, ExpertForm, Saved)))
moe_mlp_backward_op = torch.library.custom_op(
    "moe_kernels::moe_mlp_backward", _moe_mlp_backward, mutates_args=()
)


@moe_mlp_backward_op.register_fake
def _(*arguments):
    named = _BACKWARD.by_name(arguments)
    weights, _, _ = (of(arguments) for of in _OF_BACKWARD)
    needed = _needed(named["hidden_states"], named["topk_weights"], weights, named["needs"])
    return [tensor.new_empty(tensor.shape) for tensor in needed]


def _needed(
    hidden_states: Tensor, topk_weights: Tensor, weights: ExpertWeights, needs: list[bool]
) -> list[Tensor]:
    candidates = (hidden_states, topk_weights, *weights.trainable())
    return [tensor for tensor, need in zip(candidates, needs, strict=True) if need]


def _setup_context(ctx, inputs, output):
    others, (_, *saved) = _others_of(inputs), output
    ctx.mark_non_differentiable(*saved)
    check_saved(_NAME, others.save_for_backward, ctx.needs_input_grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(others.hidden_states, others.topk_weights, *_weights_of(inputs), *saved)
    ctx.frozen_extra, ctx.backend = others.frozen_extra, others.backend
    ctx.form, ctx.tiles = _form_of(inputs), forced()


def _backward(ctx, grad_out, *_):
    if grad_out is None:
        return _FORWARD.gradients()
    refuse_batched_gradient(_NAME, grad_out)
    needs, saved = _FORWARD.needs(ctx.needs_input_grad), ctx.saved_tensors
    # With a graph of the backward pass the op must be seen, to say that it has no derivative.
    plain = not torch.is_grad_enabled() and is_plain(grad_out, *saved)
    registered = torch.ops.moe_kernels.moe_mlp_backward
    compute = _moe_mlp_backward if plain else way(registered, _transformed_backward)
    with force(ctx.tiles):
        needed = compute(grad_out, *saved, needs, ctx.frozen_extra, *ctx.form, ctx.backend)
    return _FORWARD.gradients(needed, needs)


_NAME = "moe_kernels.ops.moe_mlp"
_SECOND = no_second_derivative(_NAME)
register_formulas(moe_mlp_op, _NAME, _setup_context, _backward)
register_formulas(moe_mlp_backward_op, _NAME, **_SECOND)
_plain = plain_function("MoeMlp", _moe_mlp, _setup_context, _backward)
_transformed = transformed_function(_NAME, _moe_mlp, _setup_context, _backward)
_transformed_backward = transformed_function(_NAME, _moe_mlp_backward, **_SECOND)


# Backends with an op of the extension for all of a layer, "cuda" for a few tokens.
_IN_ONE_CALL = ("cpu", "cuda")


def run(
    *tensors: Tensor | None,
    frozen_extra: int,
    form: ExpertForm,
    save_for_backward: bool,
    backend: str,
    plain: bool,
) -> Tensor:
    """Return the first output of :func:`_moe_mlp`, around the dispatcher for plain tensors.

    Then no ``TorchFunctionMode`` sees the op either. ``plain`` says that they are known to be so.
    """
    arguments = (*tensors, frozen_extra, *form, save_for_backward, backend)
    if not (plain or is_plain(*tensors)):
        return way(torch.ops.moe_kernels.moe_mlp, _transformed)(*arguments)[0]
    if save_for_backward:
        return _plain(*arguments)
    if backend in _IN_ONE_CALL:
        out = backends.implementation("moe_mlp", backend).inference(*tensors, form=form)
        if out is not None:
            return out
    return _compute(*arguments)[0]
