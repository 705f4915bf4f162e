"""Drop-in: an ordinary ``transformers.Trainer`` script, checkpointing, mixed precision, resume."""

import difflib
import logging
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.model_zoo import FAMILY, VOCAB, make_model, randomise, token_ids, unchanged
from transformers import Trainer, TrainerCallback, TrainingArguments

from moe_kernels import ModalityLoraConfig, PatchedModel, add_modality_tokens, patch_model
from moe_kernels.training import AdapterTrainer, MatrixMuon

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
IMAGE = 8

SCRIPT = (Path(__file__).parents[1] / "support" / "trainer_script.py").read_text()
# after this line of the script -> this line
ADDED_LINES = {
    "from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments": (
        "from moe_kernels import add_modality_tokens, patch_model"
    ),
    "model = load_model()": (
        'patched = patch_model(model); add_modality_tokens(model, "image", len(IMAGE))'
    ),
}


def make_patched(family="mixtral", *, seed=0, **kwargs):
    model = make_model(family, seed=seed, **kwargs)
    targets = ("experts", "attention", "router")
    patched = patch_model(model, ModalityLoraConfig(r=4, target_modules=targets))
    add_modality_tokens(model, "image", IMAGE)
    return patched


def examples(size=16, *, image=True, length=12, seed=0):
    """Make examples of text, then image tokens, with different numbers of predicted labels."""
    ids = token_ids(size, length, seed=seed)
    if image:
        ids[:, length // 2 :] = VOCAB + ids[:, length // 2 :] % IMAGE
    labels = ids.clone()
    for row in range(size):
        labels[row, : row % 5] = -100
    return [
        {"input_ids": i.tolist(), "labels": j.tolist()} for i, j in zip(ids, labels, strict=True)
    ]


def make_trainer(
    model, folder, dataset, *, optimizers=(None, None), callbacks=(), own=None, **kwargs
):
    settings = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1,
    }  # fmt: skip
    options = {
        "args": TrainingArguments(**settings | kwargs), "train_dataset": dataset,
        "optimizers": optimizers, "callbacks": list(callbacks),
    }  # fmt: skip
    if isinstance(model, PatchedModel):
        return AdapterTrainer(model, eval_dataset=dataset, **options | (own or {}))
    return Trainer(model=model, **options)


def values(patched):
    return {name: p.detach().clone() for name, p in patched.named_trainable_parameters()}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


# --- the script


def multimodal_script():
    lines = []
    for line in SCRIPT.splitlines():
        lines.append(line)
        if line in ADDED_LINES:
            lines += ADDED_LINES[line].split("; ")
    return "\n".join(lines) + "\n"


