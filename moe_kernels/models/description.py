"""Facts of a patched model in words: the sizes of what trains, and what was added."""

import torch
from torch import nn

from moe_kernels import backends
from moe_kernels.models import offload, packed, sharding
from moe_kernels.models.handle import HANDLE, PatchState


def count_parameters(patched: PatchState) -> tuple[int, int]:
    """Return the numbers of a model's values that train and of all; those of all ranks count.

    A packed weight counts as what it is unpacked to, and a tied one once.
    """
    weights, counted = packed.parametrised(patched.model), set()
    trained = total = 0
    for part, parameter in patched.model.named_parameters():
        name = packed.weight_of(part)
        if name in counted:
            continue  # another part of the same weight
        counted.add(name)
        size = _shape(parameter, weights.get(name)).numel()
        total += size
        trained += size if parameter.requires_grad else 0
    return trained, total


def _shape(parameter: nn.Parameter, place: tuple[nn.Module, str] | None) -> torch.Size:
    """Return the whole shape of a weight; ``place``: its module and name, if it is parametrised."""
    if place is not None:
        return sharding.whole_shape(packed.outline(*place))
    # bitsandbytes keeps the shape of a packed linear layer's weight beside it.
    state = getattr(parameter, "quant_state", None)
    return torch.Size(getattr(state, "shape", sharding.whole_shape(parameter)))


def trainable_line(trained: int, total: int) -> str:
    """Return a line with the number of values that train, that of all, and the share."""
    return (
        f"trainable params: {trained:,} || all params: {total:,} || "
        f"trainable%: {100 * trained / total:.4f}"
    )


def describe(patched: PatchState) -> str:
    """Return what a model was patched with, a line for each kind of it."""
    kind = type(patched.model).__name__
    if patched.model.__dict__.get(HANDLE) is not patched:
        return f"PatchedModel({kind}, unpatched)"
    config, layers = patched.config, len(patched.parts)
    adapted = len({projection.layer_name for projection in patched.projections})
    ranks = sorted({config.rank(projection.name) for projection in patched.projections})
    facts = {
        "modalities": ", ".join(config.modalities),
        "targets": ", ".join(config.target_modules) or "none",
        "ranks": ", ".join(map(str, ranks)) or "none",
        "layers": f"{adapted} of {layers} adapted, {len(patched.moe_layers)} with experts",
        "backend": config.backend or f"{_backend(patched)} (chosen)",
        "added tokens": _tokens(patched),
        "adapters": _adapters(patched),
        "extensions": _extensions(patched),
    }
    lines = [f"  {name}: {fact}" for name, fact in facts.items()]
    return "\n".join([f"PatchedModel({kind}", *lines, ")"])


def _adapters(patched: PatchState) -> str:
    active = patched.active_adapter
    return ", ".join(f"{n} (active)" if n == active else n for n in patched.adapter_names)


def _backend(patched: PatchState) -> str:
    table = patched.model.get_input_embeddings()
    device = offload.device_of(table, table.weight)
    try:
        return backends.select(None, device, table.weight.dtype)
    except (RuntimeError, ValueError) as error:  # of MOE_KERNELS_BACKEND
        return f"none: {error}"


def _tokens(patched: PatchState) -> str:
    ranges = {name: patched.modality_token_ids(name) for name in patched.added_tokens}
    return (
        "; ".join(f"{name} {len(ids)} ({ids[0]}..{ids[-1]})" for name, ids in ranges.items())
        or "none"
    )


def _extensions(patched: PatchState) -> str:
    found = []
    for each in patched.extensions:
        number = sum(each.experts.values())
        who = "all rows" if each.modality is None else each.modality
        found.append(f"{number} experts in {len(each.experts)} layers for {who}")
    return "; ".join(found) or "none"
