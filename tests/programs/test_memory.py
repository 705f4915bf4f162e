"""Memory of training by formula: against what was measured, and what autograd keeps."""

import itertools
import json

import pytest
import torch
from support.programs import STUDIES, imported

RESULTS = STUDIES.parent / "benchmarks" / "results"


@pytest.fixture(scope="module")
def program():
    with imported("estimate_memory") as module:
        yield module


def test_measurements_follow_the_formula(program):
    """The page says by it which model fits which card."""
    with imported("shared.memory_tables") as tables, imported("shared.memory") as memory:
        records = json.loads((RESULTS / tables.RESULTS).read_text())["records"]
        cases = {(each["nf4"], each["checkpointed"], each["fused_loss"]) for each in records}
        with_logits = set(itertools.product((False, True), (False, True), (False,)))
        assert cases >= with_logits | {(False, True, True)}
        for record in records:
            of = program.terms_of(record)
            assert of == pytest.approx(record["terms"])
            assert memory.peak(of) == pytest.approx(record["measured"], rel=0.1)


def test_what_is_kept_is_there_in_the_last_layers_backward():
    """With many tokens it outgrows the gradients of adapters."""
    with imported("shared.memory") as memory:
        of = dict.fromkeys(
            ("base", "adapters and AdamW", "gathered or in buckets", "expanded scales"), 0.0
        )
        of |= {"logits": 1.0, "gradients": 2.0, "kept for backward": 7.0, "one layer's backward": 4}
        assert memory.peak(of) == 11


def test_sizes_follow_from_the_model(program):
    """Parameters, and what autograd keeps of a layer for each token, are counted."""
    with imported("shared.memory") as memory:
        sizes, kept = [], []
        for layers in (1, 2):
            trial = {"hidden": 256, "layers": layers, "nf4": False, "checkpointed": False}
            trial |= {"fused_loss": False, "targets": ["experts", "attention"]}
            patched = program.memory_run.make(trial)
            sizes.append(memory.sizes_of(patched))
            kept.append(saved_bytes(patched.model, torch.arange(128)[None]))
        base = sum(p.nbytes for p in patched.model.parameters() if not p.requires_grad)
        trained = sum(p.nbytes for p in patched.trainable_parameters())
        of = memory.terms(sizes[1], 128)
        assert (of["base"], of["gradients"]) == (base, trained)
        assert of["adapters and AdamW"] == 3 * trained
        assert sizes[1].experts == 2 * sizes[0].experts == 2 * 8 * 3 * 256 * 896
        assert kept[1] - kept[0] == pytest.approx(128 * sizes[0].kept, rel=0.1)
        packed, whole = memory.terms(sizes[1], 128, nf4=True), 2 * sizes[1].experts
        assert packed["expanded scales"] == whole / 2 * 4 / (2 * 64)
        assert packed["base"] == pytest.approx(base - whole * (1 - 0.516 / 2), rel=1e-3)
        assert memory.terms(sizes[1], 128, ranks=8)["base"] == base / 8


def saved_bytes(model, ids):
    """Return the bytes that autograd keeps in a forward beside parameters, each storage once."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(ids, use_cache=False)
    total = sum(storage.nbytes() for storage in storages.values())
    del output
    return total


def test_the_table_says_what_fits(program, capsys):
    assert program.main(["--fits", "--tokens", "1024", "--r", "4"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:] if line]
    found = {(row[0].strip(), row[1].strip()): row[-2].strip() for row in rows}
    assert found["Mixtral-8x7B", "bf16"] == "no" and found["Mixtral-8x7B", "NF4"] == "yes"
    assert found["Qwen3-30B-A3B", "bf16, attention alone"] == "yes"


def test_the_table_says_it_of_another_model(program, capsys, tmp_path):
    program.memory_run.config_of(512, 2).save_pretrained(tmp_path)
    assert program.main(["--fits", "--model", str(tmp_path)]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows and all(str(tmp_path) in row for row in rows if row)
