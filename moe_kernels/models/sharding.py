"""Parameters of a model that an engine has sharded over ranks: FSDP2, or DeepSpeed's ZeRO.

FSDP2 makes a parameter a DTensor. ZeRO-3 leaves an empty tensor, with the whole shape in
``ds_shape`` and this rank's part in ``ds_tensor``. ZeRO-1 and ZeRO-2 leave parameters whole, and
train copies of them in float32. FSDP1 joins parameters into one, and tensor parallelism makes
DTensors whose layers compute with a part: both are refused. Expert parallelism does so with experts
alone, which ``spread_experts`` computes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

_NO_VALUE = -1
_MANAGED = "_is_fsdp_managed_module"  # FSDP marks modules so, for dynamo
SPREAD = "_moe_kernels_spread"  # where an experts module has its SpreadExperts
_SPREAD_MODALITIES = 256  # whole numbers that bfloat16 has, in which rows carry their modality
NO_MASK = (
    "expert parallelism by an implementation that brings rows to their experts without their "
    'modality: load the model with DistributedConfig(ep_size=..., ep_implementation="moe_kernels")'
)


def spread(experts: nn.Module) -> Any:
    """Return the ``SpreadExperts`` that brings rows to experts of several ranks, or None."""
    return experts.__dict__.get(SPREAD)


def spread_without_mask(experts: nn.Module) -> bool:
    """Return whether experts are spread over ranks by what knows no modalities."""
    return bool(getattr(experts, "_is_expert_parallel", False)) and spread(experts) is None


def modalities_problem(number: int) -> str | None:
    """Return why experts that are spread over ranks cannot tell so many modalities apart."""
    if number <= _SPREAD_MODALITIES:
        return None
    return (
        f"{number} modalities, and experts that are spread over ranks (expert parallelism) tell "
        f"{_SPREAD_MODALITIES} apart"
    )


def is_sharded(parameter: Tensor) -> bool:
    """Return whether an engine has sharded a parameter, so that reading it takes all ranks."""
    return isinstance(parameter, DTensor) or is_zero3(parameter)


def is_model_sharded(model: nn.Module) -> bool:
    """Return whether an engine has sharded a model, also while some of its parameters are whole."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        map(is_sharded, model.parameters())
    )


def members(parameters: Iterable[Tensor]) -> tuple[int, ...] | None:
    """Return the ranks that hold the sharded ones of these parameters; None: none is sharded."""
    meshes, groups = set(), set()
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            meshes.add(parameter.device_mesh)
        elif is_zero3(parameter):
            groups.add(parameter.ds_process_group)
    ranks = [rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()]
    ranks += [rank for group in groups for rank in dist.get_process_group_ranks(group)]
    return tuple(sorted(set(ranks))) or None


def trained_copies(parameters: Iterable[Tensor]) -> bool:
    """Return whether ZeRO-1 or ZeRO-2 trains copies of these parameters, each rank some of them."""
    return any(hasattr(parameter, "_hp_mapping") for parameter in parameters)


def shard_evenly(mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard]:
    """Return a ``shard_placement_fn`` for ``fully_shard`` that pads as little as it can.

    FSDP2 shards the first dimension unless it is told otherwise, and pads it to a multiple of the
    ranks. In stacks of experts (E, out, in) and in adapters (M, E, r, in) it is short: with 8
    experts on 64 ranks, 8 times the weights would be sent and held, and the only modality of an
    adapter would be on one rank. This takes the first dimension that the ranks divide; a parameter
    without one is padded as by FSDP2.

    Args:
        mesh: that of ``fully_shard``; its last dimension is sharded over.

    Example:
        >>> for layer in model.model.layers:
        ...     fully_shard(layer, mesh=mesh, shard_placement_fn=shard_evenly(mesh))
    """
    ranks = mesh.shape[-1]

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(next((d for d, size in enumerate(parameter.shape) if size % ranks == 0), 0))

    return placement


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that FSDP2 keeps after a forward without a backward.

    They are copies: what is written into them is lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_beside(module: nn.Module, weight: Tensor) -> None:
    """Shard a new module over the ranks of a weight that FSDP2 has sharded; else do nothing.

    All ranks call this together, and get the first one's values. The module is no unit of FSDP2,
    which takes no parameter later: it reads its parameters by :func:`moe_kernels.layers.whole`.
    """
    if not isinstance(weight, DTensor):
        return
    mesh, placement = weight.device_mesh, shard_evenly(weight.device_mesh)
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                continue
            values = parameter.detach().to(mesh.device_type)
            for dimension in range(mesh.ndim):
                dist.broadcast(values, group=mesh.get_group(dimension), group_src=0)
            placements = [placement(values) if p.is_shard() else p for p in weight.placements]
            sharded = distribute_tensor(values, mesh, placements, src_data_rank=None)
            owner._parameters[name] = nn.Parameter(sharded, parameter.requires_grad)


