"""Parts of a model that are patched or watched: experts, routers and attention.

No class name decides. Experts are recognised by their stacked weights, a router by its place and
its weight beside them, decoder layers by the list that they are in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_kernels.models import sharding
from moe_kernels.models.config import ATTENTION_LAYOUTS
from moe_kernels.models.packed import outline

_ROUTER_NAMES = ("gate", "router")
# Stacks of the first projection: gate and up in one, or up alone where experts have no gate.
_UP_NAMES = ("gate_up_proj", "up_proj")


@dataclass(frozen=True)
class LayerParts:
    """Parts of one decoder layer.

    Attributes:
        layer: the decoder layer, which holds the parameters that are added to its parts.
        experts: the module with stacked expert weights, or None (a dense layer).
        router: the module beside the experts that has one weight (E, H), or one linear layer with
            it (:func:`router_linear`), or None.
        self_attn: the attention module, which takes the keywords of the model's forward; None: the
            layer has another part in its place (a state space, a convolution), or none.
        attention: the modules of ``self_attn`` that "attention" adapts, by name: one of
            ``ATTENTION_LAYOUTS``; empty if it has not all of any.
    """

    layer: nn.Module
    experts: nn.Module | None
    router: nn.Module | None
    self_attn: nn.Module | None
    attention: dict[str, nn.Module]

    @property
    def num_experts(self) -> int:
        """E, the base model's experts in this layer; 0 in a dense layer."""
        if self.experts is None:
            return 0
        return sharding.whole_shape(up_stack(self.experts))[0]


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
    """Return the parts of each decoder layer of a language model, in order.

    A patched model keeps its parts as ``get_patched(model).parts``.

    Raises:
        ValueError: the model has no list of decoder layers, or several.
    """
    return tuple(map(parts_of, _layers(find_decoder(model))))


def find_decoder(model: nn.Module) -> nn.Module:
    """Return the module that has the list of decoder layers: the text model of a multimodal one.

    Raises:
        ValueError: the model has no list of decoder layers, or several.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder is model:
        decoder = getattr(model, getattr(model, "base_model_prefix", ""), model)
    if decoder is model and _layers(model) is None:
        # A part of a larger model (Qwen3-Omni's thinker) keeps its text model as a child.
        owners = [child for child in model.children() if _has_experts_in_list(child)]
        decoder = owners[0] if len(owners) == 1 else model
    if _layers(decoder) is None:
        children = ", ".join(name for name, _ in decoder.named_children()) or "nothing"
        raise ValueError(
            f"{type(model).__name__} is not supported: its {type(decoder).__name__} has no list of "
            f"decoder layers, `layers` or one that holds experts; it has {children}"
        )
    return decoder


def _layers(decoder: nn.Module) -> nn.ModuleList | None:
    """Return the list of decoder layers: ``layers``, else the one list with experts in it."""
    lists = {name: m for name, m in decoder.named_children() if isinstance(m, nn.ModuleList)}
    if "layers" in lists:
        return lists["layers"]
    found = [each for each in lists.values() if find_experts(each) is not None]
    return found[0] if len(found) == 1 else None


def _has_experts_in_list(module: nn.Module) -> bool:
    layers = _layers(module)
    return layers is not None and find_experts(layers) is not None


def parts_of(layer: nn.Module) -> LayerParts:
    """Return the parts of one decoder layer."""
    experts, router = find_experts(layer), None
    if experts is not None:
        block = _block_of(layer, experts)
        router = next((r for r in _routers(block) if _fits(r, experts)), None)
    self_attn = _find_attention(layer)
    return LayerParts(layer, experts, router, self_attn, _adaptable(self_attn))


def _block_of(layer: nn.Module, experts: nn.Module) -> nn.Module:
    """Return the module that has these experts as a child."""
    return next(m for m in layer.modules() if any(c is experts for c in m.children()))


def _find_attention(layer: nn.Module) -> nn.Module | None:
    """Return ``self_attn``, or the ``mixer`` of a block that has attention in its place."""
    self_attn, mixer = _submodule(layer, "self_attn"), _submodule(layer, "mixer")
    return mixer if self_attn is None and _adaptable(mixer) else self_attn


def _adaptable(self_attn: nn.Module | None) -> dict[str, nn.Module]:
    """Return the projections of the first of ``ATTENTION_LAYOUTS`` that attention has all of."""
    for names in ATTENTION_LAYOUTS:
        modules = {name: _submodule(self_attn, name) for name in names}
        if None not in modules.values():
            return modules
    return {}


def router_linear(router: nn.Module) -> nn.Module:
    """Return the module that has a router's weight: the router, or the one linear layer in it."""
    linear = [each for each in router.children() if isinstance(each, nn.Linear)]
    if getattr(router, "weight", None) is None and len(linear) == 1 and linear[0].bias is None:
        return linear[0]
    return router


def why_no_router(parts: LayerParts) -> str:
    """Return why a layer with experts has no router that could be adapted."""
    block = _block_of(parts.layer, parts.experts)
    if not (found := _routers(block)):
        return f"no gate or router beside the experts of {type(block).__name__}"
    shapes = {name: sharding.whole_shape(each) for name, each in found[0].named_parameters()}
    matrices = [f"{name} {tuple(shape)}" for name, shape in shapes.items() if len(shape) > 1]
    return (
        f"{type(found[0]).__name__} has no one weight {_router_shape(parts.experts)}, a row for "
        f"each expert, but {', '.join(matrices) or 'none'}"
    )


def up_name(experts: nn.Module) -> str:
    """Return the name of the stack of an experts module's first projection."""
    return next((name for name in _UP_NAMES if _is_stack(experts, name)), _UP_NAMES[0])


def up_stack(experts: nn.Module) -> Tensor:
    """Return the outline of the stack of an experts module's first projection, as it is stored.

    It is the parameter itself, or of a parametrised one a tensor of NaN: see :mod:`packed`.
    """
    return outline(experts, up_name(experts))


def hidden_size(experts: nn.Module) -> int:
    """Return H of stacked experts, whichever way their weights are stored."""
    sizes = sharding.whole_shape(up_stack(experts))
    return sizes[1] if getattr(experts, "is_transposed", False) else sizes[2]


def all_experts(root: nn.Module) -> dict[str, nn.Module]:
    """Return every module in ``root`` with stacked expert weights, by its name there."""
    return {name: each for name, each in root.named_modules() if _has_stacked_weights(each)}


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


def _is_stack(module: nn.Module, name: str) -> bool:
    weight = outline(module, name)
    return weight is not None and len(sharding.whole_shape(weight)) == 3


def _has_stacked_weights(module: nn.Module) -> bool:
    if _is_stack(module, "gate_up_proj"):
        return True
    # Experts without a gate. Shared experts that keep gate and up apart are no such.
    names = ("up_proj", "down_proj")
    stacked = all(_is_stack(module, name) for name in names)
    return stacked and not hasattr(module, "gate_proj")


def _routers(block: nn.Module) -> list[nn.Module]:
    found = (_submodule(block, name) for name in _ROUTER_NAMES)
    return [router for router in found if router is not None]


def _fits(router: nn.Module, experts: nn.Module) -> bool:
    """Return whether the router has one weight (E, H) for these stacked experts."""
    weight = getattr(router_linear(router), "weight", None)
    if not (_has_stacked_weights(experts) and isinstance(weight, nn.Parameter)):
        return False
    return tuple(sharding.whole_shape(weight)) == _router_shape(experts)


def _router_shape(experts: nn.Module) -> tuple[int, int]:
    return sharding.whole_shape(up_stack(experts))[0], hidden_size(experts)
