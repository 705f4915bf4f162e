"""Two ranks: other patches are detected, layers are scored together, the fused loss is sharded."""

import itertools
import sys
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.model_zoo import VOCAB, make_model, token_ids
from support.patched_models import patched_model
from support.ranks import play
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model, shard_evenly
from moe_kernels.modalities import (
    ModalityCollator,
    join_features_and_text,
    join_placeholders,
    joining_placeholders,
)
from moe_kernels.models import sharding
from moe_kernels.moextend import ExpertExtender, tuning
from moe_kernels.testing import relative_rms

IMAGE = 6


def batch(rank):
    ids = token_ids(2, 12, seed=7 + rank)
    ids[:, 6:] = VOCAB + ids[:, 6:] % IMAGE
    return {"input_ids": ids, "labels": ids}


def loss(model, rank):
    return model.train()(**batch(rank)).loss


def refused(model, rank):
    """Check that the second of the two ranks to come refuses its model."""
    try:
        loss(model, rank)
    except RuntimeError as error:
        answer = str(error)
    else:
        answer = ""
    answers = [None, None]
    dist.all_gather_object(answers, answer)
    late = "trains another model than a rank before it"
    assert sorted(late in each for each in answers) == [False, True], answers


def other_layers(rank, folder):
    """The numbers and shapes of parameters agree, so that DDP finds nothing."""
    model, _ = patched_model("mixtral", ModalityLoraConfig(r=2), num_tokens=IMAGE)
    ExpertExtender(model).extend([rank], 1, init=0)
    refused(model, rank)


def other_tokens(rank, folder):
    model, _ = patched_model("mixtral", ModalityLoraConfig(r=2), num_tokens=IMAGE + rank)
    refused(model, rank)


def other_trained(rank, folder):
    model, patched = patched_model("mixtral", ModalityLoraConfig(r=2), num_tokens=IMAGE)
    list(patched.trainable_parameters())[rank].requires_grad_(False)
    refused(model, rank)


def other_layers_compiled(rank, folder):
    """The check is part of compiling."""
    model, _ = patched_model("mixtral", ModalityLoraConfig(r=2), num_tokens=IMAGE)
    ExpertExtender(model).extend([rank], 1, init=0, calibration="additive")
    refused(torch.compile(model, backend="eager"), rank)


def a_refused_model_stays_refused(rank, folder):
    """A loop that skips a failed batch must not train on."""
    model, patched = patched_model("mixtral", ModalityLoraConfig(r=2 + rank), num_tokens=IMAGE)
    if rank == 0:
        loss(model, rank)
    dist.barrier()
    if rank == 1:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="If ranks .* patched.compare_ranks = False"):
                loss(model, rank)
        patched.compare_ranks = False
        loss(model, rank)
    dist.barrier()


def text_of_one_rank(rank, folder):
    """Rank 1 trains on text alone, by text_only() or embeddings: its rows get no gradient."""
    for engine, by_embeddings in itertools.product(("ddp", "fsdp2", "sharded first"), (0, 1)):
        alone, patched = patched_model("mixtral", ModalityLoraConfig(r=2), num_tokens=IMAGE)
        (loss_of_text(patched, by_embeddings) / 2 + loss(alone, 0) / 2).backward()
        expected = {name: p.grad for name, p in patched.named_trainable_parameters()}
        model, patched = patched_model("mixtral", ModalityLoraConfig(r=2), num_tokens=IMAGE)
        if engine == "sharded first":
            state = {n: p.detach() for n, p in patched.named_trainable_parameters()}
            patched = patch_model(sharded(make_model("mixtral")), ModalityLoraConfig(r=2))
            add_modality_tokens(patched.model, "image", IMAGE)
            for name, parameter in patched.named_trainable_parameters():
                sharding.put(parameter, state[name])
        elif engine == "fsdp2":
            sharded(model)
        model = patched.model.train()
        outer = DistributedDataParallel(model) if engine == "ddp" else model
        found = loss(outer, 0) if rank == 0 else loss_of_text(patched, by_embeddings, outer)
        found.backward()
        for name, parameter in patched.named_trainable_parameters():
            gradient = parameter.grad
            gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            assert relative_rms(gradient, expected[name]) < 1e-3, (engine, by_embeddings, name)


def joins_no_features_beside_a_sharded_table(rank, folder):
    model, _ = patched_model("mixtral", ModalityLoraConfig(r=2))
    sharded(model)
    with pytest.raises(ValueError, match="embedding table outside of the model's forward, and"):
        join_features_and_text(model, torch.zeros(1, 2, 32), token_ids(1, 2))
    with pytest.raises(ValueError, match="embedding table outside of the model's forward, and"):
        join_placeholders(model, token_ids(1, 2), {}, {"image": VOCAB})
    with (
        pytest.raises(ValueError, match="embedding table outside of the model's forward, and"),
        joining_placeholders(model, {"image": VOCAB}),
    ):
        pass


