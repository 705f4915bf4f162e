"""Routers of Hugging Face models: understood by running them, and updated by low-rank pairs.

A router is a module with one weight (E, H) whose forward takes (T, H) rows, and perhaps a bias that
its block keeps, to logits, scores and indices. The weight may be that of one linear layer in it.
Families differ in what they do between logits and scores. No class name decides: patching
compares :func:`route` with the class's own forward, and refuses a router that does something else.
A layer with added experts has their columns beside the router's weight: see :func:`route_beside`.
"""

import contextlib
import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels.layers import AddedExperts, Calibration, ModalityLora
from moe_kernels.models import linear, offload, quantisation, sharding
from moe_kernels.models.config import ROUTER
from moe_kernels.models.context import MISSING, ModalityContext
from moe_kernels.models.instance_forward import OF_ACCELERATE, has_own_forward
from moe_kernels.models.parts import LayerParts, router_linear, up_stack, why_no_router
from moe_kernels.ops.dtypes import without_autocast

_PROBED_ROWS = 256


@dataclass(frozen=True)
class Groups:
    """Groups of experts of which a token may choose some alone (DeepSeek, Mistral).

    Attributes:
        number: of groups; the base's experts are split evenly and in order.
        kept: number of groups that a token may choose from.
        by_two: a group counts by the sum of its two best experts, else by its best.
        left_out: what experts of other groups have in the choice: -inf, or 0.
    """

    number: int
    kept: int
    by_two: bool
    left_out: float

    def limit(self, choice: Tensor, added: int) -> Tensor:
        """Leave out groups of a choice (T, N); the last ``added`` experts are in none."""
        base, others = choice.split([choice.shape[1] - added, added], dim=1)
        grouped = base.reshape(base.shape[0], self.number, -1)
        best = grouped.topk(2, dim=-1)[0].sum(-1) if self.by_two else grouped.max(-1).values
        kept = best.topk(self.kept, dim=-1, sorted=False)[1]
        outside = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, False)
        base = grouped.masked_fill(outside[..., None], self.left_out).reshape(base.shape)
        return torch.cat([base, others], dim=1)


@dataclass(frozen=True)
class Routing:
    """The steps of a router: its logits, and what follows them.

    Attributes:
        top_k: K, the number of experts that a token is sent to.
        normalise: whether the K scores are divided by their sum.
        float32_scores: whether scores stay as computed (Mixtral) or are cast to the input's dtype.
        score: "softmax" or "sigmoid" of all logits, by which experts are chosen too; where they are
            chosen by their logits, "sigmoid_after", or "softmax_after", of the chosen ones.
        logits: "own": in the weight's dtype; "float32": computed so; "exact": the same, whatever
            autocast says; "widened": cast to it after.
        own_dtype: whether scores are computed in the logits' dtype, not in float32.
        biased: whether a bias of the router or its block is added for the choice alone.
        groups: the groups that limit the choice, or None.
        epsilon: added to the sum that normalises.
        floor: the least that scores are divided by.
        scale: factor of the scores.
        in_order: whether the chosen experts come in the order of their scores.
    """

    top_k: int
    normalise: bool
    float32_scores: bool
    score: str = "softmax"
    logits: str = "own"
    own_dtype: bool = False
    biased: bool = False
    groups: Groups | None = None
    epsilon: float = 0.0
    scale: float = 1.0
    in_order: bool = True
    floor: float = 0.0


