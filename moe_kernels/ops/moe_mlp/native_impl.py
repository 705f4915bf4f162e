"""``moe_mlp`` on the native extension: one call forward, one backward, one where nothing trains.

Adapters go in as they are stored: the kernels round them to the compute dtype as they read them.
"""

from torch import Tensor

from moe_kernels import _native
from moe_kernels.ops.moe_mlp.weights import ExpertWeights


def inference(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    modality_ids: Tensor | None,
    *others: Tensor | None,
) -> Tensor:
    """out (T, H) alone, dispatch included; ``others`` are the rest of ExpertWeights' fields.

    With a token or two, the calls of Python cost as much as reading the weights.
    """
    return _native.ops().moe_mlp_inference(
        hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, modality_ids, *others
    )


def forward(
    hidden_states: Tensor,
    topk_weights: Tensor,
    perm: Tensor,
    inv_perm: Tensor,
    segment_offsets: Tensor,
    weights: ExpertWeights,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (T, H), pre_act (T*K, 2I), u1 (T*K, r1), u2 (T*K, r2)."""
    return _native.ops().moe_mlp_forward(
        hidden_states,
        topk_weights,
        perm,
        segment_offsets,
        *weights.in_compute_dtype(adapters=False),
        weights.num_modalities,
        save_for_backward,
    )


def backward(
    grad_out: Tensor,
    hidden_states: Tensor,
    topk_weights: Tensor,
    perm: Tensor,
    inv_perm: Tensor,
    segment_offsets: Tensor,
    weights: ExpertWeights,
    pre_act: Tensor,
    u1: Tensor,
    u2: Tensor,
    needs: list[bool],
    frozen_extra: int = 0,
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in its order."""
    return _native.ops().moe_mlp_backward(
        grad_out,
        hidden_states,
        topk_weights,
        perm,
        segment_offsets,
        *weights.in_compute_dtype(adapters=False),
        pre_act,
        u1,
        u2,
        weights.num_modalities,
        needs,
        frozen_extra,
    )
