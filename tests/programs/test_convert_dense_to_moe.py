"""The program that turns a dense model into a Mixture of Experts, on a tiny model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.dense_zoo import make_dense
from support.programs import imported, save_byte_tokenizer
from transformers import AutoModelForCausalLM

from moe_kernels.conversion import dense_to_moe, perplexity
from moe_kernels.conversion import healing as healing_module

pytestmark = pytest.mark.filterwarnings("ignore:experts of 6 neurons")


@pytest.fixture(scope="module")
def program():
    with imported("convert_dense_to_moe") as module:
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a tiny model with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("model")
    save_byte_tokenizer(folder)
    overrides = {"vocab_size": 256, "initializer_range": 0.05}
    make_dense("mistral", **overrides).save_pretrained(folder)
    return folder


SAME_FILE = [
    "--heal-text", __file__, "--choice-text", f"{Path(__file__).parent}/./{Path(__file__).name}",
    "--test-text", __file__,
]  # fmt: skip
OPTIONS = [
    "--sizes", "4x2", "8x8", "--split", "random", "clustered", "--heal-steps", "4", "--batch", "2",
    "--block", "32", "--test-tokens", "128", "--calibration-tokens", "256", "--lr", "1e-4", "1e-3",
    "--device", "cpu", "--refit-tokens", "256", "--answer-tokens", "1",
    "--more-texts", __file__,
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(program, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert program.main([str(folder), *OPTIONS, "--out", str(out)]) == 0
    return out


def test_the_program_reports_every_conversion(program, finished):
    report = json.loads((finished / "report.json").read_text())
    rows = report["conversions"]
    assert [(row["num_experts"], row["top_k"], row["split"]) for row in rows] == [
        (4, 2, "random"), (4, 2, "clustered"), (8, 8, "random"), (8, 8, "clustered"),
    ]  # fmt: skip
    for row in rows:
        assert row["class"] == "MixtralForCausalLM"
        assert len(row["healing"]["losses"]) == 4
        assert row["after"]["choice"] == min(row["choice_by_lr"].values())
        assert len(row["choice_by_lr"]) == 2
    for row in rows[2:]:  # all experts: the dense model
        for part in ("choice", "test"):
            wanted = report["dense"]["perplexity"][part]
            assert row["before"][part] == pytest.approx(wanted, rel=1e-5)
            assert row["healing"]["losses"][0] < 1e-6
    # The fit comes nearer in every layer; where all experts are chosen it leaves all as it is.
    stages = [json.loads(path.read_text()) for path in finished.glob("stages/convert-*/stage.json")]
    for stage in stages:
        left = stage["result"]["error_left"]
        if stage["inputs"]["top_k"] == 8:
            assert left == [1.0, 1.0]
        else:
            assert all(0 < share < 1 for share in left)
    best = min(rows, key=lambda row: row["after"]["choice"])
    assert report["best_by_choice_text"] == best["model"]
    model = AutoModelForCausalLM.from_pretrained(best["model"])
    model.set_experts_implementation("eager")
    options = [report["settings"]["model"], *OPTIONS]
    blocks = program.token_blocks(program.parse(program.ConvertOptions, options, ""))
    assert perplexity(model, blocks["test"].split(2)) == pytest.approx(best["after"]["test"])
    table = (finished / "table.md").read_text()
    assert table.count("\n") == 2 + 1 + 4
    assert f"| 4 | 2 | random | 50 % | {rows[0]['before']['test']:.2f} |" in table
    # All experts are chosen in the last row: it answers as the dense model does.
    assert rows[3]["more_before"]["answers"] == report["dense"]["more"]["answers"]
    found, wanted = (
        more["perplexity"][Path(__file__).stem]
        for more in (rows[3]["more_before"], report["dense"]["more"])
    )
    assert found == pytest.approx(wanted, rel=1e-5)
    answers = (finished / "answers.md").read_text().splitlines()
    assert answers[0] == "| question | dense | split | healed |" and len(answers) == 2 + 20


def test_a_second_run_of_the_program_computes_nothing(program, folder, finished, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a finished stage was built again")

    before = (finished / "report.json").read_text()
    for name in ("load_dense", "load_causal_lm", "perplexity"):
        monkeypatch.setattr(program, name, fail)
    assert program.main([str(folder), *OPTIONS, "--out", str(finished)]) == 0
    assert (finished / "report.json").read_text() == before


def test_the_program_stopped_while_healing_goes_on(
    program, folder, finished, tmp_path, monkeypatch
):
    """Interrupt the third step of the first healing."""
    import contextlib
    import threading

    original, steps = healing_module.kl_divergence, []
    event = threading.Event()

    def counted(*args):
        steps.append(None)
        if len(steps) == 3:
            event.set()
        return original(*args)

    command = [str(folder), *OPTIONS, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(program, "stop_after_step", lambda: contextlib.nullcontext(event))
        patch.setattr(healing_module, "kl_divergence", counted)
        assert program.main(command) == 130
    assert list(tmp_path.glob("stages/heal-*.partial/checkpoints/healing.pt"))
    assert not (tmp_path / "report.json").exists()
    assert program.main(command) == 0
    results = [json.loads((out / "report.json").read_text()) for out in (tmp_path, finished)]
    for one, other in zip(*(result["conversions"] for result in results), strict=True):
        for row in (one, other):
            row.pop("model")
            row["healing"].pop("seconds")
        assert one == other
    assert not list(tmp_path.glob("stages/*.partial"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "8"], "'8' is not ExK, such as 8x6"),
        (["--heal-text", __file__], "give all of"),
        (SAME_FILE, "must be different files"),
        (["--block", "1"], "--block must be at least 2"),
        (["--sizes", "4x5"], "K in 1..E"),
        (["--lr", "0"], "--lr must be above 0"),
        (["--batch", "0"], "--batch must be at least 1"),
        (
            ["--more-texts", __file__, f"{Path(__file__).parent}/./{Path(__file__).name}"],
            f"--more-texts: two files are named {Path(__file__).stem}, and figures",
        ),
    ],
)
def test_the_program_refuses_before_any_work(program, folder, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        program.main([str(folder), *options, "--out", str(tmp_path / "out")])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_figures_of_more_texts_are_kept_by_the_shape_of_their_blocks(program, folder):
    """The digest of token ids is one for 4 blocks of 32 and 2 of 64."""
    kept = []

    class Recorded:
        def run(self, name, inputs, build, after):
            kept.append(inputs)
            return SimpleNamespace(result={})

    for changed in ([], ["--block", "64"], ["--batch", "4"]):
        options = program.parse(program.ConvertOptions, [str(folder), *OPTIONS, *changed], "")
        options.answer_tokens = 0
        program.measure_more(program.Setup(options, {}), Recorded(), "dense", None)
    first, *others = ({k: v for k, v in each.items() if k != "texts"} for each in kept)
    assert first not in others and others[0] != others[1]


def test_the_program_says_what_is_wrong_with_the_model(program, folder, tmp_path, capsys):
    command = [str(folder), *OPTIONS, "--sizes", "4x2", "5x2", "--out", str(tmp_path / "out")]
    assert program.main(command) == 1
    assert "5 experts do not divide the 48 neurons" in capsys.readouterr().out
    sparse = dense_to_moe(AutoModelForCausalLM.from_pretrained(folder), 4, 2)
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    sparse.save_pretrained(tmp_path)
    command = [str(tmp_path), *OPTIONS, "--sizes", "4x2", "--out", str(tmp_path / "out")]
    assert program.main(command) == 1
    assert "is a Mixture of Experts already" in capsys.readouterr().out
    assert not list(tmp_path.glob("out/stages/dense*"))


def test_the_program_names_a_text_that_is_too_short(program, folder, tmp_path, capsys):
    texts = {"heal": "one", "choice": "two", "test": "three"}
    for part, text in texts.items():
        (tmp_path / part).write_text(text)
    options = [word for part in texts for word in (f"--{part}-text", str(tmp_path / part))]
    command = [str(folder), *OPTIONS, *options, "--out", str(tmp_path / "out")]
    assert program.main(command) == 1
    said = capsys.readouterr().out
    assert "heal text, without paragraphs of the later parts: the text has 3 tokens" in said
