"""Kills: an adapter on the disk is the old or the new one; a program goes on where it was."""

import json
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from support.interrupts import kill, lines_of
from support.killed_program import train
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_stopped_program_goes_on_to_the_same_weights(name, tmp_path, attack):
    assert run(train, tmp_path) == 0
    operations = int((tmp_path / "operations").read_text())
    expected = contents(tmp_path)
    for number in attack.tries(operations):
        folder = tmp_path / str(number)
        # The number of operations varies: a late signal may come after the end.
        assert run(train, folder, number, getattr(signal, name)) in (0, 1, -signal.SIGKILL)
        assert run(train, folder) == 0
        assert contents(folder) == expected, number
        shutil.rmtree(folder)


def run(function, *arguments):
    """Return the exit code of a process forked from one that has the modules, but no threads."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["support.killed_program"])
    process = server.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def contents(folder):
    """Return what a finished stage has: its files, the loss of each step, and the weights."""
    (stage,) = (folder / "stages").iterdir()
    # What a killed write left goes at the next one of that file, if there is one.
    names = sorted(path.name for path in stage.iterdir() if path.suffix != ".partial")
    weights = {name: each.tolist() for name, each in torch.load(stage / "weights.pt").items()}
    return names, json.loads((stage / "stage.json").read_text())["result"], weights
