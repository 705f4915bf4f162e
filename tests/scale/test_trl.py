"""TRL's trainers train a patched model as a loop by hand does: their fused head sees added rows."""

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import engines_on_cpu
from support.model_zoo import VOCAB, token_ids
from support.patched_models import patched_model
from support.ranks import errors_of, play
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from moe_kernels import ModalityLoraConfig
from moe_kernels.models import sharding
from moe_kernels.models.handle import get_patched
from moe_kernels.testing import relative_rms
from moe_kernels.training import use_reference

pytestmark = pytest.mark.scale
trl = pytest.importorskip("trl", reason="make test-scale installs it")
packages = importlib.import_module("trl.import_utils")
for name, value in list(vars(packages).items()):
    if name.endswith("_available") and isinstance(value, tuple):
        # TRL before 0.29 takes the answer of transformers 5, (available, version), for a yes.
        setattr(packages, name, value[0])
IMAGE = 8
RATE = 1.0  # so that the step of SGD shows the gradient in most of its digits
TARGETS = ("experts", "attention", "router")


def make_patched(**settings):
    """Make a model in float64, so that gradients agree in more digits than those of the loss."""
    settings |= {"num_tokens": IMAGE, "dtype": torch.float64}
    config = ModalityLoraConfig(r=4, target_modules=TARGETS)
    model, patched = patched_model("mixtral", config, **settings)
    model.config.router_aux_loss_coef = 0.0  # TRL would add the balance loss
    model.warnings_issued = {}  # of transformers 4, for TRL before 0.29
    return model.train(), patched


