"""Split LoRA on ``grouped_mm``, the usual implementation of low-rank updates of fused experts.

It runs the base's grouped product, then two narrow ones for the update, and adds that to the base's
result. Rows are sorted by expert once, and no gradient of a frozen weight is computed. Either the
mask is applied to the (rows, r) intermediate, or only the image rows are gathered.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from lib.cases import Problem


def pairs_of(problem: Problem) -> dict[str, tuple[Tensor, Tensor]]:
    """Return trainable (E, r, in) and (E, out, r) in the base's dtype, by projection."""
    dtype = problem.case.torch_dtype
    loras = (problem.inputs.gate_up_lora, problem.inputs.down_lora)
    return {
        name: tuple(tensor[0].to(dtype).requires_grad_() for tensor in lora[:2])
        for name, lora in zip(("gate_up_lora", "down_lora"), loras, strict=True)
    }


def masked(
    problem: Problem,
    pairs: dict[str, tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    topk_weights: Tensor,
) -> Tensor:
    """Run the update on all rows, with a mask that makes it zero on text."""
    rows = _Rows(problem)
    is_image = rows.image[:, None].to(hidden_states.dtype)

    def project(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor):
        u = grouped_mm(x, lora_A.mT, offs=rows.offsets) * (is_image * scaling.to(x.dtype))
        update = grouped_mm(u, lora_B.mT, offs=rows.offsets)
        return grouped_mm(x, weight.mT, offs=rows.offsets).add_(update)

    return _experts(problem, pairs, hidden_states, topk_weights, rows, project)


def gathered(
    problem: Problem,
    pairs: dict[str, tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    topk_weights: Tensor,
) -> Tensor:
    """Gather the image rows, run the update on them, and scatter the result."""
    rows = _Rows(problem)
    image = rows.image.nonzero().squeeze(1)
    offsets = _offsets(rows.experts[image], problem.case.shape.E)

    def project(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor):
        u = grouped_mm(x[image], lora_A.mT, offs=offsets) * scaling.to(x.dtype)
        update = grouped_mm(u, lora_B.mT, offs=offsets)
        return grouped_mm(x, weight.mT, offs=rows.offsets).index_add_(0, image, update)

    return _experts(problem, pairs, hidden_states, topk_weights, rows, project)


class _Rows:
    """Rows sorted by expert."""

    def __init__(self, problem: Problem):
        inputs, shape = problem.inputs, problem.case.shape
        self.experts, self.perm = inputs.topk_ids.reshape(-1).sort()
        self.tokens = self.perm // shape.K
        self.image = inputs.modality_ids[self.tokens] == 1
        self.offsets = _offsets(self.experts, shape.E)


def _offsets(sorted_experts: Tensor, num_experts: int) -> Tensor:
    """Return the end of each expert's rows, (E,) int32."""
    experts = torch.arange(num_experts, device=sorted_experts.device)
    return torch.searchsorted(sorted_experts, experts, right=True).int()


def _experts(problem, pairs, hidden_states, topk_weights, rows, project) -> Tensor:
    inputs, (num_tokens, top_k) = problem.inputs, topk_weights.shape
    x = hidden_states[rows.tokens]
    pre = project(
        x, inputs.gate_up_proj, *pairs["gate_up_lora"], inputs.gate_up_lora.scaling
    )  # (rows, 2I)
    gate, up = pre.chunk(2, dim=-1)
    y = project(silu(gate) * up, inputs.down_proj, *pairs["down_lora"], inputs.down_lora.scaling)
    y = y * topk_weights.reshape(-1)[rows.perm, None]
    inverse = torch.empty_like(rows.perm)
    inverse[rows.perm] = torch.arange(rows.perm.numel(), device=rows.perm.device)
    return y[inverse].view(num_tokens, top_k, -1).sum(1)
