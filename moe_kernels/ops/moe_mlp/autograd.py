"""The registered ops ``moe_kernels::moe_mlp`` and ``moe_mlp_backward``, and what joins them.

Saved for backward are hidden_states, topk_weights, the pre-activation, u1 = x A1^T and
u2 = a A2^T (unscaled) and the dispatch, all of shapes that do not depend on the routing.
"""

import torch
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops.dispatch import autograd as dispatch_autograd
from moe_kernels.ops.dtypes import on_device, without_autocast
from moe_kernels.ops.gradients import is_plain, place, plain_function
from moe_kernels.ops.moe_mlp import native_impl
from moe_kernels.ops.moe_mlp.weights import ExpertWeights, check_frozen_extra


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
    frozen_extra: int,
    save_for_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns out (T, H), pre_act (T*K, 2I), u1 (T*K, r1), u2 (T*K, r2), perm, inv_perm (T*K,) and
    segment_offsets; pre_act, u1 and u2 have no rows unless ``save_for_backward``. Their rows that
    nothing is computed for are zeros, so that every output is a function of the inputs.
    ``frozen_extra`` is the backward's.
    """
    weights = ExpertWeights(
        gate_up_proj, down_proj, extra_gate_up_proj, extra_down_proj,
        gate_up_A, gate_up_B, gate_up_scaling, down_A, down_B, down_scaling,
    )  # fmt: skip
    check_frozen_extra(frozen_extra, weights.num_extra)
    implementation, requested = backends.implementation("moe_mlp", backend), ()
    if backend in dispatch_autograd.WITH_MAPS:
        weights = weights.in_compute_dtype(adapters=False)
        requested = implementation.forward_maps(topk_ids.numel(), weights)
    (perm, inv_perm, _, _, segment_offsets), maps = dispatch_autograd.run(
        topk_ids, weights.num_experts, modality_ids, weights.num_modalities, backend, requested
    )
    with on_device(hidden_states.device), without_autocast(hidden_states.device):
        results = implementation.forward(
            hidden_states.contiguous(),
            topk_weights.contiguous(),
            perm,
            inv_perm,
            segment_offsets,
            weights,
            save_for_backward,
            *maps,
        )
    return *results, perm, inv_perm, segment_offsets


moe_mlp_op = torch.library.custom_op("moe_kernels::moe_mlp", _moe_mlp, mutates_args=())


@moe_mlp_op.register_fake
def _(
    hidden_states,
    topk_ids,
    topk_weights,
    gate_up_proj,
    down_proj,
    modality_ids,
    extra_gate_up_proj,
    extra_down_proj,
    gate_up_A,
    gate_up_B,
    gate_up_scaling,
    down_A,
    down_B,
    down_scaling,
    frozen_extra,
    save_for_backward,
    backend,
):
    weights = ExpertWeights(
        gate_up_proj, down_proj, extra_gate_up_proj, extra_down_proj,
        gate_up_A, gate_up_B, gate_up_scaling, down_A, down_B, down_scaling,
    )  # fmt: skip
    rows = topk_ids.numel()
    saved = rows if save_for_backward else 0
    num_segments = weights.num_experts * (weights.num_modalities + 1)
    return (
        hidden_states.new_empty(hidden_states.shape),
        hidden_states.new_empty(saved, gate_up_proj.shape[1]),
        hidden_states.new_empty(saved, weights.ranks[0]),
        hidden_states.new_empty(saved, weights.ranks[1]),
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
    pre_act: Tensor,
    u1: Tensor,
    u2: Tensor,
    perm: Tensor,
    inv_perm: Tensor,
    segment_offsets: Tensor,
    needs: list[bool],
    frozen_extra: int,
    backend: str,
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, of hidden_states, topk_weights, extra_gate_up_proj,
    extra_down_proj, gate_up_A, gate_up_B, down_A and down_B, each in its tensor's dtype. Those of
    the first ``frozen_extra`` added experts are not computed: zeros.
    """
    weights = ExpertWeights(
        gate_up_proj, down_proj, extra_gate_up_proj, extra_down_proj,
        gate_up_A, gate_up_B, gate_up_scaling, down_A, down_B, down_scaling,
    )  # fmt: skip
    check_frozen_extra(frozen_extra, weights.num_extra)
    with on_device(hidden_states.device), without_autocast(hidden_states.device):
        grads = backends.implementation("moe_mlp", backend).backward(
            grad_out.contiguous(),
            hidden_states.contiguous(),
            topk_weights.contiguous(),
            perm,
            inv_perm,
            segment_offsets,
            weights,
            pre_act,
            u1,
            u2,
            needs,
            frozen_extra,
        )
    return [
        grad.to(tensor.dtype)
        for grad, tensor in zip(
            grads, _needed(hidden_states, topk_weights, weights, needs), strict=True
        )
    ]


