"""A provider that is set up on a problem, ready to run."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from lib.cases import Problem


class Unavailable(Exception):
    """A provider cannot run here; the message says why."""


def _autograd(out: Tensor, grad_out: Tensor) -> None:
    out.backward(grad_out)


@dataclass(frozen=True)
class Runner:
    """A provider that is set up on a problem.

    Attributes:
        forward: returns (T, H), or None where there is nothing to check.
        backward: takes that result and its gradient.
        leaves: all tensors that take a gradient.
        gradients: returns the gradients, under the names and in the layout of
            ``MoeInputs.differentiable``.
        adapted: the rows with an adapter: "image", "all" or "none"; "added": none, but the layer
            has the problem's added expert.
        rounding: multiple of ``testing.TOLERANCES`` that its own roundings between ops cost.
        check: runs the provider once and returns what is wrong, or None; for a provider whose
            inputs are not the problem's.
    """

    forward: Callable[[], Tensor | None]
    backward: Callable[[Tensor, Tensor], None] = _autograd
    leaves: tuple[Tensor, ...] = ()
    gradients: Callable[[], dict[str, Tensor | None]] = dict
    adapted: str = "none"
    rounding: float = 1.0
    check: Callable[[], str | None] | None = None

    def clear(self) -> None:
        """Drop all gradients."""
        for leaf in self.leaves:
            leaf.grad = None


@dataclass(frozen=True)
class Leaves:
    """Fresh leaves on the memory of a problem's tensors: two that all providers train, and those of
    the provider's adapters.
    """

    hidden_states: Tensor
    topk_weights: Tensor
    adapters: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem) -> "Leaves":
        inputs = problem.inputs
        pair = (inputs.hidden_states, inputs.topk_weights)
        return cls(*(tensor.detach().requires_grad_() for tensor in pair))

    def add_lora(self, name: str, lora_A: Tensor, lora_B: Tensor) -> None:
        """Add the two tensors of an adapter."""
        self.adapters.update({f"{name}.lora_A": lora_A, f"{name}.lora_B": lora_B})

    def runner(
        self,
        forward: Callable[[], Tensor],
        layout: Callable[[str, Tensor], Tensor] = lambda name, grad: grad,
        **settings,
    ) -> Runner:
        """Return a runner with these leaves.

        Args:
            forward: of the runner.
            layout: converts the gradient of a named adapter to the layout of ``MoeInputs``.
            settings: other attributes of the runner.
        """

        def gradients() -> dict[str, Tensor | None]:
            adapters = {
                name: None if leaf.grad is None else layout(name, leaf.grad)
                for name, leaf in self.adapters.items()
            }
            both = {"hidden_states": self.hidden_states, "topk_weights": self.topk_weights}
            return {name: leaf.grad for name, leaf in both.items()} | adapters

        leaves = (self.hidden_states, self.topk_weights, *self.adapters.values())
        return Runner(forward, leaves=leaves, gradients=gradients, **settings)
