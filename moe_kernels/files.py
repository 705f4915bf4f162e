"""Files that are replaced as a whole, however many processes write them."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_LOCK = "lock"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path at which nothing exists yet; what the block writes there replaces ``path``.

    If the block raises, ``path`` keeps its old content. The yielded path is in a new folder beside
    ``path`` that no other user may enter, so two writers never meet and no link can be put in the
    way. A file gets the permissions that it would get at ``path``. It is on the disk before it has
    its name. Folders that killed writers have left are removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    with _own_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    with contextlib.suppress(OSError):  # the file is in place; some filesystems flush no folder
        _sync(path.parent)


@contextlib.contextmanager
def _own_folder(path: Path) -> Iterator[Path]:
    """Make a folder for one write of ``path``, locked while this writer lives."""
    folder = lock = None
    try:
        while lock is None:
            name = tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=".partial")
            folder = Path(name)
            lock = _lock_new(folder)
        yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock_new(folder: Path) -> int | None:
    """Lock a new folder; None if another writer took it for a leftover and removed it."""
    with contextlib.suppress(FileNotFoundError):
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):  # without locks, nobody removes what others left
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)
    return None


def _remove_leftovers(path: Path) -> None:
    for folder in path.parent.glob(f"{glob.escape(_prefix(path))}*.partial"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:  # made just now, or a killed writer's
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        except OSError:  # another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # a writer holds it
            pass
        finally:
            os.close(lock)


def _prefix(path: Path) -> str:
    return f".{path.name}-"


def _flush(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    if path.is_symlink():
        return
    if path.is_dir():
        for each in path.iterdir():
            _flush(each)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
