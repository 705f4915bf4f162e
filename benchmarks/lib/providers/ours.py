"""This package's providers: the op ``moe_mlp``, alone and under PEFT, and a patched MoE block."""

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from lib.cases import Problem
from lib.providers.competitors import peft_runner, with_peft
from lib.providers.runner import Leaves, Runner, Unavailable
from moe_kernels import accelerate_peft, backends
from moe_kernels.models.added_experts import added_experts
from moe_kernels.models.experts import context_of
from moe_kernels.moextend import ExpertExtender
from moe_kernels.ops import LoraWeights, moe_mlp
from moe_kernels.testing import TOLERANCES, relative_rms

_ADDED_LOGIT = 3.0  # above the K-th of E normal logits
_CHECKED = 32


def refuse_absent(backend: str) -> None:
    """Raise ``Unavailable`` unless the backend runs here."""
    reason = backends.available()[backend]
    if reason is not None:
        raise Unavailable(reason)


def adapted(problem: Problem, backend: str, *, image: bool = True) -> Runner:
    """The op with adapters; without ``image`` no row has the adapters' modality."""
    refuse_absent(backend)
    inputs, leaves, loras = problem.inputs, Leaves.of(problem), {}
    for name in ("gate_up_lora", "down_lora"):
        a, b, scaling = getattr(inputs, name)
        loras[name] = LoraWeights(a.detach().requires_grad_(), b.detach().requires_grad_(), scaling)
        leaves.add_lora(name, *loras[name][:2])
    ids = inputs.modality_ids if image else torch.zeros_like(inputs.modality_ids)

    def forward() -> Tensor:
        return moe_mlp(
            leaves.hidden_states, inputs.topk_ids, leaves.topk_weights,
            inputs.gate_up_proj, inputs.down_proj, backend=backend, modality_ids=ids, **loras,
        )  # fmt: skip

    return leaves.runner(forward, adapted="image" if image else "none")


def adapted_text(problem: Problem, backend: str) -> Runner:
    """The op with adapters that no row uses."""
    return adapted(problem, backend, image=False)


def base(problem: Problem, backend: str) -> Runner:
    """The op without adapters."""
    refuse_absent(backend)
    inputs, leaves = problem.inputs, Leaves.of(problem)

    def forward() -> Tensor:
        return moe_mlp(
            leaves.hidden_states, inputs.topk_ids, leaves.topk_weights,
            inputs.gate_up_proj, inputs.down_proj, backend=backend,
        )  # fmt: skip

    return leaves.runner(forward)


def peft_accelerated(problem: Problem, backend: str) -> Runner:
    """PEFT's model, on all rows, whose experts the op computes."""
    refuse_absent(backend)
    model = with_peft(problem, "grouped_mm")
    accelerate_peft(model, backend=backend)
    return peft_runner(problem, model, rounding=1)


def added(problem: Problem, backend: str, *, image: bool = True) -> Runner:
    """The op with one more expert, which trains; ``image`` rows, or none, are sent to it."""
    refuse_absent(backend)
    inputs, leaves = problem.inputs, Leaves.of(problem)
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


def added_text(problem: Problem, backend: str) -> Runner:
    """The op with one more expert that no row is sent to."""
    return added(problem, backend, image=False)


def block(problem: Problem, backend: str) -> Runner:
    """The MoE block of a patched model, with its router."""
    return _block(problem, backend, added=False)


def block_added(problem: Problem, backend: str) -> Runner:
    """The block with one more expert, which every image row chooses."""
    return _block(problem, backend, added=True)


def block_added_text(problem: Problem, backend: str) -> Runner:
    """The block with one more expert, when no row has its modality."""
    return _block(problem, backend, added=True, image=False)


def _block(problem: Problem, backend: str, *, added: bool, image: bool = True) -> Runner:
    refuse_absent(backend)
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


