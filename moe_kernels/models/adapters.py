"""Saving and loading the adapter of a patched model, and the checks that it fits."""

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch import distributed as dist
from transformers import PreTrainedTokenizerBase

from moe_kernels import tensor_files
from moe_kernels._version import __version__
from moe_kernels.layers import AddedExperts, ModalityProjector
from moe_kernels.models import (
    adapter_files,
    added_experts,
    named_adapters,
    offload,
    packed,
    projectors,
    quantisation,
    sharding,
    tokens,
)
from moe_kernels.models.adapter_files import LAYOUT, NAMES
from moe_kernels.models.config import ExtensionConfig, ModalityLoraConfig
from moe_kernels.models.handle import PatchState
from moe_kernels.models.parameters import (
    contents,
    expected_shapes,
    is_added,
    named_adapter_parameters,
    named_parameters,
    of_adapter,
    original_name,
    whole_parameters,
)
from moe_kernels.models.parts import trainable_dtype
from moe_kernels.models.ranks import Ranks
from moe_kernels.models.routers import RoutingFinder
from moe_kernels.models.undo import all_or_nothing
from moe_kernels.tensor_files import TensorFile

_FINGERPRINT_SAMPLES = 64
_LOAD = "load_adapter"


def save(patched: PatchState, folder: Path, adapter: str, timeout: float) -> None:
    """Write an adapter of a patched model, if it could be loaded again.

    Of a sharded model all ranks gather it, and the first one writes.
    """
    with _together(patched, "save_adapter", timeout) as ranks:
        first = ranks is None or ranks.first
        parameters = of_adapter(whole_parameters(patched, sharded_too=True), adapter)
        tensors = {}
        if ranks is not None:  # before the first collective
            ranks.meet(_names_and_shapes(parameters))
        for name, parameter in parameters.items():
            if is_added(name):
                whole = sharding.gather(parameter)
                if first:
                    tensors[name] = whole if ranks is None else whole.cpu()
        described = _describe(patched, parameters, adapter)
        if first:
            tensor_files.write(folder, NAMES, tensors, described)


def load(
    patched: PatchState,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    adapter: str,
    timeout: float,
) -> None:
    """Copy an adapter into one of a patched model, and the names of its tokens into a tokenizer.

    All checks come before it. An adapter that the model does not have yet is made.
    """
    find = RoutingFinder()
    with _together(patched, _LOAD, timeout) as ranks:
        with adapter_files.opened(folder) as file:
            saved = adapter_files.read_config(file)
            parameters = whole_parameters(patched, sharded_too=True)
            parameters = of_adapter(parameters, _like(patched, adapter))
            _check_fits(patched, saved)
            if ranks is not None:  # before the first collective
                content = {f"adapter in {folder}": _hash(sorted(file.metadata.items()))}
                ranks.meet(content | _names_and_shapes(parameters))
            _check_base(patched, saved, parameters)
            missing = _find_missing(patched, saved, find)
            _check_beside_others(patched, missing, adapter)
            tensor_files.check_shapes(file, _expected_shapes(patched, saved, file))
            _check_frozen(file, saved)
            _check_routing(patched, saved, find)
            names = tokens.find_names(tokenizer, patched.base_vocabulary, saved["added_tokens"])
            if ranks is not None:
                _check_settled(patched, missing, saved, parameters, adapter)
            tensors = _read(patched, file, parameters)
        change = functools.partial(_copy_in, patched, saved, missing, tensors, find, names, adapter)
        if ranks is not None:
            ranks.meet()  # before anything changes
            change()
            return
    change()  # last of all: an interrupt after it would come too late to change nothing


@contextlib.contextmanager
def _together(patched: PatchState, what: str, timeout: float) -> Iterator[Ranks | None]:
    """Let all ranks of a sharded model leave together, with an error if any of them has one.

    A load under ZeRO-2 is one too: each rank puts its part into the copies that train.

    Yields:
        The ranks, for the meetings within, after which collectives may come; None: not sharded.
    """
    sharding.reshard(patched.model)
    members = sharding.members(patched.model.parameters())
    if members is None and what == _LOAD and sharding.trained_copies(patched.model.parameters()):
        members = tuple(range(dist.get_world_size()))
    if members is None:
        patched.check_computed()
        yield None
        return
    ranks = Ranks(members, what, timeout)
    with ranks.leaving_together():
        patched.check_computed()
        yield ranks


