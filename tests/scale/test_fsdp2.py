"""FSDP2 on two gloo processes: an adapter is saved, loaded and trained on as that of one process.

All scenes run in one pair of processes, each on both ranks; the test fails with what they raised.
"""

import dataclasses
import sys
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.model_zoo import VOCAB, make_model, randomise, token_ids
from support.ranks import errors_of, play
from support.saved_adapters import ADAPTER
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from moe_kernels import (
    ModalityLoraConfig,
    add_modality_tokens,
    initialise_lora,
    patch_model,
    shard_evenly,
)
from moe_kernels.models import tokens
from moe_kernels.models.handle import get_patched
from moe_kernels.models.named_adapters import parameters_of
from moe_kernels.moextend import ExpertExtender

IMAGE = 7  # not even: the ranks' parts differ
CONFIG = ModalityLoraConfig(r=3, target_modules=("experts", "attention", "router"))
RICH = {"experts": True, "projector": True}


def make(family="mixtral", *, seed=1, experts=False, projector=False, **settings):
    """Return a patched model with random adapters, and with what else an adapter can hold."""
    model = make_model(family, **settings)
    patched = patch_model(model, CONFIG)
    add_modality_tokens(model, "image", IMAGE)
    if experts:
        ExpertExtender(model).extend([0], 2, init=0, calibration="additive")
        ExpertExtender(model).extend("all", 1, init=1)
    if projector:
        ExpertExtender(model).add_projector(in_features=5)
    randomise(patched, seed=seed)
    model.train()
    return patched


def shard(model, mesh=None, **options):
    mesh = mesh or init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def wrap(model):
    """Wrap the layers for activation checkpointing, as accelerate does, and by torch.compile."""
    layers = set(model.model.layers)
    apply_activation_checkpointing(model, check_fn=lambda module: module in layers)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")


def batch(rank, step):
    """Make a batch: rank 0 gets pictures, rank 1 text only."""
    ids = token_ids(2, 12, seed=10 * step + rank)
    if rank == 0:
        ids[:, 6:] = VOCAB + ids[:, 6:] % IMAGE
    return ids


def adamw(patched):
    return torch.optim.AdamW(list(patched.trainable_parameters()), lr=1e-2)


def train(patched, optimiser, rank, steps):
    for step in steps:
        ids = batch(rank, step)
        patched.model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def whole(patched):
    """Return all trainable parameters, gathered."""
    return {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach().clone()
        for name, p in patched.named_trainable_parameters()
    }


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def files(folder):
    return [(folder / name).read_bytes() for name in ADAPTER]


def saved_whole(patched, folder, rank):
    """Save the adapter of a whole model, on rank 0 alone."""
    if rank == 0:
        patched.save_adapter(folder)
    dist.barrier()
    return files(folder)


# --- scenes


def saves_the_bytes_of_one_process(rank, folder):
    for number, settings in enumerate(
        (RICH, {"family": "olmoe", "tie_word_embeddings": True}, {"dtype": torch.bfloat16})
    ):
        expected = saved_whole(make(**settings), folder / f"whole-{number}", rank)
        patched = make(**settings)
        sizes = patched.count_parameters()
        shard(patched.model)
        assert patched.count_parameters() == sizes
        patched.save_adapter(folder / f"sharded-{number}")
        assert files(folder / f"sharded-{number}") == expected


