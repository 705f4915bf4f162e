"""Saving and loading the adapter of a patched model, and the checks that it fits."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_kernels._version import __version__
from moe_kernels.layers import AddedExperts, ModalityProjector
from moe_kernels.models import adapter_files, added_experts, projectors, tokens
from moe_kernels.models.adapter_files import LAYOUT
from moe_kernels.models.config import ExtensionConfig, ModalityLoraConfig
from moe_kernels.models.handle import PatchState
from moe_kernels.models.routers import RoutingFinder

_ADDED_NAMES = ("modality_lora", tokens.ROWS, added_experts.EXTENSIONS, projectors.PROJECTORS)
_FINGERPRINT_SAMPLES = 64


def named_adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield low-rank pairs, added rows, added experts and projectors with their names."""
    for name, parameter in model.named_parameters():
        if _is_added(name):
            yield name, parameter


def save(patched: PatchState, folder: Path) -> None:
    """Write the adapter of a patched model."""
    named = named_adapter_parameters(patched.model)
    tensors = {name: parameter.detach() for name, parameter in named}
    text = json.dumps(_describe(patched), indent=2) + "\n"
    adapter_files.write(folder, tensors, text, {"format": "pt", "adapter_config": text})


def load(patched: PatchState, folder: Path) -> None:
    """Copy an adapter into a patched model, after all checks."""
    model, find = patched.model, RoutingFinder()
    saved, tensors = adapter_files.read_config(folder), adapter_files.read_tensors(folder)
    _check_fits(patched, saved)
    missing = _make_missing(patched, saved, find)
    _check_tensors(tensors, _expected_shapes(patched, missing))
    _check_routing(patched, saved.get("routing", {}), find)  # absent in files of older versions
    missing.attach(patched, find)
    frozen = saved.get("frozen")
    with torch.no_grad():
        for name, parameter in named_adapter_parameters(model):
            parameter.copy_(tensors[name])
            if frozen is not None:  # absent in files of older versions
                parameter.requires_grad_(name not in frozen)


@dataclass
class _Missing:
    """Tokens, experts and projectors that an adapter has and the model lacks, not attached yet."""

    added_tokens: dict[str, int]
    extensions: list[tuple[ExtensionConfig, dict[int, AddedExperts]]]
    projectors: dict[str, ModalityProjector]

    def shapes(self, patched: PatchState) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the parameters' names in the model once they are attached, and their shapes."""
        yield from _row_shapes(patched.model, self.added_tokens)
        for number, (_, modules) in enumerate(self.extensions):
            for name, parameter in added_experts.named_parameters(patched, number, modules):
                yield name, tuple(parameter.shape)
        for modality, projector in self.projectors.items():
            for name, parameter in projector.named_parameters():
                yield f"{projectors.PROJECTORS}.{modality}.{name}", tuple(parameter.shape)

    def attach(self, patched: PatchState, find: RoutingFinder) -> None:
        for modality, count in self.added_tokens.items():
            tokens.add_modality_tokens(patched.model, modality, count, init="mean")
        for config, modules in self.extensions:
            added_experts.attach(patched, config, modules, find)
        for modality, projector in self.projectors.items():
            projectors.attach(patched, modality, projector)


def _make_missing(patched: PatchState, saved: dict, find: RoutingFinder) -> _Missing:
    """Build the adapter's additions; raise ValueError if the model has different ones already."""
    present, requested = tokens.token_counts(patched.model), saved["added_tokens"]
    if present and list(present.items()) != list(requested.items()):
        raise ValueError(
            f"the adapter has added tokens {requested}, the model {present}; load the adapter into "
            "a model without added tokens, which gets them then"
        )
    return _Missing(
        {} if present else requested,
        _missing_extensions(patched, saved.get("extensions", ()), find),
        _missing_projectors(patched, saved.get("projectors", {})),
    )


def _missing_extensions(
    patched: PatchState, saved: list[dict], find: RoutingFinder
) -> list[tuple[ExtensionConfig, dict[int, AddedExperts]]]:
    requested = [ExtensionConfig.from_dict(values) for values in saved]
    if patched.extensions:
        present = [config.structure() for config in patched.extensions]
        structures = [config.structure() for config in requested]
        if present != structures:
            raise ValueError(
                "the adapter has other added experts than the model (adapter != model): "
                f"{structures or 'none'} != {present}"
            )
        return []
    built = []
    for number, config in enumerate(requested):
        earlier = requested[:number]
        added_experts.check(patched, config, earlier, find)
        built.append((config, added_experts.build(patched, config, earlier)))
    return built


