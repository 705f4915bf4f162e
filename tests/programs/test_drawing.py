"""The page of what a real base learnt to draw: tables out of reports of the programs."""

import json
import re

import pytest
from PIL import Image
from support.programs import STUDIES, imported

RESULTS = STUDIES.parent / "docs" / "results"


@pytest.fixture(scope="module")
def program():
    with imported("drawing") as loaded:
        yield loaded


def test_the_page_is_the_one_that_the_json_gives(program):
    data, page = (json.loads((RESULTS / "drawing.json").read_text()),
                  (RESULTS / "drawing.md").read_text())  # fmt: skip
    assert program.report.fill(page, data, program.drawing.BLOCKS) == page
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (RESULTS / picture).is_file(), picture


def test_a_report_is_kept_without_long_lists_and_paths_of_a_machine(program):
    report = {
        "nll": 1.5, "answers": ["Paris"] * 30, "nearest": [0] * 100, "in": {"loss": [[1]] * 21},
        "model": "/home/somebody/out/heal-8x4/model", "dense": "/home/somebody/smol", "out": "/o/x",
    }  # fmt: skip
    kept = {
        "nll": 1.5, "answers": ["Paris"] * 30, "in": {}, "model": "heal-8x4/model", "dense": "smol",
    }  # fmt: skip
    assert program.drawing.brief(report) == kept


def test_the_guidance_is_chosen_on_captions_of_training(program):
    def read(trained, held_out):
        shares = {"trained": trained, "held_out": held_out}
        return {"read_right": {group: {"caption": {"share": s}} for group, s in shares.items()}}

    samples = {"1": read(0.5, 0.9), "2": read(0.7, 0.1), "3": read(0.6, 0.2)}
    assert program.drawing.best_guidance({"reader": {"raw": {}}, "samples": samples}) == "2"
    assert program.drawing.best_guidance({"reader": None, "samples": samples}) == "1"


def test_an_aim_that_is_missed_is_said_to_be(program):
    data = json.loads((RESULTS / "drawing.json").read_text())
    run = data["digits"]
    best = program.drawing.best_guidance(run)
    for share, word in ((0.849, "**missed**"), (0.85, "reached")):
        run["samples"][best]["read_right"]["held_out"]["caption"]["share"] = share
        (row,) = [r for r in program.drawing.aims(data).split("\n") if "held-out" in r]
        assert word in row


def test_a_perplexity_is_that_of_the_conversion_that_was_chosen(program):
    data = json.loads((RESULTS / "drawing.json").read_text())
    first = data["convert"][0]
    (chosen,) = first["conversions"]
    worse = chosen | {"model": "another", "after": {"test": 99.0}}
    first["conversions"] = [worse, chosen]
    assert "99.00" not in program.drawing.aims(data) and "99.00" in program.drawing.bases(data)
    tables = program.drawing.other_texts(data), program.drawing.answers(data)
    first["conversions"] = [chosen]
    assert tables == (program.drawing.other_texts(data), program.drawing.answers(data))


def test_a_logit_that_either_training_changed_is_counted(program):
    data = json.loads((RESULTS / "drawing.json").read_text())
    data["emoji"]["text"]["logits_changed_by_training"] = 3
    (row,) = [r for r in program.drawing.aims(data).split("\n") if "every bit" in r]
    assert "**missed**" in row and "3 logits changed by 2 trainings" in row


def test_a_run_that_learns_by_heart_is_told_from_one_that_still_falls(program):
    def said(curve):
        data = json.loads((RESULTS / "drawing.json").read_text())
        data["digits"]["training"]["held_out"] = curve
        return program.drawing.taught(data, "digits")

    assert "still fell by 25.0 % in the last 100 steps" in said([[0, 9.0], [100, 4.0], [200, 3.0]])
    assert "was lowest, 2.00, after 100 steps" in said([[0, 9.0], [100, 2.0], [200, 3.0]])


def test_some_reports_without_the_others_are_refused(program, tmp_path, capsys):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(SystemExit):
        program.main(["--digits", str(tmp_path / "report.json")])
    assert "together, or none" in capsys.readouterr().err


def test_reports_fill_the_page_and_their_sheets_are_copied(program, tmp_path, monkeypatch):
    """The reports of the page itself, as if they had just been made."""
    data = json.loads((RESULTS / "drawing.json").read_text())
    arguments = ["--results", str(tmp_path / "results")]
    (tmp_path / "results").mkdir()
    for name in ("convert", "digits", "emoji"):
        (tmp_path / name).mkdir()
        made = data["convert"][0] if name == "convert" else data[name]
        (tmp_path / name / "report.json").write_text(json.dumps(made))
        arguments += [f"--{name}", str(tmp_path / name / "report.json")]
    best = program.drawing.best_guidance(data["digits"])
    sheet = Image.effect_noise((64, 64), 50).convert("RGB")
    sheet.save(tmp_path / "digits" / f"held-out-guidance-{best}.png")
    assert program.main(arguments) == 0
    copied = Image.open(tmp_path / "results" / "drawing-digits-held-out.png")
    assert copied.size == sheet.size and len(copied.getcolors()) <= 256
    again = json.loads((tmp_path / "results" / "drawing.json").read_text())
    assert again == data | {"convert": data["convert"][:1]}
    assert "<!-- study:aims -->\n\n| aim |" in (tmp_path / "results" / "drawing.md").read_text()
