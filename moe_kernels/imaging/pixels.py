"""Conversion of pictures to tensors and to PIL pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL.Image import Image


def as_pixels(images: Any) -> torch.Tensor:
    """Return pictures (N, H, W[, C]), uint8 or float in [0, 1], as float32 in [0, 1] on the CPU."""
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


def to_pil(images: Any) -> list[Image]:
    """Return PIL pictures of mode "L" or "RGB".

    images: (N, H, W[, C]), C 1 or 3, uint8 or float in [0, 1]
    """
    from PIL import Image

    pixels = as_pixels(images)
    if pixels.ndim == 4 and pixels.shape[3] not in (1, 3):
        raise ValueError(f"a picture must have 1 or 3 channels; got {pixels.shape[3]}")
    if pixels.ndim == 4 and pixels.shape[3] == 1:
        pixels = pixels[..., 0]
    return [Image.fromarray(picture.numpy()) for picture in (pixels * 255).round().byte()]