moe_mlp_backward_op = torch.library.custom_op(
    "moe_kernels::moe_mlp_backward", _moe_mlp_backward, mutates_args=()
)


@moe_mlp_backward_op.register_fake
def _(
    grad_out,
    hidden_states,
    topk_weights,
    gate_up_proj,
    down_proj,
    extra_gate_up_proj,
    extra_down_proj,
    gate_up_A,
    gate_up_B,
    gate_up_scaling,
    down_A,
    down_B,
    down_scaling,
    pre_act,
    u1,
    u2,
    perm,
    inv_perm,
    segment_offsets,
    needs,
    frozen_extra,
    backend,
):
    weights = ExpertWeights(
        gate_up_proj, down_proj, extra_gate_up_proj, extra_down_proj,
        gate_up_A, gate_up_B, gate_up_scaling, down_A, down_B, down_scaling,
    )  # fmt: skip
    return [
        tensor.new_empty(tensor.shape)
        for tensor in _needed(hidden_states, topk_weights, weights, needs)
    ]


def _needed(
    hidden_states: Tensor, topk_weights: Tensor, weights: ExpertWeights, needs: list[bool]
) -> list[Tensor]:
    candidates = (hidden_states, topk_weights, *weights.trainable())
    return [tensor for tensor, need in zip(candidates, needs, strict=True) if need]


# Positions in moe_mlp_op's arguments of what may take a gradient, in the order of ``needs``.
_DIFFERENTIABLE = (0, 2, 6, 7, 8, 9, 11, 12)
_NUM_ARGS = 17


def _setup_context(ctx, inputs, output):
    hidden_states, _, topk_weights, gate_up_proj, down_proj, _, *rest = inputs
    *trainable, frozen_extra, _, backend = rest
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_states, topk_weights, gate_up_proj, down_proj, *trainable, *saved)
    ctx.frozen_extra, ctx.backend = frozen_extra, backend


def _backward(ctx, grad_out, *_):
    if grad_out is None:
        return (None,) * _NUM_ARGS
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    saved = ctx.saved_tensors
    # With a graph of the backward pass the op must be seen, to say that it has no derivative.
    plain = not torch.is_grad_enabled() and is_plain(grad_out, *saved)
    compute = _moe_mlp_backward if plain else torch.ops.moe_kernels.moe_mlp_backward
    needed = compute(grad_out, *saved, needs, ctx.frozen_extra, ctx.backend)
    return place(needed, _DIFFERENTIABLE, needs, _NUM_ARGS)


moe_mlp_op.register_autograd(_backward, setup_context=_setup_context)
_plain = plain_function("MoeMlp", _moe_mlp, _setup_context, _backward)


def run(*arguments: Tensor | int | str | None) -> Tensor:
    """The first output of :func:`_moe_mlp`, by the short way where the tensors are plain.

    Then no ``TorchFunctionMode`` sees the op either.
    """
    *tensors, _, save_for_backward, backend = arguments
    if not is_plain(*tensors):
        return torch.ops.moe_kernels.moe_mlp(*arguments)[0]
    if save_for_backward:
        return _plain.apply(*arguments)[0]
    if backend == "cpu":
        return native_impl.inference(*tensors)
    return _moe_mlp(*arguments)[0]
