"""The program that measures routing: results, interruptions, refusals."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.model_zoo import make_model, randomise, token_ids
from support.programs import imported, save_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.analysis import (
    ExpertRedundancy,
    RoutingRecorder,
    RoutingStatistics,
    expert_redundancy,
)

VOCAB, IMAGES = 256, 10
OPTIONS = ["--text-tokens", "640", "--block", "64", "--batch", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def program():
    with imported("analyze_routing") as module:
        yield module


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a model, and an adapter with held-out sequences: four text tokens, then images."""
    folder = tmp_path_factory.mktemp("saved")
    save_byte_tokenizer(folder / "model")
    model = make_model("olmoe", vocab_size=VOCAB)
    model.save_pretrained(folder / "model")
    patched = patch_model(model, ModalityLoraConfig(r=2))
    add_modality_tokens(model, "image", IMAGES)
    randomise(patched)
    patched.save_adapter(folder / "run" / "adapter")
    ids = token_ids(7, 12, vocab=VOCAB)
    ids[:, 4:] = token_ids(7, 8, seed=1, vocab=IMAGES) + VOCAB
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    save_file({"input_ids": ids, "attention_mask": mask}, folder / "run" / "held_out.safetensors")
    return folder, model, {"input_ids": ids, "attention_mask": mask}


def command(saved, *options, adapter=True):
    folder = saved[0]
    given = ["--adapter", str(folder / "run" / "adapter")] if adapter else []
    return [str(folder / "model"), *given, *OPTIONS, *options]


