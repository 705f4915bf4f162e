"""Tensors on disk with their configuration: a safetensors file, and JSON beside it.

The configuration is in the header of the safetensors file too, and that one counts: two files
cannot be replaced at once, so the JSON may be that of another save. The header also has a sha256 of
configuration and tensors. Files without one were written by older versions or other libraries.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_kernels.files import replacing, why_no_folder

_DIGEST = "sha256"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Names:
    """Names of the two files in their folder.

    Attributes:
        weights: the safetensors file.
        config: the JSON beside it.
        marks: fields that each of these configurations has, and none of another library under this
            name has all of.
        earlier: the names that older versions wrote, which other libraries have for their own
            files; None: there are none.
        shared: other libraries write files of the same kind under these names, which a save
            replaces as it does ours. Otherwise it replaces ours alone.
    """

    weights: str
    config: str
    marks: tuple[str, ...]
    earlier: "Names | None" = None
    shared: bool = False

    @property
    def key(self) -> str:
        """The configuration's place in the header of the weights."""
        return Path(self.config).stem

    def mark(self, config: dict) -> bool:
        """Return whether a configuration is one of ours by its fields."""
        return all(mark in config for mark in self.marks)


class TensorFile:
    """An open safetensors file, of which no tensor has been read yet.

    Attributes:
        path: the file.
        names: those that it and the JSON beside it have.
        shapes: of its tensors, by name.
        dtypes: of its tensors, by name, as safetensors calls them.
        metadata: the strings in its header.
    """

    def __init__(self, path: Path, names: Names, file: safe_open):
        self.path, self.names, self._file = path, names, file
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        self.shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
        self.dtypes = {name: each.get_dtype() for name, each in slices.items()}
        self.metadata = file.metadata() or {}

    @property
    def beside(self) -> Path:
        """The JSON beside the file."""
        return self.path.with_name(self.names.config)

    def config(self) -> dict | None:
        """Return the configuration in the header; None: there is none.

        Warns:
            UserWarning: the JSON beside the file is another one of ours, or damaged.

        Raises:
            ValueError: it is not JSON.
        """
        text = self.metadata.get(self.names.key)
        if text is None:
            return None
        config = parse_json(text, f"the header of {self.path}")
        if self.beside.is_file() and _contradicts(self.beside, self.names, config):
            warnings.warn(
                f"{self.beside} is not the configuration of {self.path.name} beside it, whose own "
                "header counts: it was edited, or is that of another save",
                stacklevel=3,
            )
        return config

    def read(self) -> dict[str, Tensor]:
        """Return all tensors.

        Raises:
            ValueError: a tensor is not float64, float32, float16 or bfloat16, or the content is not
                what was written.
        """
        for name, dtype in self.dtypes.items():
            if dtype not in _FLOATS:
                raise ValueError(
                    f"{self.path}: {name} is {dtype}; tensors must be one of {', '.join(_FLOATS)}"
                )
        tensors = {name: self._file.get_tensor(name) for name in self.shapes}
        expected, text = self.metadata.get(_DIGEST), self.metadata.get(self.names.key, "")
        if expected is not None and expected != _digest(text, tensors):
            raise ValueError(
                f"{self.path} is damaged: its content is not what was written (sha256); copy it "
                "again, or save it anew"
            )
        return tensors


