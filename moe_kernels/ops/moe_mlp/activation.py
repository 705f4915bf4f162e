"""Activations of the experts, and the form of their weights, as every backend takes it."""

import math
from typing import NamedTuple

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu_squared", "clamped_swiglu")


class Activation(NamedTuple):
    """An activation of the experts: one of a closed set that the kernels compute.

    With a gate the activation is a = f(gate) * up, without one a = f(up). f(x) is::

        "silu"             x * sigmoid(x)
        "gelu"             x * (1 + erf(x / sqrt(2))) / 2
        "gelu_tanh"        x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2
        "relu_squared"     max(x, 0)**2

    and "clamped_swiglu", which has a gate always, is::

        g, u = min(gate, limit), min(max(up, -limit), limit)
        a    = (u + shift) * g * sigmoid(alpha * g)

    Attributes:
        name: one of the above.
        gated: whether there is a gate.
        alpha: factor within the sigmoid, of "clamped_swiglu" alone.
        limit: bound of gate and up, above 0, of "clamped_swiglu" alone.
        shift: what is added to up, of "clamped_swiglu" alone.

    Example, gpt-oss::

        Activation("clamped_swiglu", alpha=1.702, limit=7.0, shift=1.0)
    """

    name: str
    gated: bool = True
    alpha: float = 1.0
    limit: float = math.inf
    shift: float = 0.0


class ExpertForm(NamedTuple):
    """Form of the experts: the fields of :class:`Activation`, and the order of gate and up.

    Attributes:
        act, gated, alpha, limit, shift: name and values of the activation.
        interleaved: whether the rows of gate_up_proj are gate, up, gate, up, ... instead of the
            gate's, then up's. All that has 2I elements is in the same order.
    """

    act: str
    gated: bool
    alpha: float
    limit: float
    shift: float
    interleaved: bool

    @property
    def factor(self) -> int:
        """Rows of gate_up_proj for each intermediate feature."""
        return 2 if self.gated else 1


SILU = ExpertForm("silu", True, 1.0, math.inf, 0.0, False)  # SwiGLU of rows [gate; up]


def expert_form(act: str | Activation, interleaved: bool) -> ExpertForm:
    """Check an activation and an order of gate and up, and return them together.

    Raises:
        TypeError: a wrong type.
        ValueError: a name or a value that no kernel computes.
    """
    activation = Activation(act) if isinstance(act, str) else act
    if not isinstance(activation, Activation):
        raise TypeError(f"act must be a str or an Activation, got {type(act).__name__}")
    name, gated, alpha, limit, shift = activation
    if name not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(map(repr, ACTIVATIONS))}, got {name!r}")
    for field, value in (("gated", gated), ("interleaved", interleaved)):
        if type(value) is not bool:
            raise TypeError(f"{field} must be True or False, got {value!r}")
    _check_values(activation)
    if interleaved and not gated:
        raise ValueError("interleaved needs gate and up, but act has gated=False: leave it out")
    return ExpertForm(name, gated, float(alpha), float(limit), float(shift), interleaved)


def _check_values(activation: Activation) -> None:
    """Raise unless alpha, limit and shift are numbers that the activation has a use for."""
    name, gated, *values = activation
    fields = Activation._fields[2:]
    for field, value in zip(fields, values, strict=True):
        if type(value) not in (int, float):
            raise TypeError(f"{field} of act must be a number, got {value!r}")
    if name == "clamped_swiglu":
        alpha, limit, shift = values
        if not gated:
            raise ValueError("act 'clamped_swiglu' has a gate always, got gated=False")
        if not (math.isfinite(alpha) and math.isfinite(shift) and limit > 0):
            raise ValueError(
                f"act 'clamped_swiglu' needs a limit above 0 and finite alpha and shift, got "
                f"limit={limit}, alpha={alpha}, shift={shift}"
            )
    elif tuple(values) != tuple(Activation._field_defaults[field] for field in fields):
        raise ValueError(
            f"alpha, limit and shift are values of act 'clamped_swiglu' alone, but act {name!r} "
            f"has {', '.join(f'{f}={v}' for f, v in zip(fields, values, strict=True))}"
        )
