"""An image tokenizer with a k-means codebook of square patches."""

from __future__ import annotations

from typing import Any, Self

import torch

from moe_kernels import arguments, extras, schema, tensor_files
from moe_kernels.imaging.pixels import as_pixels
from moe_kernels.imaging.tokenizer import (
    CodebookTokenizer,
    channels_of,
    check_geometry,
    warn_if_collapsed,
)
from moe_kernels.tensor_files import TensorFile


class PatchTokenizer(CodebookTokenizer):
    """Tokenizer whose codebook entries are patches; a patch's code is its nearest entry.

    Attributes:
        codebook: (num_codes, patch_size * patch_size * channels) float32, pixels in [0, 1].
        image_shape: (H, W) or (H, W, C); H and W are multiples of ``patch_size``.
        patch_size: side in pixels of a patch.
        grid: rows and columns of codes.
    """

    type_name = "patch"

    def __init__(self, codebook: torch.Tensor, patch_size: int, image_shape: tuple[int, ...]):
        (patch_size,) = arguments.integers(patch_size=patch_size)
        super().__init__(codebook, image_shape, patch_size)
        self.patch_size = patch_size
        patch_length = patch_size * patch_size * self.channels
        if self.codebook.shape[1] != patch_length:
            raise ValueError(
                f"codebook must have shape (num_codes, {patch_length}) for patches of "
                f"{patch_size} in images of shape {self.image_shape}; "
                f"got {tuple(self.codebook.shape)}"
            )

    @classmethod
    def fit(
        cls,
        images: Any,
        *,
        num_codes: int = 256,
        patch_size: int = 4,
        seed: int = 0,
        max_patches: int = 60_000,
    ) -> Self:
        """Learn a codebook. images: (N, H, W[, C]), uint8, or float in [0, 1].

        K-means runs over the distinct patches, each weighted by its number of occurrences. If there
        are more than ``max_patches`` distinct patches, it runs over a random sample of this size
        and the ``num_codes`` commonest patches. Warns if the images use fewer than a tenth of the
        codes.

        Raises:
            ImportError: scikit-learn is not installed.
            TypeError: images are no pictures, or a number is no integer.
            ValueError: images or settings do not fit.
        """
        cluster = extras.load("sklearn.cluster", "PatchTokenizer.fit")
        num_codes, patch_size, max_patches = arguments.integers(
            num_codes=num_codes, patch_size=patch_size, max_patches=max_patches
        )
        if num_codes < 1:
            raise ValueError(f"num_codes must be at least 1; got {num_codes}")
        pixels = as_pixels(images)
        check_geometry(patch_size, tuple(pixels.shape[1:]))
        patches, counts = torch.unique(_patches(pixels, patch_size), dim=0, return_counts=True)
        if len(patches) < num_codes:
            raise ValueError(
                f"{num_codes} codes need as many distinct patches; these images have {len(patches)}"
            )
        if len(patches) > max_patches:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(patches), generator=generator, device="cpu")
            chosen = order[:max_patches]
            # Always include the commonest patches, so that the background keeps its own entry.
            chosen = torch.cat([counts.topk(num_codes).indices, chosen]).unique()
            patches, counts = patches[chosen], counts[chosen]
        means = cluster.KMeans(num_codes, n_init=1, max_iter=25, tol=1e-3, random_state=seed)
        means.fit(patches.numpy(), sample_weight=counts.double().numpy())
        fitted = cls(torch.from_numpy(means.cluster_centers_), patch_size, tuple(pixels.shape[1:]))
        warn_if_collapsed(fitted.codebook_usage(torch.from_numpy(means.labels_).long()))
        return fitted

    def _vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        return _patches(pixels, self.patch_size)

    def _pictures(self, entries: torch.Tensor) -> torch.Tensor:
        images, rows, columns, _ = entries.shape
        side = self.patch_size
        patches = entries.reshape(images, rows, columns, side, side, self.channels)
        return patches.permute(0, 1, 3, 2, 4, 5).reshape(images, *self.image_shape)

    def _config(self) -> dict[str, Any]:
        return {"patch_size": self.patch_size}

    @classmethod
    def _check_file(cls, config: dict[str, Any], file: TensorFile) -> None:
        super()._check_file(config, file)
        schema.check(config, {"patch_size": int}, file.path)
        check_geometry(config["patch_size"], tuple(config["image_shape"]))
        channels = channels_of(tuple(config["image_shape"]))
        length = config["patch_size"] ** 2 * channels
        tensor_files.check_shapes(file, {"codebook": (config["num_codes"], length)})

    @classmethod
    def _restore(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Self:
        return cls(tensors["codebook"], config["patch_size"], tuple(config["image_shape"]))


def _patches(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Cut pictures into patches in raster order.

    (N, H, W[, C]) -> (N * rows * columns, side * side * C)
    """
    images, height, width = pixels.shape[:3]
    channels = channels_of(tuple(pixels.shape[1:]))
    rows, columns = height // side, width // side
    grid = pixels.reshape(images, rows, side, columns, side, channels)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(images * rows * columns, side * side * channels)
