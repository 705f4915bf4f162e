"""Routers of Hugging Face models: understood by running them, and updated by low-rank pairs.

A router is a module with one weight (E, H) whose forward takes (T, H) rows to logits, scores and
indices. Families differ in what they do between logits and scores. No class name decides: patching
compares :func:`route` with the class's own forward, and refuses a router that does something else.
A layer with added experts has their columns beside the router's weight: see :func:`route_beside`.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels.layers import AddedExperts, Calibration, ModalityLora
from moe_kernels.models import linear, sharding
from moe_kernels.models.config import ROUTER
from moe_kernels.models.context import MISSING, ModalityContext
from moe_kernels.models.parts import LayerParts, up_stack
from moe_kernels.ops.dtypes import without_autocast

_PROBED_ROWS = 32


@dataclass(frozen=True)
class Routing:
    """The steps of a router after its logits.

    Attributes:
        top_k: K, the number of experts that a token is sent to.
        normalise: whether the K scores are divided by their sum.
        float32_scores: whether scores stay float32 (Mixtral) or are cast to the logits' dtype.
    """

    top_k: int
    normalise: bool
    float32_scores: bool


def route(
    logits: Tensor,
    routing: Routing,
    calibrations: Sequence[Calibration] = (),
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Map logits (T, E) to scores (T, K), their softmax in float32, and indices (T, K) int64.

    Calibrations change the scores of ``rows`` ((T, 1) bool; None: all), never the choice. Several
    of one form add up.
    """
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    scores, indices = torch.topk(probabilities, routing.top_k, dim=-1)
    if additive := [c for c in calibrations if c.form == "additive"]:
        scores = scores + _calibrate(additive, probabilities, indices, rows)
    if routing.normalise:
        scores = scores / scores.sum(dim=-1, keepdim=True)
    if multiplicative := [c for c in calibrations if c.form == "multiplicative"]:
        weights = torch.zeros_like(probabilities).scatter(-1, indices, scores)
        scores = scores * (1 + _calibrate(multiplicative, weights, indices, rows))
    return scores if routing.float32_scores else scores.to(logits.dtype), indices


def _calibrate(
    calibrations: Sequence[Calibration], values: Tensor, indices: Tensor, rows: Tensor | None
) -> Tensor:
    """Sum the calibrations of values (T, N) at the chosen experts: (T, K).

    A calibration that is older than the last experts gives these zero. Rows outside ``rows`` get
    zero too. They enter the calibration as zeros, so that their zero gradient meets no infinity.
    """
    seen, width = _where(rows, values, 0.0), values.shape[-1]
    changes = [calibration(seen) for calibration in calibrations]
    total = sum(F.pad(c, (0, width - c.shape[-1])).gather(-1, indices) for c in changes)
    return _where(rows, total, 0.0)