def projects_features_of_one_rank(rank, folder):
    """DDP waits for each projector on all ranks, and rank 1 has no features of either modality."""
    model = make_model("mixtral")
    patch_model(model, ModalityLoraConfig(modalities=("image", "audio"), target_modules=()))
    modalities = {"image": VOCAB, "audio": VOCAB + 1}
    torch.manual_seed(0)
    for name in modalities:
        ExpertExtender(model).add_projector(4, modality=name)
    own = {"input_ids": [5, 6]}
    if rank == 0:
        ids, features = [5, *modalities.values(), 6], dict.fromkeys(modalities, [torch.ones(2, 4)])
        own = {"input_ids": ids, "features": features}
    with joining_placeholders(model, modalities):
        wrapped = DistributedDataParallel(model.train())
        for _ in range(2):
            wrapped(**ModalityCollator(modalities, 0)([own])).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            both = [torch.empty_like(parameter) for _ in range(2)]
            dist.all_gather(both, parameter.grad)
            assert torch.equal(*both) and both[0].any(), name


def sharded(model):
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=init_device_mesh("cpu", (2,)))
    return model


def loss_of_text(patched, by_embeddings, model=None):
    model, ids = model or patched.model.train(), token_ids(2, 12, seed=3)
    if not by_embeddings:
        with patched.text_only():
            return model(input_ids=ids, labels=ids).loss
    embeds = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(5))
    modality_ids = torch.zeros_like(ids)
    return model(inputs_embeds=embeds, modality_ids=modality_ids, labels=ids).loss


def adapters_on_one_rank(rank, folder):
    """FSDP2 shards the first dimension, which is 1 for one modality."""
    mesh = init_device_mesh("cpu", (2,))
    for options in ({}, {"shard_placement_fn": shard_evenly(mesh)}):
        model, _ = patched_model("mixtral", ModalityLoraConfig(r=2), num_tokens=IMAGE)
        for unit in (*model.model.layers, model):
            fully_shard(unit, mesh=mesh, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss(model, rank).backward()
        told = [w for w in caught if "lora_A on 1 of 2 ranks" in str(w.message)]
        assert len(told) == (not options)


def other_replicas(rank, folder):
    """FSDP2 hands out no values: replicas that differ stay apart, and one of them is saved.

    Both ranks raise: one alone would leave the other in a collective.
    """
    answers = [None, None]
    for differ in (False, True):
        model = make_model("mixtral").train()
        torch.manual_seed(rank if differ else 0)
        patch_model(model, ModalityLoraConfig(r=2))
        for unit in (*model.model.layers, model):
            fully_shard(unit, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("r", "s")))
        try:
            model(input_ids=token_ids(1, 4), modality_ids=torch.ones(1, 4).long())
        except RuntimeError as error:
            answer = str(error)
        else:
            answer = ""
        dist.all_gather_object(answers, answer)
        told = ["from other values than another rank" in each for each in answers]
        assert told == [differ, differ], answers


def same(rank, folder):
    """A model that grows on both, and a forward of one rank alone, are no fault."""
    model, _ = patched_model("mixtral", ModalityLoraConfig(r=2), num_tokens=IMAGE)
    if rank == 0:
        loss(model, rank)
    dist.barrier()
    loss(model, rank)
    ExpertExtender(model).extend([1], 1, init=0)
    loss(model, rank)
    other, _ = patched_model("olmoe", ModalityLoraConfig(r=3), num_tokens=IMAGE)
    loss(other, rank)


def scores(rank, folder):
    """Each rank has its own data, and rank 1 no image at all in one of its batches."""
    model, _ = patched_model("mixtral", ModalityLoraConfig(r=2))
    add_modality_tokens(model, "image", IMAGE)
    text = token_ids(2, 12)
    own = [batch(rank), {"input_ids": text} if rank else batch(5)]
    found = ExpertExtender(model).score_layers(own, 2, progress=False)
    both = [None, None]
    dist.all_gather_object(both, found.to_dict())
    assert both[0] == both[1]
    images = 3 * 2 * 6  # three batches of two rows with six tokens of images
    assert found.before.sum(1).tolist() == [2 * images] * 2  # top 2


def scores_a_sharded_model(rank, folder):
    model, _ = patched_model("mixtral", ModalityLoraConfig(r=2), num_tokens=IMAGE)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="score_layers reads the weights .* before fully_shard"):
        ExpertExtender(model).score_layers([batch(rank)], 1, progress=False)


def scores_alone(rank, folder):
    """One rank that scores alone is told so; the sum over ranks would wait for ever."""
    if rank == 0:
        model, _ = patched_model("mixtral", ModalityLoraConfig(r=2), num_tokens=IMAGE)
        extender = ExpertExtender(model)
        with (
            mock.patch.object(tuning, "_TIMEOUT", 0.5),
            pytest.raises(RuntimeError, match="score_layers was called on rank 0 of 2 alone"),
        ):
            extender.score_layers([batch(0)], 1, progress=False)
    dist.barrier()


