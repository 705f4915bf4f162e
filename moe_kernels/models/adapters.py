"""Adapters on disk: ``adapter_model.safetensors`` beside ``adapter_config.json``.

The configuration stands in the safetensors header too, so a file says by itself what it fits.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_kernels.layers import AddedExperts, ModalityProjector
from moe_kernels.models import extensions, projectors, tokens
from moe_kernels.models.config import ModalityLoraConfig
from moe_kernels.models.extensions import ExtensionConfig
from moe_kernels.models.methods import get_patched

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
LAYOUT = 1  # raised when names or shapes of the saved tensors change

_OURS = ("modality_lora", tokens.ROWS, extensions.EXTENSIONS, projectors.PROJECTORS)
_FINGERPRINT_SAMPLES = 64


def named_adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Low-rank pairs, added rows, added experts and projectors with their names in the model."""
    for name, parameter in model.named_parameters():
        if _is_ours(name):
            yield name, parameter


def save(model: PreTrainedModel, config: ModalityLoraConfig, folder: Path) -> None:
    """Write the adapter of a patched model."""
    tensors = {name: parameter.detach() for name, parameter in named_adapter_parameters(model)}
    text = json.dumps(_describe(model, config), indent=2) + "\n"
    write(folder, tensors, text, {"format": "pt", "adapter_config": text})


