"""DDP by accelerate without find_unused_parameters; one of two processes has text only."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from support.model_zoo import VOCAB, token_ids
from support.patched_models import patched_model
from support.ranks import run_ranks
from transformers import TrainingArguments

from moe_kernels import ModalityLoraConfig
from moe_kernels.training import AdapterTrainer

IMAGE = 8


def make_patched():
    config = ModalityLoraConfig(r=4, target_modules=("experts", "attention", "router"))
    model, patched = patched_model("mixtral", config, num_tokens=IMAGE)
    model.train()
    return patched


def batch(rank, step):
    """Make a batch: rank 0 gets pictures, rank 1 text only."""
    ids = token_ids(2, 12, seed=10 * step + rank)
    if rank == 0:
        ids[:, 6:] = VOCAB + ids[:, 6:] % IMAGE
    return ids


def losses(model, rank):
    """Yield the losses of three steps; the last step has two forwards before its backward."""
    yield model(batch(rank, 0), labels=batch(rank, 0)).loss
    yield model(batch(rank, 1), labels=batch(rank, 1)).loss
    first, second = batch(rank, 2), batch(rank, 3)
    yield model(first, labels=first).loss + model(second, labels=second).loss


def work(folder):
    """Train in one process; write the gradients of every step and the parameters."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    patched = make_patched()
    model, optimiser = accelerator.prepare(
        patched.model, torch.optim.SGD(list(patched.trainable_parameters()), lr=0.1)
    )
    assert type(model).__name__ == "DistributedDataParallel" and not model.find_unused_parameters
    grads = []
    for loss in losses(model, accelerator.process_index):
        assert loss.requires_grad
        accelerator.backward(loss)
        grads.append({n: p.grad.clone() for n, p in patched.named_trainable_parameters()})
        optimiser.step()
        optimiser.zero_grad()
    result = {"grads": grads, "end": dict(patched.named_trainable_parameters())}
    torch.save(result, Path(folder) / f"{accelerator.process_index}.pt")


def adapter_trainer(folder, steps):
    """Return a trainer that has made ``steps`` steps, some of them in an earlier run."""
    rows = [{"input_ids": ids, "labels": ids} for step in range(8) for ids in batch(step % 2, step)]
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, save_steps=2,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    trainer = AdapterTrainer(
        make_patched(), args, rows_lr=5e-2, train_dataset=rows, eval_dataset=rows
    )
    trainer.train(resume_from_checkpoint=(folder / "checkpoint-2").exists() or None)
    return trainer


def resume(folder):
    """Check that a run in two parts ends as one in one part, on both ranks, with its best model."""
    whole = adapter_trainer(folder / "whole", 4)
    assert type(whole.model_wrapped).__name__ == "DistributedDataParallel"
    adapter_trainer(folder / "parts", 2)
    resumed = adapter_trainer(folder / "parts", 4)
    assert resumed.state.global_step == 4 and resumed.state.best_global_step == 4
    expected = dict(whole.patched.named_trainable_parameters())
    for name, found in resumed.patched.named_trainable_parameters():
        assert torch.equal(found, expected[name]), name
        first = found.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(found, first), name
    files = {path.name for path in (folder / "parts" / "checkpoint-4").iterdir()}
    assert files >= {*AdapterTrainer.adapter_files, "rng_state_1.pth"}
    assert not any("model" in name for name in files - {*AdapterTrainer.adapter_files})


def test_gradients_are_the_mean_of_the_two(tmp_path):
    run_ranks(__file__, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    patched = make_patched()
    parameters = dict(patched.named_trainable_parameters())
    optimiser = torch.optim.SGD(parameters.values(), lr=0.1)
    steps = zip(*(losses(patched.model, rank) for rank in range(2)), strict=True)
    for step, both in enumerate(steps):
        (sum(both) / 2).backward()
        for name, parameter in parameters.items():
            for result in results:
                error = (result["grads"][step][name] - parameter.grad).norm()
                assert error / parameter.grad.norm() < 1e-4, (step, name)
        optimiser.step()
        optimiser.zero_grad()
    for name, end in results[0]["end"].items():
        assert torch.equal(end, results[1]["end"][name]), name


def test_an_adapter_trainer_resumes(tmp_path):
    run_ranks(__file__, tmp_path, "resume")


if __name__ == "__main__":
    resume(Path(sys.argv[1])) if sys.argv[2:] else work(sys.argv[1])