def _names_and_shapes(parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    """Return a hash that must be the same on all ranks: their collectives are in this order."""
    shapes = [(name, tuple(sharding.whole_shape(p))) for name, p in parameters.items()]
    return {"model (names and shapes of its parameters)": _hash(shapes)}


def _hash(values: object) -> str:
    return hashlib.sha256(str(values).encode()).hexdigest()


_Modules = tuple[list[dict[int, AddedExperts]], dict[str, ModalityProjector]]


def _copy_in(
    patched: PatchState,
    saved: dict,
    missing: "_Missing",
    tensors: dict[str, Tensor],
    find: RoutingFinder,
    names: tokens.NewNames,
    adapter: str,
) -> None:
    """Make what is missing, and copy all values in: wholly or not at all."""
    modules, frozen = missing.build(patched), saved.get("frozen")
    kept = [sharding.local(parameter) for _, parameter in named_adapter_parameters(patched.model)]
    with all_or_nothing(patched.model, names.tokenizer, patched, values=kept), torch.no_grad():
        names.add()
        missing.attach(patched, modules, find)
        if adapter not in patched.adapter_names:
            named_adapters.add(patched, adapter)
        for name, parameter in of_adapter(named_parameters(patched.model), adapter).items():
            if not is_added(name):
                continue
            sharding.put(parameter, tensors[name])
        if frozen is not None:  # absent in files of older versions
            named_adapters.set_frozen(patched, adapter, frozenset(frozen))
        return  # inside, as all_or_nothing asks


@dataclass
class _Missing:
    """Tokens, experts and projectors that an adapter has and the model lacks."""

    added_tokens: dict[str, int]
    extensions: list[ExtensionConfig]
    projectors: dict[str, dict[str, int]]

    def build(self, patched: PatchState) -> _Modules:
        """Make the modules, without values and not attached yet."""
        extensions = [
            added_experts.build(patched, config, self.extensions[:number])
            for number, config in enumerate(self.extensions)
        ]
        built = {k: projectors.build(patched, each) for k, each in self.projectors.items()}
        return extensions, built

    def attach(self, patched: PatchState, modules: _Modules, find: RoutingFinder) -> None:
        extensions, built = modules
        for modality, count in self.added_tokens.items():
            tokens.add_modality_tokens(patched.model, modality, count, init="mean")
        for config, module in zip(self.extensions, extensions, strict=True):
            added_experts.attach(patched, config, module, find)
        for modality, projector in built.items():
            projectors.attach(patched, modality, projector)


def _find_missing(patched: PatchState, saved: dict, find: RoutingFinder) -> _Missing:
    """Return what the model lacks; raise ValueError if it has other additions already."""
    present, requested = patched.added_tokens, saved["added_tokens"]
    if present and list(present.items()) != list(requested.items()):
        raise ValueError(
            f"the adapter has added tokens {requested}, the model {present}; load the adapter into "
            "a model without added tokens, which gets them then"
        )
    for modality in requested:
        patched.modality_id(modality)
    return _Missing(
        {} if present else requested,
        _missing_extensions(patched, saved.get("extensions", ()), find),
        _missing_projectors(patched, saved.get("projectors", {})),
    )


def _like(patched: PatchState, adapter: str) -> str:
    """Return an adapter of the model that has the shapes of one that is to be loaded."""
    if adapter in patched.adapter_names:
        return adapter
    named_adapters.check_new(patched, adapter)
    return patched.active_adapter


def _check_beside_others(patched: PatchState, missing: "_Missing", adapter: str) -> None:
    """Raise ValueError if what an adapter brings would change the other adapters of the model."""
    several = len(patched.adapter_names) > 1 or adapter not in patched.adapter_names
    if several and missing != _Missing({}, [], {}):
        brought = [*missing.added_tokens, *missing.extensions, *missing.projectors]
        raise ValueError(
            "the adapter has tokens, added experts or a projector that the model lacks "
            f"({', '.join(map(str, brought))}), and the model's other adapters would get them too: "
            "load it into a model without other adapters, or call add_modality_tokens first"
        )


def _missing_extensions(
    patched: PatchState, saved: list[dict], find: RoutingFinder
) -> list[ExtensionConfig]:
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
    if requested:
        added_experts.check_beside(patched)
    for number, config in enumerate(requested):
        added_experts.check(patched, config, requested[:number], find)
    return requested


def _missing_projectors(
    patched: PatchState, requested: dict[str, dict[str, int]]
) -> dict[str, dict[str, int]]:
    existing = projectors.projectors(patched.model)
    present = {modality: projector.settings() for modality, projector in existing.items()}
    if present and present != requested:
        raise ValueError(
            f"the adapter has other projectors than the model: {requested or 'none'} != {present}"
        )
    missing = {} if present else requested
    for modality in missing:
        projectors.check(patched, modality)
    return missing


def _expected_shapes(
    patched: PatchState, saved: dict, file: TensorFile
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the header describes, without any of their memory."""
    settings = saved.get("projectors", {})
    for modality, each in settings.items():
        if each["num_layers"] > len(file.shapes):
            raise ValueError(
                f"{file.path}: the projector for {modality!r} has {each['num_layers']} layers, but "
                f"the file {len(file.shapes)} tensors"
            )
    extensions = [ExtensionConfig.from_dict(values) for values in saved.get("extensions", ())]
    try:
        return expected_shapes(patched, saved["added_tokens"], extensions, settings)
    except (RuntimeError, TypeError) as error:  # sizes that overflow
        raise ValueError(f"{file.path}: its header has impossible sizes: {error}") from error


def _check_frozen(file: TensorFile, saved: dict) -> None:
    if unknown := sorted(set(saved.get("frozen", ())) - set(file.shapes)):
        raise ValueError(f"{file.path}: the field frozen names {unknown[0]}, which is not there")


def _check_settled(
    patched: PatchState,
    missing: _Missing,
    saved: dict,
    parameters: dict[str, nn.Parameter],
    adapter: str,
) -> None:
    """Raise ValueError if loading would change more of a sharded model than its engine follows."""
    if missing != _Missing({}, [], {}) and (problem := sharding.problem(patched.model)):
        raise ValueError(
            f"the adapter has tokens, experts or projectors that this model lacks, and {problem}"
        )
    if (frozen := saved.get("frozen")) is None or adapter != patched.active_adapter:
        return
    for name, parameter in parameters.items():
        if is_added(name) and parameter.requires_grad == (name in frozen):
            was, now = ("trained", "frozen") if parameter.requires_grad else ("frozen", "trained")
            raise ValueError(
                f"{name} is {was} in this sharded model and was {now} in the adapter: set what "
                "requires grad, or load the adapter, before the model is sharded"
            )


def _read(
    patched: PatchState, file: TensorFile, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the file's tensors in the dtypes that they will have, all of them finite."""
    default = trainable_dtype(patched.model.get_input_embeddings().weight)
    tensors = {
        name: tensor.to(parameters[name].dtype if name in parameters else default)
        for name, tensor in file.read().items()
    }
    tensor_files.check_finite(tensors, file.path)
    return tensors


def _fingerprint(parameters: dict[str, nn.Parameter], model: nn.Module) -> str:
    """Return a hash of the base weights: names, shapes and a sample of each, in bfloat16.

    Rounding gives a float32 copy of a bfloat16 model the same hash. A float16 copy may differ, as
    it was rounded before. Experts that a parametrisation unpacks count as what they are unpacked
    to, so that the unpacked model has the same hash; of a quantised linear layer the kind counts.
    Weights that accelerate has offloaded are read one at a time.
    """
    base = {n: p for n, p in parameters.items() if not (is_added(n) or packed.is_part(n))}
    kinds = {name: p for name, p in base.items() if quantisation.is_packed(p)}
    read = {original_name(name): at for name, at in packed.parametrised(model).items()}
    brought = {original_name(name): at for name, at in offload.offloaded(model).items()}
    read |= {n: at for n, at in brought.items() if n in base and n not in kinds}
    plain = dict(sorted((n, p) for n, p in base.items() if n not in kinds and n not in read))
    samples = sharding.samples(plain, _FINGERPRINT_SAMPLES)
    shapes = {name: sharding.whole_shape(parameter) for name, parameter in plain.items()}
    for name, (module, own) in read.items():
        weight = {name: offload.value(module, own)}  # one at a time is in full size
        samples |= sharding.samples(weight, _FINGERPRINT_SAMPLES)
        shapes[name] = weight[name].shape
        del weight
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(f"{name}{tuple(shapes[name])}".encode())
        digest.update(samples[name].to(torch.int16).numpy().tobytes())
    for name, weight in sorted(kinds.items()):
        digest.update(f"{name} {type(weight.data).__name__} {weight.dtype}".encode())
    return digest.hexdigest()


def _fingerprints(patched: PatchState, parameters: dict[str, nn.Parameter]) -> Iterator[str]:
    """Yield the fingerprint, then that of version 0.1.0, with what was attached to the model."""
    yield _fingerprint(parameters, patched.model)
    every = named_parameters(patched.model)
    if len(every) > len(parameters):
        here = {name: p for name, p in every.items() if not p.is_meta}
        yield _fingerprint(here, patched.model)


def _describe(patched: PatchState, parameters: dict[str, nn.Parameter], adapter: str) -> dict:
    model = patched.model
    added_tokens, extensions, settings = contents(patched)
    held = named_adapters.frozen(patched, adapter)
    frozen = [name for name in parameters if name in held]
    return {
        "layout": LAYOUT,
        "lora": patched.config.to_dict(),
        "added_tokens": added_tokens,
        "extensions": [each.to_dict() for each in extensions],
        "routing": added_experts.routing(patched, RoutingFinder()),
        "projectors": settings,
        "frozen": frozen,
        "base_model": {
            "model_type": model.config.model_type,
            **_base_of(model),
            "fingerprint": _fingerprint(parameters, model),
        },
        "versions": {
            "moe_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _base_of(model: nn.Module) -> dict[str, str | None]:
    """Return where a model was loaded from: id or folder, and the commit of a hub's repository."""
    config = model.config
    return {
        "name_or_path": config.name_or_path,
        "revision": getattr(config, "_commit_hash", None),
    }


def _base_name(base: dict) -> str:
    """Return where a base was loaded from, for people."""
    revision = base.get("revision")  # absent in files of older versions
    name = base["name_or_path"] or "unnamed"
    return f"{name} at revision {revision}" if revision else name


def _check_fits(patched: PatchState, saved: dict) -> None:
    """Raise ValueError unless type of model and configuration are those of the adapter."""
    model, base = patched.model, saved["base_model"]
    if base["model_type"] != model.config.model_type:
        raise ValueError(
            f"the adapter is for a {base['model_type']!r} model ({_base_name(base)}), this is a "
            f"{model.config.model_type!r} ({_base_name(_base_of(model))})"
        )
    trained = ModalityLoraConfig.from_dict(saved["lora"]).to_dict()
    current = patched.config.to_dict()
    if differing := [k for k in trained if _as_list(trained[k]) != _as_list(current[k])]:
        listed = ", ".join(f"{k}: {trained[k]!r} != {current[k]!r}" for k in differing)
        raise ValueError(
            f"the adapter was trained with another configuration (adapter != model): {listed}; "
            "patch with ModalityLoraConfig.from_adapter(folder)"
        )


def _check_base(patched: PatchState, saved: dict, parameters: dict[str, nn.Parameter]) -> None:
    """Raise ValueError unless the base weights are those of the adapter."""
    base = saved["base_model"]
    if base["fingerprint"] not in _fingerprints(patched, parameters):
        raise ValueError(
            f"the adapter was trained on other base weights ({_base_name(base)}) than this model's "
            f"({_base_name(_base_of(patched.model))}), or on a copy of these in another precision "
            "than float32 or bfloat16"
        )


def _check_routing(patched: PatchState, saved: dict, find: RoutingFinder) -> None:
    """Raise unless top-k and normalisation match those the added experts were trained with."""
    trained = saved.get("routing", {})  # absent in files of older versions
    extended = {layer for each in saved.get("extensions", ()) for layer in each["experts"]}
    if unknown := sorted(set(trained) - extended):
        raise ValueError(f"the adapter describes the routing of layer {unknown[0]}, not extended")
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
