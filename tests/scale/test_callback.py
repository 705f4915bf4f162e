"""The Trainer's callback, in one process and in two: DDP, FSDP2 and DeepSpeed by accelerate."""

import sys

import pytest
import torch
import torch.distributed as dist
from support import engines_on_cpu
from support.model_zoo import VOCAB, make_model, token_ids
from support.ranks import errors_of, play
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from moe_kernels import ModalityLoraConfig, SaveAdapter, add_modality_tokens, patch_model
from moe_kernels.models import sharding

IMAGE = 7
ALL = ["adapter", "checkpoint-2/adapter", "checkpoint-4/adapter"]
FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "fsdp_version": 2, "transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"],
        "reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT",
    },
}  # fmt: skip


def make():
    model = make_model("mixtral")
    patched = patch_model(model, ModalityLoraConfig(r=2))
    add_modality_tokens(model, "image", IMAGE)
    return patched


def dataset():
    ids = token_ids(16, 12)
    ids[::2, 6:] = VOCAB + ids[::2, 6:] % IMAGE
    return [{"input_ids": each.tolist(), "labels": each.tolist()} for each in ids]


class Look(TrainerCallback):
    """Keep the parameters after each step, gathered."""

    def __init__(self, patched):
        self.patched, self.seen = patched, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(
            {
                name: sharding.gather(p).clone()
                for name, p in self.patched.named_trainable_parameters()
            }
        )


def run(folder, resume=None, **settings):
    """Train for four steps; return the trainer and the parameters after each step."""
    patched = make()
    look = Look(patched)
    defaults = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    trainer = Trainer(
        model=patched.model,
        args=TrainingArguments(**defaults | settings),
        train_dataset=dataset(),
        callbacks=[look, SaveAdapter(patched)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, look.seen


def found(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.glob("**/adapter"))


def check(folder, seen):
    """Check that a whole model loads from each folder what the run had at its step."""
    for path in folder.glob("**/adapter"):
        number = path.parent.name.partition("checkpoint-")[2]
        loaded, step = make(), int(number or 4)
        loaded.load_adapter(path)
        for name, tensor in loaded.named_trainable_parameters():
            assert torch.equal(tensor, seen[step - 1][name]), (path, name)


def ddp(rank, folder):
    trainer, seen = run(folder)
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    dist.barrier()
    assert found(folder) == ALL
    check(folder, seen)


def saves_and_resumes(folder, settings):
    """Check adapters of a run, and that one from its first checkpoint has its bits; return it."""
    trainer, seen = run(folder, **settings)
    dist.barrier()  # the first rank may still write
    assert found(folder) == ALL
    check(folder, seen)
    _, resumed = run(folder, resume=str(folder / "checkpoint-2"), **settings)
    assert len(resumed) == 2
    for step, expected in zip(resumed, seen[2:], strict=True):
        assert all(torch.equal(step[name], tensor) for name, tensor in expected.items())
    return trainer


def fsdp2(rank, folder):
    trainer = saves_and_resumes(folder, FSDP)
    assert trainer.accelerator.is_fsdp2
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())


def zero(stage, **settings):
    def scene(rank, folder):
        config = {"zero_optimization": {"stage": stage} | settings, "gradient_clipping": "auto"}
        batch = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
        engine = saves_and_resumes(folder, {"deepspeed": config | batch}).model_wrapped
        assert type(engine).__name__ == "DeepSpeedEngine"
        assert engine.zero_optimization_stage() == stage
        whole = [parameter.numel() > 0 for parameter in engine.module.parameters()]
        assert all(whole) if stage == 2 else not any(whole)

    return scene


def test_one_process(tmp_path):
    _, seen = run(tmp_path, save_total_limit=1)  # an adapter goes with its checkpoint
    assert found(tmp_path) == ["adapter", "checkpoint-4/adapter"]
    check(tmp_path, seen)


SCENES = {
    "ddp": ddp, "fsdp2": fsdp2, "zero2": zero(2),
    "zero3": zero(3, stage3_param_persistence_threshold=0),
}  # fmt: skip
MARKS = {
    "ddp": pytest.mark.slow, "fsdp2": pytest.mark.slow, "zero2": pytest.mark.scale,
    "zero3": pytest.mark.scale,
}  # fmt: skip


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=MARKS.get(name, ())) for name in SCENES]
)
def test_two_processes(engine, tmp_path):
    assert not errors_of(__file__, tmp_path, engine)


if __name__ == "__main__":
    if sys.argv[2].startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    if sys.argv[2] != "ddp":
        engines_on_cpu.allow()
    play({sys.argv[2]: SCENES[sys.argv[2]]}, sys.argv[1])
