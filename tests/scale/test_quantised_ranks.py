"""Experts in NF4 on two gloo processes: DDP trains them, engines that would shard them refuse."""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from support.model_zoo import make_model, randomise, token_ids
from support.ranks import errors_of, play
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_kernels import add_modality_tokens, patch_model
from moe_kernels.models.parts import all_experts
from moe_kernels.testing import relative_rms

pytestmark = pytest.mark.scale
SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
SHARDED = "gate_up_proj is packed and sharded.*DDP"


def in_nf4(model):
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for experts in all_experts(model).values():
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(experts, name, compress_statistics=True, quant_type="nf4")
    return model


def patch(model):
    patched = patch_model(model)
    add_modality_tokens(model, "image", 8)
    randomise(patched)
    model.train()
    return patched


def loss(model, rank):
    ids = token_ids(2, 12, seed=rank)
    modality_ids = torch.tensor([[0], [1]]).expand_as(ids)
    return model(ids, labels=ids, modality_ids=modality_ids).loss


def ddp(rank, folder):
    """Gradients are the mean of those of both batches on one device, to rounding."""
    packed = in_nf4(make_model("mixtral", **SIZES))
    alone = patch(copy.deepcopy(packed))
    (loss(alone.model, 0) / 2 + loss(alone.model, 1) / 2).backward()
    patched = patch(packed)
    wrapped = DistributedDataParallel(packed)
    for _ in range(2):
        patched.model.zero_grad()
        loss(wrapped, rank).backward()
        for found, expected in zip(
            patched.trainable_parameters(), alone.trainable_parameters(), strict=True
        ):
            assert relative_rms(found.grad, expected.grad) < 1e-5
    patched.save_adapter(folder / "adapter")
    dist.barrier()
    patched.load_adapter(folder / "adapter")


def fsdp2(rank, folder):
    """Before patching and after."""
    mesh = init_device_mesh("cpu", (2,))
    model = in_nf4(make_model("mixtral", **SIZES))
    later = copy.deepcopy(model)
    patch(later)
    for each in (*model.model.layers, *later.model.layers):
        fully_shard(each, mesh=mesh)
    with pytest.raises(ValueError, match=SHARDED):
        patch_model(model)
    with pytest.raises(RuntimeError, match=f"sharded after patch_model, and .*{SHARDED}"):
        loss(later, rank)


def fsdp2_without_experts(rank, folder):
    """Experts that FSDP2 ignores are whole: the loss has the bits of one device."""
    packed = in_nf4(make_model("mixtral", **SIZES))
    alone = patch(copy.deepcopy(packed))
    patched = patch(packed)
    codes = {p for n, p in packed.named_parameters() if "parametrizations" in n}
    mesh = init_device_mesh("cpu", (2,))
    for each in (*packed.model.layers, packed):
        fully_shard(each, mesh=mesh, ignored_params=codes)
    assert torch.equal(loss(packed, rank), loss(alone.model, rank))
    patched.save_adapter(folder / "adapter")


def engine_of(patched, stage):
    """Return DeepSpeed's engine of a patched model."""
    import deepspeed

    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": zero,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    optimizer = torch.optim.AdamW(list(patched.trainable_parameters()), lr=1e-2)
    return deepspeed.initialize(model=patched.model, optimizer=optimizer, config=config)[0]


def zero2(rank, folder):
    packed = in_nf4(make_model("mixtral", **SIZES))
    alone = patch(copy.deepcopy(packed))
    patched = patch(packed)
    engine = engine_of(patched, 2)
    found = loss(engine, rank)
    assert torch.equal(found, loss(alone.model, rank))
    engine.backward(found)
    engine.step()
    assert not torch.equal(loss(engine, rank), found)
    patched.save_adapter(folder / "adapter")


def zero3(rank, folder):
    engine = engine_of(patch(in_nf4(make_model("mixtral", **SIZES))), 3)
    with pytest.raises(RuntimeError, match=f"sharded after patch_model, and .*{SHARDED}"):
        loss(engine, rank)


SCENES = {each.__name__: each for each in (ddp, fsdp2, fsdp2_without_experts, zero2, zero3)}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    return errors_of(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("scene", SCENES)
def test_two_ranks(scene, errors):
    assert scene not in errors, errors[scene]


if __name__ == "__main__":
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    play(SCENES, sys.argv[1])
