"""TRL's SFTTrainer, and accelerate's FSDP2, train an accelerated PEFT model as PEFT's own."""

import importlib
import os
import sys

import pytest
import torch
from peft import get_peft_model
from support import engines_on_cpu
from support.model_zoo import VOCAB, make_model, token_ids
from support.peft_models import fill_adapters, lora_config, make_pair, make_peft
from support.ranks import errors_of, play
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from moe_kernels import ModalityLoraConfig, accelerate_peft, add_modality_tokens, patch_model
from moe_kernels.models import sharding
from moe_kernels.testing import relative_rms

pytestmark = pytest.mark.scale
FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "fsdp_version": 2, "transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"],
        "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT",
    },
}  # fmt: skip
STEP = {
    "report_to": [], "use_cpu": True, "learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 1e9,
    "lr_scheduler_type": "constant", "logging_steps": 1, "disable_tqdm": True, "max_steps": 1,
    "save_strategy": "no", "bf16": False,
}  # fmt: skip


# --- TRL


def make_tokenizer():
    """Return a tokenizer with a word for each id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", *(f"t{i}" for i in range(2, VOCAB))]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def import_trl():
    trl = pytest.importorskip("trl", reason="make test-scale installs it")
    packages = importlib.import_module("trl.import_utils")
    for name, value in list(vars(packages).items()):
        if name.endswith("_available") and isinstance(value, tuple):
            # TRL before 0.29 takes the answer of transformers 5, (available, version), for a yes.
            setattr(packages, name, value[0])
    return trl


def make_rows():
    from datasets import Dataset

    ids = [token_ids(1, 8 + seed, seed=seed)[0].clamp(min=2).tolist() for seed in range(6)]
    return Dataset.from_list([{"input_ids": each} for each in ids])


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_sft(packing, reentrant, tmp_path):
    trl, results = import_trl(), []
    for name, model in zip(("theirs", "ours"), make_pair(target_modules=["q_proj"]), strict=True):
        model.get_base_model().config.router_aux_loss_coef = 0.0
        args = trl.SFTConfig(
            **STEP, output_dir=str(tmp_path / name), per_device_train_batch_size=6,
            packing=packing, max_length=32, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model, args, train_dataset=make_rows(), processing_class=make_tokenizer()
        )
        assert trainer.model is model
        before = values(model)
        trainer.train()
        results.append((trainer.state.log_history[0]["loss"], before, values(model)))
    (expected, before, theirs), (loss, _, ours) = results
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, value in theirs.items():
        assert relative_rms(ours[name] - before[name], value - before[name]) < 1e-6, name


def test_sft_that_makes_the_model_of_peft(tmp_path):
    """With ``peft_config``, SFTTrainer calls get_peft_model: accelerate_peft comes after it."""
    trl, results = import_trl(), []
    for accelerated in (False, True):
        base = make_model("mixtral")
        base.config.router_aux_loss_coef = 0.0
        args = trl.SFTConfig(
            **STEP | {"max_steps": 2}, output_dir=str(tmp_path), per_device_train_batch_size=6,
            max_length=32,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            base, args, train_dataset=make_rows(), processing_class=make_tokenizer(),
            peft_config=lora_config(),
        )  # fmt: skip
        if accelerated:
            handle = accelerate_peft(trainer.model)
            assert len(handle.names) == 2
        fill_adapters(trainer.model)
        before = values(trainer.model)
        trainer.train()
        results.append((before, values(trainer.model)))
    (before, theirs), (_, ours) = results
    assert len(ours) == 2 * 2 * 2
    for name, value in theirs.items():
        assert relative_rms(ours[name] - before[name], value - before[name]) < 1e-4, name


def values(model):
    return {
        name: sharding.gather(p).detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


# --- accelerate's FSDP2


class Look(TrainerCallback):
    """Keep what was trained, gathered, and whether it was sharded."""

    def __init__(self, model):
        self.model, self.seen, self.sharded = model, {}, False

    def on_step_end(self, args, state, control, **kwargs):
        self.sharded = any(isinstance(p, DTensor) for p in self.model.parameters())
        self.seen = values(self.model)


def train(model, folder, **settings):
    """Take two steps; return the first loss and what was trained."""
    rows = token_ids(4, 8)
    look = Look(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **STEP | {"max_steps": 2} | settings),
        train_dataset=[{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows],
        callbacks=[look],
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"], look


def train_accelerated(folder, **settings):
    """Train an accelerated model on this rank; keep what was trained."""
    # float32: accelerate keeps trained parameters in it
    model = make_peft(dtype=torch.float32, target_modules=["q_proj"])
    accelerate_peft(model)
    loss, look = train(model, folder, per_device_train_batch_size=2, **settings)
    torch.save((loss, look.seen), folder / f"{os.environ['RANK']}.pt")
    return look


def fsdp2(rank, folder):
    assert train_accelerated(folder, **FSDP).sharded


def zero(stage, **settings):
    config = {"zero_optimization": {"stage": stage} | settings, "gradient_clipping": "auto"}
    batch = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
    return config | batch | {"zero_allow_untested_optimizer": True}


def zero2(rank, folder):
    train_accelerated(folder, deepspeed=zero(2))


def zero3(rank, folder):
    """ZeRO-3 gathers what a module reads that it does not call, of PEFT's wrappers too."""
    look = train_accelerated(folder, deepspeed=zero(3, stage3_param_persistence_threshold=0))
    assert all(p.ds_status.name == "NOT_AVAILABLE" for p in look.model.parameters())


