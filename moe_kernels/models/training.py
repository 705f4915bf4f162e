"""Checks of a training forward for faults that show in no loss, each made once."""

import contextlib
import hashlib
import json
import warnings
from collections import Counter

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from moe_kernels.layers import ModalityLora
from moe_kernels.models import sharding
from moe_kernels.models.handle import PatchState
from moe_kernels.models.intact import modalities_of_peft
from moe_kernels.models.parameters import named_adapter_parameters, original_name
from moe_kernels.models.ranks import Ranks
from moe_kernels.ops.gradients import in_graph_capture, in_transform


def check_training(patched: PatchState, *, ids_given: bool, embeds_train: bool) -> None:
    """Find adapters that cannot learn, and ranks that were patched differently.

    Args:
        patched: the model whose forward begins.
        ids_given: the caller has given modality ids.
        embeds_train: the caller has given embeddings that take a gradient.

    Warns:
        UserWarning: adapters of a modality get no gradient, no parameter trains, or adapters are on
            few ranks.

    Raises:
        RuntimeError: added parameters have no values, or other ranks were patched differently.
    """
    if patched.model.training and torch.is_grad_enabled():
        _check(patched, ids_given, embeds_train)


@torch.compiler.assume_constant_result  # a compiled forward makes the checks when it is compiled
def _check(patched: PatchState, ids_given: bool, embeds_train: bool) -> None:
    if not ids_given:
        _warn_of_idle_adapters(patched)
    if not embeds_train and _has_values():
        _warn_of_frozen(patched)
    stage = len(patched.extensions), len(patched.added_tokens), patched.active_adapter
    if stage in patched.checked:
        return
    if not _has_values():
        return
    _check_values(patched.model)
    _warn_of_one_rank(patched.model)
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and patched.compare_ranks:
        if stage not in patched.compared_at:  # else it was refused there, and is again
            patched.compared_at[stage] = _new_place(patched)
        with _leaving_together(patched.model):
            _check_ranks(patched, patched.compared_at[stage])
    patched.checked.add(stage)


def _warn_of_idle_adapters(patched: PatchState) -> None:
    for modality in patched.config.modalities:
        if modality in {*patched.added_tokens, *patched.config.token_ids, *patched.warned}:
            continue
        extended = {config.modality for config in patched.extensions}
        by_peft = patched.modality_id(modality) in modalities_of_peft(patched.links)
        if not (patched.projections or modality in extended or by_peft):
            continue
        patched.warned.add(modality)
        warnings.warn(
            f"this training forward has no token of modality {modality!r}, so that its adapters "
            "get no gradient: the model has no tokens of it, and no modality_ids were given. Pass "
            "modality_ids (does the collator drop the column?), or call add_modality_tokens",
            stacklevel=2,
        )


def _has_values() -> bool:
    """Return whether values can be read here; a later forward is checked otherwise."""
    return not (in_transform() or in_graph_capture() or torch.compiler.is_exporting())


def _warn_of_frozen(patched: PatchState) -> None:
    """Warn if what was added is frozen, and all else of the model too.

    The loss would have a gradient all the same, where checkpointing makes embeddings require grad.
    What trains may also be outside of the model's parameters, as a vector that a hook adds.
    """
    if _FROZEN in patched.warned or any(p.requires_grad for p in patched.model.parameters()):
        return
    if next(named_adapter_parameters(patched.model), None) is not None:
        patched.warned.add(_FROZEN)
        warnings.warn(
            "this training forward teaches the model nothing: every parameter of it was frozen "
            "after patch_model, those that it added too (by peft.prepare_model_for_kbit_training "
            "or model.requires_grad_(False)?). Call these before patch_model, or "
            "requires_grad_(True) on what shall train. If something else trains (a vector in a "
            "hook, say), call model.eval(), which still lets gradients flow, or ignore this",
            stacklevel=2,
        )


_FROZEN = ""  # among the names of modalities that were warned of; no modality has this name


def _check_values(model: nn.Module) -> None:
    """Raise RuntimeError if an added parameter has no values, which to_empty leaves as NaN."""
    for name, parameter in named_adapter_parameters(model):
        if not sharding.local(parameter).isfinite().all():
            raise RuntimeError(_NO_VALUES.format(name, "is not finite"))
    for name, module in model.named_modules():
        if isinstance(module, ModalityLora) and _is_zero(module.lora_A) and _is_zero(module.lora_B):
            raise RuntimeError(_NO_VALUES.format(name, "is zero, lora_A too"))


_NO_VALUES = (
    "{} {}: to_empty leaves what was added without values, and a diverged run does too. "
    "load_adapter(folder) gives it values; a model that was made on the device meta is patched "
    "once it has its own"
)