def saves_under_wrappers_on_two_dimensions_and_offloaded(rank, folder):
    expected = saved_whole(make(), folder / "whole", rank)
    for name, wrapped, options in (
        ("wrapped", True, {}),
        ("replicated", False, {"mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=("r", "s"))}),
        ("offloaded", False, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    ):
        patched = make()
        if wrapped:
            wrap(patched.model)
        shard(patched.model, **options)
        patched.save_adapter(folder / name)
        assert files(folder / name) == expected, name


def saves_and_loads_after_an_evaluation(rank, folder):
    """The root keeps whole copies of its parameters then, which are not what trains."""
    patched = make()
    expected = saved_whole(patched, folder / "whole", rank)
    other = make(seed=2)
    with torch.no_grad():
        shard(patched.model)(batch(rank, 0))
        shard(other.model)(batch(rank, 0))
    patched.save_adapter(folder / "sharded")
    assert files(folder / "sharded") == expected
    other.load_adapter(folder / "whole")
    with torch.no_grad():
        other.model(batch(rank, 0))
    assert_same(whole(other), whole(make()))


def loads_into_a_sharded_model(rank, folder):
    for number, settings in enumerate((RICH, {"dtype": torch.bfloat16})):
        saved = make(**settings)
        saved_whole(saved, folder / str(number), rank)
        patched = make(seed=2, **settings)
        shard(patched.model)
        kept = list(patched.model.parameters())
        patched.load_adapter(folder / str(number))
        assert all(a is b for a, b in zip(patched.model.parameters(), kept, strict=True))
        assert_same(whole(patched), whole(saved))


def one_rank_alone_is_told_so(rank, folder):
    patched = make()
    expected = saved_whole(patched, folder / "whole", rank)
    shard(patched.model)
    if rank == 0:
        with pytest.raises(RuntimeError, match="save_adapter was called on rank 0 of 2 alone"):
            patched.save_adapter(folder / "sharded", timeout=0.5)
        with pytest.raises(RuntimeError, match="load_adapter was called on rank 0 of 2 alone"):
            patched.load_adapter(folder / "whole", timeout=0.5)
    dist.barrier()
    assert not (folder / "sharded").exists()
    patched.save_adapter(folder / "sharded")  # the ranks still find each other
    assert files(folder / "sharded") == expected


def an_error_of_one_rank_is_that_of_all(rank, folder):
    patched = make()
    expected = saved_whole(patched, folder / "whole", rank)
    shard(patched.model)
    (folder / "file").touch()
    dist.barrier()
    error, match = (FileExistsError, "file") if rank == 0 else (RuntimeError, "on rank 0: FileEx")
    with pytest.raises(error, match=match):
        patched.save_adapter(folder / "file")
    error, match = (
        (FileNotFoundError, "no adapter") if rank == 1 else (RuntimeError, "on rank 1: F")
    )
    with pytest.raises(error, match=match):
        patched.load_adapter(folder / ("whole", "nowhere")[rank])
    other = make(seed=2)
    other.save_adapter(folder / f"other-{rank}")
    config = dataclasses.replace(CONFIG, r=3 + rank)
    unlike = patch_model(make_model("mixtral"), config)
    unlike.save_adapter(folder / f"unlike-{rank}")
    shard(unlike.model)
    dist.barrier()  # both have written
    error, match = (
        (ValueError, "r: 3 != 4") if rank == 1 else (RuntimeError, "rank 1: ValueError: .* r: 3 !=")
    )
    with pytest.raises(error, match=match):  # not a hang in the first collective
        unlike.load_adapter(folder / "unlike-0")
    with pytest.raises(RuntimeError, match=r"found another model \(names .* on rank . than"):
        unlike.save_adapter(folder / "unlike")
    layer = patched.model.model.layers[0]
    if rank == 1:
        patched.model.model.layers[0] = torch.nn.Identity()
    error, match = (
        (RuntimeError, "replaced")
        if rank == 1
        else (RuntimeError, "failed on rank 1: Runtime.*repl")
    )
    with pytest.raises(error, match=match):
        patched.save_adapter(folder / "sharded")
    patched.model.model.layers[0] = layer
    if rank == 1:
        randomise(other, seed=3)
        other.save_adapter(folder / f"other-{rank}")
    with pytest.raises(RuntimeError, match="found another adapter in .*/other-. on rank"):
        patched.load_adapter(folder / f"other-{rank}")
    patched.save_adapter(folder / "sharded")
    assert files(folder / "sharded") == expected


def what_could_not_be_loaded_is_refused_before_a_byte(rank, folder):
    patched = make()
    saved_whole(patched, folder / "whole", rank)
    frozen = make()
    frozen.model.model.layers[0].modality_lora.q_proj.lora_A.requires_grad_(False)
    shard(frozen.model)
    with pytest.raises(ValueError, match="q_proj.lora_A is frozen in this sharded .* was trained"):
        frozen.load_adapter(folder / "whole")
    other = patch_model(make_model("mixtral", seed=5), CONFIG)
    add_modality_tokens(other.model, "image", IMAGE)
    shard(other.model)
    with pytest.raises(ValueError, match="trained on other base weights"):
        other.load_adapter(folder / "whole")
    model, mesh = make_model("mixtral"), init_device_mesh("cpu", (2,))
    model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh))
    with pytest.raises(ValueError, match="lm_head.weight is a DTensor that FSDP2 does not manage"):
        patch_model(model)
    shard(patched.model)
    lora = patched.model.model.layers[0].modality_lora.q_proj
    lora.lora_A = torch.nn.Parameter(lora.lora_A.detach()[..., :-1])
    with pytest.raises(ValueError, match=r"q_proj.lora_A are not here: it has shape \(1, 3, 31\)"):
        patched.save_adapter(folder / "sharded")
    assert not (folder / "sharded").exists()


def a_resumed_run_is_the_uninterrupted_one(rank, folder):
    """The adapter and a distributed checkpoint of the optimiser are all that a run needs."""
    options = StateDictOptions(ignore_frozen_params=True)
    patched = make(experts=True)
    shard(patched.model)
    optimiser = adamw(patched)
    train(patched, optimiser, rank, range(2))
    patched.save_adapter(folder / "adapter")
    state = get_optimizer_state_dict(patched.model, optimiser, options=options)
    dcp.save({"optimiser": state}, checkpoint_id=folder / "optimiser")
    train(patched, optimiser, rank, range(2, 4))

    resumed = make(experts=True, seed=2)
    shard(resumed.model)
    resumed.load_adapter(folder / "adapter")
    again = adamw(resumed)
    state = get_optimizer_state_dict(resumed.model, again, options=options)
    dcp.load({"optimiser": state}, checkpoint_id=folder / "optimiser")
    set_optimizer_state_dict(resumed.model, again, state, options=options)
    train(resumed, again, rank, range(2, 4))
    assert_same(whole(resumed), whole(patched))


def distributed_checkpoints_hold_what_trains(rank, folder):
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    patched, other = make(**RICH), make(seed=2, **RICH)
    for each in (patched, other):
        shard(each.model)
    state = get_model_state_dict(patched.model, options=options)
    assert state.keys() == dict(patched.named_trainable_parameters()).keys()
    dcp.save({"model": state}, checkpoint_id=folder / "trained")
    state = get_model_state_dict(other.model, options=options)
    dcp.load({"model": state}, checkpoint_id=folder / "trained")
    set_model_state_dict(other.model, state, options=options)
    assert_same(whole(other), whole(patched))


def trains_as_one_process(rank, folder):
    """Losses of both ranks' batches, one of them text only, with clipping and checkpointing."""
    mesh = init_device_mesh("cpu", (2,))
    for options in ({}, {"mesh": mesh, "shard_placement_fn": shard_evenly(mesh)}):
        alone, patched = make(experts=True), make(experts=True)
        for each in (alone, patched):
            each.model.gradient_checkpointing_enable({"use_reentrant": False})
        shard(patched.model, **options)
        optimisers = adamw(alone), adamw(patched)
        for step in range(3):
            both = [batch(each, step) for each in range(2)]
            sum(alone.model(ids, labels=ids).loss / 2 for ids in both).backward()
            patched.model(both[rank], labels=both[rank]).loss.backward()
            for each, optimiser in zip((alone, patched), optimisers, strict=True):
                torch.nn.utils.clip_grad_norm_(list(each.trainable_parameters()), 1.0)
                optimiser.step()
                optimiser.zero_grad()
        expected = whole(alone)
        for name, tensor in whole(patched).items():
            assert (tensor - expected[name]).norm() < 1e-3 * expected[name].norm(), name


def shards_evenly(rank, folder):
    """Each rank has half of each parameter that has an even dimension, and no rank has padding."""
    saved = make(**RICH)
    expected = saved_whole(saved, folder / "whole", rank)
    patched, other = make(**RICH), patch_model(shard(make_model("mixtral")), CONFIG)
    mesh = init_device_mesh("cpu", (2,))
    shard(patched.model, mesh, shard_placement_fn=shard_evenly(mesh))
    other.load_adapter(folder / "whole")  # what is added to a sharded model is shared out evenly
    for each in (*patched.model.parameters(), *other.trainable_parameters()):
        if any(size % 2 == 0 for size in each.shape):
            assert 2 * each.to_local().numel() == each.numel(), each.shape
    for each, name in ((patched, "patched first"), (other, "sharded first")):
        each.save_adapter(folder / name)
        assert files(folder / name) == expected, name
    patched.load_adapter(folder / "whole")
    assert_same(whole(patched), whole(saved))


def trains_in_mixed_precision(rank, folder):
    """FSDP2 casts to bf16: equal to a loop by hand that casts to and reduces in what it does."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    patched, alone = make(), make()
    shard(patched.model, mp_policy=policy)
    optimisers = adamw(alone), adamw(patched)
    for step in range(3):
        grads = [mixed_gradients(alone, batch(each, step)) for each in range(2)]
        for parameter, *of_ranks in zip(alone.trainable_parameters(), *grads, strict=True):
            parameter.grad = torch.stack(of_ranks).mean(0)
        ids = batch(rank, step)
        patched.model(ids, labels=ids).loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    expected = whole(alone)
    for name, tensor in whole(patched).items():
        assert tensor.dtype == torch.float32
        assert (tensor - expected[name]).norm() < 1e-3 * expected[name].norm(), name
    patched.save_adapter(folder / "end")
    alone.load_adapter(folder / "end")  # in float32: nothing was rounded
    assert_same(whole(alone), whole(patched))
    ids = batch(0, 9)
    with torch.no_grad():
        found = patched.model.eval()(ids).logits
        assert torch.equal(found, cast(alone.model.eval())(ids).logits)
        patched.unpatch()
        base = cast(make_model("mixtral"))(ids % VOCAB).logits
        assert torch.equal(patched.model(ids % VOCAB).logits, base)


def cast(model):
    """Cast parameters, not buffers, as FSDP2 does: rotary frequencies stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def mixed_gradients(patched, ids):
    """Return gradients, in float32, of a model whose parameters are cast to bf16."""
    copy = cast(deepcopy(patched.model))
    copy(ids, labels=ids).loss.backward()
    return [p.grad.float() for p in get_patched(copy).trainable_parameters()]


def trains_offloaded(rank, folder):
    """With parameters on the host between uses, also adapters that were added when sharded."""
    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    patched, alone = make(), make()
    shard(patched.model, **policy)
    optimisers = adamw(alone), adamw(patched)
    train(patched, optimisers[1], rank, range(2))
    for step in range(2):
        both = [batch(each, step) for each in range(2)]
        sum(alone.model(ids, labels=ids).loss / 2 for ids in both).backward()
        optimisers[0].step()
        optimisers[0].zero_grad()
    expected = whole(alone)
    for name, tensor in whole(patched).items():
        assert (tensor - expected[name]).norm() < 1e-3 * expected[name].norm(), name
    started_sharded(rank, folder, lambda: shard(make_model("mixtral"), **policy))


def started_sharded(rank, folder, shard_first, **settings):
    """Patch a sharded model, and check that it trains as one process does."""
    torch.manual_seed(rank)  # the ranks get the first one's adapters all the same
    model = shard_first()
    config = dataclasses.replace(CONFIG, modalities=("image", "a"))
    patched = patch_model(model, config)
    add_modality_tokens(model, "image", IMAGE)
    add_modality_tokens(model, "a", 2)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    model.train()
    with torch.no_grad():
        for number, parameter in enumerate(patched.trainable_parameters()):
            parameter.add_(0.01 * (number % 7 + 1))
    patched.save_adapter(folder / "start")
    alone = patch_model(make_model("mixtral", **settings), config)
    alone.load_adapter(folder / "start")
    alone.model.train()
    optimisers = adamw(alone), adamw(patched)
    for step in range(3):
        both = [batch(each, step) for each in range(2)]
        sum(alone.model(ids, labels=ids).loss / 2 for ids in both).backward()
        patched.model(both[rank], labels=both[rank]).loss.backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    expected = whole(alone)
    for name, tensor in whole(patched).items():
        assert (tensor - expected[name]).norm() < 1e-3 * expected[name].norm(), name
    patched.save_adapter(folder / "end")
    ids = batch(0, 9)
    with torch.no_grad():
        trained = model.eval()(ids).logits
        other = patch_model(make_model("mixtral", **settings), config)
        other.load_adapter(folder / "end")
        assert torch.equal(other.model(ids).logits, trained)
        before = make_model("mixtral", **settings)(ids % VOCAB).logits
        patched.unpatch()
        assert torch.equal(model(ids % VOCAB).logits, before)


def patches_a_sharded_model(rank, folder):
    started_sharded(rank, folder, lambda: shard(make_model("mixtral")))


def patches_a_sharded_model_with_replicas_tied_and_checkpointed(rank, folder):
    def shard_first():
        model = make_model("mixtral", tie_word_embeddings=True)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return shard(model, init_device_mesh("cpu", (2, 1), mesh_dim_names=("r", "s")))

    started_sharded(rank, folder, shard_first, tie_word_embeddings=True)


def patches_a_sharded_model_that_has_run(rank, folder):
    def shard_first():
        model = shard(make_model("mixtral"))
        model(batch(rank, 0) % VOCAB)
        return model

    started_sharded(rank, folder, shard_first)


def patches_what_transformers_has_sharded(rank, folder):
    if rank == 0:
        make_model("mixtral").save_pretrained(folder / "base")
    dist.barrier()

    def shard_first():
        config = DistributedConfig(fsdp_size=2)
        return AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=config)

    started_sharded(rank, folder, shard_first)


