"""Adapters by name: further low-rank pairs and added rows of a patched model, of the same shapes.

The op has an axis of modalities. A batch of several adapters takes a slot of it for each adapter
and modality, so that one launch serves it whole.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_kernels.layers.modality_lora import BASE, split_name
from moe_kernels.models import offload, projectors, sharding, tokens
from moe_kernels.models.context import Chosen
from moe_kernels.models.handle import PatchState
from moe_kernels.models.intact import modalities_of_peft
from moe_kernels.models.parameters import is_added, named_parameters, of_adapter

# --- the adapters of a model


def check_new(patched: PatchState, name: str) -> None:
    """Raise unless a model can get a further adapter of this name."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"the name of an adapter must be an identifier, got {name!r}")
    if name == BASE:
        raise ValueError(f"{BASE!r} stands for no adapter in calls: give the adapter another name")
    if name in patched.adapter_names:
        raise ValueError(f"the model has an adapter {name!r} already: delete_adapter it first")
    if problem := _problem(patched):
        raise ValueError(f"a further adapter cannot be added: {problem}")


def _problem(patched: PatchState) -> str | None:
    """Return why a model can have one adapter alone, or None."""
    if patched.extensions or projectors.projectors(patched.model):
        return (
            "the model has added experts or a projector, of which there is one set for all "
            "adapters: use adapters by name on a model without them"
        )
    if modalities_of_peft(patched.links):
        return "PEFT has adapted the model too, and its adapters are for one modality alone"
    if sharding.is_model_sharded(patched.model):
        return "the model is sharded: add adapters before fully_shard or deepspeed.initialize"
    if any(each.experts and sharding.spread(each.experts) for each in patched.parts):
        return "its experts are spread over ranks (expert parallelism)"
    if offload.problem(patched.model):
        return offload.problem(patched.model)
    return None


def add(patched: PatchState, name: str, like: str | None = None) -> None:
    """Make an adapter, which does not train.

    It has the values of another one, ``like``; default: pairs of no effect, and the active rows.
    """
    with torch.inference_mode(False):  # tensors of inference mode could not train later
        for projection in patched.projections:
            projection.lora.add(name, like)
        for rows in tokens.all_rows(patched.model):
            rows.copy_for(name, patched.active_adapter if like is None else like)
    for parameter in parameters_of(patched, name):
        parameter.requires_grad_(False)
    patched.frozen_if_active[name] = frozenset() if like is None else frozen(patched, like)
    patched.adapter_names = [*patched.adapter_names, name]


def frozen(patched: PatchState, name: str) -> frozenset[str]:
    """Return the names of an adapter's parameters that do not train when it is active."""
    if name != patched.active_adapter:
        return patched.frozen_if_active[name]
    own = of_adapter(named_parameters(patched.model), name)
    return frozenset(n for n, p in own.items() if is_added(n) and not p.requires_grad)


def set_frozen(patched: PatchState, name: str, names: frozenset[str]) -> None:
    """Let these parameters of an adapter not train, now if it is active, and all its others."""
    if name != patched.active_adapter:
        patched.frozen_if_active[name] = names
        return
    for key, parameter in of_adapter(named_parameters(patched.model), name).items():
        if is_added(key):
            parameter.requires_grad_(key not in names)


def activate(patched: PatchState, name: str) -> None:
    """Let an adapter be that of all forwards, and let it alone train."""
    before = patched.active_adapter
    patched.frozen_if_active[before] = frozen(patched, before)
    for parameter in parameters_of(patched, before):
        parameter.requires_grad_(False)
    patched.switches.adapter = name
    set_frozen(patched, name, patched.frozen_if_active.pop(name))


