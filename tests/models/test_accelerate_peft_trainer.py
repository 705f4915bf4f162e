"""transformers' Trainer trains an accelerated PEFT model as PEFT's own, and resumes."""

import pytest
import torch
from peft import get_peft_model
from support.model_zoo import VOCAB, make_model, token_ids
from support.peft_models import fill_adapters, lora_config, make_pair
from transformers import Trainer, TrainingArguments

from moe_kernels import (
    ModalityLoraConfig,
    SaveAdapter,
    accelerate_peft,
    add_modality_tokens,
    patch_model,
)
from moe_kernels.testing import relative_rms

IMAGE = 6


def dataset(image=False):
    ids = token_ids(8, 12)
    if image:
        ids[::2, 6:] = VOCAB + ids[::2, 6:] % IMAGE
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]


def train(model, folder, *, resume=None, callbacks=(), image=False, **settings):
    """Train for four steps; return the losses and what has been trained."""
    defaults = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_steps": 2, "logging_steps": 1, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**defaults | settings),
        train_dataset=dataset(image),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "not"])
def test_the_steps_are_pefts(reentrant, tmp_path):
    settings = {}
    if reentrant is not None:
        settings["gradient_checkpointing"] = True
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    results = [
        train(model, tmp_path / name, optim="sgd", learning_rate=1.0, **settings)
        for name, model in zip(
            ("theirs", "ours"), make_pair(target_modules=["q_proj"]), strict=True
        )
    ]
    (expected, theirs), (losses, ours) = results
    assert losses == pytest.approx(expected, rel=1e-6)
    assert ours.keys() == theirs.keys()
    assert all(relative_rms(ours[name], values) < 1e-6 for name, values in theirs.items())


def test_resumes_with_the_same_bits(tmp_path):
    whole, expected = train(make_pair()[1], tmp_path)
    losses, found = train(make_pair()[1], tmp_path / "again", resume=tmp_path / "checkpoint-2")
    assert losses == whole
    assert all(torch.equal(found[name], values) for name, values in expected.items())


@pytest.mark.parametrize("callback", [False, True])
def test_rows_of_added_tokens_resume(callback, tmp_path):
    """PEFT's checkpoint has them; a callback may write them by themselves, too."""

    def make():
        base = make_model("mixtral")
        patched = patch_model(base, ModalityLoraConfig(target_modules=()))
        add_modality_tokens(base, "image", IMAGE)
        model = fill_adapters(get_peft_model(base, lora_config()))
        accelerate_peft(model, modality="image")
        return model, [SaveAdapter(patched)] if callback else ()

    model, callbacks = make()
    whole, expected = train(model, tmp_path, callbacks=callbacks, image=True)
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "adapter").exists() == callback
    model, callbacks = make()
    losses, found = train(
        model, tmp_path / "again", resume=checkpoint, callbacks=callbacks, image=True
    )
    assert losses == whole
    assert sum("added_rows" in name for name in found) == 2
    assert all(torch.equal(found[name], values) for name, values in expected.items())
