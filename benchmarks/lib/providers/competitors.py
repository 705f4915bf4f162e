"""Implementations that others wrote: transformers' experts, PEFT, split LoRA, Liger, ScatterMoE."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from lib.cases import SCALING, Problem
from lib.providers.runner import Leaves, Runner, Unavailable
from moe_kernels.models import peft_format

# batched_mm copies the weights of every row's expert.
_MAX_COPIED_BYTES = 4 << 30


def _experts_module(problem: Problem, implementation: str) -> OlmoeExperts:
    """transformers' experts module on the problem's weights, dispatched by its own decorator."""
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


def hf(problem: Problem, implementation: str, *, compiled: bool = False) -> Runner:
    """transformers' experts without adapters."""
    module, leaves = _experts_module(problem, implementation), Leaves.of(problem)
    function = torch.compile(module) if compiled else module
    ids = problem.inputs.topk_ids

    def forward() -> Tensor:
        return function(leaves.hidden_states, ids, leaves.topk_weights)

    return leaves.runner(forward, rounding=2)


def hf_compiled(problem: Problem, implementation: str) -> Runner:
    """transformers' experts without adapters, under ``torch.compile``."""
    return hf(problem, implementation, compiled=True)


def peft(problem: Problem, implementation: str) -> Runner:
    """PEFT's ``target_parameters`` with default options, on all rows: PEFT cannot mask."""
    return peft_runner(problem, with_peft(problem, implementation), rounding=4)


def with_peft(problem: Problem, implementation: str) -> PeftModel:
    """Return a model of PEFT whose only layer, ``experts``, has the problem's adapters."""
    rank, holder = problem.case.shape.r, nn.Module()
    holder.experts = _experts_module(problem, implementation)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(
        r=rank, lora_alpha=SCALING * rank, target_modules=[], target_parameters=targets
    )
    model = get_peft_model(holder, config)
    for name, (a, b) in _peft_pairs(model).items():
        lora = getattr(problem.inputs, name)
        a.data.copy_(peft_format.experts_A_to_peft(lora.lora_A[0]))
        b.data.copy_(peft_format.experts_B_to_peft(lora.lora_B[0]))
    return model


def _peft_pairs(model: PeftModel) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return A and B as PEFT lays them out, by the argument of ``moe_mlp``."""
    outermost = model.base_model.model.experts
    wrappers = {"gate_up_lora": outermost.base_layer, "down_lora": outermost}
    return {
        name: (wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight)
        for name, wrapper in wrappers.items()
    }


def peft_runner(problem: Problem, model: PeftModel, *, rounding: float) -> Runner:
    """Return the runner of a model that :func:`with_peft` made."""
    leaves, experts = Leaves.of(problem), model.base_model.model.experts
    for name, pair in _peft_pairs(model).items():
        leaves.add_lora(name, *pair)

    def layout(name: str, grad: Tensor) -> Tensor:
        convert = getattr(peft_format, f"experts_{name[-1]}_from_peft")
        return convert(grad, problem.case.shape.E)[None]

    ids = problem.inputs.topk_ids
    return leaves.runner(
        lambda: experts(leaves.hidden_states, ids, leaves.topk_weights),
        layout, adapted="all", rounding=rounding,
    )  # fmt: skip


def split(problem: Problem, variant: str) -> Runner:
    """Split LoRA on ``grouped_mm``, the usual implementation of low-rank updates of fused experts.

    It runs the base's grouped product, then two narrow ones for the update, and adds that to the
    base's result. Rows are sorted by expert once, and no gradient of a frozen weight is computed.
    The variant is "masked", where a mask is applied to the (rows, r) intermediate, "gathered",
    where only the image rows are gathered, or "compiled", which is masked too.
    """
    function = _split_gathered if variant == "gathered" else _split_masked
    if variant == "compiled":
        if problem.case.dtype == "float32":
            raise Unavailable("torch.compile has no grouped_mm in float32")
        function = torch.compile(function)
    leaves, pairs = Leaves.of(problem), _split_pairs(problem)
    for name, (a, b) in pairs.items():
        leaves.add_lora(name, a, b)

    return leaves.runner(
        lambda: function(problem, pairs, leaves.hidden_states, leaves.topk_weights),
        lambda name, grad: grad[None], adapted="image", rounding=2,
    )  # fmt: skip


def _split_pairs(problem: Problem) -> dict[str, tuple[Tensor, Tensor]]:
    """Return trainable (E, r, in) and (E, out, r) in the base's dtype, by projection."""
    dtype = problem.case.torch_dtype
    loras = (problem.inputs.gate_up_lora, problem.inputs.down_lora)
    return {
        name: tuple(tensor[0].to(dtype).requires_grad_() for tensor in lora[:2])
        for name, lora in zip(("gate_up_lora", "down_lora"), loras, strict=True)
    }


