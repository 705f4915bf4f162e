"""The implementations that are compared, by name: ``kind`` or ``kind:variant``.

To add one, write a function (problem, variant) -> Runner and enter it in ``KINDS``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import _split_lora
import torch
from _bounds import ExpertGemms, weight_reader
from _cases import SCALING, Problem
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moe_kernels import backends
from moe_kernels.models import peft_format
from moe_kernels.ops import LoraWeights, moe_mlp

HF_TRAINING = ("hf:eager", "hf:grouped_mm")  # transformers' own that are in the race in training
# batched_mm copies the weights of every row's expert.
_MAX_COPIED_BYTES = 4 << 30


class Unavailable(Exception):
    """A provider that cannot run here; the message says why."""


def _autograd(out: Tensor, grad_out: Tensor) -> None:
    out.backward(grad_out)


@dataclass(frozen=True)
class Runner:
    """A provider that is set up on a problem.

    Attributes:
        forward: returns (T, H), or nothing where there is nothing to check.
        backward: of that result and the gradient of it.
        leaves: all that takes a gradient.
        gradients: them, under the names and in the layout of ``MoeInputs.differentiable``.
        adapted: the rows with an adapter: "image", "all" or "none".
        rounding: multiple of ``testing.TOLERANCES`` that its own roundings between ops cost.
    """

    forward: Callable[[], Tensor | None]
    backward: Callable[[Tensor, Tensor], None] = _autograd
    leaves: tuple[Tensor, ...] = ()
    gradients: Callable[[], dict[str, Tensor | None]] = dict
    adapted: str = "none"
    rounding: float = 1.0

    def clear(self) -> None:
        """Drop all gradients."""
        for leaf in self.leaves:
            leaf.grad = None


@dataclass(frozen=True)
class _Leaves:
    """Fresh leaves on the memory of a problem's tensors; all providers train the same two."""

    hidden_states: Tensor
    topk_weights: Tensor
    adapters: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem) -> "_Leaves":
        inputs = problem.inputs
        pair = (inputs.hidden_states, inputs.topk_weights)
        return cls(*(tensor.detach().requires_grad_() for tensor in pair))

    def runner(
        self,
        forward: Callable[[], Tensor],
        layout: Callable[[str, Tensor], Tensor] = lambda name, grad: grad,
        **settings,
    ) -> Runner:
        """A runner with these leaves; ``layout`` brings an adapter's gradient into ours."""

        def gradients() -> dict[str, Tensor | None]:
            adapters = {
                name: None if leaf.grad is None else layout(name, leaf.grad)
                for name, leaf in self.adapters.items()
            }
            both = {"hidden_states": self.hidden_states, "topk_weights": self.topk_weights}
            return {name: leaf.grad for name, leaf in both.items()} | adapters

        leaves = (self.hidden_states, self.topk_weights, *self.adapters.values())
        return Runner(forward, leaves=leaves, gradients=gradients, **settings)


def set_up(name: str, problem: Problem) -> Runner:
    """The provider ``name`` on a problem.

    Raises:
        Unavailable: it does not run here.
        KeyError: there is no such provider.
    """
    kind, _, variant = name.partition(":")
    return KINDS[kind].set_up(problem, variant)


def names() -> list[str]:
    """All providers."""
    return [
        f"{kind}:{variant}" if variant else kind
        for kind, entry in KINDS.items()
        for variant in entry.variants()
    ]


# --- ours


def _ours(problem: Problem, backend: str, *, image: bool = True, adapters: bool = True) -> Runner:
    reason = backends.available()[backend]
    if reason is not None:
        raise Unavailable(reason)
    inputs, leaves, keywords = problem.inputs, _Leaves.of(problem), {}
    if adapters:
        for name in ("gate_up_lora", "down_lora"):
            a, b, scaling = getattr(inputs, name)
            pair = LoraWeights(a.detach().requires_grad_(), b.detach().requires_grad_(), scaling)
            keywords[name] = pair
            leaves.adapters.update({f"{name}.lora_A": pair.lora_A, f"{name}.lora_B": pair.lora_B})
        ids = inputs.modality_ids
        keywords["modality_ids"] = ids if image else torch.zeros_like(ids)

    def forward() -> Tensor:
        return moe_mlp(
            leaves.hidden_states, inputs.topk_ids, leaves.topk_weights,
            inputs.gate_up_proj, inputs.down_proj, backend=backend, **keywords,
        )  # fmt: skip

    return leaves.runner(forward, adapted="image" if adapters and image else "none")


def _ours_text(problem: Problem, backend: str) -> Runner:
    return _ours(problem, backend, image=False)


def _ours_base(problem: Problem, backend: str) -> Runner:
    return _ours(problem, backend, adapters=False)


# --- transformers, and PEFT on it; Liger


