"""DDP by accelerate without find_unused_parameters; one of two processes has text only."""

import sys
from pathlib import Path

import torch
from support.model_zoo import VOCAB, token_ids
from support.patched_models import patched_model
from support.ranks import run_ranks

from moe_kernels import ModalityLoraConfig

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
    accelerator.end_training()


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


if __name__ == "__main__":
    work(sys.argv[1])
