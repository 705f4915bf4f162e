"""``moe_mlp`` on the native extension: one call forward, one backward, one where nothing trains.

Adapters go in as they are stored: the kernels round them to the compute dtype as they read them.
"""

from torch import Tensor

from moe_kernels import _native
from moe_kernels.ops.moe_mlp.activation import ExpertForm
from moe_kernels.ops.moe_mlp.weights import ExpertWeights, Saved


def inference(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    modality_ids: Tensor | None,
    *others: Tensor | None,
    form: ExpertForm,
) -> Tensor:
    """out (T, H) alone, dispatch included; ``others`` are the rest of ExpertWeights' fields.

    With a token or two, the calls of Python cost as much as reading the weights.
    """
    return _native.ops().moe_mlp_inference(
        hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, modality_ids, *others, *form
    )


def forward(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    modality_ids: Tensor | None,
    weights: ExpertWeights,
    form: ExpertForm,
    save_for_backward: bool,
) -> tuple[Tensor, Saved]:
    """Return out (T, H), and what the backward pass needs, without rows unless it saves."""
    weights = weights.in_compute_dtype(hidden_states.dtype, adapters=False)
    return forward_of(
        hidden_states, topk_ids, topk_weights, modality_ids, weights, form, save_for_backward
    )


def forward_of(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    modality_ids: Tensor | None,
    weights: ExpertWeights,
    form: ExpertForm,
    save_for_backward: bool,
) -> tuple[Tensor, Saved]:
    """Do what :func:`forward` does, for weights that the op takes as they are."""
    out, *saved = _native.ops().moe_mlp_forward(
        hidden_states,
        topk_ids,
        topk_weights,
        *weights[:2],
        modality_ids,
        *weights[2:],
        *form,
        save_for_backward,
    )
    return out, Saved(*saved)


def backward(
    grad_out: Tensor,
    hidden_states: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    form: ExpertForm,
    saved: Saved,
    needs: list[bool],
    frozen_extra: int = 0,
) -> list[Tensor]:
    """Return the gradients that ``needs`` asks for, in its order."""
    weights = weights.in_compute_dtype(hidden_states.dtype, adapters=False)
    return backward_of(
        grad_out, hidden_states, topk_weights, weights, form, saved, needs, frozen_extra
    )


def backward_of(
    grad_out: Tensor,
    hidden_states: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    form: ExpertForm,
    saved: Saved,
    needs: list[bool],
    frozen_extra: int,
) -> list[Tensor]:
    """Do what :func:`backward` does, for weights that the op takes as they are."""
    return _native.ops().moe_mlp_backward(
        grad_out,
        hidden_states,
        topk_weights,
        saved.perm,
        saved.inv_perm,
        saved.segment_offsets,
        *weights,
        *form,
        saved.pre_act,
        saved.u1,
        saved.u2,
        weights.num_modalities,
        needs,
        frozen_extra,
    )
