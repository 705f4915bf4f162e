"""Form of an experts module of transformers: its layout, and its activation found by trial.

The attributes that ``use_experts_implementation`` sets say how weights are stored. No class name
says what the activation is: it runs on numbers, and a member of the kernels' closed set must give
the same.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from moe_kernels import ops
from moe_kernels.layers import AddedExperts
from moe_kernels.models import offload, sharding
from moe_kernels.models.parts import up_name
from moe_kernels.ops import Activation

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_LAYOUT = ("has_gate", "is_concatenated", "is_transposed", "has_bias")
_NORMED = "has_post_expert_norm"  # the oldest versions lack it
# Names that classes have for the values of a clamped SwiGLU.
_ALPHAS, _LIMITS = ("alpha", "swiglu_alpha"), ("limit", "swiglu_limit")
_UNCLAMPED = ("silu", "gelu", "gelu_tanh", "relu_squared")
# Where activations bend, and beyond where they are linear or zero, without a gap.
_BEYOND = tuple(8 * 1.37**n for n in range(39))  # up to 1e6
_GATES = (*(x / 4 for x in range(-32, 33)), *_BEYOND, *(-x for x in _BEYOND))
_UPS = (-1e4, -20.0, -1.5, 0.0, 0.75, 2.0, 20.0, 1e4)
_RANDOM_PAIRS = 512  # of no grid, on which an activation of steps would agree
_TOLERANCE = 1e-6  # a class may compute in float32 whatever it gets


class Form(NamedTuple):
    """Layout and activation of an experts module.

    Attributes:
        act: the activation.
        interleaved: rows of the first stack are gate, up, gate, up, ...
        transposed: stacks are stored (E, in, out).
        biased: both projections have biases.
        normed: the module's ``post_expert_norm`` is applied to each expert's output.
    """

    act: Activation
    interleaved: bool = False
    transposed: bool = False
    biased: bool = False
    normed: bool = False

    def stack(self, experts: nn.Module, name: str) -> Tensor:
        """Return a stack of weights (E, out, in), a view if it is stored transposed."""
        weight = offload.value(experts, name)
        return weight.transpose(1, 2) if self.transposed else weight

    def stacks(self, experts: nn.Module) -> tuple[Tensor, Tensor]:
        """Return both stacks of weights, (E, N, H) and (E, H, I)."""
        return self.stack(experts, up_name(experts)), self.stack(experts, "down_proj")

    def biases(self, experts: nn.Module, added: Sequence[AddedExperts]) -> dict[str, Tensor]:
        """Return the biases as arguments of ``moe_mlp``, those of added experts last."""
        if not self.biased:
            return {}
        names = {"gate_up_bias": f"{up_name(experts)}_bias", "down_bias": "down_proj_bias"}
        found = {name: offload.value(experts, own) for name, own in names.items()}
        if not added:
            return found
        return {
            name: torch.cat([own, *(each.bias(name).to(own.dtype) for each in added)])
            for name, own in found.items()
        }


PLAIN = Form(Activation("silu"))
_FORMS = [PLAIN]  # a graph of torch.compile can hold a number, and reads the form from here
_known: WeakKeyDictionary[nn.Module, tuple[tuple, int]] = WeakKeyDictionary()


def problems(experts: nn.Module) -> list[str]:
    """List the properties of an experts module that the kernels do not compute."""
    reasons = []
    if missing := [name for name in _LAYOUT if getattr(experts, name, None) is None]:
        reasons.append(
            f"{type(experts).__name__} is not built on transformers' interface of experts (no "
            f"{', '.join(missing)}), through which the kernels are called: docs/families.md lists "
            "classes that are"
        )
    if getattr(experts, _NORMED, False) and getattr(experts, "post_expert_norm", None) is None:
        reasons.append(f"{_NORMED}, and no post_expert_norm")
    if sharding.spread_without_mask(experts):
        reasons.append(sharding.NO_MASK)
    if getattr(experts, "has_bias", False):
        names = (f"{up_name(experts)}_bias", "down_proj_bias")
        reasons += [f"no {each}" for each in names if getattr(experts, each, None) is None]
    if not reasons and isinstance(found := _find(experts), str):
        reasons.append(found)
    return reasons


def not_plain(experts: nn.Module) -> list[str]:
    """List what keeps experts from being gated SiLU, concatenated, not transposed, without biases.

    Nor may they be spread over ranks.

    They are all that is computed for adapters of PEFT.
    """
    try:
        form = form_of(experts)
    except ValueError:
        return problems(experts)
    found = {
        "experts that are spread over ranks": sharding.spread(experts) is not None,
        "experts without a gate": not form.act.gated,
        "interleaved gate and up rows": form.interleaved,
        "transposed expert weights": form.transposed,
        "expert biases": form.biased,
        "a norm after each expert": form.normed,
        f"activation {form.act.name} (only SiLU)": form.act.name != "silu",
    }
    return [meaning for meaning, holds in found.items() if holds]


def form_of(experts: nn.Module) -> Form:
    """Return how an experts module computes now; what was found is kept while it stays the same.

    Raises:
        ValueError: the kernels do not compute it.
    """
    return _FORMS[_number_of(experts)]


@torch.compiler.assume_constant_result  # a compiled forward makes the trial when it is compiled
def _number_of(experts: nn.Module) -> int:
    """Return the place of an experts module's form among those that were found."""
    found = _known.get(experts)
    if found is None or found[0] != _deciding(experts):
        if reasons := problems(experts):
            raise ValueError(f"{type(experts).__name__} is not supported: {'; '.join(reasons)}")
        found = _known[experts]
    return found[1]


