"""Pictures to discrete codes and back, by a k-means codebook over square patches."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

_CODEBOOK_FILE = "codebook.safetensors"
_CONFIG_FILE = "tokenizer_config.json"
_FORMAT_VERSION = 1
# Distances are taken for this many patches at a time: 16,384 x 256 floats are 16 MiB.
_PATCHES_PER_CHUNK = 16_384


class ImageTokenizer(Protocol):
    """What the rest of the package needs of an image tokenizer, however it was learnt."""

    @property
    def num_codes(self) -> int: ...

    @property
    def tokens_per_image(self) -> int: ...

    def encode(self, images: Any) -> torch.Tensor:
        """images: (N, H, W[, C]) -> codes (N, tokens_per_image) int64, in raster order."""

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """codes: (N, tokens_per_image) -> images (N, H, W[, C]) float32 in [0, 1]."""


class PatchTokenizer:
    """A codebook whose entries are patches; a code is the nearest entry (Euclidean).

    codebook: (num_codes, patch_size * patch_size * channels) float32, pixels in [0, 1]
    image_shape: (H, W) or (H, W, C); H and W are multiples of ``patch_size``
    """

    def __init__(self, codebook: torch.Tensor, patch_size: int, image_shape: tuple[int, ...]):
        _check_geometry(patch_size, image_shape)
        self.patch_size = patch_size
        self.image_shape = tuple(image_shape)
        self.codebook = codebook.detach().to("cpu", torch.float32).contiguous()
        if (
            self.codebook.ndim != 2
            or self.codebook.shape[1] != self._patch_length
            or not len(self.codebook)
        ):
            raise ValueError(
                f"codebook must have shape (num_codes, {self._patch_length}) for patches of "
                f"{patch_size} in images of shape {self.image_shape}; "
                f"got {tuple(self.codebook.shape)}"
            )
        if not torch.isfinite(self.codebook).all():
            raise ValueError("codebook holds values that are not finite")

    @classmethod
    def fit(
        cls,
        images: Any,
        *,
        num_codes: int = 256,
        patch_size: int = 4,
        seed: int = 0,
        max_patches: int = 60_000,
    ) -> PatchTokenizer:
        """Learns a codebook. images: (N, H, W[, C]), uint8, or float in [0, 1].

        K-means over the distinct patches, each weighted by how often it occurs; where there are
        more than ``max_patches`` distinct ones, a sample of them and the commonest.
        """
        from sklearn.cluster import KMeans

        pixels = _as_pixels(images)
        _check_geometry(patch_size, tuple(pixels.shape[1:]))
        patches, counts = torch.unique(_patches(pixels, patch_size), dim=0, return_counts=True)
        if len(patches) < num_codes:
            raise ValueError(
                f"{num_codes} codes need as many distinct patches; these images have {len(patches)}"
            )
        if len(patches) > max_patches:
            chosen = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))[
                :max_patches
            ]
            # The commonest patches always take part, so the background keeps an entry of its own.
            chosen = torch.cat([counts.topk(num_codes).indices, chosen]).unique()
            patches, counts = patches[chosen], counts[chosen]
        means = KMeans(num_codes, n_init=1, max_iter=25, tol=1e-3, random_state=seed)
        means.fit(patches.numpy(), sample_weight=counts.double().numpy())
        return cls(torch.from_numpy(means.cluster_centers_), patch_size, tuple(pixels.shape[1:]))

    @property
    def num_codes(self) -> int:
        return len(self.codebook)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_shape[0] // self.patch_size, self.image_shape[1] // self.patch_size

    @property
    def tokens_per_image(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def _patch_length(self) -> int:
        channels = self.image_shape[2] if len(self.image_shape) == 3 else 1
        return self.patch_size * self.patch_size * channels

    def encode(self, images: Any) -> torch.Tensor:
        """(N, H, W[, C]), uint8 or float in [0, 1] -> (N, tokens_per_image) int64, raster order."""
        pixels = _as_pixels(images)
        if tuple(pixels.shape[1:]) != self.image_shape:
            raise ValueError(
                f"this tokenizer takes images of {self.image_shape}; got {tuple(pixels.shape[1:])}"
            )
        chunks = _patches(pixels, self.patch_size).split(_PATCHES_PER_CHUNK)
        half_norm = self.codebook.square().sum(1) / 2
        # The nearest entry: |p - c|^2 less the term that all entries share.
        codes = [(half_norm - chunk @ self.codebook.T).argmin(1) for chunk in chunks]
        return torch.cat(codes).reshape(len(pixels), self.tokens_per_image)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """codes: (N, tokens_per_image) integers -> (N, H, W[, C]) float32 in [0, 1]."""
        codes = torch.as_tensor(codes)
        if codes.ndim != 2 or codes.shape[1] != self.tokens_per_image or codes.is_floating_point():
            raise ValueError(
                f"codes must be integers of shape (N, {self.tokens_per_image}); "
                f"got {codes.dtype} {tuple(codes.shape)}"
            )
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.num_codes):
            raise ValueError(
                f"codes must lie in 0..{self.num_codes - 1}; "
                f"got {int(codes.min())}..{int(codes.max())}"
            )
        rows, columns = self.grid
        side = self.patch_size
        patches = self.codebook[codes.cpu().long()].reshape(
            len(codes), rows, columns, side, side, -1
        )
        images = patches.permute(0, 1, 3, 2, 4, 5).reshape(len(codes), *self.image_shape)
        return images.clamp(0, 1)

    def reconstruction_error(self, images: Any) -> float:
        """The mean squared error of a pixel, in [0, 1], after encode and decode."""
        pixels = _as_pixels(images)
        return float((self.decode(self.encode(pixels)) - pixels).square().mean())

    def codebook_usage(self, codes: torch.Tensor) -> torch.Tensor:
        """codes: any shape -> how often each code occurs, (num_codes,) int64."""
        return torch.bincount(torch.as_tensor(codes).flatten().cpu(), minlength=self.num_codes)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes codebook.safetensors and tokenizer_config.json, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format_version": _FORMAT_VERSION,
            "type": "patch",
            "patch_size": self.patch_size,
            "image_shape": list(self.image_shape),
            "num_codes": self.num_codes,
        }
        _write_then_rename(
            folder / _CODEBOOK_FILE,
            lambda path: save_file({"codebook": self.codebook}, path, {"format": "pt"}),
        )
        _write_then_rename(
            folder / _CONFIG_FILE, lambda path: Path(path).write_text(json.dumps(config, indent=2))
        )

    @classmethod
    def load(cls, folder: str | os.PathLike) -> PatchTokenizer:
        folder = Path(folder)
        config = json.loads((folder / _CONFIG_FILE).read_text())
        if config.get("type") != "patch" or config.get("format_version") != _FORMAT_VERSION:
            raise ValueError(
                f"{folder} holds a tokenizer of type {config.get('type')!r}, "
                f"format {config.get('format_version')!r}; "
                f"expected 'patch', format {_FORMAT_VERSION}"
            )
        codebook = load_file(folder / _CODEBOOK_FILE)["codebook"]
        if len(codebook) != config["num_codes"]:
            raise ValueError(
                f"{folder}: the codebook has {len(codebook)} codes, "
                f"its config says {config['num_codes']}"
            )
        return cls(codebook, config["patch_size"], tuple(config["image_shape"]))


def _write_then_rename(path: Path, write) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(descriptor)
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _check_geometry(patch_size: int, image_shape: tuple[int, ...]) -> None:
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1; got {patch_size}")
    if len(image_shape) not in (2, 3):
        raise ValueError(
            "images must have shape (N, H, W) or (N, H, W, C); "
            f"one image here has {tuple(image_shape)}"
        )
    if image_shape[0] % patch_size or image_shape[1] % patch_size:
        raise ValueError(
            f"patches of {patch_size} do not divide an image of {tuple(image_shape[:2])}"
        )


def _as_pixels(images: Any) -> torch.Tensor:
    """uint8, or float in [0, 1] -> float32 in [0, 1] on the CPU."""
    images = torch.as_tensor(images).detach().cpu()
    if images.ndim not in (3, 4):
        raise ValueError(
            f"images must have shape (N, H, W) or (N, H, W, C); got {tuple(images.shape)}"
        )
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8, or float in [0, 1]; got {images.dtype}")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"float images must lie in [0, 1]; got {float(images.min())}..{float(images.max())}"
        )
    return images.float()


def _patches(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """(N, H, W[, C]) -> (N * rows * columns, side * side * C), patches in raster order."""
    images, height, width = pixels.shape[:3]
    channels = pixels.shape[3] if pixels.ndim == 4 else 1
    rows, columns = height // side, width // side
    grid = pixels.reshape(images, rows, side, columns, side, channels)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(images * rows * columns, side * side * channels)
