"""The frozen weights of a model that low-rank pairs update, and their names."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moe_kernels.layers import ModalityLora
from moe_kernels.models.config import TARGETS, ModalityLoraConfig, matches
from moe_kernels.models.experts import find_experts
from moe_kernels.models.routers import find_router


@dataclass(frozen=True)
class Projection:
    """One frozen weight.

    Attributes:
        layer: the decoder layer; it holds the pair.
        key: of the pair in ``layer.modality_lora``, such as "down_proj".
        name: in the model, which patterns are matched against: a linear layer's or router's own,
            such as "model.layers.0.self_attn.q_proj", or the parameter's of stacked experts, such
            as "model.layers.0.mlp.experts.down_proj".
        module: has the weight.
        weight: (out, in), or (E, out, in) of stacked experts.
    """

    layer: nn.Module
    key: str
    name: str
    module: nn.Module
    weight: nn.Parameter

    @property
    def lora(self) -> ModalityLora:
        """The pair of a patched model."""
        return self.layer.modality_lora[self.key]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a causal language model.

    Raises:
        ValueError: it has no list of them.
    """
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} is not supported: no list of decoder layers")
    return list(layers)


def adapted_layers(model: nn.Module, config: ModalityLoraConfig) -> list[nn.Module]:
    """The layers that ``config.layers_to_transform`` names; None: all.

    Raises:
        ValueError: the model has no layer of that index.
    """
    layers, chosen = decoder_layers(model), config.layers_to_transform
    if chosen is None:
        return layers
    if outside := [index for index in chosen if index >= len(layers)]:
        raise ValueError(f"layers_to_transform has {outside}: the model has {len(layers)} layers")
    return [layers[index] for index in chosen]


def find_projections(model: nn.Module, config: ModalityLoraConfig) -> list[Projection]:
    """All that ``config`` adapts, layer by layer; patching has checked that they are there."""
    names = {module: name for name, module in model.named_modules()}
    return [
        Projection(layer, key, names[module] + suffix, module, weight)
        for layer in adapted_layers(model, config)
        for target in TARGETS
        if target in config.target_modules
        for key, suffix, module, weight in _FINDERS[target](layer)
    ]


def check_patterns(config: ModalityLoraConfig, projections: list[Projection]) -> None:
    """Every key of a pattern names a projection.

    Raises:
        ValueError: one that does not; the message has names that there are.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(matches(key, projection.name) for projection in projections):
                layer = projections[0].layer
                names = ", ".join(p.name for p in projections if p.layer is layer)
                raise ValueError(
                    f"{field}: {key!r} names no projection that is adapted; those of one layer "
                    f"are {names}"
                )


_Found = tuple[str, str, nn.Module, nn.Parameter]


def _of_experts(layer: nn.Module) -> Iterator[_Found]:
    if (module := find_experts(layer)) is not None:
        for key in TARGETS["experts"]:
            yield key, f".{key}", module, getattr(module, key)


def _of_attention(layer: nn.Module) -> Iterator[_Found]:
    for key in TARGETS["attention"]:
        linear = getattr(layer.self_attn, key)
        yield key, "", linear, linear.weight


def _of_router(layer: nn.Module) -> Iterator[_Found]:
    if (router := find_router(layer)) is not None:
        yield TARGETS["router"][0], "", router, router.weight


_FINDERS = {"experts": _of_experts, "attention": _of_attention, "router": _of_router}
