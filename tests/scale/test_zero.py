"""DeepSpeed ZeRO on two gloo processes: adapters are saved and loaded as those of one process.

The engine's own checkpoints resume a run.
"""

import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.model_zoo import VOCAB, make_model, randomise, token_ids
from support.ranks import errors_of, play
from support.saved_adapters import ADAPTER, WEIGHTS
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.moextend import ExpertExtender

pytestmark = pytest.mark.scale
IMAGE = 7
CONFIG = ModalityLoraConfig(r=3, target_modules=("experts", "attention", "router"))
# name -> ZeRO's settings
ENGINES = {
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero3 with whole small parameters": {"stage": 3, "stage3_param_persistence_threshold": 300},
    "zero3 offloaded": {
        "stage": 3, "stage3_param_persistence_threshold": 0,
        "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"},
    },
}  # fmt: skip
TWO = ("zero2", "zero3")


def make(*, seed=1, experts=True, **settings):
    model = make_model("mixtral", **settings)
    patched = patch_model(model, CONFIG)
    add_modality_tokens(model, "image", IMAGE)
    if experts:
        ExpertExtender(model).extend("all", 1, init=0, calibration="additive")
    randomise(patched, seed=seed)
    model.train()
    return patched


def adamw(patched):
    return torch.optim.AdamW(list(patched.trainable_parameters()), lr=1e-2)


def engine_of(patched, zero, **settings):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": zero,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # the default is 1
    }  # fmt: skip
    return deepspeed.initialize(
        model=patched.model, optimizer=adamw(patched), config=config | settings
    )[0]


def batch(rank, step):
    """Make a batch: rank 0 gets pictures, rank 1 text only."""
    ids = token_ids(2, 12, seed=10 * step + rank)
    if rank == 0:
        ids[:, 6:] = VOCAB + ids[:, 6:] % IMAGE
    return ids


def train(engine, rank, steps):
    for step in steps:
        ids = batch(rank, step)
        engine.backward(engine(ids, labels=ids).loss)
        engine.step()


def files(folder):
    return [(folder / name).read_bytes() for name in ADAPTER]


def load_whole(folder, **settings):
    patched = make(seed=9, **settings)
    patched.load_adapter(folder)
    return patched


def save(patched, folder, rank):
    """Save on all ranks, into one folder: a whole model's ranks hold the same values."""
    patched.save_adapter(folder)
    dist.barrier()
    return files(folder)


def scene(zero):
    def saves_and_loads(rank, folder):
        expected = save(make(), folder / "whole", rank)
        patched = make()
        engine = engine_of(patched, zero)
        assert save(patched, folder / "sharded", rank) == expected
        train(engine, rank, range(2))
        trained = save(patched, folder / "trained", rank)
        assert trained != expected

        # What is loaded into an engine must survive its next step: it trains copies in float32.
        other = make(seed=2)
        started = engine_of(other, zero)
        other.load_adapter(folder / "whole")
        assert save(other, folder / "loaded", rank) == expected
        train(started, rank, range(2))
        assert save(other, folder / "again", rank) == trained

        alone = load_whole(folder / "whole")
        optimiser = adamw(alone)
        for step in range(2):
            for each in range(2):
                ids = batch(each, step)
                (alone.model(ids, labels=ids).loss / 2).backward()
            optimiser.step()
            optimiser.zero_grad()
        found = dict(load_whole(folder / "trained").named_trainable_parameters())
        for name, tensor in alone.named_trainable_parameters():
            assert (found[name] - tensor).norm() < 1e-3 * tensor.norm(), name

    return saves_and_loads


def in_bfloat16(zero):
    # Calibrations of added experts compute in the dtype of their parameters, which DeepSpeed casts.
    settings = {"dtype": torch.bfloat16, "experts": False}

    def saves_what_the_model_computes_with(rank, folder):
        patched = make(**settings)
        engine = engine_of(patched, zero, bf16={"enabled": True})
        train(engine, rank, range(2))
        save(patched, folder / "trained", rank)
        ids = batch(0, 7)
        patched.model.eval()
        with torch.no_grad():
            found = engine(ids).logits
            expected = load_whole(folder / "trained", **settings).model.eval()(ids).logits
        assert torch.equal(found, expected)

        other = make(seed=2, **settings)
        started = engine_of(other, zero, bf16={"enabled": True})
        other.load_adapter(folder / "trained")
        before = save(other, folder / "loaded", rank)
        assert before == files(folder / "trained")
        for group in started.optimizer.param_groups:
            group["lr"] = 0.0
            group["weight_decay"] = 0.0
        train(started, rank, range(1))
        assert save(other, folder / "again", rank) == before

    return saves_what_the_model_computes_with


def resumes(zero, *, frozen=True, **settings):
    def has_the_bits_of_the_uninterrupted_run(rank, folder):
        made = {"experts": not settings, "dtype": torch.bfloat16 if settings else torch.float32}
        patched = make(**made)
        engine = engine_of(patched, zero, **settings)
        train(engine, rank, range(2))
        engine.save_checkpoint(folder / "checkpoint", exclude_frozen_parameters=not frozen)
        middle = save(patched, folder / "middle", rank)
        train(engine, rank, range(2, 4))
        expected = save(patched, folder / "end", rank)
        assert middle != expected

        other = make(seed=2, **made)
        again = engine_of(other, zero, **settings)
        path, _ = again.load_checkpoint(folder / "checkpoint", load_module_strict=frozen)
        assert path is not None
        assert save(other, folder / "loaded", rank) == middle
        train(again, rank, range(2, 4))
        assert save(other, folder / "again", rank) == expected

    return has_the_bits_of_the_uninterrupted_run


