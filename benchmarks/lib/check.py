"""The check of every provider against float64, on the inputs that are timed."""

import functools

import torch
from torch import Tensor

from lib.cases import Problem
from lib.providers.runner import Runner
from moe_kernels.ops import LoraWeights, moe_mlp
from moe_kernels.testing import TOLERANCES, relative_rms

_ADDED = ("extra_gate_up_proj", "extra_down_proj")


class Oracle:
    """float64 results for a few random tokens of a problem.

    A token's output and gradients depend on that token alone. So do the gradients of the adapters
    when the gradient of the output is zero elsewhere. The reference then needs float64 copies of
    only the experts that these tokens chose.
    """

    def __init__(self, problem: Problem, *, num_tokens: int = 32):
        generator = torch.Generator().manual_seed(problem.case.seed)
        tokens = torch.randperm(problem.case.shape.T, generator=generator)[:num_tokens]
        self.problem = problem
        self.tokens = tokens.to(problem.case.device)
        self.grad_out = torch.zeros_like(problem.grad_out)
        self.grad_out[self.tokens] = problem.grad_out[self.tokens]
        self._expected: dict[tuple[str, bool], dict[str, Tensor]] = {}
        self.experts, self._ids = problem.inputs.topk_ids[self.tokens].unique(return_inverse=True)

    @functools.cached_property
    def _stacks(self) -> tuple[Tensor, Tensor]:
        inputs = self.problem.inputs
        return tuple(w[self.experts].double() for w in (inputs.gate_up_proj, inputs.down_proj))

    def expected(self, adapted: str, backward: bool) -> dict[str, Tensor]:
        """The output and, with ``backward``, all gradients; adapters' for the chosen experts."""
        key = (adapted, backward)
        if key not in self._expected:
            self._expected[key] = self._compute(adapted, backward)
        return self._expected[key]

    def _compute(self, adapted: str, backward: bool) -> dict[str, Tensor]:
        inputs = self.problem.inputs
        leaves = {
            name: getattr(inputs, name)[self.tokens].double().requires_grad_(backward)
            for name in ("hidden_states", "topk_weights")
        }
        ids, keywords = self._ids, {}
        if adapted == "added":
            is_added = self.problem.ids_with_added[self.tokens] == self.problem.case.shape.E
            ids = ids.masked_fill(is_added, len(self.experts))
            for name, weight in zip(_ADDED, self.problem.added_expert, strict=True):
                keywords[name] = leaves[name] = weight.double().requires_grad_(backward)
        elif adapted != "none":
            modality_ids = inputs.modality_ids[self.tokens]
            everywhere = torch.ones_like(modality_ids)
            keywords["modality_ids"] = everywhere if adapted == "all" else modality_ids
            for name in ("gate_up_lora", "down_lora"):
                keywords[name] = pair = self._pair(getattr(inputs, name), backward)
                leaves |= {f"{name}.lora_A": pair.lora_A, f"{name}.lora_B": pair.lora_B}
        out = moe_mlp(
            leaves["hidden_states"], ids, leaves["topk_weights"], *self._stacks,
            backend="reference", **keywords,
        )  # fmt: skip
        if not backward:
            return {"out": out}
        out.backward(self.grad_out[self.tokens].double())
        return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    def _pair(self, lora: LoraWeights, backward: bool) -> LoraWeights:
        pair = (t[:, self.experts].double().requires_grad_(backward) for t in lora[:2])
        return LoraWeights(*pair, lora.scaling.double())

    def error(self, runner: Runner, *, backward: bool = True) -> str | None:
        """Run a runner once, and describe what is wrong with its results, or return None."""
        if runner.check is not None:
            return runner.check()
        limit = runner.rounding * TOLERANCES[self.problem.case.torch_dtype]
        for name, error in self.errors(runner, backward=backward).items():
            if not error <= limit:
                return f"{name}: relative RMS error {error:.1e} is above {limit:.1e}"
        return None

    def errors(self, runner: Runner, *, backward: bool = True) -> dict[str, float]:
        """Relative RMS errors of output and gradients; empty for a runner without output."""
        out = runner.forward()
        if backward:
            runner.backward(out, self.grad_out)
        if out is None:
            return {}
        actual = {"out": out, **(runner.gradients() if backward else {})}
        return {
            name: relative_rms(self._part(name, actual.get(name), expected), expected)
            for name, expected in self.expected(runner.adapted, backward).items()
        }

    def _part(self, name: str, tensor: Tensor | None, like: Tensor) -> Tensor:
        """The part of a result that is compared; a missing gradient counts as zeros."""
        if tensor is None:
            return torch.zeros_like(like)
        if name in _ADDED:
            return tensor
        return tensor[:, self.experts] if "lora" in name else tensor[self.tokens]
