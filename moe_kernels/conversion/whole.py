"""Experts as one product over all neurons, for the healing of models that use most of them."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_kernels.modes import ending_with

_NAME = "moe_kernels_whole"
# From this share of chosen experts on, one product over all neurons costs less than one over the
# rows of each expert, whose weights' gradients are as many small products.
_SHARE = 0.5


@contextmanager
def whole_experts(moe: PreTrainedModel) -> Iterator[None]:
    """Let a converted model compute all experts of a token at once, those not chosen times zero."""
    config = moe.config
    before = config._experts_implementation
    if config.num_experts_per_tok < _SHARE * _num_experts(moe):
        yield
        return
    ALL_EXPERTS_FUNCTIONS.register(_NAME, _forward)
    with ending_with(lambda: _set(moe, before)):
        _set(moe, _NAME)
        yield


def _num_experts(moe: PreTrainedModel) -> int:
    return moe.model.layers[0].mlp.experts.num_experts


def _set(moe: PreTrainedModel, name: str) -> None:
    for module in moe.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = name


def _forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the sum of the chosen experts' outputs, (N, H), (N, k), (N, k) -> (N, H)."""
    act = gated_activations(experts, hidden_states, top_k_index, top_k_weights)
    return F.linear(act, experts.down_proj.transpose(0, 1).flatten(1))


def gated_activations(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return all neurons times their expert's gate, 0 where it was not chosen: (N, E I)."""
    num_experts, gate_up, _ = experts.gate_up_proj.shape
    act = F.linear(hidden_states, experts.gate_up_proj.flatten(0, 1))
    gate, up = act.view(-1, num_experts, gate_up).chunk(2, dim=-1)
    gates = top_k_weights.new_zeros(len(hidden_states), num_experts)
    gates = gates.scatter(1, top_k_index, top_k_weights).to(up.dtype)
    return (experts.act_fn(gate) * up * gates[..., None]).flatten(1)
