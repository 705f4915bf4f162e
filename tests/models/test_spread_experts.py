"""Experts of which a rank has some: ids of other ranks' experts mean that a row is not computed."""

import copy
from types import SimpleNamespace

import pytest
import torch
from support.model_zoo import make_model
from torch import nn

from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.models import sharding
from moe_kernels.models.experts import experts_forward
from moe_kernels.models.parts import find_experts
from moe_kernels.ops import LoraWeights
from moe_kernels.testing import make_routing, relative_rms, working_backends


def rank_of(experts, rank, number):
    """Return a copy of an experts module with the experts of one rank."""
    part = slice(rank * number, (rank + 1) * number)

    def part_of(lora):
        return LoraWeights(lora.lora_A[:, part], lora.lora_B[:, part], lora.scaling)

    local = copy.copy(experts)
    local.__dict__ = experts.__dict__ | {"_parameters": dict(experts._parameters)}
    for name in ("gate_up_proj", "down_proj"):
        stack = getattr(experts, name)[part].detach()
        local._parameters[name] = nn.Parameter(stack, requires_grad=False)
    local.num_experts = number
    local.__dict__[sharding.SPREAD] = SimpleNamespace(part_of=part_of)
    return local


@pytest.mark.parametrize("backend", working_backends())
def test_the_parts_of_ranks_add_up(backend):
    config = ModalityLoraConfig(r=4, backend=backend, target_modules=("experts",))
    model = make_model("mixtral")
    patched = patch_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in patched.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    experts = find_experts(model.model.layers[0])
    ids, weights = make_routing(40, 2, 4, generator=generator)
    rows = torch.randn(40, 32, generator=generator)
    modality_ids = torch.arange(40)[None] % 3 - 1
    parameters = list(model.model.layers[0].modality_lora.parameters())

    def run(module, ids, weights):
        x, w = rows.clone().requires_grad_(), weights.clone().requires_grad_()
        module._modality_context.start(modality_ids)
        out = experts_forward(module, x, ids, w)
        return out.detach(), *torch.autograd.grad(out.square().sum(), [x, w, *parameters])

    def run_half(rank):
        here = ids // 2 == rank
        local = torch.where(here, ids % 2, 2)  # as transformers' AllReduceEP has it
        return run(rank_of(experts, rank, 2), local, weights.masked_fill(~here, 0.0))

    out, *_ = run(experts, ids, weights)
    halves = [run_half(rank) for rank in range(2)]
    assert relative_rms(halves[0][0] + halves[1][0], out) < 1e-5
    for rank, (_, _, of_weights, *grads) in enumerate(halves):
        assert not of_weights[ids // 2 != rank].any()  # nothing was computed for these
        for grad in grads:
            own = grad[:, 2 * rank : 2 * rank + 2]
            assert own.any() and torch.equal(own.norm(), grad.norm())
