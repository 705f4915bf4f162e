"""Experts spread over two gloo processes (expert parallelism), against one process.

transformers spreads them: by DistributedConfig, with FSDP2 and a batch for each rank, or by
``apply_expert_parallelism`` of a model that is whole otherwise, with one batch for both ranks.
"""

import copy
import re
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support import families
from support.model_zoo import FAMILIES, VOCAB, make_model, randomise, token_ids
from support.ranks import errors_of, play
from support.saved_adapters import ADAPTER
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.models import sharding, shared_batch
from moe_kernels.moextend import ExpertExtender

IMAGE = 7
TARGETS = ("experts", "attention", "router")
NAME = "moe_kernels"


def load(folder, **distributed):
    """Load the model of a folder, in float64; whole without arguments."""
    settings = {"dtype": torch.float64}
    if distributed:
        sizes = {"fsdp_size": dist.get_world_size(), "ep_size": 2, "ep_implementation": NAME}
        settings["distributed_config"] = DistributedConfig(**sizes | distributed)
    model = AutoModelForCausalLM.from_pretrained(folder, **settings)
    model.set_experts_implementation("eager")
    return model


def base(rank, folder, family="mixtral", **settings):
    """Write a model on rank 0, and return its folder on all."""
    if rank == 0:
        if family in FAMILIES:
            model = make_model(family, **settings)
        else:
            model = families.make_family(family, vocab_size=VOCAB, **settings)
        model.save_pretrained(folder / "base")
    dist.barrier()
    return folder / "base"


def plan_of(model):
    """Name what transformers' plan spreads: each stack of experts, then their modules."""
    names = [name for name, _ in (*model.named_parameters(), *model.named_modules())]
    plan = {}
    for path, module in model.named_modules():
        own = getattr(getattr(module, "config", None), "base_model_ep_plan", None) or {}
        for pattern, style in own.items():
            whole = re.escape(f"{path}.{pattern}").replace(r"\*", r"\d+")
            if style in ("grouped_gemm", "ep_dispatch_experts"):  # others are tensor parallel
                plan |= {name: style for name in names if re.fullmatch(whole, name)}
    return plan


def spread(model, own_batches=False):
    """Spread the experts of a whole model, whose ranks hold one batch unless they are to differ."""
    plan = plan_of(model)
    experts = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ep", "alone"))
    same = experts["alone"] if own_batches else experts["ep"]
    apply_expert_parallelism(model, experts["ep"], same, plan, ep_implementation=NAME)
    return model


def patch(model, *, like=None, **settings):
    """Patch a model, with the random values of another handle, or of its own."""
    torch.manual_seed(0)
    settings = {"r": 3, "target_modules": TARGETS} | settings
    patched = patch_model(model, ModalityLoraConfig(**settings))
    add_modality_tokens(model, patched.config.modalities[0], IMAGE)
    generator = torch.Generator().manual_seed(1)
    values = {} if like is None else dict(like.named_trainable_parameters())
    for name, parameter in patched.named_trainable_parameters():
        own = 0.3 * torch.randn(parameter.shape, generator=generator)
        sharding.put(parameter, values.get(name, own).detach())
    model.train()
    return patched


def batch(rank, text=()):
    """Make a batch with other pictures on each rank, or with text alone."""
    ids = token_ids(2, 12, seed=rank)
    if rank not in text:
        ids[:, 6:] = VOCAB + ids[:, 6:] % IMAGE
    return {"input_ids": ids, "labels": ids}


def losses(model, batches):
    return [model(**each).loss for each in batches]


def assert_gradients(patched, alone):
    expected = {name: p.grad for name, p in alone.named_trainable_parameters()}
    for name, parameter in patched.named_trainable_parameters():
        found = parameter.grad
        found = found.full_tensor() if isinstance(found, DTensor) else found
        error = (found - expected[name]).norm() / expected[name].norm()
        assert error < 1e-9, (name, float(error))  # also where both are zero: nothing was trained


def assert_files(folder, other):
    for name in ADAPTER:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def train_alike(rank, folder, path, text=(), checkpointing=False, **distributed):
    """Compare losses, gradients and saved files with those of one process; return both handles."""
    settings = {"shared_A": distributed.pop("shared_A", False)}
    settings["modalities"] = distributed.pop("modalities", ("image",))
    settings["target_modules"] = distributed.pop("target_modules", TARGETS)
    alone = patch(load(path), **settings)
    patched = patch(load(path, **distributed), like=alone, **settings)
    if checkpointing:
        patched.model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [batch(each, text) for each in range(dist.get_world_size())]
    expected = losses(alone.model, batches)
    (sum(expected) / len(batches)).backward()
    found = patched.model(**batches[rank]).loss
    found.backward()
    assert abs(found - expected[rank]).item() < 1e-6  # the loss is float32
    assert_gradients(patched, alone)
    saved_as_one_process(rank, folder, patched, alone)
    return patched, alone