def route_beside(
    logits: Tensor,
    hidden_states: Tensor,
    added: Sequence[AddedExperts],
    modality_ids: Tensor,
    routing: Routing,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of a router beside which experts were added.

    A row that may choose no added expert gets the scores and indices of its E logits alone, taken
    row by row: no value of an added parameter reaches them, nor their gradient. In the other rows
    the base's experts and the added ones that the row may choose compete for the same K places.

    Args:
        logits: (T, E), the router's own.
        hidden_states: (T, H).
        added: in the order of their ids, from E on.
        modality_ids: (T,).
        routing: the router's steps after its logits.

    Returns:
        Logits (T, E+X), -inf where a row may not choose the expert; scores (T, K); indices (T, K).
    """
    scores, indices = route(logits, routing)
    sizes = [logits.shape[1], *(experts.num_added for experts in added)]
    ids = torch.arange(sum(sizes), device=logits.device).split(sizes)
    rows = [experts.open_to(modality_ids) for experts in added]
    # Rows that may not choose an expert go in as zeros and get zeros: a NaN or infinity in them
    # would turn a gradient of zero into NaN.
    inputs = [_where(allowed, hidden_states, 0.0) for allowed in rows]
    own = [e.logits(x).to(logits.dtype) for e, x in zip(added, inputs, strict=True)]
    seen = [_where(allowed, values, 0.0) for allowed, values in zip(rows, own, strict=True)]
    for modality_id in dict.fromkeys(experts.modality_id for experts in added):
        members = [i for i, experts in enumerate(added) if experts.modality_id == modality_id]
        new_scores, chosen = route(
            torch.cat([logits, *(seen[i] for i in members)], dim=1),
            routing,
            [added[i].calibration for i in members if added[i].calibration is not None],
            rows[members[0]],
        )
        new_indices = torch.cat([ids[0], *(ids[i + 1] for i in members)])[chosen]
        scores = _where(rows[members[0]], new_scores, scores)
        indices = _where(rows[members[0]], new_indices, indices)
    closed = [
        _where(allowed, values, -torch.inf) for allowed, values in zip(rows, own, strict=True)
    ]
    return torch.cat([logits, *closed], dim=1), scores, indices


def _where(rows: Tensor | None, values: Tensor, others: Tensor | float) -> Tensor:
    return values if rows is None else torch.where(rows, values, others)


class RoutingFinder:
    """Routing of each router: the attached one, else :func:`find_routing`, run once.

    Make one for each operation on a model, since a router's settings may change between two.
    """

    def __init__(self):
        self._found: dict[nn.Module, Routing] = {}

    def __call__(self, router: nn.Module) -> Routing:
        if is_attached(router):
            return routing_of(router)
        if router not in self._found:
            self._found[router] = find_routing(router)
        return self._found[router]


def problem(parts: LayerParts, find: RoutingFinder) -> str | None:
    """Return why the router of a layer with experts is not supported; None: it is."""
    router = parts.router
    if router is None:
        return "no router of one weight beside the experts"
    dtypes = (router.weight.dtype, up_stack(parts.experts).dtype)
    if dtypes[0] != dtypes[1] and not is_attached(router):
        return f"a router in {dtypes[0]} beside experts in {dtypes[1]}"
    try:
        find(router)
    except ValueError as error:
        return str(error)
    return None


def find_routing(router: nn.Module) -> Routing:
    """Find the steps of a router's class after its logits, by running it.

    The class's own forward runs on a few random rows, in the weight's dtype and in bfloat16, in
    training mode and not; :func:`route` must give the same bits.

    Raises:
        ValueError: the class does something else; the message says what is known of it.
    """
    name = type(router).__name__
    if "forward" in router.__dict__:
        raise ValueError(f"{name} has a forward of its own (a device map?)")
    top_k, num_experts = getattr(router, "top_k", 0), sharding.whole_shape(router.weight)[0]
    if isinstance(top_k, int) and top_k > num_experts:
        raise ValueError(f"{name} chooses {top_k} experts of {num_experts}")
    candidates = None
    for dtype, training in itertools.product((router.weight.dtype, torch.bfloat16), (False, True)):
        trial, rows = _trial(router, dtype, training)
        logits, *expected = _run(trial, rows)
        if candidates is None:
            switches = itertools.product((True, False), repeat=2)
            candidates = [Routing(expected[0].shape[-1], *switch) for switch in switches]
        if not _same([F.linear(rows, trial.weight)], [logits]):
            raise ValueError(f"{name} does not compute the logits of a linear layer")
        candidates = [c for c in candidates if _same(route(logits, c), expected)]
        if not candidates:
            raise ValueError(f"{name} does not choose and weigh experts by softmax and top-k")
    return candidates[0]


def attach(
    router: nn.Module, context: ModalityContext, lora: ModalityLora | None, routing: Routing
) -> None:
    """Make this one instance add the low-rank update to its logits, on rows of added modalities.

    Without an update it computes the same as its class, until experts are added.
    """
    router.__dict__["_routing"] = routing
    linear.attach(router, context, lora, ROUTER, _forward)


def is_attached(router: nn.Module) -> bool:
    """Return whether :func:`attach` was called on the router."""
    return "_routing" in router.__dict__


def routing_of(router: nn.Module) -> Routing:
    """Return the routing that :func:`attach` was given."""
    return router.__dict__["_routing"]


def detach(router: nn.Module) -> None:
    """Undo :func:`attach`, if it was called."""
    for name in ("_routing", "_added_experts", "_tuned"):
        router.__dict__.pop(name, None)
    linear.detach(router)


def set_added_experts(router: nn.Module, added: list[AddedExperts]) -> None:
    """Let an attached router choose among these experts too; an empty list: only among its own."""
    router.__dict__["_added_experts"] = added


def tune(router: nn.Module, change: Tensor | None) -> None:
    """Add a change (E, H) to an attached router's logits; its weight keeps its bits. None: none."""
    if change is None:
        router.__dict__.pop("_tuned", None)
    else:
        router.__dict__["_tuned"] = change


def _forward(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Map (..., H) to updated logits (T, E+X), scores (T, K) and indices (T, K)."""
    hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
    own, routing = self.__dict__, self.__dict__["_routing"]
    context: ModalityContext = own["_modality_context"]
    if own["_modality_lora"] is None:
        context.module_ran(ROUTER)
        logits = F.linear(hidden_states, self.weight)
    else:
        logits = linear.masked_linear(self, hidden_states)
    if (change := own.get("_tuned")) is not None:
        # Autocast would keep using its first copy of the change, although the optimiser updates it.
        with without_autocast(hidden_states.device):
            shift = F.linear(hidden_states, change.to(hidden_states.dtype))
        logits = logits + shift.to(logits.dtype)
    if not (added := own.get("_added_experts")) or not context.added_experts:
        return logits, *route(logits, routing)
    if context.modality_ids is None:
        raise RuntimeError(MISSING)
    modality_ids = context.modality_ids.reshape(-1)
    return route_beside(logits, hidden_states, added, modality_ids, routing)


def _trial(router: nn.Module, dtype: torch.dtype, training: bool) -> tuple[nn.Module, Tensor]:
    """Return a copy of the router in another dtype, without hooks, and random rows for it.

    A copy of weights without values (on the meta device) gets random ones, on the CPU.
    """
    trial, generator = copy.copy(router), torch.Generator().manual_seed(0)
    trial.__dict__["training"] = training

    def values(like: Tensor) -> Tensor:
        if like.is_meta:
            return torch.randn(like.shape, generator=generator, device="cpu").to(dtype)
        return sharding.gather(like).to(dtype)

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
    """Run the class's own forward: logits, scores, indices."""
    name = type(trial).__name__
    try:
        output = type(trial).forward(trial, rows.clone())
    except Exception as error:  # foreign code may raise anything; patching says why it stops
        raise ValueError(f"{name} does not run on rows alone: {error}") from error
    if not isinstance(output, tuple) or len(output) != 3 or output[2].is_floating_point():
        raise ValueError(f"{name} does not return (logits, scores, indices)")
    return output


def _same(actual, expected) -> bool:
    pairs = zip(actual, expected, strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