@pytest.fixture(scope="module")
def finished(program, saved, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert program.main(command(saved, "--out", str(out))) == 0
    return out


def read(path):
    return json.loads(path.read_text())


def test_writes_what_recorder_and_redundancy_say(finished, saved):
    _, model, sequences = saved
    report = read(finished / "report.json")
    # Eight image tokens in each of seven rows, three of them padding; the captions do not count.
    assert report["rows"] == {"text": 640, "image": 7 * 8 - 3}
    assert report["text_routing_unchanged"] is True
    before, after = (
        RoutingStatistics.from_dict(read(finished / f"routing_{state}.json"))
        for state in ("before", "after")
    )
    assert torch.equal(before.counts[:, 0], after.counts[:, 0])
    assert not torch.equal(before.counts[:, 1], after.counts[:, 1])
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(**sequences)
    assert torch.equal(recorder.statistics().counts[:, 1], after.counts[:, 1])
    for state, found in (("before", before), ("after", after)):
        figures = report["routing"][state]
        divergence = found.divergence("text", "image").tolist()
        assert figures["jensen_shannon_divergence_bits"] == divergence
        assert figures["entropy_nats"]["image"] == found.entropy()[:, 1].tolist()
        assert sum(sum(kind) for kind in figures["experts"].values()) == 2 * 4
    rows = [sequences]
    for name, adapted in (("image_after", True), ("image_after_base_experts", False)):
        found = ExpertRedundancy.from_dict(read(finished / f"redundancy_{name}.json"))
        # 512 is more than there are: every row.
        expected = expert_redundancy(model, rows, modality="image", adapted=adapted)
        assert found.rows == expected.rows == 53
        torch.testing.assert_close(found.mean(), expected.mean(), rtol=1e-3, atol=1e-4)
        assert report["redundancy"][name] == {"rows": 53, "mean": found.mean().tolist()}
    means = {name: found["mean"] for name, found in report["redundancy"].items()}
    assert means.keys() == {"text", "image_before", "image_after", "image_after_base_experts"}
    assert len({tuple(found) for found in means.values()}) == 4


def test_writes_pictures(finished):
    pictures = {path.name for path in finished.glob("*.png")}
    assert pictures == {
        "load_before.png", "load_after.png", "specialisation_before.png",
        "specialisation_after.png", "divergence.png", "redundancy_text.png", "redundancy_image.png",
    }  # fmt: skip
    for name in pictures:
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert not list(finished.glob(".*")), "a temporary file stayed"


def test_a_second_run_loads_no_model(program, saved, finished, monkeypatch):
    def fail(*_):
        raise AssertionError("the model was loaded again")

    before = (finished / "report.json").read_text()
    monkeypatch.setattr(program, "load_causal_lm", fail)
    assert program.main(command(saved, "--out", str(finished))) == 0
    assert (finished / "report.json").read_text() == before


def test_stopped_it_goes_on(program, saved, finished, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(program.Subject, "redundancy", stop)
        assert program.main(command(saved, "--out", str(tmp_path))) == 130
    assert "continues from here" in capsys.readouterr().out
    assert not (tmp_path / "report.json").exists()
    monkeypatch.setattr(program.Subject, "routing", stop)  # done before
    assert program.main(command(saved, "--out", str(tmp_path))) == 0
    one, other = (read(out / "report.json") for out in (tmp_path, finished))
    for field in ("rows", "routing", "redundancy"):
        assert one[field] == other[field]


def test_a_model_without_adapter(program, saved, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    options = ("--text", str(text), "--metric", "cosine", "--out", str(tmp_path / "out"))
    assert program.main(command(saved, *options, adapter=False)) == 0
    report = read(tmp_path / "out" / "report.json")
    assert report["rows"] == {"text": 640} and report["routing"].keys() == {"before"}
    assert report["redundancy"].keys() == {"text"}
    found = read(tmp_path / "out" / "redundancy_text.json")
    assert found["metric"] == "cosine" and found["rows"] == 512
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {"load_before.png", "redundancy_text.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1"),
        (["--max-tokens", "3"], "--max-tokens must be at least 4"),
        (["--modality", "sound"], "the adapter has image, not sound"),
        (["--sequences", "none.safetensors"], "none.safetensors is not a file"),
        (["--text", "none.txt"], "none.txt is not a file"),
        (["--adapter", "nowhere"], "no adapter: there is no folder nowhere"),
        (["--device", "nonsense"], "nonsense"),
        (["--backend", "triton"], "triton"),
    ],
)
def test_refuses_before_any_work(program, saved, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        program.main(command(saved, *options, "--out", str(tmp_path / "out")))
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_refuses_options_of_an_adapter_without_one(program, saved, capsys):
    with pytest.raises(SystemExit):
        program.main(command(saved, "--modality", "image", adapter=False))
    assert "only with --adapter" in capsys.readouterr().err


def test_an_adapter_without_sequences(program, saved, tmp_path, capsys):
    shutil.copytree(saved[0] / "run" / "adapter", tmp_path / "alone" / "adapter")
    with pytest.raises(SystemExit):
        program.main(
            command(saved, "--adapter", str(tmp_path / "alone" / "adapter"), adapter=False)
        )
    assert "no held_out.safetensors in or beside" in capsys.readouterr().err


def with_sequences(tmp_path, **tensors):
    save_file(tensors, tmp_path / "given.safetensors")
    return ("--sequences", str(tmp_path / "given.safetensors"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"ids": torch.ones(2, 5).long()}, "has no tensor input_ids, it has ids"),
        ({"input_ids": torch.ones(2, 5).int()}, "must be (N, S) int64"),
        (
            {"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 4).long()},
            "attention_mask must be (N, S) int64",
        ),
        ({"input_ids": torch.full((2, 5), VOCAB + IMAGES)}, "the model knows 0..265"),
        ({"input_ids": torch.ones(2, 5).long()}, "no sequence has a token of modality 'image'"),
    ],
)
def test_says_what_is_wrong_with_sequences(program, saved, tensors, message, tmp_path, capsys):
    options = with_sequences(tmp_path, **tensors)
    assert program.main(command(saved, *options, "--out", str(tmp_path / "out"))) == 1
    assert message in " ".join(capsys.readouterr().out.split())


def test_says_what_is_wrong_with_the_model(program, saved, tmp_path, capsys):
    """A dense model is refused, and one that the adapter was not trained on."""
    folder = saved[0]
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    for name, model, adapter, message in (
        ("dense", LlamaForCausalLM(config), False, "LlamaForCausalLM has no router"),
        ("dense", None, True, "no layer has experts: "),
        ("other", make_model("olmoe", vocab_size=VOCAB, seed=5), True, "other base weights"),
    ):
        if model is not None:
            model.save_pretrained(tmp_path / name)
        options = ["--tokenizer", str(folder / "model"), "--out", str(tmp_path / "out")]
        given = command(saved, *options, adapter=adapter)
        assert program.main([str(tmp_path / name), *given[1:]]) == 1
        assert message in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out" / "report.json").exists()
