"""DeepSpeed ZeRO on two gloo processes: adapters are saved and loaded as those of one process."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.model_zoo import VOCAB, make_model, randomise, token_ids
from support.ranks import errors_of, play, run_ranks
from support.saved_adapters import ADAPTER

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


def one_rank_alone_is_told_so(rank, folder):
    patched = make()
    engine_of(patched, ENGINES["zero3"])
    if rank == 0:
        with pytest.raises(RuntimeError, match="save_adapter was called on rank 0 of 2 alone"):
            patched.save_adapter(folder / "adapter", timeout=0.5)
    dist.barrier()
    assert not (folder / "adapter").exists()
    patched.save_adapter(folder / "adapter")


SCENES = {
    **{name: scene(zero) for name, zero in ENGINES.items()},
    **{f"{name} bf16": in_bfloat16(ENGINES[name]) for name in ("zero2", "zero3")},
    "one rank alone": one_rank_alone_is_told_so,
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    run_ranks(__file__, folder)
    return errors_of(folder)


@pytest.mark.parametrize("scene", SCENES)
def test_it(scene, errors):
    assert scene not in errors, errors[scene]


if __name__ == "__main__":
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    play(SCENES, dist.get_rank(), Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