def _missing_projectors(
    patched: PatchState, requested: dict[str, dict]
) -> dict[str, ModalityProjector]:
    existing = projectors.projectors(patched.model)
    present = {modality: projector.settings() for modality, projector in existing.items()}
    if present and present != requested:
        raise ValueError(
            f"the adapter has other projectors than the model: {requested or 'none'} != {present}"
        )
    missing = {} if present else requested
    for modality in missing:
        projectors.check(patched, modality)
    return {modality: projectors.build(patched, each) for modality, each in missing.items()}


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the base weights: names, shapes and a sample of each, in bfloat16.

    Rounding gives a float32 copy of a bfloat16 model the same hash. A float16 copy may differ, as
    it was rounded before.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not _is_added(name):
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // _FINGERPRINT_SAMPLES)][:_FINGERPRINT_SAMPLES]
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(sample.bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def _is_added(name: str) -> bool:
    """Return whether a parameter of this name was added by patching or later."""
    return any(part in _ADDED_NAMES for part in name.split("."))


def _describe(patched: PatchState) -> dict:
    model = patched.model
    frozen = [name for name, p in named_adapter_parameters(model) if not p.requires_grad]
    return {
        "layout": LAYOUT,
        "lora": patched.config.to_dict(),
        "added_tokens": tokens.token_counts(model),
        "extensions": [each.to_dict() for each in patched.extensions],
        "routing": added_experts.routing(patched, RoutingFinder()),
        "projectors": {k: p.settings() for k, p in projectors.projectors(model).items()},
        "frozen": frozen,
        "base_model": {
            "model_type": model.config.model_type,
            "name_or_path": model.config.name_or_path,
            "fingerprint": fingerprint(model),
        },
        "versions": {
            "moe_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _check_fits(patched: PatchState, saved: dict) -> None:
    """Raise ValueError unless base model and configuration are those of the adapter."""
    model, base = patched.model, saved["base_model"]
    if base["model_type"] != model.config.model_type:
        raise ValueError(
            f"the adapter is for a {base['model_type']!r} model, this is a "
            f"{model.config.model_type!r}"
        )
    trained = ModalityLoraConfig.from_dict(saved["lora"]).to_dict()
    current = patched.config.to_dict()
    if differing := [k for k in trained if _as_list(trained[k]) != _as_list(current[k])]:
        listed = ", ".join(f"{k}: {trained[k]!r} != {current[k]!r}" for k in differing)
        raise ValueError(
            f"the adapter was trained with another configuration (adapter != model): {listed}; "
            "patch with ModalityLoraConfig.from_adapter(folder)"
        )
    if base["fingerprint"] != fingerprint(model):
        raise ValueError(
            f"the adapter was trained on other base weights ({base['name_or_path'] or 'unnamed'}), "
            "or on a copy of these in another precision than float32 or bfloat16"
        )


def _check_routing(patched: PatchState, trained: dict[str, dict], find: RoutingFinder) -> None:
    """Raise unless top-k and normalisation match those the added experts were trained with."""
    current = added_experts.routing(patched, find, trained)
    differing = [
        f"layer {layer}: {name} {value!r} != {current[layer].get(name)!r}"
        for layer, facts in trained.items()
        for name, value in facts.items()
        if current[layer].get(name) != value
    ]
    if differing:
        raise ValueError(
            "the adapter's experts were trained in a model that routes differently "
            f"(adapter != model): {', '.join(differing)}"
        )


def _as_list(value):
    """Return a dict as an ordered list of items: the first matching key wins."""
    return list(value.items()) if isinstance(value, dict) else value


def _expected_shapes(patched: PatchState, missing: _Missing) -> dict[str, tuple[int, ...]]:
    named = named_adapter_parameters(patched.model)
    return {name: tuple(parameter.shape) for name, parameter in named} | dict(
        missing.shapes(patched)
    )


def _row_shapes(
    model: PreTrainedModel, added: dict[str, int]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the rows that adding these tokens would create."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [table] if table.weight is head.weight else [table, head]
    names = {module: name for name, module in model.named_modules()}
    for module in modules:
        for modality, count in added.items():
            yield f"{names[module]}.{tokens.ROWS}.{modality}", (count, module.weight.shape[1])


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the adapter has exactly these tensors."""
    if missing := sorted(set(expected) - set(tensors)):
        raise ValueError(f"the adapter lacks {len(missing)} tensors, such as {missing[0]}")
    if unknown := sorted(set(tensors) - set(expected)):
        raise ValueError(f"the adapter has {len(unknown)} unknown tensors, such as {unknown[0]}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"the adapter's {name} has shape {tuple(tensors[name].shape)}, the model's {shape}"
            )
