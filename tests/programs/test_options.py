"""Options of the programs: declared once, checked, and explained by --help."""

import dataclasses
import re
from operator import attrgetter
from pathlib import Path

import pytest
from support.programs import PROGRAMS, imported

DECLARED = {
    "analyze_routing": "RoutingOptions",
    "convert_dense_to_moe": "ConvertOptions",
    "demo": "DemoOptions",
    "estimate_memory": "EstimateOptions",
    "extend_experts": "ExtendOptions",
    "generate_images": "DrawOptions",
    "moextend": "study.MoExtendOptions",
    "redundancy": "study.RedundancyOptions",
    "train_text_to_image": "TextToImageOptions",
}


@pytest.mark.parametrize("name", DECLARED)
def test_help_explains_every_option(name, capsys):
    with imported(name) as program:
        with pytest.raises(SystemExit) as stop:
            program.main(["--help"])
        fields = dataclasses.fields(attrgetter(DECLARED[name])(program))
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"python python/{name}.py" in text, "no example of a call"
    for field in fields:
        if "help" in field.metadata:
            spelling = re.escape(field.name.replace("_", "-"))
            explained = re.escape(" ".join(field.metadata["help"].split()))
            assert re.search(rf"{spelling} .*?{explained}", text), field.name


def test_options_are_declared_as_fields_alone():
    programs = [PROGRAMS / f"{name}.py" for name in DECLARED]
    for path in (*programs, *PROGRAMS.glob("s*/**/*.py")):
        if path != PROGRAMS / "shared" / "cli.py":
            assert not re.search(r"argparse|add_argument", path.read_text()), path


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("moextend", ["--runs", "gated", "nothing"], "invalid choice: 'nothing'"),
        ("moextend", ["--seeds", "one"], "--seeds"),
        ("moextend", ["--emoji", "."], "unrecognized arguments"),
        ("redundancy", ["--runs", "emoji-plora"], "['emoji-plora'] need --real or --emoji"),
        ("redundancy", ["--real", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_studies_refuse_what_they_cannot_run(name, arguments, message, capsys):
    with imported(name) as program, pytest.raises(SystemExit) as stop:
        program.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def cli():
    with imported("shared.cli") as module:
        yield module


@pytest.fixture
def options(cli):
    @dataclasses.dataclass(kw_only=True)
    class Shared(cli.Options):
        """Shared options."""

        steps: int = cli.option(5, "training steps", at_least=1)
        rates: list[float] = cli.option([0.5, 1.0], "learning rates", above=0)

    @dataclasses.dataclass(kw_only=True)
    class Own(Shared):
        """Own options."""

        model: str = cli.option(dataclasses.MISSING, "a folder", positional=True)
        quick: bool = cli.option(False, "a short run")
        text_file: str | None = cli.option(None, "a text", is_file=True)
        seeds: list[int] | None = cli.option(None, "seeds of the runs", at_least=0)
        pictures: Path | None = cli.option(None, "a folder", is_folder=True)
        steps: int = cli.option(7, "training steps", at_least=1)
        fixed: int = 3

    return Own


def test_defaults_lists_flags_and_positions(cli, options):
    given = cli.parse(options, ["folder", "--rates", "1", "2"], "")
    assert given == options(model="folder", rates=[1.0, 2.0], steps=7, fixed=3)
    assert given.seeds is None and given.pictures is None
    given = cli.parse(options, ["folder", "--seeds", "3", "4", "--pictures", "."], "")
    assert given.seeds == [3, 4] and given.pictures == Path(".")
    given = cli.parse(options, ["--quick", "folder"], "")
    assert given.quick and given.model == "folder" and given.rates == [0.5, 1.0]
    assert given.of(options.__mro__[1]) == {"steps": 7, "rates": [0.5, 1.0]}


def test_quick_changes_defaults_alone(cli, options):
    quick = {"steps": 2, "fixed": 1}
    assert cli.parse(options, ["folder"], "", quick=quick).steps == 7
    given = cli.parse(options, ["folder", "--quick"], "", quick=quick)
    assert (given.steps, given.fixed) == (2, 1)
    assert cli.parse(options, ["folder", "--quick", "--steps", "9"], "", quick=quick).steps == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model"),
        (["folder", "--fixed", "4"], "unrecognized arguments"),
        (["folder", "--steps", "0"], "--steps must be at least 1"),
        (["folder", "--rates", "1", "nan"], "--rates must be above 0"),
        (["folder", "--rates", "inf"], "--rates must be above 0"),
        (["folder", "--text-file", "nowhere"], "--text-file: nowhere is not a file"),
        (["folder", "--seeds", "0", "-1"], "--seeds must be at least 0"),
        (["folder", "--pictures", "nowhere"], "--pictures: there is no folder nowhere"),
    ],
)
def test_refusals_end_with_code_2(cli, options, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(options, arguments, "")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_help_groups_options_by_the_class_that_declares_them(cli, options):
    own, shared = (
        cli.OptionParser(options, "")
        .format_help()
        .split("Own options:")[1]
        .split("Shared options:")
    )
    assert "--quick" in own and "--steps" not in own
    assert "training steps; default: 7" in shared and "learning rates; default: 0.5 1.0" in shared
