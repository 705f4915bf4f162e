"""Experts of Hugging Face models: the supported layouts, and the function registered for them.

No class is replaced: ``set_experts_implementation("moe_kernels")`` makes transformers call
:func:`experts_forward` with the experts module. Its attributes say which layout it has.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from moe_kernels import ops
from moe_kernels.layers import AddedExperts, ModalityLora
from moe_kernels.models import sharding
from moe_kernels.models.context import MISSING, ModalityContext
from moe_kernels.models.parts import up_name
from moe_kernels.registration import IMPLEMENTATION

_AWAITED = "experts"
# attribute of an experts module -> (the supported value, the meaning of any other)
_LAYOUT = {
    "has_gate": (True, "experts without a gate"),
    "is_concatenated": (True, "interleaved gate and up rows"),
    "is_transposed": (False, "transposed expert weights"),
    "has_bias": (False, "expert biases"),
    "has_post_expert_norm": (False, "a norm after each expert"),
    "_is_expert_parallel": (False, "expert parallelism"),
}


def expert_problems(experts: nn.Module) -> list[str]:
    """List the properties of an experts module that cannot be patched, its weights included."""
    return layout_problems(experts) + _weight_problems(experts)


def layout_problems(experts: nn.Module) -> list[str]:
    """List the properties of an experts module that the kernels do not compute."""
    reasons = []
    for attribute, (supported, meaning) in _LAYOUT.items():
        value = getattr(experts, attribute, None)
        if value is None and attribute not in ("has_post_expert_norm", "_is_expert_parallel"):
            reasons.append(f"no attribute {attribute!r} (not built for transformers' experts)")
        elif value is not None and value != supported:
            reasons.append(meaning)
    if getattr(type(experts), "_apply_gate", None) is not _default_apply_gate:
        reasons.append("a gating function of its own")
    act = getattr(experts, "act_fn", None)
    if type(act).__name__ not in ("SiLU", "SiLUActivation"):
        reasons.append(f"activation {type(act).__name__} (only SiLU)")
    return reasons


def _weight_problems(experts: nn.Module) -> list[str]:
    reasons, down = [], getattr(experts, "down_proj", None)
    up = getattr(experts, up_name(experts))
    if not isinstance(down, nn.Parameter) or len(sharding.whole_shape(down)) != 3:
        reasons.append("no stacked down_proj")
    elif not up.is_floating_point() or not down.is_floating_point():
        reasons.append(f"quantised expert weights ({up.dtype})")
    else:
        weights = [w for w in (up, down) if not sharding.is_sharded(w)]
        classes = {type(weight.data) for weight in weights} - {Tensor}
        reasons += [f"expert weights of class {cls.__name__}" for cls in classes]
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

    An experts module without a context (the model is not patched) takes the base path.

    Raises:
        ValueError: the model is not patched, and the kernels do not support its experts.
    """
    context: ModalityContext | None = self.__dict__.get("_modality_context")
    modality_ids, weights, backend = None, {}, None
    if context is None:
        # Nobody has checked it: the name was set in the config, or by from_pretrained.
        if problems := layout_problems(self):
            raise ValueError(
                f"experts_implementation={IMPLEMENTATION!r} does not support "
                f"{type(self).__name__}: {'; '.join(problems)}; choose another implementation"
            )
    else:
        if context.modality_ids is None:
            raise RuntimeError(MISSING)
        context.module_ran(_AWAITED)
        modality_ids, backend = context.modality_ids.reshape(-1), context.backend
        adapters: dict[str, ModalityLora] = self.__dict__["_modality_lora"]
        if adapters:
            weights = {
                "gate_up_lora": adapters["gate_up_proj"].weights(),
                "down_lora": adapters["down_proj"].weights(),
            }
        weights |= _stacked(self.__dict__.get("_added_experts", ()))
    return ops.moe_mlp(
        hidden_states,
        top_k_index.to(torch.int64),
        top_k_weights,
        self.gate_up_proj,
        self.down_proj,
        modality_ids=modality_ids,
        backend=backend,
        **weights,
    )


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
