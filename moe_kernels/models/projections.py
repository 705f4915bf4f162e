"""The frozen weights of a model that low-rank pairs update, and their names."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from moe_kernels.layers import ModalityLora
from moe_kernels.layers.modality_lora import pair_shapes
from moe_kernels.models import offload, packed, sharding
from moe_kernels.models.config import (
    EXPERT_PROJECTIONS,
    ROUTER,
    TARGETS,
    ModalityLoraConfig,
)
from moe_kernels.models.intact import without_wrappers
from moe_kernels.models.parts import LayerParts, router_linear, up_name
from moe_kernels.models.patterns import matches

LORA = "modality_lora"


@dataclass(frozen=True)
class Projection:
    """One frozen weight.

    Attributes:
        layer: the decoder layer, which holds the pair.
        layer_name: its name in the model.
        key: of the pair in ``layer.modality_lora``, such as "down_proj".
        name: the name in the model that patterns are matched against: that of a linear layer or
            router, such as "model.layers.0.self_attn.q_proj", or that of a parameter of stacked
            experts, such as "model.layers.0.mlp.experts.down_proj".
        module: the module that has the weight.
        parameter: the weight's name in ``module``.
    """

    layer: nn.Module
    layer_name: str
    key: str
    name: str
    module: nn.Module
    parameter: str

    @property
    def weight(self) -> Tensor:
        """The frozen weight (out, in) or (E, out, in), read now: a view if it is transposed."""
        weight = offload.value(self.module, self.parameter)
        return weight.mT if self.transposed else weight

    @property
    def outline(self) -> Tensor:
        """The weight as it is stored, or of a parametrised one a tensor of NaN in its shape."""
        return packed.outline(self.module, self.parameter)

    @property
    def transposed(self) -> bool:
        """True if the weight is a stack that is stored (E, in, out)."""
        stacked = self.key in EXPERT_PROJECTIONS
        return stacked and bool(getattr(self.module, "is_transposed", False))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole weight, (out, in) or (E, out, in), however it is stored."""
        *stack, rows, columns = sharding.whole_shape(self.outline)
        return (*stack, columns, rows) if self.transposed else (*stack, rows, columns)

    @property
    def lora(self) -> ModalityLora:
        """The low-rank pair, once the model is patched."""
        return self.layer.modality_lora[self.key]

    def pair_shapes(self, config: ModalityLoraConfig) -> dict[str, tuple[int, ...]]:
        """Return the shapes of ``lora_A`` and ``lora_B`` by their names in the model."""
        *stack, out_features, in_features = self.shape
        shapes = pair_shapes(
            len(config.modalities),
            in_features,
            out_features,
            config.rank(self.name),
            num_experts=stack[0] if stack else None,
            shared_A=config.shared_A,
        )
        prefix = f"{self.layer_name}.{LORA}.{self.key}"
        return {f"{prefix}.lora_A": shapes[0], f"{prefix}.lora_B": shapes[1]}


def adapted_parts(config: ModalityLoraConfig, parts: Sequence[LayerParts]) -> Sequence[LayerParts]:
    """Return the layers that ``config.layers_to_transform`` names; None names all.

    Raises:
        ValueError: the model has no layer of that index.
    """
    chosen = config.layers_to_transform
    if chosen is None:
        return parts
    if outside := [index for index in chosen if index >= len(parts)]:
        raise ValueError(f"layers_to_transform has {outside}: the model has {len(parts)} layers")
    return [parts[index] for index in chosen]


def find_projections(
    model: nn.Module, config: ModalityLoraConfig, parts: Sequence[LayerParts]
) -> list[Projection]:
    """Return the projections that ``config`` adapts, layer by layer; their modules must be present.

    A patched model keeps its projections as ``get_patched(model).projections``.
    """
    names = {module: without_wrappers(name) for name, module in model.named_modules()}
    return [
        Projection(each.layer, names[each.layer], key, names[module] + suffix, module, parameter)
        for each in adapted_parts(config, parts)
        for target in TARGETS
        if target in config.target_modules
        for key, suffix, module, parameter in _FINDERS[target](each)
    ]


def check_patterns(config: ModalityLoraConfig, projections: list[Projection]) -> None:
    """Raise ValueError, with the projections of a layer, if a pattern's key names no projection."""
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(matches(key, projection.name) for projection in projections):
                layer = projections[0].layer
                names = ", ".join(p.name for p in projections if p.layer is layer)
                raise ValueError(
                    f"{field}: {key!r} names no projection that is adapted; the names in one "
                    f"layer are {names}"
                )


_Found = tuple[str, str, nn.Module, str]  # key, suffix of the name, module, parameter


def _of_experts(parts: LayerParts) -> Iterator[_Found]:
    if parts.experts is not None:
        for key in (up_name(parts.experts), "down_proj"):
            yield key, f".{key}", parts.experts, key


def _of_attention(parts: LayerParts) -> Iterator[_Found]:
    for key, module in parts.attention.items():
        yield key, "", module, "weight"


def _of_router(parts: LayerParts) -> Iterator[_Found]:
    if parts.router is not None:
        yield ROUTER, "", router_linear(parts.router), "weight"


_FINDERS = {"experts": _of_experts, "attention": _of_attention, "router": _of_router}
