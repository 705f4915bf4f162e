"""The folder under --out: nothing in it that the program did not write is replaced or removed."""

import shutil

import pytest
from support.programs import imported

FILES = ("adapter/weights", "report.json", "samples-*.png")
STAGE = "stages/teach-0123456789ab"


@pytest.fixture(scope="module")
def outputs():
    with imported("shared.outputs") as module:
        yield module


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def test_a_folder_that_is_new_or_empty(outputs, tmp_path):
    outputs.check_outputs(tmp_path / "new", FILES)
    (tmp_path / "empty").mkdir()
    outputs.check_outputs(tmp_path, FILES)


@pytest.mark.parametrize(
    "names",
    [
        ("stages/teach-0123456789ab.partial/seconds",),
        (f"{STAGE}/stage.json", f"{STAGE}/adapter/anything"),
        (f"{STAGE}/stage.json", "report.json", "adapter/weights", "samples-1.png"),
        (f"{STAGE}/stage.json", ".report.json-0ab_cdef.partial/lock", ".DS_Store"),
        (f"{STAGE}/stage.json", "adapter/.weights-0ab_cdef.partial/weights", "adapter/.DS_Store"),
        (f"{STAGE}/stage.json", ".report.json.tmp", ".adapter.tmp/weights"),
    ],
    ids=range(6),
)
def test_a_folder_of_the_program(outputs, tmp_path, names):
    fill(tmp_path, *names)
    outputs.check_outputs(tmp_path, FILES)


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (("adapter/weights",), "adapter/weights"),
        (("report.json", "samples-1.png"), "report.json, samples-1.png"),
        ((f"{STAGE}/stage.json", "adapter/mine"), "adapter/mine"),
        ((f"{STAGE}/stage.json", "notes.txt", "report.json"), "notes.txt"),
        (("stages/mine/stage.json", "report.json"), "report.json, stages/mine/stage.json"),
        ((f"{STAGE}/stage.json", "stages/mine"), "stages/mine"),
        (tuple("abcdefg"), "a, b, c, d, e and 2 more"),
    ],
    ids=range(7),
)
def test_files_of_others_are_refused_and_listed(outputs, tmp_path, names, others):
    fill(tmp_path, *names)
    with pytest.raises(ValueError, match="did not write") as error:
        outputs.check_outputs(tmp_path, FILES)
    assert f": {others}. Give another --out" in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_link_is_a_file(outputs, tmp_path):
    fill(tmp_path, f"{STAGE}/stage.json", "elsewhere/weights")
    shutil.move(tmp_path / "elsewhere", tmp_path.parent / "elsewhere")
    (tmp_path / "adapter").symlink_to(tmp_path.parent / "elsewhere")
    with pytest.raises(ValueError, match=": adapter. Give another"):
        outputs.check_outputs(tmp_path, FILES)
    outputs.check_outputs(tmp_path, ("adapter",))


def test_a_marker_of_a_program_without_stages(outputs, tmp_path):
    fill(tmp_path, "0000-a-0.png")
    with pytest.raises(ValueError, match="0000-a-0.png"):
        outputs.check_outputs(tmp_path, ("*.png", "pictures.json"), marker="pictures.json")
    fill(tmp_path, "pictures.json")
    outputs.check_outputs(tmp_path, ("*.png", "pictures.json"), marker="pictures.json")


def test_out_is_a_file(outputs, tmp_path):
    fill(tmp_path, "out")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        outputs.check_outputs(tmp_path / "out", FILES)


def test_a_folder_is_not_replaced_if_a_file_would_be_lost(outputs, tmp_path):
    from moe_kernels.programs.shared.files import copy_whole

    fill(tmp_path, "new/weights", "adapter/weights", "adapter/mine")
    with pytest.raises(ValueError, match="adapter/mine would be lost"):
        copy_whole(tmp_path / "new", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "mine").read_text() == "mine"
    (tmp_path / "adapter" / "mine").unlink()
    (tmp_path / "new" / "weights").write_text("new")
    copy_whole(tmp_path / "new", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "weights").read_text() == "new"


@pytest.mark.parametrize(
    "name", [".DS_Store", ".weights-0ab_cdef.partial/weights", ".weights.tmp", "empty/Thumbs.db"]
)
def test_what_is_accepted_at_the_start_is_not_refused_at_the_end(outputs, name, tmp_path):
    from moe_kernels.programs.shared.files import copy_whole

    fill(tmp_path, f"{STAGE}/stage.json", "new/weights", "out/adapter/weights")
    fill(tmp_path / "out", f"{STAGE}/stage.json", f"adapter/{name}")
    outputs.check_outputs(tmp_path / "out", FILES)
    (tmp_path / "new" / "weights").write_text("new")
    copy_whole(tmp_path / "new", tmp_path / "out" / "adapter")
    assert (tmp_path / "out" / "adapter" / "weights").read_text() == "new"


PROGRAMS = {
    "analyze_routing": ["MODEL"],
    "convert_dense_to_moe": ["MODEL"],
    "demo": ["--quick"],
    "extend_experts": ["--quick"],
    "generate_images": ["MODEL", "--run", "RUN", "--captions", "a"],
    "moextend": ["--quick"],
    "pathways": ["--quick", "--base", ".", "--dense", "."],
    "redundancy": ["--quick"],
    "train_text_to_image": ["MODEL"],
}


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_every_program_refuses_before_any_work(name, tmp_path, capsys):
    """No MODEL is there: a program that got further would fail for another reason, or train."""
    fill(tmp_path, "adapter/weights", "report.json")
    with imported(name) as program:
        assert program.main([*PROGRAMS[name], "--out", str(tmp_path)]) == 1
    assert "adapter/weights, report.json. Give another --out" in capsys.readouterr().out
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["adapter", "report.json", "weights"]