def scores_and_fails(rank, folder):
    """An error of one rank is that of all, before and after they have begun."""
    model, _ = patched_model("mixtral", ModalityLoraConfig(r=2), num_tokens=IMAGE)
    extender, own = ExpertExtender(model), f"score_layers failed on rank {1 - rank}: "
    none = [] if rank == 1 else [batch(0)]
    with pytest.raises(ValueError if rank == 1 else RuntimeError) as failure:
        extender.score_layers(none, 1, progress=False)
    assert (
        str(failure.value)
        == ("" if rank else own + "ValueError: ") + "the dataloader gave no batch"
    )
    diverging = batch(rank)
    if rank == 0:
        diverging["labels"] = torch.full_like(diverging["labels"], -100)
    with pytest.raises(RuntimeError, match="" if rank == 0 else own) as failure:
        extender.score_layers([diverging], 1, progress=False)
    assert "the loss became nan" in str(failure.value)
    assert extender.score_layers([batch(rank)], 1, progress=False).before.any()


def fused_loss(rank, folder):
    """The head is a unit of FSDP2, which frees its weight between forward and backward."""

    def gradients(fused):
        model, patched = patched_model("mixtral", ModalityLoraConfig(r=2), num_tokens=IMAGE)
        patched.fused_loss = fused
        if not fused:
            (loss(model, 0) / 2 + loss(model, 1) / 2).backward()
            return {name: p.grad for name, p in patched.named_trainable_parameters()}
        for unit in (*model.model.layers, model.lm_head, model):
            fully_shard(unit, mesh=init_device_mesh("cpu", (2,)))
        loss(model, rank).backward()
        return {n: p.grad.full_tensor() for n, p in patched.named_trainable_parameters()}

    expected = gradients(False)
    for name, gradient in gradients(True).items():
        error = relative_rms(gradient, expected[name])
        assert error < 1e-3, (name, error)


def fsdp1(rank, folder):
    """Each rank holds other parameters, and must hear the same."""
    for original in (True, False):
        model = make_model("mixtral")
        FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)
        with pytest.raises(ValueError, match="FSDP1 .* use FSDP2"):
            patch_model(model)
    model, patched = patched_model("mixtral", ModalityLoraConfig(r=2), num_tokens=IMAGE)
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    for call in (lambda: wrapped.eval()(**batch(rank)), lambda: loss(wrapped, rank)):
        with pytest.raises(RuntimeError, match="sharded after patch_model, and FSDP1 .* use FSDP2"):
            call()
    with pytest.raises(RuntimeError, match="FSDP1 .* use FSDP2"):
        patched.save_adapter(folder / "adapter")
    assert not (folder / "adapter").exists()


def by_tensors(model, mesh):
    """Shard the attention of each layer by tensor parallelism."""
    plan = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel())
    for layer in model.model.layers:
        parallelize_module(layer.self_attn, mesh, plan | {"o_proj": RowwiseParallel()})


def tensor_parallelism(rank, folder):
    """Alone, and below FSDP2; before patching and after."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    for below_fsdp in (False, True):
        model = make_model("mixtral")
        by_tensors(model, mesh["tp"])
        if below_fsdp:
            fully_shard(model, mesh=mesh["dp"])
        match = r"q_proj.weight is a DTensor that .*\(tensor or expert para.*without tp_plan"
        with pytest.raises(ValueError, match=match):
            patch_model(model)
    model, patched = patched_model("mixtral", ModalityLoraConfig(r=2), num_tokens=IMAGE)
    by_tensors(model, mesh["tp"])
    for call in (lambda: loss(model, rank), lambda: patched.save_adapter(folder / "adapter")):
        with pytest.raises(RuntimeError, match="sharded after patch_model, and .*tensor or expert"):
            call()
    assert not (folder / "adapter").exists()


def parallelism_of_transformers(rank, folder):
    base = [folder]
    if rank == 0:
        make_model("mixtral").save_pretrained(folder)
    dist.broadcast_object_list(base)
    for sizes, match in (
        ({"tp_size": 2}, r"not supported: \S+ is a DTensor .*tensor or expert"),
        ({"fsdp_size": 2, "ep_size": 2}, r"not supported: \S+experts: expert parallelism by an"),
    ):
        config = DistributedConfig(**sizes)
        model = AutoModelForCausalLM.from_pretrained(base[0], distributed_config=config)
        with pytest.raises(ValueError, match=match):
            patch_model(model)


ALL = (
    fsdp1,
    tensor_parallelism,
    parallelism_of_transformers,
    a_refused_model_stays_refused,
    text_of_one_rank,
    joins_no_features_beside_a_sharded_table,
    projects_features_of_one_rank,
    adapters_on_one_rank,
    other_replicas,
    other_layers,
    other_layers_compiled,
    other_tokens,
    other_trained,
    same,
    scores,
    scores_a_sharded_model,
    scores_alone,
    scores_and_fails,
    fused_loss,
)
SCENES = {each.__name__: each for each in ALL}


@pytest.mark.parametrize("scene", sorted(SCENES))
def test_two_ranks(scene, scene_errors):
    assert scene not in scene_errors, scene_errors[scene]


if __name__ == "__main__":
    play(SCENES, sys.argv[1])
