"""Experts of Hugging Face models: what can be patched, and the function registered for them.

No class is replaced: ``set_experts_implementation("moe_kernels")`` makes transformers call
:func:`experts_forward` with the experts module, whose form ``forms`` finds.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_kernels import backends, ops
from moe_kernels.layers import AddedExperts, ModalityLora
from moe_kernels.models import forms, offload, packed, sharding
from moe_kernels.models.context import ModalityContext
from moe_kernels.models.parts import up_name, up_stack
from moe_kernels.ops import LoraWeights, PackedWeights
from moe_kernels.ops.dtypes import FLOATS
from moe_kernels.registration import IMPLEMENTATION

_AWAITED = "experts"
_DEQUANTISE = (
    "load them in bfloat16, FP8 checkpoints with FineGrainedFP8Config(dequantize=True), or pack "
    "them in 4 bits by bitsandbytes' replace_parameter_4bit"
)


def expert_problems(experts: nn.Module) -> list[str]:
    """List the properties of an experts module that cannot be patched, its weights included."""
    return forms.problems(experts) + _weight_problems(experts)


def backend_problem(experts: nn.Module, backend: str | None) -> str | None:
    """Return why a backend does not compute the form of these experts, by trying it; None: it does.

    Experts of :func:`expert_problems` without any.
    """
    form, weight = forms.form_of(experts), up_stack(experts)
    device = offload.device_of(experts, weight)
    if form == forms.PLAIN or device.type == "meta":
        return None
    options = {"device": device, "dtype": weight.dtype}
    rows = 2 * 16 if form.act.gated else 16
    up, down = (torch.zeros(shape, **options) for shape in ((2, rows, 16), (2, 16, 16)))
    biases = {"gate_up_bias": up[:, :, 0], "down_bias": down[:, :, 0]} if form.biased else {}
    ids = torch.zeros(1, 1, device=device, dtype=torch.int64)
    hidden_states = torch.zeros(1, 16, **options)
    arguments = (hidden_states, ids, hidden_states[:, :1], up, down)
    settings = {"act": form.act, "interleaved": form.interleaved, "backend": backend}
    try:
        with torch.no_grad():
            ops.moe_mlp(*arguments, **biases, **settings)
    except NotImplementedError as error:
        return str(error)
    return None


def _weight_problems(experts: nn.Module) -> list[str]:
    reasons, down = [], packed.outline(experts, "down_proj")
    up = up_stack(experts)
    if down is None or len(sharding.whole_shape(down)) != 3:
        reasons.append("no stacked down_proj")
    elif others := {up.dtype, down.dtype}.difference(FLOATS):
        reasons.append(f"quantised expert weights ({', '.join(map(str, others))}); {_DEQUANTISE}")
    elif up.dtype != down.dtype:
        reasons.append(f"expert weights of two dtypes ({up.dtype}, {down.dtype})")
    else:
        weights = [w for w in (up, down) if not sharding.is_sharded(w)]
        classes = {type(weight.data) for weight in weights} - {Tensor}
        reasons += [f"expert weights of class {cls.__name__}" for cls in classes]
        found = (packed.problem(experts, name) for name in (up_name(experts), "down_proj"))
        reasons += filter(None, found)
    return reasons


def attach(experts: nn.Module, context: ModalityContext, loras: dict[str, ModalityLora]) -> None:
    """Give an experts module its context and its adapters, if any, as unregistered references."""
    experts.__dict__["_modality_context"] = context
    experts.__dict__["_modality_lora"] = loras
    context.await_module(_AWAITED, bool(loras))


def detach(experts: nn.Module) -> None:
    """Undo :func:`attach`."""
    experts.__dict__.pop("_modality_context", None)
    experts.__dict__.pop("_modality_lora", None)
    experts.__dict__.pop("_added_experts", None)


def context_of(experts: nn.Module) -> ModalityContext:
    """Return the context that :func:`attach` gave to an experts module."""
    return experts.__dict__["_modality_context"]


def set_added_experts(experts: nn.Module, added: list[AddedExperts]) -> None:
    """Let an attached experts module serve these experts too, with ids from E on."""
    experts.__dict__["_added_experts"] = added
    awaited = bool(added or experts.__dict__["_modality_lora"])
    context_of(experts).await_module(_AWAITED, awaited)


def _stacked(added: Sequence[AddedExperts]) -> dict[str, Tensor | int]:
    """Return the weights of all added experts of a layer as arguments of ``moe_mlp``.

    The parameters of a single extension are passed as they are. Those of several are copied into
    one tensor, which requires grad as a whole: ``frozen_extra`` says how many of its experts, the
    first, are frozen.
    """
    if not added:
        return {}
    frozen = itertools.takewhile(lambda experts: not experts.ffn_trains, added)
    stacks = {"frozen_extra": sum(experts.num_added for experts in frozen)}
    pairs = zip(*(experts.weights() for experts in added), strict=True)
    for name, weights in zip(("gate_up_proj", "down_proj"), pairs, strict=True):
        stacks[f"extra_{name}"] = weights[0] if len(weights) == 1 else torch.cat(weights)
    return stacks


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Implement transformers' experts interface: (T, H), (T, K), (T, K) -> (T, H).

    An experts module without a context (the model is not patched) takes the base path. Of experts
    that are spread over ranks, ids from the number of this rank's on are those of other ranks.

    Raises:
        ValueError: the model is not patched, and the kernels do not support its experts.
    """
    context: ModalityContext | None = self.__dict__.get("_modality_context")
    form, added = _form_of(self), self.__dict__.get("_added_experts", ())
    modality_ids, weights, backend = None, {}, None
    if context is not None:
        modality_ids, backend = context.row_ids(), context.backend
        context.module_ran(_AWAITED)
        adapters: dict[str, ModalityLora] = self.__dict__["_modality_lora"]
        if adapters:
            part = part_of_rank(self, context)
            weights = {
                "gate_up_lora": part(adapters[up_name(self)]),
                "down_lora": part(adapters["down_proj"]),
            }
        weights |= _stacked(added)
    rows = hidden_states, top_k_index.to(torch.int64), top_k_weights
    if form.normed or sharding.spread(self) is not None:
        here = self.num_experts + sum(each.num_added for each in added)
        *rows, modality_ids = _one_expert_each(*rows, modality_ids, here)
    routed_weights = rows[2]
    if form.normed:
        rows[2] = torch.ones_like(routed_weights)
    read = functools.partial(_stack, self, form, backend)
    stacks = {name: read(name) for name in (up_name(self), "down_proj")}
    brought = offload.is_offloaded(self)
    passing = {
        n: _computed(stack) for n, stack in stacks.items() if brought or is_parametrized(self, n)
    }
    if is_parametrized(self):
        _check_cast(stacks["down_proj"].dtype, weights.values())
    with packed.read_again(passing, lambda name: _computed(read(name))):
        output = ops.moe_mlp(
            *rows,
            *stacks.values(),
            modality_ids=modality_ids,
            act=form.act,
            interleaved=form.interleaved,
            backend=backend,
            **form.biases(self, added),
            **weights,
        )
    if form.normed:
        output = self.post_expert_norm(output) * routed_weights
        output = torch.where((modality_ids >= 0)[:, None], output, 0)  # a norm may have a bias
    if len(output) != len(hidden_states):
        output = output.view(*top_k_index.shape, -1).sum(1)
    return output.to(hidden_states.dtype)


