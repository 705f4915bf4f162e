"""The parameters that were added to a patched model: their names, and the shapes they must have."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moe_kernels.layers.modality_lora import name_for, split_name
from moe_kernels.models import (
    added_experts,
    offload,
    packed,
    projectors,
    quantisation,
    sharding,
    tokens,
)
from moe_kernels.models.config import ExtensionConfig
from moe_kernels.models.handle import PatchState
from moe_kernels.models.intact import without_wrappers
from moe_kernels.models.projections import LORA

_ADDED_NAMES = (LORA, tokens.ROWS, added_experts.EXTENSIONS, projectors.PROJECTORS)


def named_adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield low-rank pairs, added rows, added experts and projectors with their names."""
    for name, parameter in model.named_parameters():
        if is_added(name):
            yield name, parameter


def is_added(name: str) -> bool:
    """Return whether a parameter of this name was added by patching or later."""
    return any(part in _ADDED_NAMES for part in name.split("."))


def of_adapter(parameters: dict[str, nn.Parameter], adapter: str) -> dict[str, nn.Parameter]:
    """Return the base's parameters and one adapter's, under the names that the default one has."""
    named = {name: split_name(name) if is_added(name) else (name, adapter) for name in parameters}
    return {
        named[name][0]: parameter
        for name, parameter in parameters.items()
        if named[name][1] == adapter
    }


def is_row(name: str) -> bool:
    """Return whether a parameter of this name is rows of added tokens."""
    # The first part decides: below it stand names of modalities, which may be any.
    return next((part for part in name.split(".") if part in _ADDED_NAMES), None) == tokens.ROWS


def original_name(name: str) -> str:
    """Return a parameter's name without torch's wrappers around the modules above it."""
    parts = name.split(".")
    # Below an added module stand names of modalities, which may be those of wrappers.
    end = next((i for i, part in enumerate(parts) if part in _ADDED_NAMES), len(parts))
    above = without_wrappers(".".join(parts[:end]))
    return ".".join(filter(None, [above, *parts[end:]]))


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters by their original names."""
    return {original_name(name): parameter for name, parameter in model.named_parameters()}


def whole_parameters(patched: PatchState, sharded_too: bool = False) -> dict[str, nn.Parameter]:
    """Return the parameters that a model had when it was patched, by their names then, and ours.

    What users attach to the model later, an encoder for example, is none of these.

    Args:
        patched: the model.
        sharded_too: allow those that FSDP2 or ZeRO-3 has sharded, of which the whole shape counts.

    Raises:
        ValueError: a parameter's values are not here (see :func:`check_values`), one is missing, or
            the model has low-rank pairs, rows or experts that were not added to it.
    """
    found, expected = check_values(patched, sharded_too)
    # A weight may have been packed or unpacked since: what it computes counts, not its parts.
    weights = {packed.weight_of(name) for name in expected}
    found = {n: p for n, p in found.items() if packed.weight_of(n) in weights or is_added(n)}
    if differing := sorted({packed.weight_of(name) for name in found} ^ weights):
        what = "missing" if differing[0] in weights else "unknown"
        raise ValueError(
            f"the model is not as it was patched: the parameter {differing[0]} is {what} (one of "
            f"{len(differing)})"
        )
    return found


def check_values(
    patched: PatchState, sharded_too: bool = False
) -> tuple[dict[str, nn.Parameter], dict[str, tuple[int, ...]]]:
    """Return all parameters by their names at patching, and the shapes that they should have.

    Raises:
        ValueError: a parameter's values are not here, because it is sharded or emptied.
    """
    found = named_parameters(patched.model)
    # First, since the other shapes follow from these. A weight of another class, which its own
    # library quantised for example, is no obstacle.
    brought = set(map(original_name, offload.offloaded(patched.model)))
    here = {name: parameter for name, parameter in found.items() if name not in brought}
    _check_values(here, patched.base_shapes, sharded_too, any_class=True)
    added = {
        name_for(name, adapter): shape
        for name, shape in expected_shapes(patched, *contents(patched)).items()
        for adapter in patched.adapter_names
    }
    _check_values(found, added, sharded_too, any_class=False)
    return found, patched.base_shapes | added


def contents(
    patched: PatchState,
) -> tuple[dict[str, int], Sequence[ExtensionConfig], dict[str, dict[str, int]]]:
    """Return what a model has beside its low-rank pairs, as :func:`expected_shapes` takes it."""
    model = patched.model
    settings = {k: p.settings() for k, p in projectors.projectors(model).items()}
    return dict(patched.added_tokens), patched.extensions, settings


def expected_shapes(
    patched: PatchState,
    added_tokens: dict[str, int],
    extensions: Sequence[ExtensionConfig],
    projector_settings: dict[str, dict[str, int]],
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the default adapter's parameters by name, without allocating them.

    Args:
        patched: the model.
        added_tokens: number of added tokens by modality.
        extensions: its extensions, in order.
        projector_settings: settings of its projectors by modality.
    """
    shapes = _row_shapes(patched, added_tokens)
    for projection in patched.projections:
        shapes |= projection.pair_shapes(patched.config)
    for number, config in enumerate(extensions):
        modules = added_experts.build(patched, config, extensions[:number], device="meta")
        for name, parameter in added_experts.named_parameters(patched, number, modules):
            shapes[name] = tuple(parameter.shape)
    for modality, settings in projector_settings.items():
        module = projectors.build(patched, settings, device="meta")
        for name, parameter in module.named_parameters():
            shapes[f"{projectors.PROJECTORS}.{modality}.{name}"] = tuple(parameter.shape)
    return shapes


def _row_shapes(patched: PatchState, added: dict[str, int]) -> dict[str, tuple[int, ...]]:
    width = sharding.whole_shape(patched.model.get_input_embeddings().weight)[1]
    return {
        f"{patched.paths[module]}.{tokens.ROWS}.{modality}": (count, width)
        for module in tokens.modules_with_rows(patched.model).values()
        for modality, count in added.items()
    }


def _check_values(
    found: dict[str, nn.Parameter],
    expected: dict[str, tuple[int, ...]],
    sharded_too: bool,
    any_class: bool,
) -> None:
    for name, shape in expected.items():
        if name in found and (problem := _problem(found[name], shape, sharded_too, any_class)):
            raise ValueError(
                f"the values of {name} are not here: it {problem}. save_adapter and load_adapter, "
                "called on all ranks, gather what FSDP2 (fully_shard) and DeepSpeed have sharded; "
                "of a model that FSDP1 has sharded nothing can be saved or loaded: use FSDP2, or "
                "load its full state_dict into a patched model that is whole"
            )


def _problem(
    parameter: nn.Parameter, shape: tuple[int, ...], sharded_too: bool, any_class: bool
) -> str | None:
    if sharding.is_sharded(parameter):
        if not sharded_too:
            return "is sharded"
    elif hasattr(parameter, "to_local") or not (any_class or type(parameter.data) is Tensor):
        return f"is a {type(parameter.data).__name__}"
    if sharding.local(parameter).device == torch.device("meta"):
        return "is on the device meta"
    found = tuple(sharding.whole_shape(parameter))
    if found != shape and not quantisation.is_packed(parameter):
        return f"has shape {found}, and had {shape}"
    return None