def _experts_module(problem: Problem, implementation: str) -> OlmoeExperts:
    """transformers' own module on the problem's weights, dispatched by its own decorator."""
    case = problem.case
    if implementation == "batched_mm":
        copied = 2 * case.rows * case.expert_bytes // 3
        if copied > _MAX_COPIED_BYTES:
            raise Unavailable(
                f"it copies the weights of every row: {copied / 2**30:.0f} GiB at once"
            )
    config = OlmoeConfig(
        hidden_size=case.shape.H, intermediate_size=case.shape.I, num_experts=case.shape.E,
        num_experts_per_tok=case.shape.K,
    )  # fmt: skip
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = OlmoeExperts(config)
    for name in ("gate_up_proj", "down_proj"):
        weight = nn.Parameter(getattr(problem.inputs, name), requires_grad=False)
        setattr(module, name, weight)
    return module


def _hf(problem: Problem, implementation: str) -> Runner:
    module, leaves = _experts_module(problem, implementation), _Leaves.of(problem)
    ids = problem.inputs.topk_ids

    def forward() -> Tensor:
        return module(leaves.hidden_states, ids, leaves.topk_weights)

    return leaves.runner(forward, rounding=2)


def _peft(problem: Problem, implementation: str) -> Runner:
    """PEFT's ``target_parameters``, by its defaults; it cannot mask, so all rows are adapted."""
    rank, leaves = problem.case.shape.r, _Leaves.of(problem)
    holder = nn.Module()
    holder.experts = _experts_module(problem, implementation)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(
        r=rank, lora_alpha=SCALING * rank, target_modules=[], target_parameters=targets
    )
    wrapped = get_peft_model(holder, config).base_model.model.experts
    wrappers = {"gate_up_lora": wrapped.base_layer, "down_lora": wrapped}
    for name, wrapper in wrappers.items():
        lora = getattr(problem.inputs, name)
        a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        a.data.copy_(peft_format.experts_A_to_peft(lora.lora_A[0]))
        b.data.copy_(peft_format.experts_B_to_peft(lora.lora_B[0]))
        leaves.adapters.update({f"{name}.lora_A": a, f"{name}.lora_B": b})

    def layout(name: str, grad: Tensor) -> Tensor:
        convert = getattr(peft_format, f"experts_{name[-1]}_from_peft")
        return convert(grad, problem.case.shape.E)[None]

    ids = problem.inputs.topk_ids
    return leaves.runner(
        lambda: wrapped(leaves.hidden_states, ids, leaves.topk_weights),
        layout, adapted="all", rounding=4,
    )  # fmt: skip


def _liger(problem: Problem, _: str) -> Runner:
    """Liger's fused MoE; it computes the weights' gradients whether they are frozen or not."""
    if problem.case.device != "cuda":
        raise Unavailable("it runs on CUDA devices only")
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError as error:
        raise Unavailable(f"liger-kernel is not installed ({error})") from error
    inputs, leaves = problem.inputs, _Leaves.of(problem)
    ids = inputs.topk_ids.int()

    def forward() -> Tensor:
        return LigerFusedMoEFunction.apply(
            leaves.hidden_states, inputs.gate_up_proj, inputs.down_proj, ids, leaves.topk_weights
        )

    return leaves.runner(forward, rounding=2)


# --- split LoRA, and the bounds


def _split(problem: Problem, variant: str) -> Runner:
    function = _split_lora.gathered if variant == "gathered" else _split_lora.masked
    if variant == "compiled":
        if problem.case.dtype == "float32":
            raise Unavailable("torch.compile has no grouped_mm in float32")
        function = torch.compile(function)
    leaves, pairs = _Leaves.of(problem), _split_lora.pairs_of(problem)
    for name, (a, b) in pairs.items():
        leaves.adapters.update({f"{name}.lora_A": a, f"{name}.lora_B": b})

    return leaves.runner(
        lambda: function(problem, pairs, leaves.hidden_states, leaves.topk_weights),
        lambda name, grad: grad[None], adapted="image", rounding=2,
    )  # fmt: skip


def _bound(problem: Problem, _: str) -> Runner:
    gemms = ExpertGemms(problem)
    return Runner(gemms.forward, gemms.backward)


def _read(problem: Problem, _: str) -> Runner:
    if problem.case.device != "cpu":
        raise Unavailable("it reads the CPU's memory")
    try:
        read = weight_reader(problem)
    except OSError as error:
        raise Unavailable(str(error)) from error

    def forward() -> None:
        read()

    return Runner(forward, lambda *_: None)


@dataclass(frozen=True)
class _Kind:
    set_up: Callable[[Problem, str], Runner]
    variants: Callable[[], list[str]]


def _experts_implementations() -> list[str]:
    ours = "moe_kernels"  # registered by the package itself
    return sorted({"eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()} - {ours})


KINDS: dict[str, _Kind] = {
    "bound": _Kind(_bound, lambda: [""]),
    "read": _Kind(_read, lambda: [""]),
    "ours": _Kind(_ours, lambda: list(backends.NAMES)),
    "ours_text": _Kind(_ours_text, lambda: list(backends.NAMES)),
    "ours_base": _Kind(_ours_base, lambda: list(backends.NAMES)),
    "hf": _Kind(_hf, _experts_implementations),
    "peft": _Kind(_peft, _experts_implementations),
    "liger": _Kind(_liger, lambda: [""]),
    "split": _Kind(_split, lambda: ["masked", "gathered", "compiled"]),
}