def reference_model(patched: PatchState) -> PreTrainedModel:
    """Return a copy of a model that shares its base; see ``PatchedModel.reference_model``."""
    model = patched.model
    sharding.check_whole(model, "reference_model")
    if offload.offloaded(model):
        raise ValueError(
            "reference_model shares the weights of the base, and accelerate has offloaded them: "
            "add_adapter(name, like=...) keeps a frozen reference in the model itself"
        )
    base = {name: p for name, p in model.named_parameters() if not is_added(name)}
    if trained := [name for name, parameter in base.items() if parameter.requires_grad]:
        raise ValueError(
            f"{trained[0]} of the base trains, and the reference would move with it: freeze it, or "
            "use copy.deepcopy(model)"
        )
    shared = {id(tensor): tensor for tensor in (*base.values(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    return twin.requires_grad_(False).eval()


def delete(patched: PatchState, name: str) -> None:
    """Take the parameters of an adapter out of a model."""
    modules = [projection.lora for projection in patched.projections]
    for module in (*modules, *tokens.all_rows(patched.model)):
        for key in [key for key in module._parameters if split_name(key)[1] == name]:
            if isinstance(module, tokens.AddedRows):
                del module[key]
            else:
                delattr(module, key)
    del patched.frozen_if_active[name]
    patched.adapter_names = [each for each in patched.adapter_names if each != name]


def parameters_of(patched: PatchState, name: str) -> list[nn.Parameter]:
    """Return the parameters of an adapter: its pairs, then its rows."""
    modules = [projection.lora for projection in patched.projections]
    return [
        parameter
        for module in (*modules, *tokens.all_rows(patched.model))
        for key, parameter in module._parameters.items()
        if split_name(key)[1] == name
    ]


# --- the adapters of a batch


def choose(
    patched: PatchState,
    inputs: Mapping[str, Any],
    adapter: str | Sequence[str] | None,
    adapter_ids: Tensor | None,
) -> Chosen:
    """Return the adapters of a forward's batch.

    Args:
        patched: the model.
        inputs: of the forward.
        adapter: name of the adapter, or one for each sequence, as the caller gave it; None: that
            of the context, or of all threads.
        adapter_ids: (B,) int64, the place of each sequence's adapter among those of the context,
            which ``generate`` hands from step to step; None: all sequences have the same.

    Raises:
        ValueError: there is no adapter of a name, or there are not as many as sequences; or places
            are given outside of a ``generate`` of several adapters, or none within one.
    """
    switches = patched.switches
    of_batch = switches.joined() is not None
    if adapter_ids is not None and not of_batch:
        raise ValueError(
            "adapter_ids is what generate() of several adapters hands from step to step: name the "
            "adapters by adapter="
        )
    if isinstance(adapter, str):
        _check_name(patched, adapter)
        return switches.named(adapter)
    if adapter is not None:
        rows = inputs.get("inputs_embeds") if (ids := inputs.get("input_ids")) is None else ids
        if rows is None:
            raise ValueError("a name for each sequence needs input_ids or inputs_embeds")
        return of_sequences(patched, adapter, rows)
    if not of_batch:
        return switches.chosen_outside()
    if adapter_ids is None:
        raise ValueError(
            "this forward within a generate() of several adapters does not say which sequence has "
            "which (guidance_scale makes such forwards, and logits processors may): give it "
            "adapter=, or generate with one adapter at a time"
        )
    return Chosen(switches.chosen_outside().names, adapter_ids)


def _check_name(patched: PatchState, name: str) -> None:
    if name != BASE:
        patched.check_adapter(name)


def of_sequences(patched: PatchState, names: Sequence[str], tokens_of: Tensor) -> Chosen:
    """Return the adapters of a batch, one name for each of its sequences (B, ...)."""
    names = list(names)
    if len(names) != len(tokens_of):
        raise ValueError(
            f"adapter has {len(names)} names for a batch of {len(tokens_of)} sequences: give one "
            "for each, or one name for all"
        )
    for name in names:
        _check_name(patched, name)
    active = patched.active_adapter
    if len(set(names)) <= 1:
        return patched.switches.named(names[0] if names else active)
    found = tuple(dict.fromkeys(active if name == BASE else name for name in names))
    places = [-1 - found.index(active) if name == BASE else found.index(name) for name in names]
    return Chosen(found, torch.tensor(places, device=tokens_of.device))


def slots(patched: PatchState, modality_ids: Tensor, of_sequence: Tensor) -> Tensor:
    """Return the slot a M + m of each token (B, S) of the m-th modality under the a-th adapter.

    Text stays 0 and padding -1; a sequence of no adapter becomes text.
    """
    place = of_sequence[:, None]
    of_adapter = modality_ids + len(patched.config.modalities) * place
    adapted = torch.where(place >= 0, of_adapter, 0)
    return torch.where(modality_ids > 0, adapted, modality_ids)