def patches_what_is_sharded_already(rank, folder):
    """With HfDeepSpeedConfig, from_pretrained gives each rank its part alone."""
    if rank == 0:
        make_model("mixtral").save_pretrained(folder / "base")
    dist.barrier()
    zero = {"zero_optimization": ENGINES["zero3"], "train_micro_batch_size_per_gpu": 2}
    kept = HfDeepSpeedConfig(zero)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    del kept
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    torch.manual_seed(rank)  # the ranks get the first one's adapters all the same
    patched = patch_model(model, CONFIG)
    assert add_modality_tokens(model, "image", IMAGE) == range(VOCAB, VOCAB + IMAGE)
    model.train()
    engine = engine_of(patched, ENGINES["zero3"])
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    assert patched.modality_token_ids("image") == range(VOCAB, VOCAB + IMAGE)
    save(patched, folder / "start", rank)
    train(engine, rank, range(2))
    save(patched, folder / "trained", rank)

    alone = patch_model(make_model("mixtral"), CONFIG)
    alone.load_adapter(folder / "start")
    alone.model.train()
    train(engine_of(alone, ENGINES["zero2"]), rank, range(2))
    save(alone, folder / "again", rank)
    found, expected = (load_file(folder / name / WEIGHTS) for name in ("trained", "again"))
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() < 1e-3 * tensor.norm(), name
    with pytest.raises(ValueError, match="ZeRO-3 trains it already, .*before deepspeed.initialize"):
        patched.unpatch()
        patch_model(model, CONFIG)


def a_running_engine_takes_no_parameters(rank, folder):
    save(make(), folder / "adapter", rank)
    patched = patch_model(make_model("mixtral"), CONFIG)
    engine_of(patched, ENGINES["zero3"])
    with pytest.raises(ValueError, match="tokens cannot be added: DeepSpeed ZeRO-3 trains it"):
        add_modality_tokens(patched.model, "image", IMAGE)
    with pytest.raises(ValueError, match="experts or projectors that this model lacks, and Deep"):
        patched.load_adapter(folder / "adapter")


def a_load_on_one_rank_alone_is_told_so(rank, folder):
    """ZeRO-2 trains copies, each rank a part: one rank's load would mix two adapters."""
    patched = make()
    engine_of(patched, ENGINES["zero2"])
    expected = save(patched, folder / "before", rank)
    if rank == 0:
        with pytest.raises(RuntimeError, match="load_adapter was called on rank 0 of 2 alone"):
            patched.load_adapter(folder / "before", timeout=0.5)
    dist.barrier()
    patched.load_adapter(folder / "before")
    assert save(patched, folder / "after", rank) == expected


def one_rank_alone_is_told_so(rank, folder):
    patched = make()
    engine_of(patched, ENGINES["zero3"])
    if rank == 0:
        with pytest.raises(RuntimeError, match="save_adapter was called on rank 0 of 2 alone"):
            patched.save_adapter(folder / "adapter", timeout=0.5)
    dist.barrier()
    assert not (folder / "adapter").exists()
    patched.save_adapter(folder / "adapter")


def a_fused_loss(rank, folder):
    """The head is called by the model's forward, so that ZeRO-3 has gathered its weight."""
    for name in ("zero2", "zero3"):
        for fused in (False, True):
            patched = make()
            patched.fused_loss = fused
            train(engine_of(patched, ENGINES[name]), rank, range(2))
            save(patched, folder / f"{name} {fused}", rank)
        expected, found = (
            load_file(folder / f"{name} {fused}" / WEIGHTS) for fused in (False, True)
        )
        for tensor_name, tensor in expected.items():
            assert (found[tensor_name] - tensor).norm() < 1e-3 * tensor.norm(), (name, tensor_name)


SCENES = {
    **{name: scene(zero) for name, zero in ENGINES.items()},
    **{f"{name} bf16": in_bfloat16(ENGINES[name]) for name in TWO},
    **{f"{name} resumed": resumes(zero) for name, zero in ENGINES.items()},
    **{f"{name} resumed, trainable only": resumes(ENGINES[name], frozen=False) for name in TWO},
    **{f"{name} resumed, bf16": resumes(ENGINES[name], bf16={"enabled": True}) for name in TWO},
    "a fused loss": a_fused_loss,
    "sharded already": patches_what_is_sharded_already,
    "a running engine": a_running_engine_takes_no_parameters,
    "one rank alone": one_rank_alone_is_told_so,
    "a load on one rank": a_load_on_one_rank_alone_is_told_so,
}


def test_every_scene(tmp_path):
    errors = errors_of(__file__, tmp_path)
    assert (tmp_path / list(SCENES)[-1]).is_dir()
    assert not errors, "\n".join(errors.values())


if __name__ == "__main__":
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    play(SCENES, sys.argv[1])