def _stack(
    experts: nn.Module, form: forms.Form, backend: str | None, name: str
) -> Tensor | PackedWeights:
    """Return a stack of weights (E, out, in), packed where the op unpacks it tile by tile."""
    found = None if form.transposed else packed.recipe(experts, name)
    if found is None or backends.select(backend, found.device, found.dtype) == "reference":
        return form.stack(experts, name)  # the reference would unpack it whole, with more memory
    return found


def _computed(stack: Tensor | PackedWeights) -> Tensor:
    """Return what was computed for this call of a parametrised stack: the weights, or scales."""
    return stack.scales if isinstance(stack, PackedWeights) else stack


def _check_cast(computed_in: torch.dtype, added: Iterable[LoraWeights | Tensor | int]) -> None:
    """Raise RuntimeError if what was added has a dtype that the packed experts have not."""
    tensors = (each[0] if isinstance(each, LoraWeights) else each for each in added)
    found = {each.dtype for each in tensors if isinstance(each, Tensor)}
    if others := found - {computed_in, torch.float32}:
        raise RuntimeError(
            f"the model was cast to {others.pop()} after patch_model, and its packed experts still "
            f"compute in {computed_in}, in which they were packed: cast the model before its "
            "experts are packed, or after patch_model what was added alone, to torch.float32 "
            "(for p in patched.trainable_parameters(): p.data = p.data.float())"
        )


def part_of_rank(
    experts: nn.Module, context: ModalityContext
) -> Callable[[ModalityLora], LoraWeights]:
    """Return a function from adapters of experts to the weights of those on this rank."""
    spread = sharding.spread(experts)  # with one adapter alone
    return context.weights if spread is None else spread.part_of


def _one_expert_each(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    modality_ids: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give each route a row of its own: (T K, H), (T K, 1), (T K, 1) and (T K,) modality ids.

    A route to an expert that is not here becomes padding, which no backend computes.
    """
    if modality_ids is None:
        modality_ids = top_k_index.new_zeros(len(hidden_states))
    number = top_k_index.shape[1]
    if number > 1:
        hidden_states = hidden_states.repeat_interleave(number, 0)
        modality_ids = modality_ids.repeat_interleave(number)
    ids = top_k_index.reshape(-1)
    here = ids < num_experts
    modality_ids = torch.where(here, modality_ids, -1)
    return (
        hidden_states,
        torch.where(here, ids, 0)[:, None],
        top_k_weights.reshape(-1, 1),
        modality_ids,
    )


def _form_of(experts: nn.Module) -> forms.Form:
    """Return how experts compute; the name may have been set without a check, in the config."""
    try:
        return forms.form_of(experts)
    except ValueError as error:
        raise ValueError(
            f"experts_implementation={IMPLEMENTATION!r}: {error}; choose another implementation"
        ) from None


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
