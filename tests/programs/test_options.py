"""Options of the programs: declared once, checked, and explained by --help."""

import dataclasses
import errno
import re
import statistics
from operator import attrgetter
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.programs import STUDIES, imported

from moe_kernels import imaging
from moe_kernels.programs import commands

DECLARED = {
    "analyze_routing": "RoutingOptions",
    "convert_dense_to_moe": "ConvertOptions",
    "demo": "DemoOptions",
    "drawing": "PageOptions",
    "estimate_memory": "EstimateOptions",
    "extend_experts": "ExtendOptions",
    "generate_images": "DrawOptions",
    "moextend": "study.MoExtendOptions",
    "pathways": "study.PathwaysOptions",
    "redundancy": "study.RedundancyOptions",
    "train_text_to_image": "TextToImageOptions",
}
STUDY_PAGES = ("drawing", "moextend", "pathways", "redundancy")  # not run as files by the tests
COMMAND_OF = {
    command.module.split(".")[-1]: f"moe-kernels {name}"
    for name, command in commands.COMMANDS.items()
}


@pytest.mark.parametrize("name", DECLARED)
def test_help_explains_every_option(name, capsys):
    with imported(name) as program:
        with pytest.raises(SystemExit) as stop:
            program.main(["--help"])
        fields = dataclasses.fields(attrgetter(DECLARED[name])(program))
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    command = COMMAND_OF.get(name, f"python python/{name}.py")
    assert f"usage: {command} " in text or name in STUDY_PAGES
    assert text.count(command) > 1, "no example of a call"
    for field in fields:
        if "help" in field.metadata:
            spelling = re.escape(field.name.replace("_", "-"))
            explained = re.escape(" ".join(field.metadata["help"].split()))
            assert re.search(rf"{spelling} .*?{explained}", text), field.name


def test_options_are_declared_as_fields_alone():
    programs = Path(commands.__file__).parent
    for path in (*programs.rglob("*.py"), *STUDIES.rglob("*.py")):
        if path != programs / "shared" / "cli.py":
            assert not re.search(r"argparse|add_argument", path.read_text()), path


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("moextend", ["--runs", "gated", "nothing"], "invalid choice: 'nothing'"),
        ("moextend", ["--seeds", "one"], "--seeds"),
        ("moextend", ["--emoji", "."], "unrecognized arguments"),
        ("redundancy", ["--runs", "emoji-plora"], "['emoji-plora'] need --real or --emoji"),
        ("redundancy", ["--real", "nowhere"], "there is no folder nowhere"),
        ("pathways", ["--runs", "both"], "--base and --dense are needed for anything but --page"),
        ("pathways", ["--base", ".", "--dense", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_studies_refuse_what_they_cannot_run(name, arguments, message, capsys):
    with imported(name) as program, pytest.raises(SystemExit) as stop:
        program.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_study_does_not_replace_a_file_of_something_else(tmp_path, capsys):
    mine = tmp_path / "moextend.json"
    for text in ('{"mine": 1}', "no JSON", "[]"):
        mine.write_text(text)
        options = ["--quick", "--results", str(tmp_path), "--out", str(tmp_path / "out")]
        with imported("moextend") as program:
            assert program.main(options) == 1
        assert "moextend.json is " in capsys.readouterr().out
        assert mine.read_text() == text and not (tmp_path / "out").exists()


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
        seeds: list[int] | None = cli.option(
            None, "seeds of the runs", at_least=0, at_most=2**32 - 1
        )
        pictures: Path | None = cli.option(None, "a folder", is_folder=True)
        steps: int = cli.option(7, "training steps", at_least=1, at_most=1000)
        limit: int = cli.option(7, "a number without a limit of its own")
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
        (["folder", "--steps", "1001"], "--steps must be at most 1,000"),
        (["folder", "--seeds", "0", "10000000000"], "--seeds must be at most 4,294,967,295"),
        (["folder", "--limit", "10000000000"], "--limit must be at most 2,147,483,647"),
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


# --- running


def on_a_full_disk():
    raise OSError(errno.ENOSPC, "No space left on device", "out/adapter")


def in_too_little_memory():
    torch.empty(10**15)


def in_too_little_memory_for_an_array():
    np.empty(10**15)


def saved_to_a_full_disk():
    torch.save(torch.ones(10**6), "/dev/full")


def loaded_from_a_damaged_archive(folder):
    file = folder / "optimizer.pt"
    torch.save(torch.ones(9), file)
    file.write_bytes(file.read_bytes()[:-300])
    torch.load(file)


def loaded_from_damaged_weights(folder):
    file = folder / "model.safetensors"
    save_file({"weight": torch.ones(9)}, file)
    file.write_bytes(file.read_bytes()[:-1])
    load_file(file)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (on_a_full_disk, "No space left on device: 'out/adapter'"),
        (in_too_little_memory, "error: there is too little memory ("),
        (in_too_little_memory_for_an_array, "error: there is too little memory (Unable to"),
        (saved_to_a_full_disk, "is the disk full?"),
        (loaded_from_a_damaged_archive, "could not be written or read to its end"),
        (loaded_from_damaged_weights, "not fully covered"),
    ],
)
def test_what_a_user_can_mend_is_one_line(cli, work, message, tmp_path, capsys):
    assert cli.exit_code(lambda: work(tmp_path) if work.__code__.co_argcount else work()) == 1
    said = capsys.readouterr().out
    assert message in said and said.count("\n") == 1


