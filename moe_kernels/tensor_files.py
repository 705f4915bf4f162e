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

from moe_kernels.files import replacing

_DIGEST = "sha256"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Names:
    """Names of the two files in their folder."""

    weights: str
    config: str

    @property
    def key(self) -> str:
        """The configuration's place in the header of the weights."""
        return Path(self.config).stem


class TensorFile:
    """An open safetensors file, of which no tensor has been read yet.

    Attributes:
        path: the file.
        shapes: of its tensors, by name.
        dtypes: of its tensors, by name, as safetensors calls them.
        metadata: the strings in its header.
    """

    def __init__(self, path: Path, file: safe_open):
        self.path, self._file = path, file
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        self.shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
        self.dtypes = {name: each.get_dtype() for name, each in slices.items()}
        self.metadata = file.metadata() or {}

    def config(self, names: Names) -> dict | None:
        """Return the configuration in the header; None: there is none.

        Warns:
            UserWarning: the JSON beside the file is another one.

        Raises:
            ValueError: it is not JSON.
        """
        text = self.metadata.get(names.key)
        if text is None:
            return None
        config = parse_json(text, f"the header of {self.path}")
        beside = self.path.with_name(names.config)
        if beside.is_file() and not _says(beside, config):
            warnings.warn(
                f"{beside} is not the configuration of {names.weights} beside it, whose own header "
                "counts: it was edited, or is that of another save",
                stacklevel=3,
            )
        return config

    def read(self, names: Names) -> dict[str, Tensor]:
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
        expected = self.metadata.get(_DIGEST)
        if expected is not None and expected != _digest(self.metadata.get(names.key, ""), tensors):
            raise ValueError(
                f"{self.path} is damaged: its content is not what was written (sha256); copy it "
                "again, or save it anew"
            )
        return tensors


def write(folder: Path, names: Names, tensors: dict[str, Tensor], config: dict) -> None:
    """Write both files, each whole or not at all, with the same bytes for the same content.

    The weights are replaced first: they carry the configuration that is read back, so an
    interruption between the two leaves good weights beside an older JSON, which only people read.

    Raises:
        ValueError: a tensor is not float64, float32, float16 or bfloat16, or not finite.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS.values():
            raise ValueError(
                f"{folder / names.weights}: {name} is {tensor.dtype}; tensors must be one of "
                f"{', '.join(_FLOATS)}"
            )
    check_finite(tensors, folder / names.weights)
    text = json.dumps(config, indent=2) + "\n"
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", names.key: text, _DIGEST: _digest(text, tensors)}
    with replacing(folder / names.config) as settings, replacing(folder / names.weights) as weights:
        settings.write_text(text)
        save_file(tensors, weights, metadata=metadata)
        _sort_metadata(weights)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file; raise a ValueError with its path if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield TensorFile(path, file)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error


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


def _says(path: Path, config: dict) -> bool:
    try:
        return parse_json(path.read_bytes(), path) == config
    except ValueError:
        return False


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
