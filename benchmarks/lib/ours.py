"""This package's providers: the op ``moe_mlp``, and the MoE block of a patched model."""

import torch
from torch import Tensor

from lib.blocks import Block
from lib.cases import Problem
from lib.runner import Leaves, Runner, Unavailable
from moe_kernels import backends
from moe_kernels.ops import LoraWeights, moe_mlp


def refuse_absent(backend: str) -> None:
    """Raise ``Unavailable`` unless the backend runs here."""
    reason = backends.available()[backend]
    if reason is not None:
        raise Unavailable(reason)


def adapted(problem: Problem, backend: str, *, image: bool = True) -> Runner:
    """The op with adapters; without ``image`` no row has the adapters' modality."""
    refuse_absent(backend)
    inputs, leaves, loras = problem.inputs, Leaves.of(problem), {}
    for name in ("gate_up_lora", "down_lora"):
        a, b, scaling = getattr(inputs, name)
        loras[name] = LoraWeights(a.detach().requires_grad_(), b.detach().requires_grad_(), scaling)
        leaves.add_lora(name, *loras[name][:2])
    ids = inputs.modality_ids if image else torch.zeros_like(inputs.modality_ids)

    def forward() -> Tensor:
        return moe_mlp(
            leaves.hidden_states, inputs.topk_ids, leaves.topk_weights,
            inputs.gate_up_proj, inputs.down_proj, backend=backend, modality_ids=ids, **loras,
        )  # fmt: skip

    return leaves.runner(forward, adapted="image" if image else "none")


def adapted_text(problem: Problem, backend: str) -> Runner:
    """The op with adapters that no row uses."""
    return adapted(problem, backend, image=False)


def base(problem: Problem, backend: str) -> Runner:
    """The op without adapters."""
    refuse_absent(backend)
    inputs, leaves = problem.inputs, Leaves.of(problem)

    def forward() -> Tensor:
        return moe_mlp(
            leaves.hidden_states, inputs.topk_ids, leaves.topk_weights,
            inputs.gate_up_proj, inputs.down_proj, backend=backend,
        )  # fmt: skip

    return leaves.runner(forward)


def added(problem: Problem, backend: str, *, image: bool = True) -> Runner:
    """The op with one more expert, which trains; ``image`` rows, or none, are sent to it."""
    refuse_absent(backend)
    inputs, leaves = problem.inputs, Leaves.of(problem)
    gate_up, down = (weight.detach().requires_grad_() for weight in problem.added_expert)
    leaves.adapters.update(extra_gate_up_proj=gate_up, extra_down_proj=down)
    ids = problem.ids_with_added if image else inputs.topk_ids

    def forward() -> Tensor:
        return moe_mlp(
            leaves.hidden_states, ids, leaves.topk_weights, inputs.gate_up_proj, inputs.down_proj,
            modality_ids=inputs.modality_ids, extra_gate_up_proj=gate_up, extra_down_proj=down,
            backend=backend,
        )  # fmt: skip

    return leaves.runner(forward, adapted="added" if image else "none")


def added_text(problem: Problem, backend: str) -> Runner:
    """The op with one more expert that no row is sent to."""
    return added(problem, backend, image=False)


def block(problem: Problem, backend: str) -> Runner:
    """The MoE block of a patched model, with its router."""
    return _block(problem, backend, added=False)


def block_added(problem: Problem, backend: str) -> Runner:
    """The block with one more expert, which every image row chooses."""
    return _block(problem, backend, added=True)


def block_added_text(problem: Problem, backend: str) -> Runner:
    """The block with one more expert, when no row has its modality."""
    return _block(problem, backend, added=True, image=False)


def _block(problem: Problem, backend: str, *, added: bool, image: bool = True) -> Runner:
    refuse_absent(backend)
    if problem.case.routing != "balanced":
        raise Unavailable("its router chooses by itself, about balanced")
    block = Block(problem, backend, added=added)
    ids = problem.inputs.modality_ids
    ids = ids if image else torch.zeros_like(ids)

    def check() -> str | None:
        if torch.is_grad_enabled():
            block.forward(ids).backward(problem.grad_out)
        return block.error(ids)

    leaves = (block.hidden_states, *block.parameters)
    return Runner(lambda: block.forward(ids), leaves=leaves, check=check)
