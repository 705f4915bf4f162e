"""The low-rank term of ``lora_linear`` on the native extension."""

from torch import Tensor

from moe_kernels import _native


def forward(
    out: Tensor,
    hidden_states: Tensor,
    perm: Tensor,
    segment_offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    save_for_backward: bool,
) -> Tensor:
    """Add s (x A^T) B^T to ``out`` (T, out) in place; returns u = x A^T, (T, r) or (0, r)."""
    return _native.ops().lora_linear_forward(
        out,
        hidden_states,
        perm,
        segment_offsets,
        lora_A.contiguous(),
        lora_B.contiguous(),
        scaling.float().contiguous(),
        save_for_backward,
    )


def backward(
    grad_out: Tensor,
    hidden_states: Tensor,
    u: Tensor,
    perm: Tensor,
    segment_offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    grad_hidden: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Add s (dy B) A to ``grad_hidden`` in place; returns those of dA, dB that are needed."""
    return _native.ops().lora_linear_backward(
        grad_out,
        hidden_states,
        u,
        perm,
        segment_offsets,
        lora_A.contiguous(),
        lora_B.contiguous(),
        scaling.float().contiguous(),
        grad_hidden,
        needs,
    )