def make_tokenizer():
    """Return a tokenizer with a word for each id, those of images among them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", *(f"t{i}" for i in range(2, VOCAB + IMAGE))]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def ids_of(seed, length):
    """Return (length,) ids, three of them of an image."""
    ids = token_ids(1, length, seed=seed)[0].clamp(min=2)
    ids[3:6] = VOCAB + ids[3:6] % IMAGE
    return ids


def words(ids):
    return " ".join(f"t{i}" for i in ids.tolist())


def settings(folder, **more):
    return {
        "output_dir": str(folder), "max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "optim": "sgd",
        "max_grad_norm": 1e9, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    } | more  # fmt: skip


def gradients_of(trainer, patched):
    """Return the gradients of the step that SGD took."""
    before = {name: p.detach().clone() for name, p in patched.named_trainable_parameters()}
    trainer.train()
    named = patched.named_trainable_parameters()
    return {name: (before[name] - sharding.gather(p)) / RATE for name, p in named}


def assert_same_gradients(found, patched):
    for name, parameter in patched.named_trainable_parameters():
        assert relative_rms(found[name], parameter.grad) < 1e-5, name
    assert patched.model.lm_head.added_rows["image"].grad.any()


def dataset(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


# --- supervised finetuning


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_sft(packing, reentrant, tied, tmp_path):
    """Completion-only loss with activation checkpointing, on rows that are packed or padded."""
    examples = [ids_of(seed, 8 + seed) for seed in range(6)]
    rows = [
        {"input_ids": ids.tolist(), "completion_mask": [0] * 3 + [1] * (len(ids) - 3)}
        for ids in examples
    ]
    model, patched = make_patched(tie_word_embeddings=tied)
    args = trl.SFTConfig(**settings(
        tmp_path, per_device_train_batch_size=6, packing=packing, max_length=32,
        completion_only_loss=True, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    ))  # fmt: skip
    trainer = trl.SFTTrainer(
        model, args, train_dataset=dataset(rows), processing_class=make_tokenizer()
    )
    if packing:
        assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape == (1, 63)
    found = gradients_of(trainer, patched)
    by_hand, patched = make_patched(tie_word_embeddings=tied)
    count = sum(len(ids) - 3 for ids in examples)
    total = 0
    for ids in examples:
        labels = ids.clone()
        labels[:3] = -100
        loss = by_hand(ids[None], labels=labels[None], num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total, rel=1e-5)
    assert_same_gradients(found, patched)


def test_its_collator_drops_modality_ids(tmp_path):
    """Without tokens of their own, adapters would train nothing, with a loss like any other."""
    model, patched = patched_model("mixtral", ModalityLoraConfig(r=4))
    ids = token_ids(1, 8)[0].tolist()
    rows = [{"input_ids": ids, "modality_ids": [1] * 8} for _ in range(2)]
    model.warnings_issued = {}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**settings(tmp_path)),
        train_dataset=dataset(rows),
        processing_class=make_tokenizer(),
    )
    with pytest.warns(UserWarning, match="no token of modality 'image'.*does the collator drop"):
        found = gradients_of(trainer, patched)
    assert not any(gradient.any() for gradient in found.values())


# --- preferences


def sequence_log_probs(model, prompt, completion):
    """Return the log probability of a completion, a scalar."""
    ids = torch.cat([prompt, completion, torch.tensor([1])])  # TRL ends a completion by eos
    scores = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, ids[1:, None])[len(prompt) - 1 :].sum()


def scaled(model):
    """Return the handle of a model whose adapters are those of the reference, times 1.3."""
    patched = get_patched(model)
    with torch.no_grad():
        for parameter in patched.trainable_parameters():
            parameter.mul_(1.3)
    return patched


TRIPLES = [(ids_of(i, 7), ids_of(20 + i, 6), ids_of(40 + i, 8)) for i in range(2)]


def preferences():
    columns = ("prompt", "chosen", "rejected")
    rows = [dict(zip(columns, map(words, triple), strict=True)) for triple in TRIPLES]
    for row in rows:
        row["prompt"] += " "  # TRL joins prompt and completion
    return dataset(rows)


def dpo_loss(model, reference):
    """Return the mean loss of the preferences, with beta 0.5."""
    losses = []
    for prompt, chosen, rejected in TRIPLES:
        ours, theirs = (
            sequence_log_probs(m, prompt, chosen) - sequence_log_probs(m, prompt, rejected)
            for m in (model, reference)
        )
        losses.append(-F.logsigmoid(0.5 * (ours - theirs.detach())))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo(precomputed, tmp_path):
    """The reference is a deepcopy of the patched model, or the model itself before it trains."""
    model, _ = make_patched()
    by_hand, reference = copy.deepcopy(model), copy.deepcopy(model)
    args = trl.DPOConfig(**settings(
        tmp_path, per_device_train_batch_size=2, beta=0.5, precompute_ref_log_probs=precomputed
    ))  # fmt: skip
    patched = scaled(model)
    if precomputed:
        scaled(reference)
    trainer = trl.DPOTrainer(
        model,
        None if precomputed else copy.deepcopy(reference),
        args,
        train_dataset=preferences(),
        processing_class=make_tokenizer(),
    )
    found = gradients_of(trainer, patched)
    expected = scaled(by_hand)
    loss = dpo_loss(by_hand, reference)
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert_same_gradients(found, expected)


def dpo_losses(folder, shared):
    """Return the losses of four steps of DPO beside a reference that shares the base, or a copy."""
    model, patched = make_patched()
    reference = patched.reference_model() if shared else copy.deepcopy(model)
    scaled(model)
    args = trl.DPOConfig(**settings(
        folder, per_device_train_batch_size=2, beta=0.5, max_steps=4, learning_rate=0.1
    ))  # fmt: skip
    trainer = trl.DPOTrainer(
        model, reference, args, train_dataset=preferences(), processing_class=make_tokenizer()
    )
    trainer.train()
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


def test_dpo_with_a_reference_that_shares_the_base(tmp_path):
    found, expected = (dpo_losses(tmp_path / str(shared), shared) for shared in (True, False))
    assert len(found) == 4 and len(set(found)) > 1
    assert found == expected


def test_a_copy_that_would_compute_with_the_original():
    """TRL's head leaves forwards without its keyword to a method that it found bound."""
    heads = pytest.importorskip("trl.trainer.utils")
    if not hasattr(heads, "add_fused_lm_head"):
        pytest.skip("this TRL has no fused head")
    model, _ = make_patched()
    ids = ids_of(0, 8)[None]
    expected = copy.deepcopy(model)
    heads.add_fused_lm_head(model)
    copied = copy.deepcopy(model)
    for each in (expected, copied):
        scaled(each)
    heads.add_fused_lm_head(copied)
    with pytest.raises(RuntimeError, match="calls the model that this one is a deepcopy of: copy"):
        copied(ids)
    fused = copied(ids, labels=ids, fused_lm_head=True).loss
    assert fused.item() == pytest.approx(expected(ids, labels=ids).loss.item(), rel=1e-4)
    heads.add_fused_lm_head(model)
    assert model(ids).logits.isfinite().all()


