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
    """Return out (T, H), and what the backward pass needs."""
    num_modalities = weights.num_modalities
    perm, inv_perm, _, _, segment_offsets = _native.ops().dispatch(
        topk_ids, weights.num_experts, modality_ids, num_modalities
    )
    out, pre_act, u1, u2 = _native.ops().moe_mlp_forward(
        hidden_states,
        topk_weights,
        perm,
        segment_offsets,
        *weights.in_compute_dtype(hidden_states.dtype, adapters=False),
        *form,
        num_modalities,
        save_for_backward,
    )
    return out, Saved(pre_act, u1, u2, perm, inv_perm, segment_offsets)


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
    return _native.ops().moe_mlp_backward(
        grad_out,
        hidden_states,
        topk_weights,
        saved.perm,
        saved.segment_offsets,
        *weights.in_compute_dtype(hidden_states.dtype, adapters=False),
        *form,
        saved.pre_act,
        saved.u1,
        saved.u2,
        weights.num_modalities,
        needs,
        frozen_extra,
    )