def _is_zero(parameter: nn.Parameter) -> bool:
    """Return whether a parameter that trains is zero, as far as this rank has its values."""
    values = sharding.local(parameter)
    known = parameter.requires_grad and sharding.part_of(parameter) is not None and values.numel()
    return bool(known) and not values.any()


def _warn_of_one_rank(model: nn.Module) -> None:
    """Warn where FSDP2 keeps all of an adapter on few ranks, and sends it padded to all."""
    held = {name: sharding.holders(p) for name, p in named_adapter_parameters(model)}
    for name, (holding, ranks) in held.items():
        if 2 * holding <= ranks:
            warnings.warn(
                f"FSDP2 keeps {name} on {holding} of {ranks} ranks, with its optimiser state, and "
                "sends it padded to all of them: pass shard_placement_fn=shard_evenly(mesh) to "
                "fully_shard (accelerate has no such setting; HSDP keeps it within a node)",
                stacklevel=2,
            )
            return


# --- ranks

_SAMPLES = 16
_TIMEOUT = 600.0  # seconds to wait for ranks that may still load or compile
_numbers: Counter[str] = Counter()  # of structures that this process has compared, by base model


def _new_place(patched: PatchState) -> str:
    base = _hash(patched.base_shapes)
    _numbers[base] += 1
    return f"moe_kernels/structure/{base}/{_numbers[base]}"


def _leaving_together(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Let an error of one rank reach all, where they compute each forward together.

    Those without it would wait for its collectives. Other ranks may run forwards alone.
    """
    members = sharding.members(model.parameters())
    if members is None:
        return contextlib.nullcontext()
    return Ranks(members, "the first training forward", _TIMEOUT).leaving_together()


def _check_ranks(patched: PatchState, place: str) -> None:
    """Compare the patch with that of the first rank that came here.

    Data parallelism pairs parameters by their order, and DDP then writes those of one rank over
    those of the other, frozen ones included. The n-th structure that a rank trains is compared with
    the n-th of the others, if their base models have the same parameters. Replicas of a sharded
    model must have the same values too, which FSDP2 does not give them.
    """
    own, rank = _describe(patched), dist.get_rank()
    first = json.loads(_first_value(place, json.dumps(own)))
    if differing := [name for name in own if first.get(name) != own[name]]:
        listed = ", ".join(f"{n}: {own[n]} instead of {first.get(n)}" for n in differing)
        raise RuntimeError(
            f"rank {rank} trains another model than a rank before it ({listed}). Choose the same "
            "on all ranks, before DDP or FSDP takes the model (DDP has written tensors of one over "
            "those of the other: load the base again). If ranks are to train models of their own, "
            "set patched.compare_ranks = False"
        )
    for part, values in _values_by_part(patched.model).items():
        if _first_value(f"{place}/{part}", values) != values:
            raise RuntimeError(
                f"rank {rank} trains from other values than another rank that has the same part of "
                "the model, and the engine would keep them apart: call torch.manual_seed with one "
                "seed on all ranks before patch_model and what adds to it, or load_adapter"
            )


def _first_value(place: str, value: str) -> str:
    """Return the value of the rank that came first to a place, this one's if it did.

    The store of the process group serves: a collective would hang where one rank trains alone.
    """
    # No public function returns the store of a group that init_process_group has made.
    store = distributed_c10d._get_default_store()
    if store.add(f"{place}/ranks", 1) == 1:
        store.set(place, value)
        return value
    return store.get(place).decode()


def _values_by_part(model: nn.Module) -> dict[tuple[int, ...], str]:
    """Return hashes of what replicas of a sharded model must share, by place among the shards."""
    found: dict[tuple[int, ...], list] = {}
    if not sharding.is_model_sharded(model):
        return {}  # DDP and ZeRO hand out the first rank's values
    for name, parameter in named_adapter_parameters(model):
        if parameter.requires_grad and (part := sharding.part_of(parameter)) is not None:
            values = sharding.local(parameter).detach().flatten()
            some = values[:: max(1, values.numel() // _SAMPLES)].tolist()
            found.setdefault(part, []).append([original_name(name), some])
    return {part: _hash(values) for part, values in found.items()}


def _describe(patched: PatchState) -> dict[str, object]:
    """Return the structure of a patch; of the parameters that train their number and a hash."""
    named = named_adapter_parameters(patched.model)
    trained = [original_name(name) for name, p in named if p.requires_grad]
    described = patched.config.to_dict() | {
        "extensions": [config.to_dict() for config in patched.extensions],
        "added tokens": patched.added_tokens,
        "trained parameters": f"{len(trained)} ({_hash(trained)})",
    }
    return json.loads(json.dumps(described))  # as it is read from the store


def _hash(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]