def saves_between_forwards_and_backwards(rank, folder):
    """Graphs of two forwards keep what they need, whatever frees whole parameters meanwhile."""
    for name, make_sharded in (("first", sharded_first), ("later", sharded_later)):
        patched = make_sharded()
        patched.save_adapter(folder / name)
        alone = patch_model(make_model("mixtral"), patched.config)
        alone.load_adapter(folder / name)
        losses = [loss(patched.model.train(), batch(rank, step)) for step in range(2)]
        patched.save_adapter(folder / f"{name} again")
        assert files(folder / f"{name} again") == files(folder / name)
        for each in losses:
            each.backward(retain_graph=True)
        losses[0].backward()
        for ids, times in ((batch(each, step), 2 - step) for each in range(2) for step in range(2)):
            (loss(alone.model.train(), ids) * times / 2).backward()
        expected = dict(alone.named_trainable_parameters())
        for parameter_name, parameter in patched.named_trainable_parameters():
            found, right = parameter.grad.full_tensor(), expected[parameter_name].grad
            assert (found - right).norm() < 1e-3 * right.norm(), (name, parameter_name)


def loss(model, ids):
    return model(ids, labels=ids).loss


def sharded_first():
    patched = patch_model(shard(make_model("mixtral")), CONFIG)
    add_modality_tokens(patched.model, "image", IMAGE)
    with torch.no_grad():
        for number, parameter in enumerate(patched.trainable_parameters()):
            parameter.add_(0.01 * (number % 7 + 1))
    return patched


