"""FSDP2 and DDP send in a step what benchmarks/lib/collectives.py says.

Two gloo processes count it, and for 64 and 512 ranks one process that torch's "fake" backend lets
believe that there are others: what it gathers are no values, but the messages have their sizes.
"""

import sys
from collections import Counter

import pytest
import torch.distributed as dist
from support.ranks import errors_of, play
from support.sent import base, formulas, patched, step
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed import fake_pg  # noqa: F401, registers the backend

from moe_kernels import shard_evenly
from moe_kernels.models.handle import get_patched

LARGE = {"hidden_size": 512, "num_attention_heads": 64}  # 64 and 512 ranks divide it
SETTINGS = ({}, {"reshard": False}, {"evenly": False}, {"sharded_first": True})


def sharded(mesh, *, reshard=True, evenly=True, sharded_first=False, **settings):
    """Return a patched model that is sharded as docs/scaling.md does."""
    model = base(**settings)
    options = {"mesh": mesh} | ({"shard_placement_fn": shard_evenly(mesh)} if evenly else {})
    if not sharded_first:
        patched(model)
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=reshard, **options)
    fully_shard(model, **options)
    return patched(model) if sharded_first else model


def check(model, expected):
    counted = Counter(step(model).messages)
    right = Counter((each.kind, each.size) for each in expected)
    assert counted == right, (counted - right, right - counted)


def fsdp2(rank, folder):
    of, mesh = formulas(), init_device_mesh("cpu", (2,))
    for settings in SETTINGS:
        layout = {k: v for k, v in settings.items() if k != "evenly"}
        units = of.units(patched(base()), **layout)
        model = sharded(mesh, **settings)
        check(model, of.fsdp2(units, 2, evenly=settings.get("evenly", True)))


def ddp(rank, folder):
    model = patched(base())
    check(DistributedDataParallel(model), formulas().ddp(model, 2))


SCENES = {"fsdp2": fsdp2, "ddp": ddp}


def test_two_ranks_send_what_the_formulas_say(tmp_path):
    assert not (errors := errors_of(__file__, tmp_path)), "\n".join(errors.values())


@pytest.fixture(params=[64, 512])
def ranks(request):
    dist.init_process_group("fake", rank=0, world_size=request.param, store=dist.HashStore())
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("evenly", [True, False])
@pytest.mark.parametrize("per_node", [None, 8])
def test_many_ranks_would_send_what_the_formulas_say(ranks, per_node, evenly):
    of, whole = formulas(), patched(base(**LARGE))
    shape = (ranks // per_node, per_node) if per_node else (ranks,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("nodes", "ranks")[-len(shape) :])
    model = sharded(mesh, evenly=evenly, **LARGE)
    get_patched(model).compare_ranks = False  # no other rank comes
    check(model, of.fsdp2(of.units(whole), shape[-1], ranks // shape[-1], evenly=evenly))


if __name__ == "__main__":
    play(SCENES, sys.argv[1])