def _deciding(experts: nn.Module) -> tuple:
    """Return all that a form follows from, which is compared in each forward."""
    own, cls = experts.__dict__, type(experts)
    names = (*_LAYOUT, _NORMED, *_ALPHAS, *_LIMITS, "_apply_gate", "act_fn")
    act = own["_modules"].get("act_fn")
    inside = () if act is None else _settings(act)
    spread = sharding.spread_without_mask(experts)
    return (*map(own.get, names), act, inside, cls, getattr(cls, "_apply_gate", None), spread)


def _settings(act: nn.Module) -> tuple:
    """Return what an activation follows from: its classes, numbers and functions.

    It has no tensors, and its mode does not count: see :func:`_changeable`.
    """
    own, cls = act.__dict__, type(act)
    kept = [(k, v) for k, v in own.items() if k not in _OF_EVERY_MODULE and _is_setting(v)]
    return cls, cls.forward, *kept, *map(_settings, filter(None, own["_modules"].values()))


def _is_setting(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str) or callable(value)


def _find(experts: nn.Module) -> Form | str:
    """Return the form of an experts module, or why it is in none that the kernels compute."""
    deciding, act = _deciding(experts), _find_activation(experts)
    if isinstance(act, str):
        return act
    interleaved = act.gated and not experts.is_concatenated
    normed = bool(getattr(experts, _NORMED, False))
    found = Form(act, interleaved, bool(experts.is_transposed), bool(experts.has_bias), normed)
    if found not in _FORMS:
        _FORMS.append(found)
    _known[experts] = deciding, _FORMS.index(found)
    return found


def _find_activation(experts: nn.Module) -> Activation | str:
    name = _name_of_activation(experts)
    if found := _changeable(getattr(experts, "act_fn", None)):
        return f"{name} has {found}: what it computes may change without a sign"
    with torch.no_grad(), unset_fake_temporarily():
        gate, up = _probes(experts)
        try:
            expected = _run(experts, gate, up)
        except Exception as error:  # foreign code may raise anything; patching says why it stops
            return f"{name} does not run by itself ({type(error).__name__}: {error})"
        for act in _candidates(experts):
            if _agree(_compute(act, gate, up), expected):
                return act
    if experts.has_gate and not experts.is_concatenated:
        name += " of interleaved gate and up rows"
    return f"{name} (only {', '.join(_UNCLAMPED)} and clamped SwiGLU)"


def _changeable(act: object) -> str | None:
    """Return what an activation has that changes in place, which no forward could notice."""
    for name, module in act.named_modules() if isinstance(act, nn.Module) else ():
        at = f" in {name}" if name else ""
        if isinstance(module, nn.modules.dropout._DropoutNd):
            return f"{type(module).__name__}{at}"
        tensors = {**module._parameters, **module._buffers, **vars(module)}
        for key, value in tensors.items():
            if isinstance(value, Tensor):
                return f"the tensor {key}{at}"
    return None


def _name_of_activation(experts: nn.Module) -> str:
    act = getattr(experts, "act_fn", None)
    if act is None:
        return f"activation _apply_gate of {type(experts).__name__}"
    return f"activation {act.__name__ if hasattr(act, '__name__') else type(act).__name__}"


def _probes(experts: nn.Module) -> tuple[Tensor, Tensor]:
    """Return pre-activations of gate and up, (n,) float64, every value with every other."""
    beyond = [sign * 2 * each for each in _numbers(experts, _LIMITS) for sign in (1, -1)]
    pairs = itertools.product((*_GATES, *beyond), (*_UPS, *beyond))
    grid = torch.tensor(list(pairs), dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(0)
    options = {"dtype": torch.float64, "device": "cpu", "generator": generator}
    grid = torch.cat([grid, 10 * torch.randn(_RANDOM_PAIRS, 2, **options)])
    return grid[:, 0], grid[:, 1]


def _run(experts: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """Run the module's own activation, as transformers' implementations do: (n,)."""
    if not experts.has_gate:
        return experts.act_fn(gate[None])[0]
    if experts.is_concatenated:
        return experts._apply_gate(torch.cat([gate, up])[None])[0]
    return experts._apply_gate(torch.stack([gate, up], -1).reshape(1, -1))[0]


def _compute(act: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """Run the op with one expert whose projections are identities: (n,)."""
    x = torch.stack([gate, up], -1)
    first = torch.eye(2, device="cpu").to(x)[: 2 if act.gated else 1]
    ids = torch.zeros(len(x), 1, dtype=torch.int64, device="cpu")
    second = torch.ones(2, 1, device="cpu").to(x)
    out = ops.moe_mlp(
        x, ids, torch.ones_like(x[:, :1]), first[None], second[None], act=act, backend="reference"
    )
    return out[:, 0]


def _candidates(experts: nn.Module) -> Iterator[Activation]:
    gated = bool(experts.has_gate)
    for name in _UNCLAMPED:
        yield Activation(name, gated)
    alphas, limits = ([*_numbers(experts, names)] for names in (_ALPHAS, _LIMITS))
    for alpha, limit, shift in itertools.product([1.0, *alphas], limits, (0.0, 1.0)):
        if gated:
            yield Activation("clamped_swiglu", True, alpha, limit, shift)


def _numbers(experts: nn.Module, names: tuple[str, ...]) -> Iterator[float]:
    for name in names:
        value = getattr(experts, name, None)
        if isinstance(value, int | float) and 0 < value < float("inf"):
            yield float(value)


def _agree(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or not expected.isfinite().all():
        return False
    expected = expected.to(found.dtype)
    return torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
