"""Memory of training by formula: against what was measured, and what autograd keeps."""

import itertools
import json

import pytest
import torch
from support.families import make_family
from support.programs import STUDIES, imported
from transformers import AutoModelForCausalLM, MixtralConfig

from moe_kernels import info
from moe_kernels.models import memory, support

RESULTS = STUDIES.parent / "benchmarks" / "results"


@pytest.fixture(scope="module")
def program():
    with imported("estimate_memory") as module:
        yield module


def test_measurements_follow_the_formula(program):
    """The page says by it which model fits which card."""
    with imported("shared.memory_tables") as tables:
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
    of = dict.fromkeys(
        ("base", "adapters and AdamW", "gathered or in buckets", "expanded scales"), 0.0
    )
    of |= {"logits": 1.0, "gradients": 2.0, "kept for backward": 7.0, "one layer's backward": 4}
    assert memory.peak(of) == 11


def test_sizes_follow_from_the_model(program):
    """Parameters, and what autograd keeps of a layer for each token, are counted."""
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


def test_a_small_model_has_its_own_units(program, capsys, tmp_path):
    """All of it was 0.0 B and 0 GiB."""
    program.memory_run.config_of(256, 1).save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--r", "2"]
    assert program.main([*options, "--num-tokens", "10"]) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[2:-1]]
    assert cells == ["9.77 M", "59.6 k, 19.5 MiB", "8.45 k, 18.8 MiB"]
    assert program.main([*options, "--fits", "--tokens", "1"]) == 0
    row = capsys.readouterr().out.splitlines()[2].split("|")
    assert float(row[3]) == pytest.approx(2 * 9.77e6 / 1e9, rel=0.05)


def test_info_says_what_a_model_takes_by_the_same_formula(program, capsys, tmp_path):
    config = program.memory_run.config_of(2048, 4)
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path)
    info.main(["--model", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "mixtral"
    assert found["layout"] == (
        "4 layers, 4 with experts: 8 MixtralExperts (8, 14336, 2048), 2 a token; attention q_proj, "
        "k_proj, v_proj, o_proj"
    )
    assert program.main(["--fits", "--model", str(tmp_path)]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:] if line]
    peaks = {row[1].strip(): row[-3].strip() for row in rows}
    for said, of in (
        ("one card, bf16", "bf16"),
        ("one card, experts in NF4", "NF4"),
        ("each of 8 cards, bf16 under FSDP2", "bf16, FSDP2 on 8 cards"),
    ):
        size, _, fits = found["memory to train"][said].partition(" GB, ")
        assert float(size) == pytest.approx(float(peaks[of]), abs=0.05)
        assert fits == "fits cards of 24 GB and 80 GB"


@pytest.mark.parametrize(
    ("family", "words"),
    [("deepseek_v3", "like Mixtral's, with q, k, v and o"), ("inkling2", "neither experts nor")],
)
def test_info_says_where_the_formula_does_not_hold(family, words):
    assert words in support.of_model(make_family(family))["memory to train"]


def test_the_table_says_where_the_formula_does_not_hold(program, capsys, tmp_path):
    make_family("deepseek_v3").config.save_pretrained(tmp_path)
    assert program.main(["--fits", "--model", str(tmp_path)]) == 1
    assert "error: no estimate for DeepseekV3ForCausalLM: " in capsys.readouterr().out


def test_too_large_a_model_fits_no_card():
    config = MixtralConfig(num_hidden_layers=90)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = memory.in_short(model, ("experts", "attention"))
    assert found["one card, bf16"].endswith("GB, fits no card of up to 80 GB")
    assert not any(p.requires_grad is False for p in model.parameters()), "it is still patched"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0"), (7, "7"), (999, "999"), (1000, "1 k"), (33_760, "33.8 k"), (999_999, "1 M"),
        (46.7e9, "46.7 B"), (1.2e12, "1,200 B"),
    ],
)  # fmt: skip
def test_amounts(number, words):
    assert memory.amount(number, ("", " k", " M", " B")) == words