def saved_as_one_process(rank, folder, patched, alone):
    patched.save_adapter(folder / "spread")
    if rank == 0:
        alone.save_adapter(folder / "alone")
        assert_files(folder / "spread", folder / "alone")
    dist.barrier()


# --- scenes


def with_fsdp2(rank, folder):
    """Each rank has its own batch, and rank 1 text alone in one of the runs."""
    for family, settings in (
        ("mixtral", {}),
        ("olmoe", {"shared_A": True, "modalities": ("image", "sound")}),
        ("qwen2_moe", {"text": (1,), "checkpointing": True}),
    ):
        own = folder / family
        own.mkdir(exist_ok=True)
        train_alike(rank, own, base(rank, own, family), ep_size=2, **settings)


def without_fsdp2(rank, folder):
    """Both ranks hold the same batch, and all of each adapter."""
    for family, shared in (("mixtral", False), ("olmoe", True), ("gpt_oss", False)):
        own = folder / family
        own.mkdir(exist_ok=True)
        path = base(rank, own, family)
        alone = patch(load(path), shared_A=shared)
        patched = patch(spread(load(path)), like=alone, shared_A=shared)
        for each in (alone, patched):
            each.model(**batch(0)).loss.backward()
        assert_gradients(patched, alone)
        saved_as_one_process(rank, own, patched, alone)


def loads_and_trains_on(rank, folder):
    """Load an adapter and train for two steps, as one process does."""
    path = base(rank, folder)
    first = patch(load(path))
    if rank == 0:
        first.save_adapter(folder / "first")
    dist.barrier()
    alone, patched = patch(load(path)), patch(load(path, ep_size=2), like=first)
    for each in (alone, patched):
        for parameter in each.trainable_parameters():
            with torch.no_grad():
                parameter.zero_().add_(0.5)
        each.load_adapter(folder / "first")
        optimiser = torch.optim.SGD(list(each.trainable_parameters()), lr=0.1)
        batches = [batch(number) for number in range(2)]
        for _ in range(2):
            if each is alone:
                (sum(losses(each.model, batches)) / 2).backward()
            else:
                each.model(**batches[rank]).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    copied = patch(load(path))
    patched.save_adapter(folder / "trained")
    copied.load_adapter(folder / "trained")
    for (name, found), expected in zip(
        copied.named_trainable_parameters(), alone.trainable_parameters(), strict=True
    ):
        assert (found - expected).norm() < 1e-9 * expected.norm(), name


def resumes_with_the_same_bits(rank, folder):
    """Train on from the adapter and each rank's state of the optimiser."""
    path = base(rank, folder)
    for own_batches in (False, True):
        adapter, runs, state = folder / str(own_batches), [], None
        for steps in ((0, 1, 2), (2,)):
            model = load(path, ep_size=2) if own_batches else spread(load(path))
            runs.append(patch(model))
            optimiser = torch.optim.AdamW(list(runs[-1].trainable_parameters()), lr=0.1)
            if state is not None:
                runs[-1].load_adapter(adapter)
                optimiser.load_state_dict(state)
            for step in steps:
                if step == 2 and state is None:
                    runs[-1].save_adapter(adapter)
                    state = copy.deepcopy(optimiser.state_dict())
                model(**batch(2 * step + own_batches * rank)).loss.backward()
                optimiser.step()
                optimiser.zero_grad()
        for found, expected in zip(*(run.trainable_parameters() for run in runs), strict=True):
            assert torch.equal(sharding.local(found), sharding.local(expected))


def an_expert_group_without_rows(rank, folder):
    """All rows go to the experts of rank 0: rank 1 takes part in each collective all the same."""
    path = folder / "base"
    if rank == 0:
        model = make_model("mixtral", num_experts_per_tok=1)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight[2:] = layer.mlp.gate.weight[:2]  # ties go to the first
        model.save_pretrained(path)
    dist.barrier()
    patched, _ = train_alike(rank, folder, path, ep_size=2)
    lora = patched.model.model.layers[0].modality_lora["down_proj"].lora_B
    assert lora.grad.full_tensor()[:, :2].any()


