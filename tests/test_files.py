"""Files that are replaced whole: by many writers at once, past links and past killed writers."""

import errno
import importlib.util
import os
import platform
import signal
import stat
import sys
import threading

import pytest

from moe_kernels import files
from moe_kernels.files import replacing


def write(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.txt"]


def test_many_writers_of_one_file(tmp_path):
    """No writer meets another, none fails, and the file is always that of one of them."""
    path, texts, failures = tmp_path / "file.txt", [str(i) * 5000 for i in range(6)], []
    write(path, texts[0])

    def work(text):
        try:
            for _ in range(20):
                write(path, text)
                assert path.read_text() in texts
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert os.listdir(tmp_path) == ["file.txt"]


def start_writer(path):
    """Fork a process that waits within :func:`replacing`; return its id once it is there."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with replacing(path) as temporary:
            temporary.write_text("half")
            os.write(writer, b"x")
            signal.pause()
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    return child


def test_leftovers_of_killed_writers_are_removed_and_no_others(tmp_path):
    path, mine = tmp_path / "file.txt", tmp_path / ".file.txt-notes"
    mine.mkdir()
    (tmp_path / f"{files._prefix(path)}empty.partial").mkdir()  # killed before it had its lock
    children = [start_writer(path) for _ in range(2)]
    try:
        assert len(list(tmp_path.glob(".*.partial"))) == 2
        write(path, "new")
        assert len(list(tmp_path.glob(".*.partial"))) == 2  # both are alive
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)
        write(path, "newer")
        assert len(list(tmp_path.glob(".*.partial"))) == 1
    finally:
        for child in children[1:]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    write(path, "newest")
    assert sorted(os.listdir(tmp_path)) == [".file.txt-notes", "file.txt"]
    assert path.read_text() == "newest"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_an_ordinary_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        write(tmp_path / "file.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o666 & ~mask


def test_no_other_user_can_put_a_link_in_the_way(tmp_path):
    with replacing(tmp_path / "file.txt") as temporary:
        assert not os.path.lexists(temporary)
        assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700
        temporary.write_text("x")


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    path, events = tmp_path / "file.txt", []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_replace(source, target):
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    with replacing(path) as temporary:
        temporary.write_text("x")
    assert events == [str(temporary), "replace", str(tmp_path)]


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_folders_and_links_are_replaced_too(kind, tmp_path):
    with replacing(tmp_path / "target") as temporary:
        if kind == "folder":
            temporary.mkdir()
            (temporary / "inside").write_text("x")
        else:
            temporary.symlink_to("elsewhere")
    assert os.listdir(tmp_path) == ["target"]
    if kind == "link":
        assert os.readlink(tmp_path / "target") == "elsewhere"
    else:
        assert (tmp_path / "target" / "inside").read_text() == "x"


def write_folder(path, text):
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "inside").write_text(text)


@pytest.mark.parametrize("where", ["_flush", "second rename"])
def test_a_folder_stays_until_the_new_one_has_its_name(where, tmp_path, monkeypatch):
    path, replace = tmp_path / "target", os.replace

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail_for_the_new_one(source, target):
        full_disk() if source.parent.name == "new" else replace(source, target)

    write_folder(path, "old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        if where == "_flush":
            patch.setattr(files, "_flush", full_disk)
        else:
            patch.setattr(os, "replace", fail_for_the_new_one)
        write_folder(path, "new")
    assert (path / "inside").read_text() == "old"
    assert os.listdir(tmp_path) == ["target"]
    write_folder(path, "newest")
    assert (path / "inside").read_text() == "newest"
    assert os.listdir(tmp_path) == ["target"]


def test_a_folder_whose_writer_was_killed_between_two_names_is_given_back(tmp_path):
    path = tmp_path / "target"
    write_folder(path, "old")
    child = os.fork()
    if not child:
        replace = os.replace

        def killed_after_the_first(source, target):
            replace(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        os.replace = killed_after_the_first
        write_folder(path, "new")
    os.waitpid(child, 0)
    assert not path.exists()
    with pytest.raises(KeyboardInterrupt), replacing(path):
        raise KeyboardInterrupt
    assert (path / "inside").read_text() == "old"
    assert os.listdir(tmp_path) == ["target"]


def test_a_writer_on_another_computer_is_left_alone(tmp_path, monkeypatch):
    """Some network filesystems show the locks of another computer to none."""
    path = tmp_path / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("mine")
        with monkeypatch.context() as patch:
            patch.setattr(platform, "node", lambda: "another")
            patch.setattr(files.fcntl, "flock", lambda *_: None)
            write(path, "theirs")
        assert temporary.read_text() == "mine"
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("name", ["a" * 240 + ".bin", "é" * 127, "lock", "new", "old"])
def test_any_name_that_a_file_may_have(name, tmp_path):
    write(tmp_path / name, "x")
    assert (tmp_path / name).read_text() == "x"
    assert os.listdir(tmp_path) == [name]


def test_without_locks_files_are_written_and_nothing_is_removed(tmp_path, monkeypatch):
    """Windows has no fcntl, and opens no folder."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("without_locks", files.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / f"{module._prefix(tmp_path / 'file.txt')}abc.partial").mkdir()
    with module.replacing(tmp_path / "file.txt") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "file.txt").read_text() == "x"
    assert len(os.listdir(tmp_path)) == 2