def rows(rank, folder):
    """Rows of added tokens resume by FULL_STATE_DICT; SHARDED_STATE_DICT would lose them."""
    ids = token_ids(4, 8)
    ids[::2, 4:] = VOCAB + ids[::2, 4:] % 6

    def run(name, state_dict_type, resume=None):
        base = make_model("mixtral")
        patch_model(base, ModalityLoraConfig(target_modules=()))
        add_modality_tokens(base, "image", 6)
        model = fill_adapters(get_peft_model(base, lora_config()))
        accelerate_peft(model, modality="image")
        look = Look(model)
        config = FSDP["fsdp_config"] | {"state_dict_type": state_dict_type}
        settings = {
            "save_strategy": "steps", "save_steps": 1, "max_steps": 2, "fsdp": True,
            "optim": "adamw_torch",  # torch cannot load the state of an optimiser that has none
        }  # fmt: skip
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                **STEP | settings, output_dir=str(folder / name), fsdp_config=config
            ),
            train_dataset=[{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids],
            callbacks=[look],
        )
        trainer.train(resume_from_checkpoint=resume)
        return look.seen

    expected = run("whole", "FULL_STATE_DICT")
    found = run("resumed", "FULL_STATE_DICT", str(folder / "whole" / "checkpoint-1"))
    assert sum("added_rows" in name for name in found) == 2
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(RuntimeError, match="set state_dict_type to FULL_STATE_DICT"):
        run("sharded", "SHARDED_STATE_DICT")


ENGINES = {"fsdp2": fsdp2, "zero2": zero2, "zero3": zero3}
SCENES = ENGINES | {"rows": rows}


def test_rows_resume_under_fsdp2(tmp_path):
    errors = errors_of(__file__, tmp_path, "rows")
    assert not errors, errors


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_by_accelerate(engine, tmp_path):
    errors = errors_of(__file__, tmp_path, engine)
    assert not errors, errors
    settings = {"dtype": torch.float32, "target_modules": ["q_proj"]}
    expected, look = train(make_peft(**settings), tmp_path / "one", per_device_train_batch_size=4)
    before = values(make_peft(**settings))
    for rank in range(2):
        loss, seen = torch.load(tmp_path / engine / f"{rank}.pt")
        assert loss == pytest.approx(expected, rel=1e-4)
        assert seen.keys() == look.seen.keys()
        for name, value in look.seen.items():
            assert relative_rms(seen[name] - before[name], value - before[name]) < 1e-3, name


if __name__ == "__main__":
    engine = sys.argv[2]
    if engine.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    engines_on_cpu.allow()
    play({engine: SCENES[engine]}, sys.argv[1])