def _split_masked(
    problem: Problem,
    pairs: dict[str, tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    topk_weights: Tensor,
) -> Tensor:
    """Run the update on all rows, with a mask that makes it zero on text."""
    rows = _SortedRows(problem)
    is_image = rows.image[:, None].to(hidden_states.dtype)

    def project(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor):
        u = grouped_mm(x, lora_A.mT, offs=rows.offsets) * (is_image * scaling.to(x.dtype))
        update = grouped_mm(u, lora_B.mT, offs=rows.offsets)
        return grouped_mm(x, weight.mT, offs=rows.offsets).add_(update)

    return _split_experts(problem, pairs, hidden_states, topk_weights, rows, project)


def _split_gathered(
    problem: Problem,
    pairs: dict[str, tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    topk_weights: Tensor,
) -> Tensor:
    """Gather the image rows, run the update on them, and scatter the result."""
    rows = _SortedRows(problem)
    image = rows.image.nonzero().squeeze(1)
    offsets = _offsets(rows.experts[image], problem.case.shape.E)

    def project(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor):
        u = grouped_mm(x[image], lora_A.mT, offs=offsets) * scaling.to(x.dtype)
        update = grouped_mm(u, lora_B.mT, offs=offsets)
        return grouped_mm(x, weight.mT, offs=rows.offsets).index_add_(0, image, update)

    return _split_experts(problem, pairs, hidden_states, topk_weights, rows, project)


class _SortedRows:
    """Rows sorted by expert."""

    def __init__(self, problem: Problem):
        inputs, shape = problem.inputs, problem.case.shape
        self.experts, self.perm = inputs.topk_ids.reshape(-1).sort()
        self.tokens = self.perm // shape.K
        self.image = inputs.modality_ids[self.tokens] == 1
        self.offsets = _offsets(self.experts, shape.E)


def _offsets(sorted_experts: Tensor, num_experts: int) -> Tensor:
    """Return the end of each expert's rows, (E,) int32."""
    experts = torch.arange(num_experts, device=sorted_experts.device)
    return torch.searchsorted(sorted_experts, experts, right=True).int()


def _split_experts(problem, pairs, hidden_states, topk_weights, rows, project) -> Tensor:
    inputs, (num_tokens, top_k) = problem.inputs, topk_weights.shape
    x = hidden_states[rows.tokens]
    pre = project(
        x, inputs.gate_up_proj, *pairs["gate_up_lora"], inputs.gate_up_lora.scaling
    )  # (rows, 2I)
    gate, up = pre.chunk(2, dim=-1)
    y = project(silu(gate) * up, inputs.down_proj, *pairs["down_lora"], inputs.down_lora.scaling)
    y = y * topk_weights.reshape(-1)[rows.perm, None]
    inverse = torch.empty_like(rows.perm)
    inverse[rows.perm] = torch.arange(rows.perm.numel(), device=rows.perm.device)
    return y[inverse].view(num_tokens, top_k, -1).sum(1)


def liger(problem: Problem, _: str) -> Runner:
    """Liger's fused MoE, which computes the weights' gradients even for frozen weights."""
    if problem.case.device != "cuda":
        raise Unavailable("it runs on CUDA devices only")
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError as error:
        raise Unavailable(f"liger-kernel is not installed ({error})") from error
    inputs, leaves = problem.inputs, Leaves.of(problem)
    ids = inputs.topk_ids.int()

    def forward() -> Tensor:
        return LigerFusedMoEFunction.apply(
            leaves.hidden_states, inputs.gate_up_proj, inputs.down_proj, ids, leaves.topk_weights
        )

    return leaves.runner(forward, rounding=2)


def scattermoe(problem: Problem, _: str) -> Runner:
    """Axolotl's ScatterMoE kernels with LoRA, on all rows: they cannot mask."""
    if problem.case.device != "cuda":
        raise Unavailable("it runs on CUDA devices only")
    kernels, leaves = _scattermoe_kernels(), Leaves.of(problem)
    inputs, shape = problem.inputs, problem.case.shape
    pairs = {name: _scattermoe_pair(problem, name) for name in ("gate_up_lora", "down_lora")}
    for name, pair in pairs.items():
        leaves.add_lora(name, *pair)
    gate_up_proj, down_proj = (w.transpose(1, 2) for w in (inputs.gate_up_proj, inputs.down_proj))

    def layout(name: str, grad: Tensor) -> Tensor:
        if name.endswith("A"):
            return grad.unflatten(0, (shape.E, shape.r))[None]
        return grad.unflatten(1, (shape.E, shape.r)).transpose(0, 1)[None]

    def forward() -> Tensor:
        routes = kernels.flatten_sort_count(inputs.topk_ids, num_experts=shape.E)
        pre_act = kernels.parallel_linear_lora(
            leaves.hidden_states, gate_up_proj, shape.K, *routes,
            *pairs["gate_up_lora"], SCALING, grouped_out=True,
        )  # fmt: skip
        gate, up = pre_act.chunk(2, dim=-1)
        return kernels.parallel_linear_lora(
            silu(gate) * up, down_proj, 1, *routes, *pairs["down_lora"], SCALING,
            gates=leaves.topk_weights, grouped_in=True,
        )  # fmt: skip

    return leaves.runner(forward, layout, adapted="all", rounding=4)


def _scattermoe_pair(problem: Problem, name: str) -> list[Tensor]:
    """A (E * r, in) and B (out, E * r) of an adapter, in the base's dtype.

    Rows of A and columns of B are grouped by expert; the rank varies fastest.
    """
    a, b = (tensor[0].to(problem.case.torch_dtype) for tensor in getattr(problem.inputs, name)[:2])
    pair = a.flatten(0, 1), b.transpose(0, 1).flatten(1)
    return [tensor.clone().requires_grad_() for tensor in pair]


@functools.cache
def _scattermoe_kernels() -> ModuleType:
    """Import the kernels' package alone: the packages around it need all of axolotl."""
    axolotl = importlib.util.find_spec("axolotl")
    if axolotl is None:
        raise Unavailable("axolotl is not installed (its wheel without its requirements will do)")
    folder = Path(axolotl.origin).parent / "integrations" / "kernels" / "libs" / "scattermoe_lora"
    if not folder.is_dir():
        raise Unavailable("this axolotl has no scattermoe_lora")
    spec = importlib.util.spec_from_file_location(
        "scattermoe_lora", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
