"""A rank is killed while an adapter is saved: the others raise, the old adapter stays whole."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.model_zoo import make_model, randomise
from support.ranks import run_ranks
from torch.distributed.fsdp import fully_shard

from moe_kernels import ModalityLoraConfig, patch_model, tensor_files
from moe_kernels.models import sharding

CONFIG = ModalityLoraConfig(r=2)
KILLED = 7


def make(seed):
    patched = patch_model(make_model("mixtral"), CONFIG)
    randomise(patched, seed=seed)
    return patched


def die(*args, **kwargs):
    os._exit(KILLED)


# who is killed -> its rank, and the function at which it is
PLACES = {
    "a rank that does not write": (1, (sharding, "gather")),
    "the rank that writes": (0, (tensor_files, "_sort_metadata")),
}


def work(folder, who):
    dist.init_process_group("gloo")
    victim, place = PLACES[who]
    patched = make(seed=1)
    fully_shard(patched.model)
    patched.save_adapter(folder)
    with torch.no_grad():
        for parameter in patched.trainable_parameters():
            parameter.mul_(2)
    if dist.get_rank() == victim:
        setattr(*place, die)
    # The store is in rank 0's process, and the error that of the store if this was killed.
    with pytest.raises(Exception, match="(?i)went on within|connection|reset|broken|closed"):
        patched.save_adapter(folder, timeout=1)
    os._exit(0)


@pytest.mark.parametrize(
    "who",
    [pytest.param(who, marks=[pytest.mark.slow] if n else []) for n, who in enumerate(PLACES)],
)
def test_the_old_adapter_stays_whole(who, tmp_path):
    codes = [KILLED if rank == PLACES[who][0] else 0 for rank in range(2)]
    run_ranks(__file__, tmp_path / "adapter", who, codes=codes)
    old = make(seed=1)
    old.save_adapter(tmp_path / "expected")
    for path in (tmp_path / "expected").iterdir():
        assert path.read_bytes() == (tmp_path / "adapter" / path.name).read_bytes()
    old.load_adapter(tmp_path / "adapter")
    old.save_adapter(tmp_path / "adapter")  # what the killed writer left is removed
    assert sorted(os.listdir(tmp_path / "adapter")) == sorted(os.listdir(tmp_path / "expected"))


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
