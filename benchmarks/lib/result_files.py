"""Files of results, with the environment of the run; they are written whole or not at all."""

import hashlib
import json
import platform
import subprocess
import time
from pathlib import Path

import torch

from moe_kernels import info
from moe_kernels.files import replacing

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_MEASURED = ("csrc", "moe_kernels", "benchmarks", "setup.py", "pyproject.toml")
_NOT_MEASURED = ":(exclude)benchmarks/results"


def environment(device: str) -> dict:
    """Return versions, build, processor, threads, commit and the hash of the sources."""
    return {
        **info.collect(),
        "device": device,
        "processor": processor(device),
        "commit": _git("rev-parse", "HEAD") or None,
        "dirty": bool(_git("status", "--porcelain", "--", *_MEASURED, _NOT_MEASURED)),
        "source_hash": source_hash(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def processor(device: str) -> str:
    """Return the name of the CPU or GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def source_hash() -> str | None:
    """Return a hash of all files that the numbers depend on, or None without git."""
    listed = _git(
        "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_MEASURED,
        _NOT_MEASURED,
    )  # fmt: skip
    if not listed:
        return None
    digest = hashlib.sha256()
    for name in sorted(set(listed.split("\0")) - {""}):
        path = ROOT / name
        if path.is_file():  # not if it is deleted but not committed
            digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _git(*arguments: str) -> str:
    """Return the output of git, or an empty string without git or a repository."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def write(path: Path, data: dict) -> None:
    """Write JSON with a line for each record; after an interruption the old file is still whole."""
    entries = (f"{json.dumps(key)}: {_lines(value)}" for key, value in data.items())
    with replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def _lines(value: object) -> str:
    """Format a section: a list of records one a line, anything else on one line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(map(_line, value)) + "\n]"
    return _line(value)


def _line(value: object) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def is_result(path: Path) -> bool:
    """Return whether a file was written by :func:`write`."""
    try:
        return "environment" in read(path)
    except (OSError, ValueError, TypeError):
        return False


def read(path: Path) -> dict:
    return json.loads(path.read_text())
