"""SIGKILL at any line of a save: the adapter on the disk is the old or the new one, and loads."""

import os

import torch
from support.interrupts import kill, lines_of
from support.model_zoo import make_model, randomise
from support.saved_adapters import ADAPTER

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model


def test_a_killed_save_leaves_an_adapter(tmp_path, attack):
    """Leftovers of killed saves are gone after the next one."""
    patched = patch_model(make_model("mixtral"), ModalityLoraConfig(r=2))
    add_modality_tokens(patched.model, "image", 3)
    folder = tmp_path / "adapter"
    save = lambda: patched.save_adapter(folder)  # noqa: E731
    lines = lines_of(save)
    found = set()
    for number in attack.tries(len(lines)):
        values = {}
        for seed in (number + 1, -number - 1):  # the old one and the new one
            randomise(patched, seed=seed)
            values[seed] = [p.detach().clone() for p in patched.trainable_parameters()]
            if seed > 0:
                save()
                assert sorted(os.listdir(folder)) == sorted(ADAPTER)
        kill(save, number)
        patched.load_adapter(folder)
        loaded = list(patched.trainable_parameters())
        seeds = [s for s, each in values.items() if all(map(torch.equal, each, loaded))]
        assert len(seeds) == 1, lines[number]
        found.add(seeds[0] > 0)
    assert True in found
