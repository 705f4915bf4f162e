"""Check that a patched model still runs through the modules that were patched.

Replacing one of them afterwards would leave out its adapters, or its rows, without an error.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from moe_kernels.models import offload, sharding
from moe_kernels.models.experts import IMPLEMENTATION
from moe_kernels.models.parts import LayerParts

# Where wrappers of torch keep the module: torch.compile, activation checkpointing, FSDP1, DDP.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")
_WRAPPED_BY_PEFT = "base_layer"
_BIND_PEFT = (
    "let accelerate_peft(model, modality=...) bind PEFT's adapters of experts, on a base that "
    "patch_model was given with ModalityLoraConfig(target_modules=())"
)
_PUT_BACK = (
    "put the module back (PEFT: unload() its model; where get_peft_model has failed halfway, the "
    "wrapper's base_layer), or unpatch() before the replacement and patch again after it"
)


def is_wrapper(module: nn.Module) -> bool:
    """Return whether a module is a wrapper of torch around another."""
    return any(name in module._modules for name in _WRAPPED)


def without_wrappers(name: str) -> str:
    """Return the name of a module or parameter without the wrappers of the modules above it."""
    parts = name.split(".")
    return ".".join(part for part in parts if part not in (*_WRAPPED, _WRAPPED_BY_PEFT))


@dataclass(frozen=True)
class Link:
    """A module and its place: ``parent.name`` is ``module``, and ``path`` its name in the model."""

    parent: nn.Module
    name: str
    module: nn.Module
    path: str


def find_links(model: nn.Module, watched: Iterable[nn.Module]) -> tuple[Link, ...]:
    """Return the places of modules of a model, and of the modules above them."""
    modules = dict(model.named_modules())
    paths = {module: path for path, module in modules.items()}
    links = {}
    for module in watched:
        path = paths[module]
        while path and path not in links:
            above, _, name = path.rpartition(".")
            links[path] = Link(modules[above], name, modules[path], path)
            path = above
    return tuple(links.values())


def check_links(links: Iterable[Link]) -> None:
    """Raise RuntimeError if a module is no longer in its place."""
    for link in links:
        found = link.parent._modules.get(link.name)
        if found is not link.module and not _wraps(found, link.module):
            remedy = _PUT_BACK
            if type(found).__module__.partition(".")[0] == "peft":
                remedy = f"{_BIND_PEFT}, or {remedy}"
            raise RuntimeError(
                f"{link.path} was replaced by {_class_of(found)} after patch_model, which "
                f"would leave out what was added to it: {remedy}"
            )


def modalities_of_peft(links: Iterable[Link]) -> set[int]:
    """Return the numbers of the modalities that accelerate_peft has bound adapters of PEFT to."""
    found = {_modality_of_peft(link.parent._modules.get(link.name)) for link in links}
    return found - {None}


def check_peft(model: nn.Module, links: Iterable[Link]) -> None:
    """Raise RuntimeError if PEFT has adapted other modules than those that links watch."""
    if "peft_config" in model.__dict__ and not modalities_of_peft(links):
        raise RuntimeError(
            "PEFT has taken this model after patch_model: it froze what was added, and its own "
            f"adapters act on tokens of every modality. Unload() PEFT's model, and {_BIND_PEFT}; "
            "or adapt by patch_model alone, and call requires_grad_(True) on what shall train "
            "again (patched.model.named_parameters())"
        )


def check_offload(model: nn.Module) -> None:
    """Raise RuntimeError if accelerate runs the model so that what was added is not computed."""
    if problem := offload.problem(model):
        raise RuntimeError(f"after patch_model, {problem}")


def check_new_hooks(model: nn.Module, links: Iterable[Link]) -> None:
    """Raise as :func:`check_offload` does; only if the modules that links watch have a new hook."""
    if offload.has_unchecked_hook((model, *(link.module for link in links))):
        check_offload(model)


def check_experts(parts: Iterable[LayerParts]) -> None:
    """Raise RuntimeError if transformers would compute experts without what was added to them."""
    checked = None
    for index, each in enumerate(parts):
        if not needs_ours(each) or (config := each.experts.config) is checked:
            continue
        checked = config  # of all layers as a rule; its attributes take a microsecond each
        if (found := config._experts_implementation) != IMPLEMENTATION:
            raise RuntimeError(
                f"the experts of layer {index} were set to {found!r} after patch_model, which "
                f"would leave out what was added to them: set them back to {IMPLEMENTATION!r}, or "
                "unpatch() first, set the other one, and patch again"
            )


def check_engine(model: nn.Module, links: Iterable[Link]) -> None:
    """Raise RuntimeError if an engine that is not supported has taken parameters of the model."""
    if not any(sharding.may_be_held(link.module) for link in links):
        return
    if reason := sharding.foreign_engine(model):
        raise RuntimeError(f"the model was sharded after patch_model, and {reason}")


def needs_ours(parts: LayerParts) -> bool:
    """Return whether a layer's experts have adapters, or added experts beside them."""
    own = {} if parts.experts is None else parts.experts.__dict__
    return bool(own.get("_modality_lora") or own.get("_added_experts"))


def patched_modules(model: nn.Module, parts: Sequence[LayerParts]) -> Iterable[nn.Module]:
    """Yield the modules that patching changes, and those that are called with a mask."""
    yield from (model.get_input_embeddings(), model.get_output_embeddings())
    for each in parts:
        several = (each.layer, each.self_attn, each.experts, each.router)
        yield from (module for module in several if module is not None)
        yield from each.attention.values()


def _class_of(module: nn.Module | None) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _modality_of_peft(wrapper: nn.Module | None) -> int | None:
    """Return the modality that accelerate_peft has bound the adapters of a wrapper to, or None."""
    own = {} if wrapper is None else wrapper.__dict__
    return getattr(own.get("forward"), "modality_id", None)


def _wraps(found: nn.Module | None, module: nn.Module) -> bool:
    """Return whether ``found`` is a wrapper of torch, or several, around a module.

    PEFT's wrappers are, if accelerate_peft has bound their adapters to a modality.
    """
    names = _WRAPPED
    while found is not None and found is not module:
        if _modality_of_peft(found) is not None:
            names = (*_WRAPPED, _WRAPPED_BY_PEFT)
        inner = (found._modules.get(name) for name in names)
        found = next((each for each in inner if each is not None), None)
    return found is module