def route(
    logits: Tensor,
    routing: Routing,
    calibrations: Sequence[Calibration] = (),
    rows: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    added: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Map logits (T, N) to scores (T, K) and indices (T, K) int64.

    Calibrations change the scores of ``rows`` ((T, 1) bool; None: all), never the choice. Several
    of one form add up.

    Args:
        logits: of all experts that compete.
        routing: the steps.
        calibrations: see above.
        rows: see above.
        bias: (N - added,) of the router, where ``routing.biased``. Added experts get its mean.
        added: number of the last experts, which were added.
        dtype: of the router's input; None: that of the logits.
    """
    values = _values(logits, routing)
    choice = logits if routing.score.endswith("_after") else values
    if routing.biased:
        choice = choice + torch.cat([bias, bias.mean().expand(added)])
    if routing.groups is not None:
        choice = routing.groups.limit(choice, added)
    chosen, indices = torch.topk(choice, routing.top_k, dim=-1, sorted=routing.in_order)
    if routing.score == "softmax_after":
        scores = torch.softmax(chosen, dim=-1, dtype=None if routing.own_dtype else torch.float32)
    else:
        scores = values.gather(-1, indices)
    if additive := [c for c in calibrations if c.form == "additive"]:
        scores = scores + _calibrate(additive, values, indices, rows)
    if routing.normalise:
        total = scores.sum(dim=-1, keepdim=True) + routing.epsilon
        scores = scores / (total.clamp(min=routing.floor) if routing.floor else total)
    if multiplicative := [c for c in calibrations if c.form == "multiplicative"]:
        weights = torch.zeros_like(values).scatter(-1, indices, scores)
        scores = scores * (1 + _calibrate(multiplicative, weights, indices, rows))
    if routing.scale != 1.0:
        scores = scores * routing.scale
    if not routing.float32_scores:
        # Autocast gives logits of the class's own kind another dtype than the input's.
        scores = scores.to(logits.dtype if routing.logits == "own" or dtype is None else dtype)
    return scores, indices


def _values(logits: Tensor, routing: Routing) -> Tensor:
    """Return what the scores of experts are taken from, (T, N)."""
    if routing.score.startswith("sigmoid"):
        return torch.sigmoid(logits if routing.own_dtype else logits.float())
    return torch.softmax(logits, dim=-1, dtype=None if routing.own_dtype else torch.float32)


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
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
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
        bias: see :func:`route`.
        dtype: see :func:`route`.

    Returns:
        Logits (T, E+X), -inf where a row may not choose the expert; scores (T, K); indices (T, K).
    """
    scores, indices = route(logits, routing, bias=bias, dtype=dtype)
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
            bias=bias,
            added=sum(added[i].num_added for i in members),
            dtype=dtype,
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
        return why_no_router(parts)
    if found := quantisation.weight_problem(router_linear(router)):
        return f"a router with {found}"
    inner = (parameter for child in router.children() for parameter in child.parameters())
    if any(map(sharding.is_zero3, inner)):
        return f"{type(router).__name__} has modules, whose weights ZeRO-3 gathers late: use FSDP2"
    dtypes = (router_linear(router).weight.dtype, up_stack(parts.experts).dtype)
    try:
        found = find(router)
    except ValueError as error:
        return str(error)
    in_float32 = found.logits in ("float32", "exact")
    if dtypes[0] != dtypes[1] and not in_float32 and not is_attached(router):
        return f"a router in {dtypes[0]} beside experts in {dtypes[1]}"
    return None


@dataclass(frozen=True)
class _Trial:
    """A run of a router's class.

    Attributes:
        router: a twin of the router.
        rows: (T, H).
        bias: (E,) that corrects the choice, of the router or its block; None: there is none.
        arguments: what the class's forward took beside rows: the bias, or nothing.
        logits: (T, E) of the class.
        expected: its scores and indices, (T, K).
    """

    router: nn.Module
    rows: Tensor
    bias: Tensor | None
    arguments: tuple[Tensor, ...]
    logits: Tensor
    expected: tuple[Tensor, Tensor]

    def gives_logits(self, kind: str) -> bool:
        linear = router_linear(self.router)
        found = _linear(kind, self.rows, linear.weight, getattr(linear, "bias", None))
        return _same([found], [self.logits])

    def gives_routing(self, candidate: Routing) -> bool:
        return _same(self._route(candidate), self.expected)

    def gives_experts(self, candidate: Routing) -> bool:
        return _equal(self._route(candidate)[1], self.expected[1])

    def _route(self, candidate: Routing) -> tuple[Tensor, Tensor]:
        bias = self.bias if candidate.biased else None
        return route(self.logits, candidate, bias=bias, dtype=self.rows.dtype)


def find_routing(router: nn.Module) -> Routing:
    """Find the steps of a router's class after its logits, by running it.

    The class's own forward runs on a few rows, in training mode and not; :func:`route` must give
    the same bits. It runs in float32 and bfloat16 too, whatever the weight's dtype: scores of 16
    bits hide steps that float32 shows, and a router has the same routing in both.

    Raises:
        ValueError: the class does something else; the message says what is known of it.
    """
    name, weight = type(router).__name__, router_linear(router).weight
    _check_calls(router)
    top_k, num_experts = getattr(router, "top_k", 0), sharding.whole_shape(weight)[0]
    if isinstance(top_k, int) and top_k > num_experts:
        raise ValueError(f"{name} chooses {top_k} experts of {num_experts}")
    device = offload.device_of(router_linear(router), weight)
    with without_autocast(torch.device("cpu") if device.type == "meta" else device):
        found = _find(router, weight.dtype)
    if isinstance(found, str):
        raise ValueError(f"{name} {found}")
    return found


def _find(router: nn.Module, dtype: torch.dtype) -> Routing | str:
    """Return the steps that give the same bits in all trials, or what the class does not do."""
    dtypes = dict.fromkeys((dtype, torch.float32, torch.bfloat16))
    trials = [_try(router, each, *mode) for each, mode in itertools.product(dtypes, _MODES)]
    kinds = [kind for kind in _LOGITS if all(each.gives_logits(kind) for each in trials)]
    if "float32" in kinds and _ignores_autocast(trials[0]):
        kinds = ["exact"]
    if not kinds:
        return "does not compute the logits of a linear layer"
    others = set()  # choices that give other experts, whatever follows them
    for candidate in _candidates(router, trials[0], kinds):
        choice = tuple(getattr(candidate, name) for name in _CHOICE)
        if choice in others:
            continue
        if not trials[0].gives_experts(candidate):
            others.add(choice)
        elif all(each.gives_routing(candidate) for each in trials):
            return candidate
    return "does not choose and weigh experts by softmax or sigmoid, a bias, groups and top-k"


def _check_calls(router: nn.Module) -> None:
    """Raise ValueError unless the router and all in it are called as their classes say."""
    name = type(router).__name__
    for path, module in router.named_modules():
        if has_own_forward(module):
            owner = f"{name}.{path}" if path else name
            raise ValueError(f"{owner} has a forward of its own")
        if path and (module._forward_hooks or module._forward_pre_hooks):
            raise ValueError(f"{name}.{path} has hooks, which would not run: take them away first")


_CHOICE = ("score", "own_dtype", "biased", "groups", "in_order")  # what decides the experts
_MODES = ((False, False), (True, False), (False, True))  # training, faint
_LOGITS = ("own", "float32", "widened")
_CORRECTION = "e_score_correction_bias"
_SCALES = ("routed_scaling_factor", "router_scaling_factor", "route_scale")


def _linear(kind: str, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a router's logits without an update."""
    if kind in ("float32", "exact"):
        rows, weight, bias = rows.float(), weight.float(), None if bias is None else bias.float()
    with without_autocast(rows.device) if kind == "exact" else contextlib.nullcontext():
        logits = F.linear(rows, weight, bias)
    return logits.float() if kind == "widened" else logits


def _bias_of(router: nn.Module) -> Tensor | None:
    """Return the bias (E,) of a router, or of a module in it, that corrects the choice, if any."""
    for module in router.modules():
        if getattr(module, _CORRECTION, None) is not None:
            return offload.value(module, _CORRECTION).flatten()
    return None


def _candidates(router: nn.Module, trial: _Trial, kinds: Sequence[str]) -> Iterator[Routing]:
    """Yield the routings that a router may have by its attributes, the most frequent first."""
    scales = {1.0, *(getattr(router, name, 1.0) for name in _SCALES)}
    top_k, floor = trial.expected[0].shape[-1], getattr(router, "norm_min", 0.0)
    for biased, score, (normalise, epsilon), values in itertools.product(
        (False,) if trial.bias is None else (True, False),
        ("softmax", "sigmoid", "softmax_after", "sigmoid_after"),
        ((True, 0.0), (True, 1e-20), (True, 1e-6), (False, 0.0)),
        itertools.product((False, True), (True, False), kinds, (True, False)),
    ):
        own_dtype, float32_scores, logits, in_order = values
        for groups, scale in itertools.product(_groups(router), scales):
            yield Routing(
                top_k, normalise, float32_scores, score, logits, own_dtype, biased, groups,
                epsilon, scale, in_order, floor,
            )  # fmt: skip


def _groups(router: nn.Module) -> Iterator[Groups | None]:
    """Yield the groups that a router may have, and None."""
    number, kept = (getattr(router, name, None) for name in ("num_group", "topk_group"))
    yield None
    if isinstance(number, int) and isinstance(kept, int) and 0 < kept < number:
        for by_two, left_out in itertools.product((True, False), (-torch.inf, 0.0)):
            yield Groups(number, kept, by_two, left_out)


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


def _forward(
    self: nn.Module, hidden_states: Tensor, *correction: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Map (..., H) to updated logits (T, E+X), scores (T, K) and indices (T, K).

    ``correction``: the bias (E,) of a block that hands it to its router.
    """
    hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
    own, routing = self.__dict__, self.__dict__["_routing"]
    context: ModalityContext = own["_modality_context"]
    dtype, weight = hidden_states.dtype, offload.value(router_linear(self), "weight")
    if routing.logits in ("float32", "exact"):
        hidden_states, weight = hidden_states.float(), weight.float()
    if own["_modality_lora"] is None:
        context.module_ran(ROUTER)
        logits = _linear(routing.logits, hidden_states, weight, getattr(self, "bias", None))
    else:
        logits = linear.masked_linear(self, hidden_states, weight)  # whatever autocast says
        logits = logits.float() if routing.logits == "widened" else logits
    if (change := own.get("_tuned")) is not None:
        # Autocast would keep using its first copy of the change, although the optimiser updates it.
        with without_autocast(hidden_states.device):
            shift = F.linear(hidden_states, change.to(hidden_states.dtype))
        logits = logits + shift.to(logits.dtype)
    bias = None
    if routing.biased:
        bias = correction[0] if correction else _bias_of(self)
    if not (added := own.get("_added_experts")) or not context.added_experts:
        return logits, *route(logits, routing, bias=bias, dtype=dtype)
    if context.modality_ids is None:
        raise RuntimeError(MISSING)
    modality_ids = context.modality_ids.reshape(-1)
    return route_beside(logits, hidden_states, added, modality_ids, routing, bias, dtype)


@torch.no_grad()
def _try(router: nn.Module, dtype: torch.dtype, training: bool, faint: bool) -> _Trial:
    """Run the class's own forward in another dtype, on random rows or on those of faint logits.

    Faint logits are all alike and far below zero. Their sigmoids are so small that what a class
    adds to a sum of them is seen.
    """
    generator = torch.Generator().manual_seed(0)
    twin = _twin(router, dtype, training, generator)
    linear = router_linear(twin)
    weight = linear.weight
    if faint:
        weight = nn.Parameter(torch.full_like(weight, 1 / weight.shape[1]), False)
        linear.__dict__["_parameters"]["weight"] = weight
        rows = torch.linspace(-4, -128, _PROBED_ROWS, device="cpu")[:, None]
        rows = rows.repeat(1, weight.shape[1]).to(weight)
    else:
        # The generator's device is the CPU, whatever torch.device() the caller is in.
        rows = torch.randn(_PROBED_ROWS, weight.shape[1], generator=generator, device="cpu")
        # Even scores and ties tell some rules apart, and a few large ones others.
        rows = (rows * torch.logspace(-1.5, 0.5, _PROBED_ROWS, device="cpu")[:, None]).to(weight)
    bias, arguments = _bias_of(twin), ()
    if _takes_bias(router):
        bias = torch.randn(weight.shape[0], generator=generator, device="cpu").to(weight) / 4
        arguments = (bias,)
    logits, *expected = _run(twin, rows, *arguments)
    return _Trial(twin, rows, bias, arguments, logits, tuple(expected))


def _twin(
    module: nn.Module, dtype: torch.dtype, training: bool, generator: torch.Generator
) -> nn.Module:
    """Return a copy of a router, or of a module in it, in another dtype.

    A copy of weights without values (on the meta device) gets random ones, on the CPU. A bias that
    corrects the choice gets some too: it starts at zero, where it could not be seen.
    """

    def value(name: str) -> Tensor:
        like = offload.value(module, name)
        if name != _CORRECTION and not like.is_meta:
            return sharding.gather(like).to(dtype)
        drawn = torch.randn(sharding.whole_shape(like), generator=generator, device="cpu")
        drawn = drawn / 4 if name == _CORRECTION else drawn
        return drawn.to("cpu" if like.is_meta else like.device, dtype)

    twin = copy.copy(module)
    for name in OF_ACCELERATE:
        twin.__dict__.pop(name, None)  # it would run the module itself
    twin.__dict__["training"] = training
    twin.__dict__["_parameters"] = {
        name: parameter if parameter is None else nn.Parameter(value(name), False)
        for name, parameter in module._parameters.items()
    }
    twin.__dict__["_buffers"] = {
        name: value(name) if name == _CORRECTION else buffer
        for name, buffer in module._buffers.items()
    }
    twin.__dict__["_modules"] = {
        name: _twin(child, dtype, training, generator) for name, child in module._modules.items()
    }
    return twin


def _takes_bias(router: nn.Module) -> bool:
    """Return whether a router's class takes a bias of its block beside rows.

    Raises:
        ValueError: it needs something else.
    """
    _, _, *further = inspect.signature(type(router).forward).parameters.values()
    further = [each for each in further if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    takes_bias = bool(further) and "bias" in further[0].name
    needed = [each.name for each in further[takes_bias:] if each.default is each.empty]
    if needed:
        raise ValueError(f"{type(router).__name__} takes {', '.join(needed)} beside rows")
    return takes_bias


# A class may have a faster GEMM, of other bits, for forwards without gradients.
@torch.enable_grad()
def _run(twin: nn.Module, rows: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the class's own forward: logits, scores, indices."""
    name, forward = type(twin).__name__, type(twin).forward
    try:
        try:
            output = forward(twin, rows.clone(), *bias)
        except Exception:  # it may want a batch of sequences
            output = forward(twin, rows[None].clone(), *bias)
    except Exception as error:  # foreign code may raise anything; patching says why it stops
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} does not run on rows alone ({found})") from error
    if not isinstance(output, tuple) or len(output) != 3 or output[2].is_floating_point():
        raise ValueError(f"{name} does not return (logits, scores, indices)")
    return output


def _ignores_autocast(trial: _Trial) -> bool:
    """Return whether a class that computes logits in float32 does so within autocast too."""
    with torch.autocast(trial.rows.device.type, torch.bfloat16):
        return _same(_run(trial.router, trial.rows, *trial.arguments)[:1], [trial.logits])


def _same(actual, expected) -> bool:
    return all(_equal(*pair) for pair in zip(actual, expected, strict=True))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same, NaNs included: a division by zero gives some."""
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