def check_whole(model: nn.Module, what: str) -> None:
    """Raise ValueError if a model is sharded; for functions that read many of its weights."""
    if is_model_sharded(model):
        raise ValueError(
            f"{what} reads the weights of a model, and those of this one are sharded: call it "
            "before fully_shard or deepspeed.initialize"
        )


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before FSDP2 took it."""
    return next(each for each in type(module).__mro__ if not issubclass(each, FSDPModule))


def problem(model: nn.Module) -> str | None:
    """Return why nothing can be added to a model as it is sharded; None: it can."""
    if any(hasattr(parameter, "_z3_optimizer") for parameter in model.parameters()):
        return (
            "DeepSpeed ZeRO-3 trains it already, and takes no new parameters: patch it, add tokens "
            "or load the adapter before deepspeed.initialize"
        )
    return foreign_engine(model)


def foreign_engine(model: nn.Module) -> str | None:
    """Return which engine that is not supported holds parameters of a model; None: none does."""
    if any(map(_is_fsdp1, model.modules())):
        return "FSDP1 (FullyShardedDataParallel) joins its parameters into one: use FSDP2 instead"
    for name, module in model.named_modules():
        if isinstance(module, ParametrizationList) and any(map(is_sharded, module.parameters())):
            return (
                f"{name} is packed and sharded, while what unpacks it is whole: keep the packed "
                "experts whole on each rank (DDP, ZeRO-2, or ignored_params of fully_shard)"
            )
        if spread_without_mask(module):
            return f"{name}: {NO_MASK}"
        if problem := _spread_problem(module, model):
            return f"{name}: {problem}"
    for name, parameter in _of_tensor_parallelism(model):
        return (
            f"{name} is a DTensor that FSDP2 does not manage, or not alone (tensor or expert "
            f"parallelism? {parameter.placements} on {parameter.device_mesh}): load the model "
            "without tp_plan, tp_size and parallelize_module, and shard it by FSDP2 or DeepSpeed, "
            'and its experts by DistributedConfig(ep_size=..., ep_implementation="moe_kernels")'
        )
    return None


def _spread_problem(experts: nn.Module, model: nn.Module) -> str | None:
    """Return why experts cannot be spread as they are, or a model with them; None: they can."""
    if (found := spread(experts)) is None:
        return None
    if is_parametrized(experts):
        return "its weights are packed, and expert parallelism spreads plain ones: load it unpacked"
    if experts.__dict__.get("_added_experts"):
        return "experts were added to it, which cannot be spread over ranks (expert parallelism)"
    for lora in experts.__dict__.get("_modality_lora", {}).values():
        if problem := modalities_problem(whole_shape(lora.lora_A)[0]):
            return problem
    if found.shares_batch:
        return None
    if found.tp_mesh.size() > 1:
        return (
            "expert parallelism of ranks of which some hold the same batch, and others do not: let "
            "all ranks that share the experts hold one batch, or each its own"
        )
    if may_be_held(model.get_input_embeddings()):  # in a forward FSDP2 may have gathered it
        return None
    return (
        "expert parallelism of ranks with batches of their own needs FSDP2, which takes the mean "
        "of their gradients: load the model with DistributedConfig(fsdp_size=..., ep_size=...)"
    )


def may_be_held(module: nn.Module) -> bool:
    """Return whether an engine may hold a module's own parameters: what is quick to see."""
    if is_parametrized(module) and any(map(is_sharded, module.parametrizations.parameters())):
        return True
    return _MANAGED in module.__dict__ or any(
        isinstance(parameter, DTensor) for parameter in module._parameters.values()
    )


def _is_fsdp1(module: nn.Module) -> bool:
    return isinstance(module, FullyShardedDataParallel) or any(
        getattr(parameter, "_fsdp_flattened", False) for parameter in module._parameters.values()
    )


def _of_tensor_parallelism(
    module: nn.Module, prefix: str = "", managed: bool = False
) -> Iterator[tuple[str, DTensor]]:
    """Yield parameters that are sharded twice, or not within a module that FSDP2 manages."""
    managed = managed or isinstance(module, FSDPModule) or _MANAGED in module.__dict__
    for name, parameter in module._parameters.items():
        if isinstance(parameter, DTensor) and spread(module) is None:
            times = sum(not placement.is_replicate() for placement in parameter.placements)
            if times > 1 or not managed:
                yield prefix + name, parameter
    for name, child in module.named_children():
        yield from _of_tensor_parallelism(child, f"{prefix}{name}.", managed)


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter."""
    return torch.Size(parameter.ds_shape) if is_zero3(parameter) else parameter.shape


def local(parameter: Tensor) -> Tensor:
    """Return the plain tensor that holds this rank's values of a parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return parameter.ds_tensor if _is_partitioned(parameter) else parameter


def holders(parameter: Tensor) -> tuple[int, int]:
    """Return how many ranks have values of a parameter, of those over which FSDP2 shards it.

    Where no placement would use more of them, they count as all.
    """
    if not isinstance(parameter, DTensor):
        return 1, 1
    mesh = parameter.device_mesh
    dimension = next((i for i, p in enumerate(parameter.placements) if p.is_shard()), None)
    if dimension is None or max(parameter.shape) < mesh.shape[dimension]:
        return 1, 1
    size = parameter.shape[parameter.placements[dimension].dim]
    return min(size, mesh.shape[dimension]), mesh.shape[dimension]


