"""Files that are replaced whole: by many writers at once, past links and past killed writers."""

import os
import signal
import stat
import threading

import pytest

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
    (tmp_path / ".file.txt-empty.partial").mkdir()  # killed before it had its lock
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
