"""The registered ops ``moe_kernels::lora_linear`` and ``lora_linear_backward``.

The base GEMM is torch's, over all rows, so its bits follow from the shape alone; the low-rank term
is added in place, on the rows of added modalities only. Saved: hidden_states, u = x A^T (unscaled)
and the dispatch.
"""

import torch
from torch import Tensor

from moe_kernels import backends
from moe_kernels.ops.dispatch import autograd as dispatch_autograd
from moe_kernels.ops.dtypes import on_device, without_autocast
from moe_kernels.ops.gradients import is_plain, place, plain_function


def _lora_linear(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modality_ids: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    save_for_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns out (T, out), u (T, r) or (0, r), perm (T,) and segment_offsets (M+2,)."""
    topk_ids = torch.zeros(
        hidden_states.shape[0], 1, dtype=torch.int64, device=hidden_states.device
    )
    implementation, requested = backends.implementation("lora_linear", backend), ()
    if backend in dispatch_autograd.WITH_MAPS:
        requested = implementation.forward_maps(lora_A.shape[0])
    (perm, _, _, _, segment_offsets), maps = dispatch_autograd.run(
        topk_ids, 1, modality_ids, lora_A.shape[0], backend, requested
    )
    with on_device(hidden_states.device), without_autocast(hidden_states.device):
        hidden_states = hidden_states.contiguous()
        out = torch.nn.functional.linear(hidden_states, weight, bias)
        u = implementation.forward(
            out,
            hidden_states,
            perm,
            segment_offsets,
            lora_A,
            lora_B,
            scaling,
            save_for_backward,
            *maps,
        )
    return out, u, perm, segment_offsets


lora_linear_op = torch.library.custom_op("moe_kernels::lora_linear", _lora_linear, mutates_args=())


@lora_linear_op.register_fake
def _(
    hidden_states,
    weight,
    bias,
    modality_ids,
    lora_A,
    lora_B,
    scaling,
    save_for_backward,
    backend,
):
    rows = hidden_states.shape[0]
    return (
        hidden_states.new_empty(rows, weight.shape[0]),
        hidden_states.new_empty(rows if save_for_backward else 0, lora_A.shape[1]),
        hidden_states.new_empty(rows, dtype=torch.int64),
        hidden_states.new_empty(lora_A.shape[0] + 2, dtype=torch.int64),
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
    """The gradients that ``needs`` asks for, of hidden_states, lora_A and lora_B."""
    with on_device(hidden_states.device), without_autocast(hidden_states.device):
        grad_out = grad_out.contiguous()
        grad_hidden = grad_out @ weight if needs[0] else None
        params = backends.implementation("lora_linear", backend).backward(
            grad_out,
            hidden_states.contiguous(),
            u,
            perm,
            segment_offsets,
            lora_A,
            lora_B,
            scaling,
            grad_hidden,
            needs[1:],
        )
    grads = [grad.to(lora_A.dtype) for grad in params]
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


# Positions in lora_linear_op's arguments of what may take a gradient, in the order of ``needs``.
_DIFFERENTIABLE = (0, 4, 5)
_NUM_ARGS = 9


def _setup_context(ctx, inputs, output):
    hidden_states, weight, _, _, lora_A, lora_B, scaling, _, backend = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_states, weight, lora_A, lora_B, scaling, *saved)
    ctx.backend = backend


def _backward(ctx, grad_out, *_):
    if grad_out is None:
        return (None,) * _NUM_ARGS
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    saved = ctx.saved_tensors
    # With a graph of the backward pass the op must be seen, to say that it has no derivative.
    plain = not torch.is_grad_enabled() and is_plain(grad_out, *saved)
    compute = _lora_linear_backward if plain else torch.ops.moe_kernels.lora_linear_backward
    needed = compute(grad_out, *saved, needs, ctx.backend)
    return place(needed, _DIFFERENTIABLE, needs, _NUM_ARGS)


lora_linear_op.register_autograd(_backward, setup_context=_setup_context)
_plain = plain_function("LoraLinear", _lora_linear, _setup_context, _backward)


def run(*arguments: Tensor | bool | str | None) -> Tensor:
    """The first output of :func:`_lora_linear`, by the short way where the tensors are plain.

    Then no ``TorchFunctionMode`` sees the op either.
    """
    *tensors, save_for_backward, _ = arguments
    if not is_plain(*tensors):
        return torch.ops.moe_kernels.lora_linear(*arguments)[0]
    if save_for_backward:
        return _plain.apply(*arguments)[0]
    return _lora_linear(*arguments)[0]