def part_of(parameter: Tensor) -> tuple[int, ...] | None:
    """Return this rank's place among the shards of a parameter, which its replicas share.

    It is empty for a whole parameter, and None where no other rank has the same values (ZeRO-3).
    """
    if not isinstance(parameter, DTensor):
        return None if is_zero3(parameter) else ()
    own = parameter.device_mesh.get_coordinate()
    return tuple(i for i, each in zip(own, parameter.placements, strict=True) if each.is_shard())


@torch.no_grad()
def gather(parameter: Tensor) -> Tensor:
    """Return the whole parameter; of a sharded one on all ranks, which must call this together."""
    if isinstance(parameter, DTensor):
        # FSDP2 may keep it on the CPU, from which the mesh's backend does not send.
        return parameter.detach().to(parameter.device_mesh.device_type).full_tensor()
    if not _is_partitioned(parameter):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@torch.no_grad()
def put(parameter: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into a parameter; of a sharded one on all ranks, together."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        values = values.to(device=mesh.device_type, dtype=parameter.dtype)
        parameter.copy_(distribute_tensor(values, mesh, parameter.placements, src_data_rank=None))
    elif is_zero3(parameter):
        _put_zero3(parameter, values)
    else:
        parameter.copy_(values)
        if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and ZeRO-2 train a copy in float32
            parameter.set_full_hp_param(values.to(parameter.device))


def samples(parameters: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Return up to ``number`` values of each parameter, evenly spread, as bits of bfloat16.

    Of sharded parameters each rank gives the values that it has: nothing is gathered.
    """
    found = {name: _sample(parameter, number) for name, parameter in parameters.items()}
    if not (sharded := [name for name, p in parameters.items() if is_sharded(p)]):
        return found
    first = parameters[sharded[0]]
    joined = torch.cat([found[name] for name in sharded])
    for group, device in _groups(first):
        joined = joined.to(device)
        dist.all_reduce(joined, dist.ReduceOp.MAX, group=group)
    sizes = [found[name].numel() for name in sharded]
    return found | dict(zip(sharded, joined.cpu().split(sizes), strict=True))


def _sample(parameter: Tensor, number: int) -> Tensor:
    """Return sampled values of one parameter, int32; _NO_VALUE where another rank has the value."""
    shape = whole_shape(parameter)
    at = torch.arange(shape.numel())[:: max(1, shape.numel() // number)][:number]
    values, (inside, places) = local(parameter).detach().reshape(-1), _places(parameter, at)
    bits = values[places[inside].to(values.device)].bfloat16().view(torch.int16)
    sample = torch.full(at.shape, _NO_VALUE, dtype=torch.int32)
    sample[inside] = bits.cpu().to(torch.int32) & 0xFFFF
    return sample


def _places(parameter: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Map places in the whole parameter, flat, to those in :func:`local`, and say which are there.

    Returns:
        Bool, of the places that are there; and int64, the place of each, if it is.
    """
    if _is_partitioned(parameter):
        size = parameter.ds_tensor.numel()
        places = at - size * dist.get_rank(parameter.ds_process_group)
        return (places >= 0) & (places < size), places
    if not isinstance(parameter, DTensor):
        return torch.ones_like(at, dtype=torch.bool), at
    (chunk,) = parameter.__create_chunk_list__()
    inside, places = torch.ones_like(at, dtype=torch.bool), torch.zeros_like(at)
    for index, start, size in zip(
        torch.unravel_index(at, parameter.shape), chunk.offsets, chunk.sizes, strict=True
    ):
        inside &= (index >= start) & (index < start + size)
        places = places * size + index - start
    return inside, places


def _groups(parameter: Tensor) -> Iterator[tuple[dist.ProcessGroup, torch.device]]:
    """Yield the groups over which a parameter is sharded, and the device that they send from."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for dimension in range(mesh.ndim):
            yield mesh.get_group(dimension), torch.device(mesh.device_type)
    else:
        yield parameter.ds_process_group, parameter.device


def _put_zero3(parameter: Tensor, values: Tensor) -> None:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(values)
    if hasattr(parameter, "_z3_optimizer"):  # trains a copy in float32
        part = parameter.ds_tensor
        start, flat = part.numel() * dist.get_rank(parameter.ds_process_group), values.reshape(-1)
        own = flat[start : start + part.numel()].to(part.device, torch.float32)
        own = F.pad(own, (0, part.numel() - own.numel()))
        deepspeed.utils.safe_set_local_fp32_param(parameter, own)


def is_zero3(parameter: Tensor) -> bool:
    """Return whether DeepSpeed ZeRO-3 has partitioned a parameter."""
    return hasattr(parameter, "ds_id")


def _is_partitioned(parameter: Tensor) -> bool:
    """Return whether this is a parameter of ZeRO-3 of which nothing but ``ds_tensor`` is here."""
    return is_zero3(parameter) and parameter.ds_status.name != "AVAILABLE"