def test_grpo(tmp_path):
    """It starts, generates from prompts with image tokens, and steps."""
    rows = [{"prompt": words(ids_of(i, 7))} for i in range(2)]
    model, patched = make_patched()
    args = trl.GRPOConfig(**settings(
        tmp_path, per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
        beta=0.0,
    ))  # fmt: skip
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(c.count("t2")) + len(c) for c in completions],
        args=args,
        train_dataset=dataset(rows),
        processing_class=make_tokenizer(),
    )
    found = gradients_of(trainer, patched)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert any("modality_lora" in name and gradient.any() for name, gradient in found.items())


def grpo_losses(folder, shared):
    """Return the losses and divergences of three steps of GRPO, by a reference of either kind."""
    model, patched = make_patched()
    reference = patched.reference_model() if shared else copy.deepcopy(model).requires_grad_(False)
    scaled(model)
    args = trl.GRPOConfig(**settings(
        folder, per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
        beta=0.0, max_steps=3, learning_rate=0.1, seed=1,
    ))  # fmt: skip
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
        args=args,
        train_dataset=dataset([{"prompt": words(ids_of(i, 7))} for i in range(4)]),
        processing_class=make_tokenizer(),
    )
    use_reference(trainer, reference, beta=0.3)
    with pytest.raises(ValueError, match="make it with beta=0"):
        use_reference(trainer, reference, beta=0.3)
    trainer.train()
    logs = [each for each in trainer.state.log_history if "loss" in each]
    return [(each["loss"], each["kl"]) for each in logs]


def test_grpo_with_a_reference_that_shares_the_base(tmp_path):
    found, expected = (grpo_losses(tmp_path / str(shared), shared) for shared in (True, False))
    assert len(found) == 3 and all(divergence > 1e-3 for _, divergence in found)
    assert found == expected


# --- two ranks take the step of one process

FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "fsdp_version": 2, "transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"],
        "reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT",
    },
}  # fmt: skip


def sft_by_fsdp2(rank, folder):
    """Train on rows of several lengths: the loss counts the tokens of both ranks."""
    rows = [ids_of(seed, 8 + seed) for seed in range(4)]
    model, patched = make_patched()
    args = settings(
        folder, per_device_train_batch_size=2, max_length=32, average_tokens_across_devices=True
    )
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**args, **FSDP),
        train_dataset=dataset([{"input_ids": ids.tolist()} for ids in rows]),
        processing_class=make_tokenizer(),
    )
    found = gradients_of(trainer, patched)
    assert trainer.accelerator.is_fsdp2
    assert all(isinstance(parameter, DTensor) for parameter in patched.trainable_parameters())
    by_hand, expected = make_patched()
    count = sum(len(ids) - 1 for ids in rows)
    for ids in rows:
        by_hand(ids[None], labels=ids[None], num_items_in_batch=count).loss.backward()
    assert_same_gradients(found, expected)


def dpo_by_ddp(rank, folder):
    model, _ = make_patched()
    by_hand, reference = copy.deepcopy(model), copy.deepcopy(model)
    args = settings(folder, per_device_train_batch_size=1, beta=0.5)
    patched = scaled(model)
    trainer = trl.DPOTrainer(
        model,
        copy.deepcopy(reference),
        trl.DPOConfig(**args, ddp_find_unused_parameters=False),
        train_dataset=preferences(),
        processing_class=make_tokenizer(),
    )
    found = gradients_of(trainer, patched)
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    expected = scaled(by_hand)
    dpo_loss(by_hand, reference).backward()
    assert_same_gradients(found, expected)


SCENES = {each.__name__: each for each in (sft_by_fsdp2, dpo_by_ddp)}


@pytest.mark.parametrize("scene", SCENES)
def test_two_ranks(scene, tmp_path):
    assert not (errors := errors_of(__file__, tmp_path, scene)), "\n".join(errors.values())


def test_a_year_old_trl(tmp_path):
    """The tests of one process, with an older TRL, which takes logits from the model's forward."""
    old = tmp_path / "trl"
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", old)
    subprocess.run([*pip, "trl==0.25.1"], check=True)
    paths = [str(old), *filter(None, [os.environ.get("PYTHONPATH")])]
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)
    done = subprocess.run(
        [*pytest_, "-k", "not year_old and not two_ranks"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "14 passed, 1 skipped" in done.stdout


if __name__ == "__main__":
    engines_on_cpu.allow()
    play({sys.argv[2]: SCENES[sys.argv[2]]}, sys.argv[1])
