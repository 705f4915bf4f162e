"""Check that ranks which hold one batch together were given the same one.

Each of them computes its own experts on all rows, and the outputs are summed. With other rows, or
another modality, on one rank the sum would be of two batches: a plausible loss of neither.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_kernels.models import sharding
from moe_kernels.models.handle import PatchState
from moe_kernels.models.ranks import Ranks
from moe_kernels.ops.gradients import in_graph_capture, in_transform

_PARTS = {  # what the hash of an input is called
    "input_ids": "sequence of tokens",
    "inputs_embeds": "sequence of tokens",
    "modality_ids": "modality_ids",
}
_OTHERS = "set of labels and masks"
_TIMEOUT = 600.0  # seconds to wait for ranks that may still load data


def check_batch(patched: PatchState, inputs: Mapping[str, Any], modality_ids: Tensor) -> None:
    """Compare a batch with those of the other ranks, if it must be the same on all of them.

    That takes the values of inputs and a meeting of the ranks, so it is done for the first batch of
    each shape of tokens, in training and out of it. Of floats, such as the features of pictures,
    shape and dtype are compared alone: an encoder need not give the same bits on all cards.

    Args:
        patched: the model whose forward begins.
        inputs: of this forward, by name.
        modality_ids: (B, S), of the tokens.

    Raises:
        RuntimeError: another rank has another batch, or did not come; on all ranks.
    """
    if torch.compiler.is_compiling() or (members := _members(patched)) is None:
        return
    if in_transform() or in_graph_capture():
        return
    tensors = {name: each for name, each in inputs.items() if isinstance(each, Tensor)}
    tensors["modality_ids"] = modality_ids
    shapes = [(name, *each.shape) for name, each in sorted(tensors.items())]
    # Not the shapes of masks, which grow with each token that is generated.
    of_tokens = (shape for shape in shapes if shape[0] in _PARTS)
    kind = patched.model.training and torch.is_grad_enabled(), *of_tokens
    if kind in patched.shared_batches:
        return
    ranks = Ranks(members, "a forward with one batch for all ranks", _TIMEOUT)
    try:
        ranks.meet({"shape of the batch": str(shapes)} | _hashes(tensors))
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}. The experts are spread over ranks {members}, which compute one batch "
            "together (expert parallelism): give all of them the same inputs, or a batch each and "
            "FSDP2 by DistributedConfig(fsdp_size=..., ep_size=...)"
        ) from None
    patched.shared_batches.add(kind)


def _members(patched: PatchState) -> tuple[int, ...] | None:
    """Return the ranks that compute one batch together; None: each has its own."""
    for parts in patched.parts:
        found = None if parts.experts is None else sharding.spread(parts.experts)
        if found is not None and found.shares_batch:
            return tuple(sorted(dist.get_process_group_ranks(found.ep_mesh.get_group())))
    return None


def _hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return hashes of a batch: of its tokens, of their modality, and of the rest."""
    hashes = {name: hashlib.sha256() for name in (*_PARTS.values(), _OTHERS)}
    for name, tensor in sorted(tensors.items()):
        found = hashes[_PARTS.get(name, _OTHERS)]
        found.update(f"{name} {tensor.dtype}".encode())
        if tensor.is_floating_point() and "mask" not in name:
            continue
        values = sharding.local(tensor).detach().cpu().reshape(-1).contiguous()
        found.update(values.view(torch.uint8).numpy().tobytes())
    return {name: each.hexdigest() for name, each in hashes.items()}