def write(folder: Path, names: Names, tensors: dict[str, Tensor], config: dict) -> None:
    """Write both files, each whole or not at all, with the same bytes for the same content.

    The weights are replaced first: they carry the configuration that is read back, so an
    interruption between the two leaves good weights beside an older JSON, which only people read.
    What an older version wrote there under earlier names is removed last, because it would be a
    second adapter or tokenizer under the names of another library. Files of others stay.

    Raises:
        ValueError: a tensor is not float64, float32, float16 or bfloat16, or not finite.
        FileExistsError: one of the names is that of a folder, or of a file that is not ours.
    """
    if not names.shared:
        _check_ours(folder, names)
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS.values():
            raise ValueError(
                f"{folder / names.weights}: {name} is {tensor.dtype}; tensors must be one of "
                f"{', '.join(_FLOATS)}"
            )
    check_finite(tensors, folder / names.weights)
    replaced = owned(folder, names.earlier) if names.earlier else []
    text = json.dumps(config, indent=2) + "\n"
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", names.key: text, _DIGEST: _digest(text, tensors)}
    with replacing(folder / names.config) as settings, replacing(folder / names.weights) as weights:
        settings.write_text(text)
        save_file(tensors, weights, metadata=metadata)
        _sort_metadata(weights)
    for path in replaced:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def opened(folder: Path, names: Names, what: str) -> Iterator[TensorFile]:
    """Open the weights in a folder; no tensor is read yet.

    Those of an older version are opened where the present ones are missing.

    Args:
        what: they are, for the message, such as "adapter".

    Raises:
        FileNotFoundError: there is no such folder, or it has none of ours.
        ValueError: the file is damaged; the message has its path.
    """
    if reason := why_no_folder(folder):
        raise FileNotFoundError(f"no {what}: {reason}")
    found = names
    if not (folder / names.weights).is_file():
        found = names.earlier
        if found is None or not (folder / found.weights).is_file() or not owned(folder, found):
            raise FileNotFoundError(f"no {what} in {folder}: {names.weights} is missing")
    path = folder / found.weights
    try:
        with safe_open(path, framework="pt") as file:
            yield TensorFile(path, found, file)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error


def _check_ours(folder: Path, names: Names) -> None:
    """Raise FileExistsError if one of the names is taken by what no save of ours has written."""
    ours = owned(folder, names)
    for path in (folder / names.weights, folder / names.config):
        if path.exists() and path not in ours:
            what = "a folder" if path.is_dir() else "damaged, or a file of something else"
            raise FileExistsError(
                f"{path} is {what}, and would be replaced: move it away, or save into another "
                "folder"
            )


def owned(folder: Path, names: Names) -> list[Path]:
    """Return which of the two files in a folder say by their configuration that they are ours."""
    weights, config = folder / names.weights, folder / names.config
    contents = {weights: _in_header(weights, names.key), config: _in_json(config)}
    return [path for path, content in contents.items() if names.mark(content)]


def _in_header(path: Path, key: str) -> dict:
    """Return the configuration in the header of a file; empty: it has none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return parse_json((file.metadata() or {}).get(key, "{}"), path)
    except (OSError, ValueError, SafetensorError):
        return {}


def _in_json(path: Path) -> dict:
    """Return the object in a file; empty: it has none that can be read."""
    try:
        return parse_json(path.read_bytes(), path)
    except (OSError, ValueError):
        return {}


def parse_json(text: str | bytes, where: object) -> dict:
    """Parse a JSON object.

    Raises:
        ValueError: it is not one; the message begins with ``where``.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: it is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{where} is damaged: it is a {type(parsed).__name__}, not an object")
    return parsed


def check_shapes(file: TensorFile, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless a file has exactly the tensors of these names and shapes."""
    if missing := sorted(set(expected) - set(file.shapes)):
        raise ValueError(f"{file.path} lacks {len(missing)} tensors, such as {missing[0]}")
    if unknown := sorted(set(file.shapes) - set(expected)):
        raise ValueError(f"{file.path} has {len(unknown)} unknown tensors, such as {unknown[0]}")
    for name, shape in expected.items():
        if file.shapes[name] != shape:
            raise ValueError(f"{file.path}: {name} has shape {file.shapes[name]}, not {shape}")


def check_finite(tensors: dict[str, Tensor], where: object) -> None:
    """Raise ValueError, with its name, if a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{where}: {name} has {count} values of {tensor.numel()} that are not finite"
            )


def _contradicts(path: Path, names: Names, config: dict) -> bool:
    """Return whether a JSON is damaged, or another configuration of ours than this one."""
    try:
        beside = parse_json(path.read_bytes(), path)
    except ValueError:
        return True
    return names.mark(beside) and beside != config


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _sort_metadata(path: Path) -> None:
    """Sort the strings in the header of a file, whose order safetensors draws at random."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))
