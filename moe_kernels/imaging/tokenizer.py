"""The interface of image tokenizers, and the base class of this package's own."""

from __future__ import annotations

import math
import os
import reprlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch

from moe_kernels import schema, tensor_files
from moe_kernels.imaging.arrays import as_tensor
from moe_kernels.imaging.pixels import as_pixels
from moe_kernels.tensor_files import TensorFile

_CONFIG = {"type": str, "format_version": int, "num_codes": int, "image_shape": [int]}
_NAMES = tensor_files.Names(
    "image_tokenizer.safetensors",
    "image_tokenizer_config.json",
    marks=tuple(_CONFIG),
    earlier=tensor_files.Names(
        "codebook.safetensors", "tokenizer_config.json", marks=tuple(_CONFIG)
    ),
)
_FORMAT_VERSION = 1
_COLLAPSED_BELOW = 0.1  # share of the codes in use
_VECTORS_PER_CHUNK = 16_384  # vectors encoded or decoded at a time, rounded to whole pictures
_LARGEST = 2**20  # side of a saved tokenizer's images; larger ones are damage
_DISTANCES_PER_CHUNK = 1 << 22  # 16 MiB


class ImageTokenizer(Protocol):
    """Interface that the rest of the package needs of an image tokenizer.

    Generation needs all members but ``codebook``. ``codebook``, (num_codes, d) float32, provides
    the features for Gromov-Wasserstein rows. This package's tokenizers offer more, see
    :class:`CodebookTokenizer`.
    """

    @property
    def num_codes(self) -> int:
        """The number of codes."""

    @property
    def tokens_per_image(self) -> int:
        """The number of codes of a picture."""

    def encode(self, images: Any) -> torch.Tensor:
        """Return the codes of pictures in raster order.

        (N, H, W[, C]) -> (N, tokens_per_image) int64
        """

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the pictures of codes.

        (N, tokens_per_image) -> (N, H, W[, C]) float32 in [0, 1]
        """

    @property
    def codebook(self) -> torch.Tensor:
        """The vectors of the codes, (num_codes, d) float32."""


@dataclass(frozen=True)
class TokenizerReport:
    """Quality of a tokenizer on some pictures.

    Attributes:
        mean_squared_error: mean squared error of a pixel in [0, 1], after encode and decode.
        codes_used: number of codes that occur.
        num_codes: number of codes in the codebook.
        perplexity: exponential of the entropy of the codes. It is the number of codes that, evenly
            used, would have the same entropy.
    """

    mean_squared_error: float
    codes_used: int
    num_codes: int
    perplexity: float


class CodebookTokenizer(ABC):
    """Base class: a picture is a grid of vectors, each coded as the nearest codebook entry.

    Nearest means Euclidean distance. Subclasses define how pictures become vectors,
    (N * tokens_per_image, d), and how entries become pictures. :func:`load_image_tokenizer` finds
    the class of a saved tokenizer by its ``type_name``.

    Attributes:
        codebook: (num_codes, d) float32.
        image_shape: (H, W) or (H, W, C).
        grid: rows and columns of codes.
    """

    type_name: ClassVar[str]
    _types: ClassVar[dict[str, type[CodebookTokenizer]]] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        CodebookTokenizer._types[cls.type_name] = cls

    def __init__(self, codebook: torch.Tensor, image_shape: tuple[int, ...], cell: int):
        """Check and keep the codebook; ``cell`` is the side of a code's square in pixels."""
        check_geometry(cell, image_shape)
        self.image_shape = tuple(map(int, image_shape))
        self.grid = (self.image_shape[0] // cell, self.image_shape[1] // cell)
        self.codebook = (
            as_tensor(codebook, "codebook").detach().to("cpu", torch.float32).contiguous()
        )
        if self.codebook.ndim != 2 or not len(self.codebook):
            raise ValueError(
                f"codebook must have shape (num_codes, d); got {tuple(self.codebook.shape)}"
            )
        if not torch.isfinite(self.codebook).all():
            raise ValueError("codebook holds values that are not finite")

    @abstractmethod
    def _vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the vectors of pictures in raster order.

        (N, H, W[, C]) float32 -> (N * tokens_per_image, d)
        """

    @abstractmethod
    def _pictures(self, entries: torch.Tensor) -> torch.Tensor:
        """Return the pictures of codebook entries.

        (N, rows, columns, d) -> (N, H, W[, C]) float32
        """

    @abstractmethod
    def _config(self) -> dict[str, Any]:
        """Return the settings that ``_restore`` needs besides the tensors."""

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"codebook": self.codebook}

    @classmethod
    @abstractmethod
    def _restore(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Self:
        """Rebuild a tokenizer from ``_config`` and ``_tensors``."""

    @classmethod
    def _check_file(cls, config: dict[str, Any], file: TensorFile) -> None:
        """Raise ValueError unless ``_restore`` can work, before any tensor is read.

        A configuration may ask for more memory than there is, while the file's tensors are small.
        """
        count = next(iter(file.shapes.get("codebook", ())), None)
        if count != config["num_codes"]:
            raise ValueError(
                f"it has {count} codes, but num_codes in its configuration is {config['num_codes']}"
            )

    @property
    def num_codes(self) -> int:
        """The number of codes."""
        return len(self.codebook)

    @property
    def tokens_per_image(self) -> int:
        """The number of codes of a picture."""
        return math.prod(self.grid)

    @property
    def channels(self) -> int:
        """The number of channels of a picture."""
        return channels_of(self.image_shape)

    @torch.no_grad()
    def encode(self, images: Any) -> torch.Tensor:
        """Return the codes of pictures in raster order.

        (N, H, W[, C]), uint8 or float in [0, 1] -> (N, tokens_per_image) int64
        """
        pixels = as_pixels(images)
        if tuple(pixels.shape[1:]) != self.image_shape:
            raise ValueError(
                f"this tokenizer encodes images of shape {self.image_shape}; got "
                f"{tuple(pixels.shape[1:])}"
            )
        chunks = pixels.split(max(1, _VECTORS_PER_CHUNK // self.tokens_per_image))
        codes = [nearest_entries(self._vectors(chunk), self.codebook) for chunk in chunks]
        return torch.cat(codes).reshape(len(pixels), self.tokens_per_image)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the pictures of codes.

        (N, tokens_per_image) integers -> (N, H, W[, C]) float32 in [0, 1]
        """
        codes = self._checked(codes)
        if codes.ndim != 2 or codes.shape[1] != self.tokens_per_image:
            raise ValueError(
                f"codes must be integers of shape (N, {self.tokens_per_image}); "
                f"got {tuple(codes.shape)}"
            )
        grids = codes.reshape(len(codes), *self.grid)
        chunks = grids.split(max(1, _VECTORS_PER_CHUNK // self.tokens_per_image))
        images = [self._pictures(self.codebook[chunk]).clamp(0, 1) for chunk in chunks]
        return torch.cat(images).reshape(len(codes), *self.image_shape)

    def _checked(self, codes: Any) -> torch.Tensor:
        """Return codes of any shape as int64 on the CPU; raise ValueError unless they are codes."""
        codes = as_tensor(codes, "codes").cpu()
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers; got {codes.dtype}")
        codes = codes.long()  # before comparing: torch compares few of the unsigned dtypes
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.num_codes):
            raise ValueError(
                f"codes must lie in 0..{self.num_codes - 1}; "
                f"got {int(codes.min())}..{int(codes.max())}"
            )
        return codes

    def reconstruction_error(self, images: Any) -> float:
        """Return the mean squared error of a pixel in [0, 1] after encode and decode."""
        return self.measure(images).mean_squared_error

    def codebook_usage(self, codes: torch.Tensor) -> torch.Tensor:
        """Return how often each code occurs in codes of any shape, (num_codes,) int64."""
        return torch.bincount(self._checked(codes).flatten(), minlength=self.num_codes)

    def measure(self, images: Any) -> TokenizerReport:
        """Measure reconstruction error and codebook use, best on pictures not used for fitting."""
        pixels = as_pixels(images)
        codes = self.encode(pixels)
        usage = self.codebook_usage(codes)
        return TokenizerReport(
            mean_squared_error=float((self.decode(codes) - pixels).square().mean()),
            codes_used=int((usage > 0).sum()),
            num_codes=self.num_codes,
            perplexity=float(torch.special.entr(usage.double() / usage.sum()).sum().exp()),
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write image_tokenizer.safetensors and image_tokenizer_config.json into a folder.

        Each is written whole or not at all. Model, text tokenizer and adapter may be in the same
        folder. Where an older version wrote codebook.safetensors and tokenizer_config.json, these
        two are removed afterwards; a tokenizer_config.json of a text tokenizer stays.

        Raises:
            ValueError: a tensor is not of floats, or not finite.
            FileExistsError: the folder has a file of one of the two names that no image tokenizer
                of this package wrote.

        Example:
            >>> tokenizer.save_pretrained("run")  # the text tokenizer
            >>> image_tokenizer.save("run")
            >>> image_tokenizer = load_image_tokenizer("run")
        """
        config = {
            "format_version": _FORMAT_VERSION,
            "type": self.type_name,
            "image_shape": list(self.image_shape),
            "num_codes": self.num_codes,
            **self._config(),
        }
        tensor_files.write(Path(folder), _NAMES, self._tensors(), config)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Load a saved tokenizer of this class.

        Raises:
            FileNotFoundError: the folder holds no tokenizer.
            ValueError: it has another type or format, or its files contradict each other.
        """
        with _opened(Path(folder)) as (file, config):
            return cls._load(file, config)

    @classmethod
    def _load(cls, file: TensorFile, config: dict[str, Any]) -> Self:
        if config["type"] != cls.type_name or config["format_version"] != _FORMAT_VERSION:
            raise ValueError(
                f"{file.path} holds a tokenizer of type {config['type']!r}, "
                f"format {config['format_version']!r}; "
                f"expected {cls.type_name!r}, format {_FORMAT_VERSION}"
            )
        try:
            cls._check_file(config, file)
            tensors = {name: tensor.float() for name, tensor in file.read().items()}
            tensor_files.check_finite(tensors, file.path)
            return cls._restore(config, tensors)
        except ValueError as error:
            raise ValueError(f"{file.path} is damaged, or inconsistent: {error}") from error


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[TensorFile, dict[str, Any]]]:
    """Open a saved tokenizer: its file and its configuration."""
    with tensor_files.opened(folder, _NAMES, "image tokenizer") as file:
        config = file.config()
        if config is None:  # written by an older version
            if not file.beside.is_file():
                raise FileNotFoundError(
                    f"no image tokenizer in {folder}: {file.beside.name} is missing"
                )
            config = tensor_files.parse_json(file.beside.read_bytes(), file.beside)
        schema.check(config, _CONFIG, file.path)
        _check_shape(config["image_shape"], file.path)
        yield file, config


def load_image_tokenizer(folder: str | os.PathLike[str]) -> CodebookTokenizer:
    """Load a saved tokenizer of any class.

    Raises:
        FileNotFoundError: the folder holds no tokenizer.
        ValueError: its type is unknown, or :meth:`CodebookTokenizer.load` refuses it.
    """
    types = CodebookTokenizer._types
    with _opened(Path(folder)) as (file, config):
        if config["type"] not in types:
            raise ValueError(
                f"{folder} holds a tokenizer of unknown type {config['type']!r}; the types are "
                f"{', '.join(sorted(types))}"
            )
        return types[config["type"]]._load(file, config)


def _check_shape(shape: list[int], path: Path) -> None:
    if len(shape) not in (2, 3) or not all(0 < size <= _LARGEST for size in shape):
        raise ValueError(
            f"{path}: image_shape must be 2 or 3 integers in 1..{_LARGEST}; got "
            f"{reprlib.repr(shape)}"
        )


def nearest_entries(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return the index of each vector's nearest entry, (n, d), (num_codes, d) -> (n,) int64.

    It minimises |v - c|^2 without |v|^2, which is the same for all entries.
    """
    half_norms = codebook.square().sum(1) / 2
    chunks = vectors.split(max(1, _DISTANCES_PER_CHUNK // len(codebook)))
    return torch.cat([(half_norms - chunk @ codebook.T).argmin(1) for chunk in chunks])


def warn_if_collapsed(usage: torch.Tensor) -> None:
    """Warn if fewer than a tenth of the codes are in use. usage: (num_codes,) counts."""
    used = int((usage > 0).sum())
    if used < _COLLAPSED_BELOW * len(usage):
        warnings.warn(
            f"the tokenizer has collapsed: {used} of {len(usage)} codes are in use "
            f"({used / len(usage):.1%}) on the images that it was fitted to",
            stacklevel=3,
        )


def channels_of(image_shape: tuple[int, ...]) -> int:
    """Return the number of channels: C of (H, W, C), 1 of (H, W)."""
    return image_shape[2] if len(image_shape) == 3 else 1


def check_geometry(cell: int, image_shape: tuple[int, ...]) -> None:
    """Raise ValueError unless squares of side ``cell`` tile an image of shape (H, W[, C])."""
    if cell < 1:
        raise ValueError(f"patches must be at least 1 pixel wide; got {cell}")
    if len(image_shape) not in (2, 3):
        raise ValueError(
            "images must have shape (N, H, W) or (N, H, W, C); "
            f"one image here has {tuple(image_shape)}"
        )
    if image_shape[0] % cell or image_shape[1] % cell:
        raise ValueError(f"patches of {cell} do not divide an image of {tuple(image_shape[:2])}")
