"""Progress of long work: a bar on a terminal, lines where there is none; the clock is a fake."""

import ast
import io
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from moe_kernels import progress
from moe_kernels.progress import Lines, bar, duration

PACKAGE = Path(progress.__file__).parent


def test_a_line_says_every_half_minute_what_is_done_and_left(clock, capsys):
    with bar(total=5000, desc="fitting") as shown:
        for _ in range(12):
            clock.seconds += 10
            shown.set_postfix(loss="0.5", refresh=False)
            shown.update(100)
    assert capsys.readouterr().err.splitlines() == [
        "fitting: 300 of 5,000 steps, elapsed 30 s, about 8 min left, loss=0.5",
        "fitting: 600 of 5,000 steps, elapsed 1 min, about 7 min left, loss=0.5",
        "fitting: 900 of 5,000 steps, elapsed 2 min, about 7 min left, loss=0.5",
        "fitting: 1,200 of 5,000 steps, elapsed 2 min, about 6 min left, loss=0.5",
    ]


def test_work_ends_with_a_line_if_it_had_one(clock, capsys):
    for item in bar(range(4), desc="drawing", unit="images"):
        clock.seconds += 40 if item < 3 else 20
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "drawing: 1 of 4 images, elapsed 40 s, about 2 min left"
    assert lines[-1] == "drawing: 4 of 4 images, elapsed 2 min" and len(lines) == 4


def test_short_work_prints_nothing(clock, capsys):
    assert list(bar(range(4), desc="drawing")) == [0, 1, 2, 3]
    clock.seconds += 29
    with bar(total=1, desc="drawing") as shown:
        shown.update()
    assert capsys.readouterr().err == ""


def test_what_an_earlier_run_has_done_is_no_speed_of_this_one(clock, capsys):
    with bar(total=100, initial=90, desc="healing") as shown:
        clock.seconds += 60
        shown.update(5)
    assert "healing: 95 of 100 steps, elapsed 1 min, about 1 min left" in capsys.readouterr().err


def test_work_of_unknown_length_says_what_it_has_done(clock, capsys):
    for _ in bar(iter(range(2)), desc="text", unit="batches"):
        clock.seconds += 45
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "text: 1 batches, elapsed 45 s" and "left" not in lines[-1]


def test_a_terminal_and_a_notebook_get_a_bar(monkeypatch):
    assert isinstance(bar(total=1, desc="work"), Lines)
    monkeypatch.setitem(sys.modules, "ipykernel", io)
    assert isinstance(bar(total=1, desc="work"), tqdm)
    monkeypatch.delitem(sys.modules, "ipykernel")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with bar(total=2, desc="work") as shown:
        shown.update()
    assert isinstance(shown, tqdm) and "work" in terminal.getvalue()


def test_nothing_is_shown_where_nothing_is_to_be_shown(clock, capsys):
    for _ in bar(range(3), desc="work", shown=False):
        clock.seconds += 100
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min"), (3540, "59 min"), (4800, "1 h 20 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_there_is_one_place_for_bars():
    """A bar of another library prints nothing in a file, or a page of noise."""
    for path in PACKAGE.rglob("*.py"):
        if path == Path(progress.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"tqdm", "rich.progress"}, path