def generates(rank, folder):
    path = base(rank, folder)
    alone = patch(load(path))
    ids = batch(0)["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = alone.model.eval().generate(ids, **settings)
    for model in (load(path, ep_size=2), spread(load(path))):
        patched = patch(model, like=alone)
        assert torch.equal(patched.model.eval().generate(ids, **settings), expected)


@torch.no_grad()
def text_keeps_its_bits_at_equal_counts(rank, folder):
    """Pictures change how many rows a rank gets of others, and so the shape of its call."""
    path = base(rank, folder, hidden_size=128, intermediate_size=64)
    text, mixed = token_ids(2, 24, seed=rank), token_ids(2, 24, seed=rank)
    mixed[:, 12:] = VOCAB + mixed[:, 12:] % IMAGE
    for model, same_batch in ((load(path, ep_size=2), False), (spread(load(path)), True)):
        if same_batch:
            text, mixed = token_ids(2, 24), batch(0)["input_ids"]
        patched = patch(model.float())
        model.eval()
        before = [model(ids).logits[..., :VOCAB] for ids in (text, mixed)]
        for value in (0.3, float("nan")):
            for parameter in patched.trainable_parameters():
                sharding.put(parameter, torch.full(parameter.shape, value))
            after = model(text).logits[..., :VOCAB]
            assert torch.equal(after, before[0])
            if value != value:  # attention would bring it to all rows of a sequence
                break
            half = mixed.shape[1] // 2
            found, expected = model(mixed).logits[:, :half, :VOCAB], before[1][:, :half]
            if same_batch:
                assert torch.equal(found, expected)
            assert (found - expected).norm() < 1e-5 * expected.norm()


def unpatched_it_is_the_base(rank, folder):
    path, ids = base(rank, folder), token_ids(2, 8)
    for model in (load(path, ep_size=2), spread(load(path))):
        with torch.no_grad():
            expected = model(ids).logits
            patched = patch(model)
            model(ids)
            assert patched.unpatch() is model
            assert torch.equal(model.eval()(ids).logits, expected)
            model.set_experts_implementation(NAME)
            assert (model(ids).logits - expected).norm() < 1e-6 * expected.norm()


def refusals(rank, folder):
    path = base(rank, folder)
    for name in ("auto", "all_to_all"):
        with pytest.raises(ValueError, match=r"layers.0.mlp.experts: .*ep_implementation=\"moe_ke"):
            patch_model(load(path, ep_size=2, ep_implementation=name))
    with pytest.raises(ValueError, match="batches of their own needs FSDP2, which takes the mean"):
        patch_model(spread(load(path), own_batches=True))
    model, meshes = load(path), init_device_mesh("cpu", (2, 1), mesh_dim_names=("tp", "ep"))
    apply_expert_parallelism(model, meshes["ep"], meshes["tp"], plan_of(model), NAME)
    with pytest.raises(ValueError, match="some hold the same batch, and others do not: let all"):
        patch_model(model)
    model = load(path, ep_size=2)
    many = ModalityLoraConfig(modalities=tuple(f"m{number}" for number in range(257)))
    with pytest.raises(ValueError, match="257 modalities, and .*spread over ranks .* tell 256"):
        patch_model(model, many)
    patched = patch(model)
    with pytest.raises(ValueError, match="those of this one are sharded"):
        ExpertExtender(model).extend("all", 1, init=0)
    alone = patch(load(path))
    ExpertExtender(alone.model).extend([1], 1, init=0)
    if rank == 0:
        alone.save_adapter(folder / "added")
    dist.barrier()
    with pytest.raises((ValueError, RuntimeError), match="layer 1 cannot be extended: .*spread ov"):
        patched.load_adapter(folder / "added")
    with pytest.raises(TypeError, match="spread over ranks .*cannot be copied"):
        copy.deepcopy(spread(load(path)))


def patched_before(rank, folder):
    """Spread the experts of a patched model, and give the rest to FSDP2 in one of the runs."""
    path = base(rank, folder)
    for own_batches in (False, True):
        batches = [batch(each if own_batches else 0) for each in range(2)]
        alone, patched = patch(load(path)), patch(load(path))
        spread(patched.model, own_batches)
        if own_batches:
            mesh = init_device_mesh("cpu", (2,))
            experts = {p for name, p in patched.model.named_parameters() if ".experts." in name}
            for unit in (*patched.model.model.layers, patched.model):
                fully_shard(unit, mesh=mesh, ignored_params=experts)
        (sum(losses(alone.model, batches)) / 2).backward()
        patched.model(**batches[rank]).loss.backward()
        assert_gradients(patched, alone)
        own = folder / str(own_batches)
        own.mkdir(exist_ok=True)
        saved_as_one_process(rank, own, patched, alone)
    many = patch(load(path), modalities=tuple(f"m{number}" for number in range(257)))
    with pytest.raises(RuntimeError, match="after patch_model, .*257 modalities, and .*tell 256"):
        spread(many.model)(**batch(0, text=(0,)))
    extended = patch(load(path))
    ExpertExtender(extended.model).extend([1], 1, init=0)
    with pytest.raises(RuntimeError, match="after patch_model, .*1.mlp.experts: experts were ad"):
        spread(extended.model)(**batch(0))


def told_on_all_ranks(message, call):
    """Check that a call raises on both ranks: none of them may wait for the other."""
    with pytest.raises(RuntimeError, match=message):
        call()
    dist.barrier()


def other_batches(rank, folder):
    """With one batch for all ranks, the sum of two batches' outputs has a plausible loss."""
    path, same = base(rank, folder), batch(0)
    patched = patch(spread(load(path)))
    ids = same["input_ids"]
    for found, inputs in (
        ("sequence of tokens and set of labels", batch(rank)),
        ("set of labels", same | {"labels": ids.clone().fill_(rank)}),
        ("modality_ids", same | {"modality_ids": torch.full_like(ids, rank)}),
        ("shape of the batch", {"input_ids": ids[: 1 + rank]}),
        ("shape of the batch", same if rank == 0 else {"input_ids": ids}),
    ):
        for model in (patched.model.train(), patched.model.eval()):
            message = f"found another {found}.* on rank . than .*spread over ranks.*same inputs"
            told_on_all_ranks(message, lambda: model(**inputs))  # noqa: B023
    embeds = patched.model.get_input_embeddings()(ids).detach()
    for near in (embeds * (1 + 1e-6 * rank), embeds):  # as of an encoder on other cards
        patched.model(inputs_embeds=near, modality_ids=torch.ones_like(ids))
    alone = patch(load(path))
    assert abs(losses(patched.model, [same])[0] - losses(alone.model, [same])[0]) < 1e-6
    with mock.patch.object(shared_batch, "_TIMEOUT", 0.2):
        if rank == 0:
            with pytest.raises(RuntimeError, match="on rank 0 of 2 alone, within 0.2 seconds"):
                patched.model(ids[:, :5])
    dist.barrier()


def other_seeds(rank, folder):
    """Each rank has whole adapters, which must start alike: both ranks say so."""
    model = spread(load(base(rank, folder)))
    torch.manual_seed(rank)
    patch_model(model, ModalityLoraConfig(r=3))
    add_modality_tokens(model, "image", IMAGE)
    told_on_all_ranks("rank . trains from other values than", lambda: model.train()(**batch(0)))


ALL = (
    with_fsdp2,
    without_fsdp2,
    patched_before,
    other_batches,
    other_seeds,
    loads_and_trains_on,
    resumes_with_the_same_bits,
    an_expert_group_without_rows,
    generates,
    text_keeps_its_bits_at_equal_counts,
    unpatched_it_is_the_base,
    refusals,
)
SCENES = {each.__name__: each for each in ALL}


def every_family(rank, folder):
    """Compare logits and gradients with one process for all families that have a plan."""
    compared = []
    for name in families.FAMILIES:
        model = families.make_family(name, dtype=torch.float64)
        if not plan_of(model):
            continue
        other = copy.deepcopy(model)
        settings = ModalityLoraConfig(r=3)
        try:
            alone = patch_model(model, settings)
        except ValueError:  # docs/families.md lists these
            continue
        randomise(alone)
        patched = patch_model(spread(other), settings)
        randomise(patched)
        ids, modality_ids = token_ids(2, 8), torch.tensor([0, 1]).repeat_interleave(4).expand(2, 8)
        logits = []
        for each in (alone, patched):
            inputs = families.inputs_of(name, each.model, ids)
            logits.append(each.model(**inputs, modality_ids=modality_ids).logits)
            logits[-1].square().mean().backward()
        assert (logits[1] - logits[0]).norm() < 1e-9 * logits[0].norm(), name
        assert_gradients(patched, alone)
        compared.append(name)
    assert len(compared) >= 60, compared


def copies_of_experts(rank, folder):
    """Spread experts over two of four ranks; the others shard them too, or have replicas."""
    path = base(rank, folder)
    for sizes in ({"fsdp_size": 4}, {"fsdp_size": 2, "dp_replicate_size": 2}):
        train_alike(rank, folder, path, **sizes)


@pytest.mark.parametrize("scene", sorted(SCENES))
def test_two_ranks(scene, scene_errors):
    assert scene not in scene_errors, scene_errors[scene]


def families_of_other_names(rank, folder):
    """Families whose table transformers leaves to FSDP2's root, which gathers it for a forward."""
    for family in ("nemotron_h", "zaya"):
        own = folder / family
        own.mkdir(exist_ok=True)
        train_alike(rank, own, base(rank, own, family), ep_size=2, target_modules=("experts",))


SLOW = [("every_family", 2), ("copies_of_experts", 4), ("families_of_other_names", 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("scene", "number"), SLOW)
def test_one_scene(scene, number, tmp_path):
    errors = errors_of(__file__, tmp_path, scene, number=number)
    assert (tmp_path / scene).is_dir()
    assert not errors, errors[scene]


if __name__ == "__main__":
    play({name: globals()[name] for name in sys.argv[2:]} or SCENES, sys.argv[1])
