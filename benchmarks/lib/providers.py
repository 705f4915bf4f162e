"""The implementations that are compared, by name: ``kind`` or ``kind:variant``.

To add one, write a function (problem, variant) -> Runner and enter it in ``KINDS``.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import OlmoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from lib import split_lora
from lib.blocks import Block
from lib.bounds import ExpertGemms, weight_reader
from lib.cases import SCALING, Problem
from moe_kernels import backends
from moe_kernels.models import peft_format
from moe_kernels.ops import LoraWeights, moe_mlp

HF_TRAINING = ("hf:eager", "hf:grouped_mm")  # transformers' own that are in the race in training
# What an added expert is timed in, and there: without it, with its rows, without a row of it.
ADDED_KINDS = {
    "op": ("ours_base", "ours_added", "ours_added_text"),
    "MoE block": ("block", "block_added", "block_added_text"),
}
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
        adapted: the rows with an adapter: "image", "all" or "none"; "added": none, but the layer
            has the problem's added expert.
        rounding: multiple of ``testing.TOLERANCES`` that its own roundings between ops cost.
        check: what is wrong, where its inputs are not the problem's; it has run once then.
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


def set_up_provider(name: str, problem: Problem) -> Runner:
    """The provider ``name`` on a problem.

    Raises:
        Unavailable: it does not run here.
        KeyError: there is no such provider.
    """
    kind, _, variant = name.partition(":")
    return KINDS[kind].set_up(problem, variant)


def provider_names() -> list[str]:
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


def _ours_added(problem: Problem, backend: str, *, image: bool = True) -> Runner:
    """One more expert, which trains; with ``image`` the image rows, else none, are sent to it."""
    reason = backends.available()[backend]
    if reason is not None:
        raise Unavailable(reason)
    inputs, leaves = problem.inputs, _Leaves.of(problem)
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


def _ours_added_text(problem: Problem, backend: str) -> Runner:
    return _ours_added(problem, backend, image=False)


def _block(problem: Problem, backend: str, *, added: bool = False, image: bool = True) -> Runner:
    """The whole MoE block, whose router decides: image rows choose the added expert, if any."""
    reason = backends.available()[backend]
    if reason is not None:
        raise Unavailable(reason)
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


def _block_added(problem: Problem, backend: str) -> Runner:
    return _block(problem, backend, added=True)


def _block_added_text(problem: Problem, backend: str) -> Runner:
    return _block(problem, backend, added=True, image=False)


# --- transformers, and PEFT on it; Liger; ScatterMoE


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


def _hf(problem: Problem, implementation: str, *, compiled: bool = False) -> Runner:
    module, leaves = _experts_module(problem, implementation), _Leaves.of(problem)
    function = torch.compile(module) if compiled else module
    ids = problem.inputs.topk_ids

    def forward() -> Tensor:
        return function(leaves.hidden_states, ids, leaves.topk_weights)

    return leaves.runner(forward, rounding=2)


def _hf_compiled(problem: Problem, implementation: str) -> Runner:
    return _hf(problem, implementation, compiled=True)


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


def _scattermoe(problem: Problem, _: str) -> Runner:
    """Axolotl's ScatterMoE kernels with LoRA; they cannot mask, so all rows are adapted."""
    if problem.case.device != "cuda":
        raise Unavailable("it runs on CUDA devices only")
    kernels, leaves = _scattermoe_kernels(), _Leaves.of(problem)
    inputs, experts, rank = problem.inputs, problem.case.shape.E, problem.case.shape.r
    pairs = {}
    for name in ("gate_up_lora", "down_lora"):
        a, b = (tensor[0].to(problem.case.torch_dtype) for tensor in getattr(inputs, name)[:2])
        # Rows of A and columns of B stand by expert, the rank runs fastest.
        pair = a.flatten(0, 1), b.transpose(0, 1).flatten(1)
        pairs[name] = [tensor.clone().requires_grad_() for tensor in pair]
        leaves.adapters.update(
            {f"{name}.lora_{x}": t for x, t in zip("AB", pairs[name], strict=True)}
        )

    def layout(name: str, grad: Tensor) -> Tensor:
        if name.endswith("A"):
            return grad.unflatten(0, (experts, rank))[None]
        return grad.unflatten(1, (experts, rank)).transpose(0, 1)[None]

    gate_up_proj, down_proj = (w.transpose(1, 2) for w in (inputs.gate_up_proj, inputs.down_proj))

    def forward() -> Tensor:
        routes = kernels.flatten_sort_count(inputs.topk_ids, num_experts=experts)
        pre_act = kernels.parallel_linear_lora(
            leaves.hidden_states, gate_up_proj, problem.case.shape.K, *routes,
            *pairs["gate_up_lora"], SCALING, grouped_out=True,
        )  # fmt: skip
        gate, up = pre_act.chunk(2, dim=-1)
        return kernels.parallel_linear_lora(
            silu(gate) * up, down_proj, 1, *routes, *pairs["down_lora"], SCALING,
            gates=leaves.topk_weights, grouped_in=True,
        )  # fmt: skip

    return leaves.runner(forward, layout, adapted="all", rounding=4)


@functools.cache
def _scattermoe_kernels() -> ModuleType:
    """The kernels alone: the packages around them need all of axolotl."""
    found = importlib.util.find_spec("axolotl")
    if found is None:
        raise Unavailable("axolotl is not installed (its wheel without its requirements will do)")
    folder = Path(found.origin).parent / "integrations" / "kernels" / "libs" / "scattermoe_lora"
    if not folder.is_dir():
        raise Unavailable("this axolotl has no scattermoe_lora")
    spec = importlib.util.spec_from_file_location(
        "scattermoe_lora", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- split LoRA, and the bounds


def _split(problem: Problem, variant: str) -> Runner:
    function = split_lora.gathered if variant == "gathered" else split_lora.masked
    if variant == "compiled":
        if problem.case.dtype == "float32":
            raise Unavailable("torch.compile has no grouped_mm in float32")
        function = torch.compile(function)
    leaves, pairs = _Leaves.of(problem), split_lora.pairs_of(problem)
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
    "ours_added": _Kind(_ours_added, lambda: list(backends.NAMES)),
    "ours_added_text": _Kind(_ours_added_text, lambda: list(backends.NAMES)),
    "block": _Kind(_block, lambda: list(backends.NAMES)),
    "block_added": _Kind(_block_added, lambda: list(backends.NAMES)),
    "block_added_text": _Kind(_block_added_text, lambda: list(backends.NAMES)),
    "hf": _Kind(_hf, _experts_implementations),
    "hf_compiled": _Kind(_hf_compiled, lambda: ["grouped_mm"]),
    "peft": _Kind(_peft, _experts_implementations),
    "liger": _Kind(_liger, lambda: [""]),
    "scattermoe": _Kind(_scattermoe, lambda: [""]),
    "split": _Kind(_split, lambda: ["masked", "gathered", "compiled"]),
}