class Block:
    """A block on a problem's weights, with a random router that chooses by itself.

    The first column of ``hidden_states`` is ones. The base's router ignores it, and the added
    expert's router row has its only weight there, so every row of the modality chooses that expert.

    Args:
        problem: gives the weights, the hidden states and the modality ids.
        backend: of the op.
        added: whether to add an expert.
    """

    def __init__(self, problem: Problem, backend: str, *, added: bool):
        self.problem = problem
        extender = ExpertExtender(_model(problem), ("image",), backend=backend)
        self.layer = extender.model.model.layers[0]
        if added:
            extender.extend([0], init=0)
            columns = added_experts(self.layer)[0].router_columns
            with torch.no_grad():
                columns.zero_()[:, 0] = _ADDED_LOGIT
        self.parameters = list(extender.patched.trainable_parameters())
        self.hidden_states = problem.inputs.hidden_states.detach().clone()
        self.hidden_states[:, 0] = 1.0
        self.hidden_states.requires_grad_()

    def forward(self, modality_ids: Tensor) -> Tensor:
        """(T,) -> (T, H)"""
        context_of(self.layer.mlp.experts).start(modality_ids)
        return self.layer.mlp(self.hidden_states[None])[0]

    @torch.no_grad()
    def error(self, modality_ids: Tensor) -> str | None:
        """Describe what is wrong, or return None.

        It checks which rows go to the added expert, and the output of a few random tokens.
        """
        out = self.forward(modality_ids)
        with context_of(self.layer.mlp.experts).running(modality_ids):
            _, weights, ids = self.layer.mlp.gate(self.hidden_states)
        num_base, added = self.problem.case.shape.E, added_experts(self.layer)
        open_to = added[0].open_to(modality_ids)[:, 0] if added else modality_ids.new_zeros(())
        if not torch.equal((ids >= num_base).any(1), open_to.expand(len(ids)).bool()):
            return "rows sent to the added expert are not those of the modality"
        sample = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:_CHECKED]
        sample = sample.to(ids.device)
        used, ids = ids[sample].unique(return_inverse=True)
        expected = moe_mlp(
            self.hidden_states[sample].double(), ids, weights[sample].double(),
            *(self._weights(name, used) for name in ("gate_up_proj", "down_proj")),
            backend="reference",
        )  # fmt: skip
        error = relative_rms(out[sample], expected)
        limit = 2 * TOLERANCES[self.problem.case.torch_dtype]
        return None if error <= limit else f"relative RMS error {error:.1e} is above {limit:.1e}"

    def _weights(self, name: str, ids: Tensor) -> Tensor:
        """Weights of some experts in float64; added ones are first cast as the op casts them."""
        stack = getattr(self.layer.mlp.experts, name)
        extra = [getattr(group, name).to(stack.dtype) for group in added_experts(self.layer)]
        return torch.stack([_pick(stack, extra, expert) for expert in ids.tolist()]).double()


def _pick(stack: Tensor, extra: list[Tensor], expert: int) -> Tensor:
    return stack[expert] if expert < len(stack) else extra[0][expert - len(stack)]


def _model(problem: Problem) -> OlmoeForCausalLM:
    """Return a model of one layer, of which only the block and the embeddings have values."""
    case, shape = problem.case, problem.case.shape
    config = OlmoeConfig(
        vocab_size=8, hidden_size=shape.H, intermediate_size=shape.I, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, num_experts=shape.E,
        num_experts_per_tok=shape.K, norm_topk_prob=True, pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    with torch.device("meta"):
        model = OlmoeForCausalLM(config).to(case.torch_dtype)
    block = model.model.layers[0].mlp
    generator = torch.Generator().manual_seed(case.seed)
    router = torch.randn(shape.E, shape.H, generator=generator) / shape.H**0.5
    router[:, 0] = 0.0
    values = {
        model.model.embed_tokens: {"weight": problem.inputs.hidden_states.new_zeros(8, shape.H)},
        block.gate: {"weight": router.to(problem.inputs.gate_up_proj)},
        block.experts: {n: getattr(problem.inputs, n) for n in ("gate_up_proj", "down_proj")},
    }
    for module, tensors in values.items():
        for name, tensor in tensors.items():
            setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
    return model
