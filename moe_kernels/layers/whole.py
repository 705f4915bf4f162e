"""Whole values of parameters that are sharded outside any unit of FSDP2."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def whole(parameter: Tensor) -> Tensor:
    """Return a parameter's values on this rank, whole, through which its gradients flow.

    All ranks that shard it call this together, and again in the backward pass, which gives each
    its part of the mean gradient. A plain parameter, also one that FSDP2 has made whole for a
    forward, is returned as it is.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    values = parameter.full_tensor(grad_placements=[Partial("sum")] * mesh.ndim)
    return _DivideGradient.apply(values, mesh.size())


class _DivideGradient(torch.autograd.Function):
    """Identity whose gradient is divided, as gloo has no mean."""

    @staticmethod
    def forward(values: Tensor, count: int) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.count = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.count, None
