"""Checks of a training forward for faults that show in no loss, each made once."""

import hashlib
import json
import warnings

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from moe_kernels.models import sharding
from moe_kernels.models.handle import PatchState
from moe_kernels.models.parameters import named_adapter_parameters, original_name
from moe_kernels.ops.gradients import in_graph_capture, in_transform


def check_training(patched: PatchState, *, ids_given: bool) -> None:
    """Find adapters that cannot learn, and ranks that were patched differently.

    Args:
        patched: the model whose forward begins.
        ids_given: the caller has given modality ids.

    Warns:
        UserWarning: adapters of a modality get no gradient.

    Raises:
        RuntimeError: added parameters have no values, or other ranks were patched differently.
    """
    if patched.model.training and torch.is_grad_enabled():
        _check(patched, ids_given)


@torch.compiler.assume_constant_result  # a compiled forward makes the checks when it is compiled
def _check(patched: PatchState, ids_given: bool) -> None:
    if not ids_given:
        _warn_of_idle_adapters(patched)
    stage = len(patched.extensions), len(patched.added_tokens)
    if patched.checked == stage:
        return
    _check_values(patched.model)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        _check_ranks(patched)
    patched.checked = stage


def _warn_of_idle_adapters(patched: PatchState) -> None:
    extended = {config.modality for config in patched.extensions}
    for modality in patched.config.modalities:
        adapted = patched.projections or modality in extended
        if not adapted or modality in patched.added_tokens or modality in patched.warned:
            continue
        patched.warned.add(modality)
        warnings.warn(
            f"this training forward has no token of modality {modality!r}, so that its adapters "
            "get no gradient: the model has no tokens of it, and no modality_ids were given. Pass "
            "modality_ids (does the collator drop the column?), or call add_modality_tokens",
            stacklevel=2,
        )


def _check_values(model: nn.Module) -> None:
    """Raise RuntimeError if an added parameter has no values, which to_empty leaves as NaN."""
    if in_transform() or in_graph_capture() or torch.compiler.is_compiling():
        return
    for name, parameter in named_adapter_parameters(model):
        if not sharding.local(parameter).isfinite().all():
            raise RuntimeError(
                f"{name} is not finite: to_empty leaves what was added without values, and a "
                "diverged run does too. load_adapter(folder) gives it values; a model that was "
                "made on the device meta is patched once it has its own"
            )


# --- ranks

_checks: list[str] = []  # one for each structure that this process has compared


def _check_ranks(patched: PatchState) -> None:
    """Compare the structure of the patch with that of the first rank that came here.

    Data parallelism pairs parameters by their order, and DDP then writes those of one rank over
    those of the other, frozen ones included. The store of the process group serves, because a
    collective would hang where one rank trains alone. The n-th structure that a rank trains is
    compared with the n-th of the others, if their base models have the same parameters.
    """
    structure = _describe(patched)
    # No public function returns the store of a group that init_process_group has made.
    store = distributed_c10d._get_default_store()
    key = f"moe_kernels/structure/{_hash(patched.base_shapes)}/{len(_checks)}"
    _checks.append(key)
    if store.add(f"{key}/ranks", 1) == 1:
        store.set(key, structure)
        return
    first = store.get(key).decode()
    if first != structure:
        raise RuntimeError(
            f"rank {dist.get_rank()} trains another model than a rank before it: {structure} "
            f"instead of {first}. Choose the same on all ranks, before DDP or FSDP takes the model "
            "(DDP has written tensors of one over those of the other: load the base again)"
        )


def _describe(patched: PatchState) -> str:
    """Return the structure of a patch, the parameters that train included by a hash."""
    named = named_adapter_parameters(patched.model)
    return json.dumps(
        {
            "added experts by layer": [config.experts for config in patched.extensions],
            "added tokens": patched.added_tokens,
            "configuration": _hash(patched.config.to_dict()),
            "extensions": _hash([config.to_dict() for config in patched.extensions]),
            "trained": _hash([original_name(name) for name, p in named if p.requires_grad]),
        }
    )


def _hash(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]