def sharded_later():
    patched = make()
    shard(patched.model)
    return patched


def a_fused_head_reads_rows_that_were_added_later(rank, folder):
    """A head as TRL's asks for the joined weight, whose rows autograd gathers."""
    patched, alone = sharded_first(), None
    patched.save_adapter(folder / "adapter")
    alone = patch_model(make_model("mixtral"), patched.config)
    alone.load_adapter(folder / "adapter")
    joined = []
    for each in (patched, alone):
        model = each.model
        hook = model.model.register_forward_hook(
            lambda module, args, output, model=model: joined.append(
                tokens.JoinedHead(model.lm_head).weight.detach().clone()
            )
        )
        model(batch(0, 0))
        hook.remove()
    assert torch.equal(*joined)
    head = fully_shard(make().model.lm_head, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(RuntimeError, match="cannot read the weight of lm_head, which is sharded"):
        tokens.JoinedHead(head).weight  # noqa: B018


def loads_what_a_sharded_model_lacks(rank, folder):
    saved = make(**RICH)
    saved_whole(saved, folder / "whole", rank)
    torch.manual_seed(rank)
    patched = patch_model(shard(make_model("mixtral")), CONFIG)
    patched.load_adapter(folder / "whole")
    assert_same(whole(patched), whole(saved))
    assert all(isinstance(parameter, DTensor) for parameter in patched.model.parameters())
    ids = batch(0, 3)
    with torch.no_grad():
        assert torch.equal(patched.model.eval()(ids).logits, saved.model.eval()(ids).logits)
    with pytest.raises(ValueError, match="extend reads the weights .* before fully_shard"):
        ExpertExtender(patched.model).extend("all", 1, init=0)
    with pytest.raises(ValueError, match="initialise_lora reads the weights .* before fully_shard"):
        initialise_lora(patched.model, [])


def adapters_by_name(rank, folder):
    """Adapters that were added before the model was sharded: mixed batches, files, refusals."""
    alone = make()
    alone.model.eval()
    alone.add_adapter("other")
    for seed, parameter in enumerate(parameters_of(alone, "other")):
        generator = torch.Generator().manual_seed(seed)
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    sharded = get_patched(shard(deepcopy(alone.model)))
    ids, names = batch(0, rank), [["default", "other"], ["other", "base"]][rank]
    with torch.no_grad():
        expected = alone.model(ids, adapter=names).logits
        assert torch.equal(sharded.model(ids, adapter=names).logits, expected)
        with sharded.adapter("other"):
            assert torch.equal(sharded.model(ids).logits, alone.model(ids, adapter="other").logits)
    for name in sharded.adapter_names:
        sharded.save_adapter(folder / name, adapter=name)
        if rank == 0:
            alone.save_adapter(folder / f"alone-{name}", adapter=name)
        dist.barrier()
        assert files(folder / name) == files(folder / f"alone-{name}")
    sharded.load_adapter(folder / "default", adapter="other")
    with torch.no_grad():
        found = sharded.model(ids, adapter="other").logits
        assert torch.equal(found, alone.model(ids).logits)
    with pytest.raises(ValueError, match="is sharded: add adapters before fully_shard"):
        sharded.add_adapter("third")


SCENES = {
    scene.__name__: scene
    for scene in (
        saves_the_bytes_of_one_process,
        saves_under_wrappers_on_two_dimensions_and_offloaded,
        saves_and_loads_after_an_evaluation,
        loads_into_a_sharded_model,
        one_rank_alone_is_told_so,
        an_error_of_one_rank_is_that_of_all,
        what_could_not_be_loaded_is_refused_before_a_byte,
        a_resumed_run_is_the_uninterrupted_one,
        distributed_checkpoints_hold_what_trains,
        trains_as_one_process,
        shards_evenly,
        trains_in_mixed_precision,
        trains_offloaded,
        patches_a_sharded_model,
        patches_a_sharded_model_with_replicas_tied_and_checkpointed,
        patches_a_sharded_model_that_has_run,
        patches_what_transformers_has_sharded,
        saves_between_forwards_and_backwards,
        a_fused_head_reads_rows_that_were_added_later,
        loads_what_a_sharded_model_lacks,
        adapters_by_name,
    )
}


def test_every_scene(tmp_path):
    errors = errors_of(__file__, tmp_path)
    assert (tmp_path / list(SCENES)[-1]).is_dir()
    assert not errors, "\n".join(errors.values())


if __name__ == "__main__":
    play(SCENES, sys.argv[1])
