"""DeepSpeed ZeRO sends in a step what benchmarks/lib/collectives.py says."""

import sys

import pytest
import torch
from support.ranks import errors_of, play
from support.sent import base, formulas, patched, step

pytestmark = pytest.mark.scale
# At most this many parameters are whole; of a full-size model the default of 1e9 are few.
NOTHING_KEPT = {
    "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}  # fmt: skip


def check(zero, expected):
    import deepspeed

    model = patched(base())
    trained = [each for each in model.parameters() if each.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, lr=1e-3), config=config
    )[0]

    def backward_and_step(loss):
        engine.backward(loss)
        engine.step()

    found = step(engine, backward_and_step).bytes()
    for kind in ("all-gather", "reduce-scatter", "all-reduce"):
        size = sum(each.size for each in expected if each.kind == kind)
        # Norms and flags of overflow are all-reduced too, a few bytes each.
        assert size <= found.get(kind, 0) <= size + 16, kind


def zero2(rank, folder):
    check({"stage": 2}, list(formulas().zero2(patched(base()), 2)))


def zero3(rank, folder):
    for persistent in (0, 100):
        zero = {"stage": 3, "stage3_param_persistence_threshold": persistent, **NOTHING_KEPT}
        check(zero, list(formulas().zero3(patched(base()), 2, persistent)))


SCENES = {"zero2": zero2, "zero3": zero3}


def test_zero_sends_what_the_formulas_say(tmp_path):
    assert not (errors := errors_of(__file__, tmp_path)), "\n".join(errors.values())


if __name__ == "__main__":
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    play(SCENES, sys.argv[1])
