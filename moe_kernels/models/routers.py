"""The routers of Hugging Face models: found, understood by trying them, and updated by low rank.

A router is a module with one weight (E, H) whose forward takes (T, H) rows to logits, scores and
indices. Families differ in what they do between logits and scores. No class name decides: patching
compares :func:`route` with the class's own forward, and refuses a router that does something else.
"""

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels.layers import ModalityLora
from moe_kernels.models import linear
from moe_kernels.models.context import ModalityContext
from moe_kernels.models.experts import find_experts

_NAMES = ("gate", "router")
_PROBED_ROWS = 32


@dataclass(frozen=True)
class Routing:
    """What comes after a router's logits.

    Attributes:
        top_k: K, experts that a token is sent to.
        normalise: whether the K scores are divided by their sum.
        float32_scores: whether scores stay float32 (Mixtral) or are cast to the logits' dtype.
    """

    top_k: int
    normalise: bool
    float32_scores: bool


def route(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """(T, E) logits -> scores (T, K), their softmax in float32, and indices (T, K) int64."""
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    scores, indices = torch.topk(probabilities, routing.top_k, dim=-1)
    if routing.normalise:
        scores = scores / scores.sum(dim=-1, keepdim=True)
    return scores if routing.float32_scores else scores.to(logits.dtype), indices


def find_router(layer: nn.Module) -> nn.Module | None:
    """The module beside a decoder layer's stacked experts that has a weight (E, H), or None."""
    experts = find_experts(layer)
    for block in layer.modules():
        if any(child is experts for child in block.children()):
            for name in _NAMES:
                router = getattr(block, name, None)
                weight = getattr(router, "weight", None)
                if isinstance(weight, nn.Parameter) and _fits(weight, experts.gate_up_proj):
                    return router
    return None


def _fits(weight: Tensor, gate_up_proj: Tensor) -> bool:
    return tuple(weight.shape) == (gate_up_proj.shape[0], gate_up_proj.shape[-1])


def unsupported(layer: nn.Module) -> list[str]:
    """Why the router of a layer with experts cannot get an update; empty: all is well."""
    router, hint = find_router(layer), '(leave "router" out of target_modules)'
    if router is None:
        return [f"no router of one weight beside the experts {hint}"]
    dtypes = (router.weight.dtype, find_experts(layer).gate_up_proj.dtype)
    if len(set(dtypes)) > 1:
        return [f"a router in {dtypes[0]} beside experts in {dtypes[1]} {hint}"]
    try:
        find_routing(router)
    except ValueError as error:
        return [f"{error} {hint}"]
    return []


def find_routing(router: nn.Module) -> Routing:
    """What a router's class does after its logits.

    Its own forward is run on a few random rows, in the weight's dtype and in bfloat16, in training
    and not; ours must give the same bits.

    Raises:
        ValueError: the class does something else; the message says what is known of it.
    """
    name = type(router).__name__
    if "forward" in router.__dict__:
        raise ValueError(f"{name} has a forward of its own (a device map?)")
    candidates = None
    for dtype, training in itertools.product((router.weight.dtype, torch.bfloat16), (False, True)):
        trial, rows = _trial(router, dtype, training)
        logits, *expected = _run(trial, rows)
        if candidates is None:
            switches = itertools.product((True, False), repeat=2)
            candidates = [Routing(expected[0].shape[-1], *switch) for switch in switches]
        if not _same([F.linear(rows, trial.weight)], [logits]):
            raise ValueError(f"{name} computes other logits than those of a linear layer")
        candidates = [c for c in candidates if _same(route(logits, c), expected)]
        if not candidates:
            raise ValueError(f"{name} chooses or weighs experts in a way of its own")
    return candidates[0]


def attach(router: nn.Module, context: ModalityContext, lora: ModalityLora) -> None:
    """Make this one instance add the low-rank update to its logits, on rows of added modalities.

    Raises:
        ValueError: as :func:`find_routing`.
    """
    router.__dict__["_routing"] = find_routing(router)
    linear.attach(router, context, lora, _forward)


def detach(router: nn.Module) -> None:
    """Undo :func:`attach`, if it was done."""
    router.__dict__.pop("_routing", None)
    linear.detach(router)


def _forward(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., H) -> logits (T, E) with the update in them, scores (T, K), indices (T, K)."""
    hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = linear.masked_linear(self, hidden_states)
    return logits, *route(logits, self.__dict__["_routing"])


def _trial(router: nn.Module, dtype: torch.dtype, training: bool) -> tuple[nn.Module, Tensor]:
    """A copy in another dtype, without hooks and without a change to the router; and rows for it.

    Weights without values (on the meta device) are random there, on the CPU.
    """
    trial, generator = copy.copy(router), torch.Generator().manual_seed(0)
    trial.__dict__["training"] = training

    def values(like: Tensor) -> Tensor:
        if like.is_meta:
            return torch.randn(like.shape, generator=generator, device="cpu").to(dtype)
        return like.detach().to(dtype)

    trial.__dict__["_parameters"] = {
        name: parameter if parameter is None else nn.Parameter(values(parameter), False)
        for name, parameter in router._parameters.items()
    }
    weight = trial.weight
    # The generator's device is the CPU, whatever torch.device() the caller is in.
    rows = torch.randn(_PROBED_ROWS, weight.shape[1], generator=generator, device="cpu")
    return trial, rows.to(weight)


@torch.no_grad()
def _run(trial: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The class's own forward: logits, scores, indices."""
    name = type(trial).__name__
    try:
        output = type(trial).forward(trial, rows.clone())
    except Exception as error:  # whatever another's code raises, patching says why it stops
        raise ValueError(f"{name} does not run on rows alone: {error}") from error
    if not isinstance(output, tuple) or len(output) != 3 or output[2].is_floating_point():
        raise ValueError(f"{name} does not return (logits, scores, indices)")
    return output


def _same(actual, expected) -> bool:
    pairs = zip(actual, expected, strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