def run_script(text, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(text.replace('OUTPUT = "out"', f"OUTPUT = {str(tmp_path / 'out')!r}"))
    return runpy.run_path(str(path))


def test_a_diff_of_three_lines(tmp_path):
    """The plain script fails on image tokens; with three more lines it learns them."""
    with pytest.raises(IndexError):
        run_script(SCRIPT, tmp_path)
    text = multimodal_script()
    diff = [
        line
        for line in difflib.unified_diff(SCRIPT.splitlines(), text.splitlines(), n=0)
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert len(diff) <= 3 and all(line.startswith("+") for line in diff)

    script = run_script(text, tmp_path)
    losses = [entry["loss"] for entry in script["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.2
    model, patched = script["model"], script["patched"]
    assert all(p.any() for name, p in patched.named_trainable_parameters() if "lora_B" in name)
    patched.unpatch()
    base = script["load_model"]()
    assert_same_bits(dict(model.state_dict()), dict(base.state_dict()))


# --- data


def test_an_all_text_dataset_trains(tmp_path):
    """On text alone the loss requires grad, and adapters' gradients are None or exact zeros."""
    patched = make_patched()
    randomise(patched)
    names = [name for name, _ in patched.named_trainable_parameters() if "modality_lora" in name]
    grads = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            for name, parameter in model.named_parameters():
                if name in names:
                    grads[name] = parameter.grad
            assert model.get_output_embeddings().added_rows["image"].grad.any()

    before = values(patched)
    dataset = examples(image=False)
    make_trainer(patched.model, tmp_path, dataset, max_steps=2, callbacks=[Look()]).train()
    assert sorted(grads) == sorted(names)
    assert all(grad is None or not grad.any() for grad in grads.values())
    after = values(patched)
    assert_same_bits({n: after[n] for n in names}, {n: before[n] for n in names})


def test_a_modality_ids_column_reaches_the_model(tmp_path):
    """remove_unused_columns keeps the column, since the model's forward has the argument."""
    patched = make_patched()
    seen = []
    patched.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    dataset = examples(image=False)
    for index, example in enumerate(dataset):
        example["modality_ids"] = [int((index + at) % 3 == 0) for at in range(12)]
        example["note"] = "no tensor could be made of this"
    trainer = make_trainer(patched.model, tmp_path, dataset, max_steps=2)
    assert trainer.args.remove_unused_columns
    trainer.train()
    assert all("note" not in kwargs for kwargs in seen)
    masks = {tuple(example["input_ids"]): example["modality_ids"] for example in dataset}
    rows = [
        (tuple(ids.tolist()), mask.tolist())
        for kwargs in seen
        for ids, mask in zip(kwargs["input_ids"], kwargs["modality_ids"], strict=True)
    ]
    assert len(rows) == 8 and all(masks[ids] == mask for ids, mask in rows)
    assert all(p.any() for name, p in patched.named_trainable_parameters() if "lora_B" in name)


def test_evaluation_and_prediction(tmp_path):
    patched = make_patched()
    dataset = examples(8)
    trainer = make_trainer(patched.model, tmp_path, dataset, max_steps=1)
    before = trainer.evaluate(dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(dataset)["eval_loss"] != before
    assert trainer.predict(dataset).predictions.shape == (8, 12, VOCAB + IMAGE)


# --- gradients


def sgd(patched):
    optimiser = torch.optim.SGD(patched.trainable_parameters(), lr=0.1)
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0)


def test_gradient_accumulation_is_the_big_batch(tmp_path):
    """Accumulated gradients equal the big batch's, even if the parts have fewer or more labels."""
    results = []
    for batch, steps in ((8, 1), (2, 4)):
        patched = make_patched()
        randomise(patched)
        trainer = make_trainer(
            patched.model, tmp_path, examples(), optimizers=sgd(patched), max_steps=1,
            per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_grad_norm=0,
        )  # fmt: skip
        before = values(patched)
        trainer.train()
        after = values(patched)
        results.append({name: after[name] - before[name] for name in after})
    for name, big in results[0].items():
        assert big.any(), name
        # One step: a second would magnify rounding, which differs with the number of tokens.
        assert (results[1][name] - big).norm() / big.norm() < 1e-4, name


def gradients(patched, batches, *, embeds=False):
    """Return gradients of all adapters, by name, for the sum of losses of several forwards."""
    model = patched.model
    model.zero_grad()
    loss = 0
    for ids, modality_ids in batches:
        inputs = {"input_ids": ids}
        if embeds:
            inputs = {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
        loss = loss + model(**inputs, modality_ids=modality_ids, labels=ids).loss
    loss.backward()
    return {name: p.grad for name, p in patched.named_trainable_parameters() if p.grad is not None}


@FAMILY
def test_two_forwards_before_one_backward(family):
    """Each backward uses the mask of its own forward."""
    patched = make_patched(family)
    randomise(patched)
    batches = [
        (token_ids(2, 12, seed=seed), torch.randint(-1, 2, (2, 12), generator=generator))
        for seed, generator in ((seed, torch.Generator().manual_seed(seed)) for seed in range(2))
    ]
    apart = [gradients(patched, [batch]) for batch in batches]
    for name, grad in gradients(patched, batches).items():
        expected = sum(part[name] for part in apart)
        assert (grad - expected).norm() <= 1e-5 * expected.norm(), name


@FAMILY
@REENTRANT
@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeddings"])
def test_checkpointing_keeps_every_bit(family, reentrant, embeds):
    """Checkpointing keeps every bit, also with two forwards of different masks."""
    patched = make_patched(family)
    randomise(patched)
    patched.model.train()
    ids = token_ids(2, 12)
    generator = torch.Generator().manual_seed(0)
    masks = [torch.randint(-1, 2, ids.shape, generator=generator) for _ in range(2)]
    one, two = [(ids, masks[0])], [(ids, masks[0]), (token_ids(2, 12, seed=1), masks[1])]
    expected = [gradients(patched, batches, embeds=embeds) for batches in (one, two)]
    assert sum("lora_A" in name for name in expected[0]) >= 10
    patched.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for batches, expected_bits in zip((one, two), expected, strict=True):
        assert_same_bits(gradients(patched, batches, embeds=embeds), expected_bits)


@REENTRANT
def test_checkpointing_through_the_trainer(reentrant, tmp_path):
    results = []
    for kwargs in (
        {},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        },
    ):
        patched = make_patched()
        make_trainer(patched.model, tmp_path, examples(), **kwargs).train()
        results.append(values(patched))
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_autocast(dtype, tmp_path):
    """float32 adapters train under autocast, on a base of either dtype; text keeps its bits."""
    patched = make_patched(dtype=dtype)
    model = patched.model
    text = token_ids(2, 12)
    with torch.no_grad():
        expected = model(text).logits[..., :VOCAB]
    state = {n: t.clone() for n, t in model.state_dict().items() if "lora" not in n}
    before = values(patched)
    trainer = make_trainer(model, tmp_path, examples(), bf16=True, max_steps=8)
    trainer.train()
    after = values(patched)
    assert {t.dtype for t in after.values()} == {torch.float32}
    for name, tensor in after.items():
        assert tensor.isfinite().all() and not torch.equal(tensor, before[name]), name
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    with torch.no_grad():
        assert torch.equal(model(text).logits[..., :VOCAB], expected)
    patched.unpatch()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_unpatch_after_mixed_precision(tmp_path):
    """Unpatching removes accelerate's wrapper of the model's forward together with ours."""
    model = make_model("mixtral")
    text = token_ids(2, 12)
    expected = model(text).logits
    with unchanged(model):
        patched = patch_model(model)
        add_modality_tokens(model, "image", IMAGE)
        make_trainer(model, tmp_path, examples(), bf16=True, max_steps=1).train()
        patched.unpatch()
        assert torch.equal(model.eval()(text).logits, expected)

    # The next run is under autocast again.
    patch_model(model)
    trainer = make_trainer(model, tmp_path, examples(image=False), bf16=True, max_steps=1)
    trainer.train()
    assert "_original_forward" in model.__dict__


def test_muon_steps_each_matrix_of_experts_and_modalities_on_its_own(tmp_path):
    model = make_model("mixtral")
    patched = patch_model(model, ModalityLoraConfig(r=4, modalities=("image", "sound")))
    randomise(patched)
    pairs = list(patched.trainable_parameters())
    alone = [
        [torch.nn.Parameter(each.clone()) for each in pair.detach().flatten(0, -3)]
        for pair in pairs
    ]  # fmt: skip
    settings = {"lr": 0.1, "weight_decay": 0.2}
    muon = MatrixMuon([{"params": pairs[:3], "lr": 0.3}, {"params": pairs[3:]}], **settings)
    expected = torch.optim.Muon(
        [{"params": sum(alone[:3], []), "lr": 0.3}, {"params": sum(alone[3:], [])}], **settings
    )
    for step in range(3):
        if step == 2:  # what it saves is what it goes on with
            state = muon.state_dict()
            muon = MatrixMuon([{"params": pairs[:3]}, {"params": pairs[3:]}], **settings)
            muon.load_state_dict(state)
        muon.zero_grad()
        ids = token_ids(2, 12, seed=step)
        model(ids, labels=ids, modality_ids=ids % 3).loss.backward()
        for pair, matrices in zip(pairs, alone, strict=True):
            for grad, matrix in zip(pair.grad.flatten(0, -3), matrices, strict=True):
                matrix.grad = grad.clone()
        muon.step()
        expected.step()
        for pair, matrices in zip(pairs, alone, strict=True):
            assert torch.equal(pair, torch.stack([*matrices]).view(pair.shape))
    vector = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \(3,\) is no matrix.*: give it to another"):
        muon.add_param_group({"params": [vector]})
    assert len(muon.param_groups) == 2
    with pytest.raises(ValueError, match="MatrixMuon got no parameter, and would train nothing"):
        MatrixMuon(iter([]), lr=1e-3)


# --- resume


class Crash(TrainerCallback):
    """End the run right after the checkpoint of step 2."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@FAMILY
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_interrupted_run_ends_with_the_same_bits(family, checkpointing, tmp_path):
    def make(folder, *callbacks):
        patched = make_patched(family, tie_word_embeddings=checkpointing)
        trainer = make_trainer(
            patched.model, folder, examples(), save_strategy="steps", save_steps=2,
            gradient_checkpointing=checkpointing, callbacks=callbacks,
        )  # fmt: skip
        return patched, trainer

    whole, trainer = make(tmp_path / "whole")
    trainer.train()

    _, trainer = make(tmp_path / "parts", Crash())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    saved = load_file(tmp_path / "parts" / "checkpoint-2" / "model.safetensors")
    assert any("modality_lora.gate_up_proj.lora_B" in name for name in saved)

    resumed, trainer = make(tmp_path / "parts")
    start = values(resumed)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert_same_bits(values(resumed), values(whole))
    assert all(not torch.equal(start[name], p) for name, p in values(whole).items())


# --- checkpoints of the adapter alone


def test_an_adapter_trainer_resumes_with_the_same_bits(tmp_path, caplog, monkeypatch):
    """The base is in no checkpoint, and nothing warns of keys that are missing."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)

    def make(folder, *callbacks):
        patched = make_patched()
        return patched, make_trainer(
            patched, tmp_path / folder, examples(), save_strategy="steps", save_steps=2,
            callbacks=callbacks, own={"rows_lr": 5e-2}, weight_decay=0.1,
        )  # fmt: skip

    whole, trainer = make("whole")
    trainer.train()
    _, trainer = make("parts", Crash())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    assert {path.name for path in checkpoint.iterdir()} == {
        *AdapterTrainer.adapter_files, "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "trainer_state.json", "training_args.bin",
    }  # fmt: skip
    resumed, trainer = make("parts")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert_same_bits(values(resumed), values(whole))
    assert not [record for record in caplog.records if "missing" in record.getMessage()]
    *groups, rows = trainer.optimizer.param_groups
    assert {each["initial_lr"] for each in groups} == {1e-2} and rows["initial_lr"] == 5e-2
    assert len(rows["params"]) == 2 and rows["weight_decay"] == 0
    assert sum(len(each["params"]) for each in (*groups, rows)) == len(values(whole))


def test_an_adapter_trainer_ends_with_the_best_model(tmp_path):
    patched = make_patched()
    trainer = make_trainer(
        patched, tmp_path, examples(), load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 1
    end = values(patched)
    trainer.save_model(tmp_path / "saved")
    for folder in (tmp_path / "checkpoint-1", tmp_path / "saved"):
        patched.load_adapter(folder)
        assert_same_bits(values(patched), end)
    patched.load_adapter(tmp_path / "checkpoint-4")
    assert not all(torch.equal(end[name], value) for name, value in values(patched).items())


def test_the_log_says_how_experts_are_chosen(tmp_path):
    """Each log is of its own steps, without evaluation, and counts once under recomputation."""
    logs = []
    for checkpointing in (False, True):
        patched, seen = make_patched(), []
        trainer = make_trainer(
            patched, tmp_path / str(checkpointing), examples(), own={"log_routing": True},
            max_steps=2, eval_strategy="steps", eval_steps=1, learning_rate=0.0,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        recorder = trainer._recorder
        recorder.clear = lambda recorder=recorder, seen=seen: (
            seen.append(recorder.statistics()), type(recorder).clear(recorder)
        )  # fmt: skip
        trainer.train()
        # A step has 4 sequences of 6 tokens of text and 6 of pictures, in each of 2 layers.
        assert [each.rows.tolist() for each in seen] == [[[24, 24]] * 2] * 2
        found = [
            {k: v for k, v in entry.items() if k.startswith("routing/")}
            for entry in trainer.state.log_history if "loss" in entry
        ]  # fmt: skip
        for entry, statistics in zip(found, seen, strict=True):
            largest = (statistics.load().amax(-1) * 4).mean(0).tolist()
            divergence = float(statistics.divergence("text", "image").mean())
            assert entry == {
                "routing/text_largest_load": round(largest[0], 4),
                "routing/image_largest_load": round(largest[1], 4),
                "routing/image_divergence": round(divergence, 4),
            }
        logs.append(found)
    assert logs[0] == logs[1]


def test_an_adapter_trainer_refuses_what_its_checkpoints_would_not_hold(tmp_path, monkeypatch):
    patched = make_patched()
    with pytest.raises(TypeError, match="the handle that patch_model.* got MixtralForCausalLM"):
        AdapterTrainer(patched.model)
    with pytest.raises(ValueError, match="rows_lr is for the optimizer that the Trainer makes"):
        make_trainer(patched, tmp_path, examples(), optimizers=sgd(patched), own={"rows_lr": 1e-2})
    trainer = make_trainer(patched, tmp_path, examples())
    patched.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="model.norm.weight trains too .one of 1., .*SaveAdapter"):
        trainer.train()
    create = Trainer.create_accelerator_and_postprocess
    for flag, engine in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):

        def create_with_engine(self, flag=flag):
            create(self)
            setattr(self, flag, True)

        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_with_engine)
        with pytest.raises(ValueError, match=f"{engine} shards the model, .*SaveAdapter"):
            make_trainer(patched, tmp_path, examples())


def test_the_adapter_of_a_trained_model_loads_elsewhere(tmp_path):
    patched = make_patched()
    make_trainer(patched.model, tmp_path / "run", examples()).train()
    patched.save_adapter(tmp_path / "adapter")
    fresh = patch_model(
        make_model("mixtral"), ModalityLoraConfig.from_adapter(tmp_path / "adapter")
    )
    fresh.load_adapter(tmp_path / "adapter")
    ids = token_ids(2, 12, vocab=VOCAB + IMAGE)
    with torch.no_grad():
        expected = patched.model.eval()(ids).logits
        assert torch.equal(fresh.model(ids).logits, expected)