def write(folder: Path, tensors: dict[str, Tensor], text: str, metadata: dict[str, str]) -> None:
    """Write the two files; each replaces an old one only when both are complete.

    The weights go first. Ours carry the configuration, which is the one that is read: an
    interruption between the two leaves a good adapter and an older JSON, which is for people.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    weights, settings = folder / f".{WEIGHTS_NAME}.tmp", folder / f".{CONFIG_NAME}.tmp"
    try:
        save_file(tensors, weights, metadata=metadata)
        settings.write_text(text)
        os.replace(weights, folder / WEIGHTS_NAME)
        os.replace(settings, folder / CONFIG_NAME)
    finally:
        weights.unlink(missing_ok=True)
        settings.unlink(missing_ok=True)


def load(model: PreTrainedModel, config: ModalityLoraConfig, folder: Path) -> None:
    """Copy an adapter into a patched model, after every check."""
    saved, tensors = _read(folder)
    _check_fits(model, config, saved)
    own, added = tokens.token_counts(model), saved["added_tokens"]
    if own and list(own.items()) != list(added.items()):
        raise ValueError(f"the adapter has added tokens {added}, the model {own}")
    expected = {name: tuple(p.shape) for name, p in named_adapter_parameters(model)}
    if not own:
        expected |= _expected_rows(model, added)
    new = _make_missing(model, saved)
    expected |= {name: tuple(p.shape) for name, p in new.named_parameters(model)}
    _check_tensors(tensors, expected)
    _check_routing(model, saved.get("routing", {}))  # an older version's does not say

    for modality, count in added.items() if not own else ():
        tokens.add_modality_tokens(model, modality, count, init="mean")
    new.attach(model)
    frozen = saved.get("frozen")
    with torch.no_grad():
        for name, parameter in named_adapter_parameters(model):
            parameter.copy_(tensors[name])
            if frozen is not None:  # an older version's does not say
                parameter.requires_grad_(name not in frozen)


@dataclass
class _Missing:
    """What an adapter has and a model lacks, beside tokens: made, but not attached yet."""

    extensions: list[tuple[ExtensionConfig, dict[int, AddedExperts]]]
    projectors: dict[str, ModalityProjector]

    def named_parameters(self, model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
        for number, (_, modules) in enumerate(self.extensions):
            yield from extensions.named_parameters(model, number, modules)
        for modality, projector in self.projectors.items():
            for name, parameter in projector.named_parameters():
                yield f"{projectors.PROJECTORS}.{modality}.{name}", parameter

    def attach(self, model: PreTrainedModel) -> None:
        patched = get_patched(model)
        for config, modules in self.extensions:
            extensions.attach(patched, config, modules)
        for modality, projector in self.projectors.items():
            projectors.attach(patched, modality, projector)


def _make_missing(model: PreTrainedModel, saved: dict) -> _Missing:
    """Raises ValueError where the model has another extension or projector than the adapter."""
    patched = get_patched(model)
    theirs = [ExtensionConfig.from_dict(values) for values in saved.get("extensions", ())]
    if patched.extensions:
        ours = [config.structure() for config in patched.extensions]
        if ours != [config.structure() for config in theirs]:
            raise ValueError(
                "the adapter has other added experts than the model (adapter != model): "
                f"{[config.structure() for config in theirs] or 'none'} != {ours}"
            )
        theirs = []
    there = {name: each.settings() for name, each in projectors.projectors(model).items()}
    wanted = saved.get("projectors", {})
    if there and there != wanted:
        raise ValueError(
            f"the adapter has other projectors than the model: {wanted or 'none'} != {there}"
        )
    missing = {} if there else wanted
    for modality in missing:
        projectors.check(patched, modality)
    return _Missing(
        [(c, extensions.build(patched, c, theirs[:i])) for i, c in enumerate(theirs)],
        {modality: projectors.build(patched, each) for modality, each in missing.items()},
    )


def fingerprint(model: nn.Module) -> str:
    """A hash of the base weights: names, shapes and a sample of each, rounded to bfloat16.

    Rounding makes a float32 copy of a bfloat16 model the same model. A float16 copy may differ, as
    it was rounded once already.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not _is_ours(name):
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // _FINGERPRINT_SAMPLES)][:_FINGERPRINT_SAMPLES]
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(sample.bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def _is_ours(name: str) -> bool:
    return any(part in _OURS for part in name.split("."))


def _describe(model: PreTrainedModel, config: ModalityLoraConfig) -> dict:
    import moe_kernels

    frozen = [name for name, p in named_adapter_parameters(model) if not p.requires_grad]
    return {
        "layout": LAYOUT,
        "lora": config.to_dict(),
        "added_tokens": tokens.token_counts(model),
        "extensions": [each.to_dict() for each in get_patched(model).extensions],
        "routing": extensions.routing(model),
        "projectors": {k: p.settings() for k, p in projectors.projectors(model).items()},
        "frozen": frozen,
        "base_model": {
            "model_type": model.config.model_type,
            "name_or_path": model.config.name_or_path,
            "fingerprint": fingerprint(model),
        },
        "versions": {
            "moe_kernels": moe_kernels.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def read_config(folder: Path) -> dict:
    """What stands in the header of the adapter's weights: the configuration and what it fits.

    Raises:
        FileNotFoundError: the folder has no adapter.
        ValueError: the file is damaged, not ours, or of another layout.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no adapter in {folder}: {WEIGHTS_NAME} is missing")
    with opened(path) as file:
        text = (file.metadata() or {}).get("adapter_config")
    try:
        saved = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its header is not JSON: {error}") from error
    if missing := {"layout", "lora", "added_tokens", "base_model", "versions"} - set(saved):
        raise ValueError(
            f"{path} was not written by moe_kernels: its header lacks {', '.join(sorted(missing))}"
        )
    if saved["layout"] != LAYOUT:
        raise ValueError(
            f"the adapter has layout {saved['layout']} (moe_kernels "
            f"{saved['versions']['moe_kernels']}), this version reads layout {LAYOUT}"
        )
    return saved


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and all tensors, in memory: a damaged file shows before any change."""
    saved = read_config(folder)
    with opened(folder / WEIGHTS_NAME) as file:
        return saved, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file; ValueError that names it where it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error


def _check_fits(model: PreTrainedModel, config: ModalityLoraConfig, saved: dict) -> None:
    base = saved["base_model"]
    if base["model_type"] != model.config.model_type:
        raise ValueError(
            f"the adapter is for a {base['model_type']!r} model, this is a "
            f"{model.config.model_type!r}"
        )
    theirs, ours = ModalityLoraConfig.from_dict(saved["lora"]).to_dict(), config.to_dict()
    if differing := [k for k in theirs if _in_order(theirs[k]) != _in_order(ours[k])]:
        listed = ", ".join(f"{k}: {theirs[k]!r} != {ours[k]!r}" for k in differing)
        raise ValueError(
            f"the adapter was trained with another configuration (adapter != model): {listed}; "
            "patch with ModalityLoraConfig.from_adapter(folder)"
        )
    if base["fingerprint"] != fingerprint(model):
        raise ValueError(
            f"the adapter was trained on other base weights ({base['name_or_path'] or 'unnamed'}), "
            "or on a copy of these in another precision than float32 or bfloat16"
        )


def _check_routing(model: PreTrainedModel, theirs: dict[str, dict]) -> None:
    """Of the layers with added experts, which were trained for as many experts and such weights."""
    ours = extensions.routing(model, theirs)
    differing = [
        f"layer {layer}: {name} {value!r} != {ours[layer].get(name)!r}"
        for layer, facts in theirs.items()
        for name, value in facts.items()
        if ours[layer].get(name) != value
    ]
    if differing:
        raise ValueError(
            "the adapter's experts were trained in a model that routes otherwise "
            f"(adapter != model): {', '.join(differing)}"
        )


def _in_order(value):
    """Of a pattern its items, as the first key that fits counts."""
    return list(value.items()) if isinstance(value, dict) else value


def _expected_rows(model: PreTrainedModel, added: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the rows that adding these tokens would create."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [table] if table.weight is head.weight else [table, head]
    names = {module: name for name, module in model.named_modules()}
    return {
        f"{names[module]}.{tokens.ROWS}.{modality}": (count, module.weight.shape[1])
        for module in modules
        for modality, count in added.items()
    }


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    if missing := sorted(set(expected) - set(tensors)):
        raise ValueError(f"the adapter lacks {len(missing)} tensors, such as {missing[0]}")
    if unknown := sorted(set(tensors) - set(expected)):
        raise ValueError(f"the adapter has {len(unknown)} unknown tensors, such as {unknown[0]}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"the adapter's {name} has shape {tuple(tensors[name].shape)}, the model's {shape}"
            )
