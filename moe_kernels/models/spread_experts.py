"""Experts of a model that transformers has spread over ranks (expert parallelism), with a mask.

``DistributedConfig(ep_size=, ep_implementation="moe_kernels")`` makes transformers build one
:class:`SpreadExperts` for each experts module. transformers' own implementations bring rows to the
ranks of their experts, without the rows' modality: here it goes along as one more column.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import AllReduceEP, AllToAllEP, EPImplementation

from moe_kernels.layers import ModalityLora
from moe_kernels.layers.whole import whole
from moe_kernels.models import sharding
from moe_kernels.ops import LoraWeights


class SpreadExperts(EPImplementation):
    """Exchange of rows with experts on other ranks, and this rank's part of their adapters.

    Where all ranks of the group hold the same batch, each runs its experts on all of it, and the
    outputs are summed. Otherwise rows are sent to their experts and back (all-to-all). A model that
    is not patched computes as transformers' own implementations do.

    Args:
        experts: the module, whose stacks are (E / ranks, ...) here.
        ep_mesh: ranks that hold one set of experts together.
        tp_mesh: ranks that hold the same batch.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        kind = AllReduceEP if self.shares_batch else AllToAllEP
        self.rows = kind(experts, ep_mesh, tp_mesh)
        self.rows.experts_forward = self._run
        experts.__dict__[sharding.SPREAD] = self

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted output of all experts for this rank's rows: (T, H)."""
        context = self.experts.__dict__.get("_modality_context")
        if context is None:
            ids = top_k_index.new_zeros(len(hidden_states))
        else:
            ids = context.row_ids()
            if self._trains():
                # The rows' gradients go back by a collective too, which all ranks must call.
                hidden_states = _requiring_grad(hidden_states)
        rows = torch.cat([hidden_states, ids[:, None].to(hidden_states.dtype)], dim=1)
        return self.rows(rows, top_k_index, top_k_weights)

    def part_of(self, lora: ModalityLora) -> LoraWeights:
        """Return the weights of the experts on this rank; gradients reach all ranks."""
        return LoraWeights(*map(self._part_of, (lora.lora_A, lora.lora_B)), lora.scaling)

    def __deepcopy__(self, memo: dict) -> "SpreadExperts":
        raise TypeError(
            "a model whose experts are spread over ranks (expert parallelism) cannot be copied: "
            "its copy would run the experts of this one; load it again"
        )

    def _run(self, rows: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Run this rank's experts on rows (T, H + 1) that may be those of other ranks."""
        hidden_states = rows[:, :-1].contiguous()
        context = self.experts.__dict__.get("_modality_context")
        if context is None:
            return self.experts_forward(hidden_states, expert_ids, weights)
        with context.at_rows(rows[:, -1].detach().to(torch.int64)):
            return self.experts_forward(hidden_states, expert_ids, weights)

    def _trains(self) -> bool:
        adapters = self.experts.__dict__["_modality_lora"].values()
        return torch.is_grad_enabled() and any(
            parameter.requires_grad for lora in adapters for parameter in lora.parameters()
        )

    def _part_of(self, parameter: Tensor) -> Tensor:
        """Return the part of (M, E, ...) on this rank, or all of (M, 1, ...)."""
        values = whole(parameter)
        if self.shares_batch:  # else FSDP2 takes the mean over ranks
            values = _SumGradient.apply(values, self.ep_mesh.get_group())
        if values.shape[1] == 1:
            return values
        first = self.ep_mesh.get_local_rank() * self.num_local_experts
        return values[:, first : first + self.num_local_experts]


def _requiring_grad(values: Tensor) -> Tensor:
    return values if values.requires_grad else values.detach().requires_grad_()


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over a group: each rank has that of its own experts."""

    @staticmethod
    def forward(values: Tensor, group: dist.ProcessGroup) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
