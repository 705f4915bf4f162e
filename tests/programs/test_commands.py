"""The console command ``moe-kernels``, which finds a program by its name."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

from moe_kernels.programs import commands

LAUNCHERS = sorted((Path(__file__).parents[2] / "python").glob("*.py"))
STUDIES = {"moextend", "pathways", "redundancy"}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_list_names_every_command_in_a_line(arguments, capsys):
    assert commands.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in commands.COMMANDS.items():
        assert any(line.split() == [name, *command.summary.split()] for line in lines), name


def test_the_version_is_that_of_the_distribution(capsys):
    assert commands.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("modality-moe-kernels")


@pytest.mark.parametrize(
    ("name", "guess"),
    [("estimate_memory", "estimate-memory"), ("generate-image", "generate-images"), ("x", None)],
)
def test_a_wrong_name_is_refused_with_the_nearest_one(name, guess, capsys):
    assert commands.main([name]) == 2
    said = capsys.readouterr().err
    assert f"no command {name}" in said and (guess is None) == ("did you mean" not in said)
    assert guess is None or f"did you mean {guess}?" in said


def test_a_program_without_its_packages_says_so_before_anything(monkeypatch, capsys):
    """Even for --help, which needs the program's options, and they need its imports."""
    present = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("rich", "sklearn") else present(name),
    )
    monkeypatch.setattr(importlib, "import_module", pytest.fail)
    assert commands.main(["demo", "--help"]) == 2
    said = capsys.readouterr().err
    assert "demo: not installed: rich, scikit-learn; pip install rich scikit-learn, or from" in said


def test_commands_that_need_no_more_than_the_library_run_without_the_extras(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert commands.main(["info"]) == 0
    assert "versions:" in capsys.readouterr().out


def test_arguments_and_exit_codes_pass_through(monkeypatch):
    given = []
    program = types.SimpleNamespace(main=lambda arguments: given.append(arguments) or 3)
    monkeypatch.setattr(importlib, "import_module", {"moe_kernels.tune": program}.get)
    assert commands.main(["tune", "--experts", "8"]) == 3
    monkeypatch.setattr(sys, "argv", ["moe-kernels", "tune", "-h"])
    assert commands.main() == 3
    assert given == [["--experts", "8"], ["-h"]]


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_every_file_of_python_starts_its_program(path):
    """Its code names a command whose module has the file's name."""
    text = path.read_text()
    if path.stem in STUDIES:
        assert f"from studies.{path.stem} import study" in text
        return
    if path.stem == "drawing":  # a page, out of reports of commands
        assert "from studies import drawing, report" in text
        return
    (name,) = (name for name in commands.COMMANDS if f'main(["{name}", *sys.argv[1:]])' in text)
    assert commands.COMMANDS[name].module == f"moe_kernels.programs.{path.stem}"


@pytest.mark.slow
def test_the_installed_command_is_the_list():
    command = [str(Path(sys.executable).parent / "moe-kernels")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.startswith(
        "usage: moe-kernels COMMAND"
    )