def of_an_unknown_model(folder):
    (folder / "config.json").write_text('{"model_type": "unknown"}')
    transformers.AutoConfig.from_pretrained(folder)


def of_a_name_of_the_hub():
    huggingface_hub.hf_hub_download("a/b/c", "config.json")


def of_the_library():
    imaging.ImageVocabulary(-1, 4)


def of_a_program():
    from moe_kernels.programs.shared.options import RunOptions

    RunOptions(device="meta")


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (of_an_unknown_model, "model type `unknown`"),
        (of_a_name_of_the_hub, "Repo id must be"),
        (of_the_library, "need first_id >= 0"),
        (of_a_program, "--device meta holds no numbers"),
    ],
)
def test_what_the_library_refuses_is_one_line(cli, work, message, tmp_path, capsys):
    assert cli.exit_code(lambda: work(tmp_path) if work.__code__.co_argcount else work()) == 1
    said = capsys.readouterr().out
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_program_that_is_started_by_a_relative_path(cli, tmp_path, monkeypatch, capsys):
    """Python keeps the path as it was given."""
    monkeypatch.chdir(STUDIES)
    code = compile("def work():\n    raise ValueError('not this')", "./demo.py", "exec")
    names = {}
    exec(code, names)
    assert cli.exit_code(names["work"]) == 1
    assert capsys.readouterr().out == "error: not this\n"


def in_a_call_of_a_program():
    from moe_kernels.programs.shared.training import in_batches

    in_batches([1], 0)


def in_a_call_of_the_library():
    imaging.PatchTokenizer.fit(np.ones((1, 4, 4), np.uint8), num_codes=1, seed=-1)


FAULTS = {
    "in a program": (in_a_call_of_a_program, ValueError, "must not be zero"),
    "in the library": (in_a_call_of_the_library, ValueError, "random_state"),
    "in Python": (lambda: [].index(3), ValueError, "3 is not in list"),
    "in Python's own code": (lambda: statistics.quantiles([1.0, 2.0], n=0), ValueError, "n must"),
    "in numpy": (lambda: np.stack([np.ones(1), np.ones(2)]), ValueError, "the same shape"),
    "of a division": (lambda: 1 / 0, ZeroDivisionError, "division"),
    "of a large number": (lambda: 10.0**400, OverflowError, "out of range"),
}


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_what_nobody_refused_keeps_its_traceback(cli, name):
    work, error, message = FAULTS[name]
    with pytest.raises(error, match=message):
        cli.exit_code(work)


@pytest.mark.parametrize(
    "error", [AssertionError, AttributeError, KeyError, RuntimeError, TypeError, IndexError]
)
def test_a_fault_of_the_program_keeps_its_traceback(cli, error):
    def work():
        raise error("what nobody expected")

    with pytest.raises(error, match="what nobody expected"):
        cli.exit_code(work)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "meta"], "--device meta holds no numbers"),
        (["--device", "mps"], "--device mps cannot be used: give cpu"),
        (["--device", "bogus"], "--device bogus cannot be used: give cpu"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used: give cpu"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--seed", "4294967296"], "--seed must be at most 4,294,967,295"),
        (["--count", "1000000000"], "--count must be at most 10,000"),
        (["--captions", "word " * 20_000], "a caption may have 2,000 characters; 'word word "),
        (["--captions-file", "latin.txt"], "latin.txt is not a text in UTF-8"),
        (["--temperature", "nan"], "--temperature must be above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_hostile_options_are_refused_with_code_2(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with imported("generate_images") as program, pytest.raises(SystemExit) as stop:
        program.main(["model", "--run", "run", "--captions", "a", *options])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()[-1]) < 300
    assert "error: " in said.splitlines()[-1]


def test_a_device_of_the_cpu_has_one_name():
    with imported("shared.options") as options:
        assert options.RunOptions(device="cpu:0").device == "cpu"
