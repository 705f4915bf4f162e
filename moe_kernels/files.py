"""Files that are replaced as a whole, however many processes write them."""

import contextlib
import errno
import glob
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_LOCK, _NEW, _OLD = "lock", "new", "old"
_LONGEST = 200  # bytes of a name; most filesystems take 255, and a leftover's name is longer


def is_of_the_system(error: Exception) -> bool:
    """Return whether an error in reading a file is the system's, not that of damaged content.

    An archive whose parts begin before its first byte raises OSError too, but as EINVAL; and so
    does a damaged part, without a number.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path at which nothing exists yet; what the block writes there replaces ``path``.

    If the block raises, or the disk is full, ``path`` keeps its old content. The yielded path is in
    a new folder beside ``path`` that no other user may enter, so two writers never meet and no link
    can be put in the way. A file gets the permissions that it would get at ``path``. It is on the
    disk before it has its name. Folders that killed writers of this computer have left are removed
    first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    with _own_folder(path) as folder:
        (folder / _NEW).mkdir(mode=0o700)
        temporary = folder / _NEW / path.name
        yield temporary
        _flush(temporary)
        _give_name(temporary, path, folder / _OLD)
    with contextlib.suppress(OSError):  # the file is in place; some filesystems flush no folder
        _sync(path.parent)


def _give_name(new: Path, path: Path, old: Path) -> None:
    """Rename ``new`` to ``path``; a folder there, which cannot be replaced, is first made ``old``.

    If anything stops this in between, the folder gets its name back, by the next writer at last.
    """
    if new.is_symlink() or not new.is_dir() or path.is_symlink() or not path.is_dir():
        os.replace(new, path)
        return
    try:
        os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        _give_back(old, path)
        raise


def _give_back(old: Path, path: Path) -> None:
    if old.is_dir() and not os.path.lexists(path):
        os.replace(old, path)


@contextlib.contextmanager
def _own_folder(path: Path) -> Iterator[Path]:
    """Make a folder for one write of ``path``, locked while this writer lives."""
    folder = lock = None
    try:
        while lock is None:
            name = tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=".partial")
            folder = Path(name)
            if fcntl is None:
                break
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
    """Remove what killed writers have left, as far as locks show that they are not alive."""
    if fcntl is None:
        return
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
            _give_back(folder / _OLD, path)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # a writer holds it
            pass
        finally:
            os.close(lock)


def why_no_folder(path: str | os.PathLike[str]) -> str | None:
    """Return why a path is no folder, for a message; None: it is one.

    Example:
        >>> why_no_folder("my-adaptr")
        'there is no folder my-adaptr in /home/me'
    """
    path = Path(path)
    if path.is_dir():
        return None
    if path.exists():
        return f"{path} is a file, not a folder"
    return f"there is no folder {path}{'' if path.is_absolute() else f' in {Path.cwd()}'}"


def _prefix(path: Path) -> str:
    """Return how the names of this computer's folders for ``path`` begin.

    Where a network filesystem locks files for each computer alone, a folder of another one seems
    to have no writer.
    """
    name = path.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    host = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    return f".{name}-{host}-"


def _flush(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    if path.is_symlink():
        return
    if path.is_dir():
        for each in path.iterdir():
            _flush(each)
    _sync(path)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
