"""Parts of a model that are patched or watched: experts, routers and attention.

No class name decides. Experts are recognised by their stacked weights, a router by its place and
its weight beside them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_kernels.models import sharding
from moe_kernels.models.config import ATTENTION_PROJECTIONS

_ROUTER_NAMES = ("gate", "router")


@dataclass(frozen=True)
class LayerParts:
    """Parts of one decoder layer.

    Attributes:
        layer: the decoder layer, which holds the parameters that are added to its parts.
        experts: the module with stacked expert weights, or None (a dense layer).
        router: the module beside the experts that has one weight (E, H), or None.
        self_attn: the attention module, or None.
        attention: the modules of ``self_attn`` among q_proj, k_proj, v_proj and o_proj.
    """

    layer: nn.Module
    experts: nn.Module | None
    router: nn.Module | None
    self_attn: nn.Module | None
    attention: dict[str, nn.Module]

    @property
    def num_experts(self) -> int:
        """E, the base model's experts in this layer; 0 in a dense layer."""
        return 0 if self.experts is None else sharding.whole_shape(self.experts.gate_up_proj)[0]


@dataclass(frozen=True)
class MoeBlock:
    """Experts and the router beside them, in any Mixture of Experts of transformers.

    Attributes:
        experts: one module with stacked weights, or a list of modules.
        router: the block's ``gate`` or ``router``.
    """

    experts: nn.Module
    router: nn.Module


def find_parts(model: nn.Module) -> tuple[LayerParts, ...]:
    """Return the parts of each decoder layer of a causal language model, in order.

    A patched model keeps its parts as ``get_patched(model).parts``.

    Raises:
        ValueError: the model has no list of decoder layers.
    """
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        children = ", ".join(name for name, _ in base.named_children()) or "nothing"
        raise ValueError(
            f"{type(model).__name__} is not supported: its {type(base).__name__} has no list of "
            f"decoder layers, `layers`; it has {children}"
        )
    return tuple(map(parts_of, layers))


def parts_of(layer: nn.Module) -> LayerParts:
    """Return the parts of one decoder layer."""
    experts, router = find_experts(layer), None
    if experts is not None:
        block = next(m for m in layer.modules() if any(c is experts for c in m.children()))
        router = next((r for r in _routers(block) if _fits(r, experts)), None)
    self_attn = _submodule(layer, "self_attn")
    found = {name: _submodule(self_attn, name) for name in ATTENTION_PROJECTIONS}
    attention = {name: module for name, module in found.items() if module is not None}
    return LayerParts(layer, experts, router, self_attn, attention)


def find_experts(root: nn.Module) -> nn.Module | None:
    """Return the first module in ``root`` with stacked expert weights, or None."""
    return next(filter(_has_stacked_weights, root.modules()), None)


def find_moe_blocks(model: nn.Module) -> dict[str, MoeBlock]:
    """Return every block that has experts beside a ``gate`` or ``router``, by its name.

    The model may be wrapped (DDP), and its experts may be a list of modules.

    Raises:
        ValueError: there is none.
    """
    blocks = {}
    for name, module in model.named_modules():
        experts = next(filter(_has_stacked_weights, module.children()), None)
        experts = _submodule(module, "experts") if experts is None else experts
        if experts is not None and (routers := _routers(module)):
            router = next((r for r in routers if _fits(r, experts)), routers[0])
            blocks[name] = MoeBlock(experts, router)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no router: "
            "no module with `experts` beside a `gate` or `router`"
        )
    return blocks


def trainable_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of new parameters beside a frozen weight: float32 if it has 16 bits."""
    return torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype


def _submodule(module: nn.Module | None, name: str) -> nn.Module | None:
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Module) else None


def _has_stacked_weights(module: nn.Module) -> bool:
    weight = getattr(module, "gate_up_proj", None)
    return isinstance(weight, nn.Parameter) and len(sharding.whole_shape(weight)) == 3


def _routers(block: nn.Module) -> list[nn.Module]:
    found = (_submodule(block, name) for name in _ROUTER_NAMES)
    return [router for router in found if router is not None]


def _fits(router: nn.Module, experts: nn.Module) -> bool:
    """Return whether the router has one weight (E, H) for these stacked experts."""
    stack, weight = getattr(experts, "gate_up_proj", None), getattr(router, "weight", None)
    if not (isinstance(stack, nn.Parameter) and isinstance(weight, nn.Parameter)):
        return False
    experts, *_, width = sharding.whole_shape(stack)
    return tuple(sharding.whole_shape(weight)) == (experts, width)
