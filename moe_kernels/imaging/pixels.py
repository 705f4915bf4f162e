"""Conversion of pictures to tensors and to PIL pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_kernels import extras

if TYPE_CHECKING:
    from PIL.Image import Image

_CHANNELS = (1, 3, 4)
_MODES = ("L", "RGB", "RGBA")  # of PIL; the numbers of others are no brightness, or not 0..255


def as_pixels(images: Any) -> torch.Tensor:
    """Return pictures as float32 in [0, 1] on the CPU.

    images: (N, H, W[, C]), uint8 or float in [0, 1]; a tensor, an array, or a list of pictures

    Raises:
        TypeError: the numbers have another dtype, or these are no numbers.
        ValueError: the shape is another, such as (N, C, H, W), or values lie outside [0, 1].
    """
    images = _as_tensor(images)
    _check_shape(tuple(images.shape))
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise TypeError(
            f"images must be uint8, or float in [0, 1]; got {images.dtype}: convert values 0..255 "
            "to uint8, and divide those of 16 bits by 65535"
        )
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"float images must lie in [0, 1]; got {float(images.min())}..{float(images.max())}: "
            "divide values 0..255 by 255, or convert them to uint8"
        )
    return images.float()


def _as_tensor(images: Any) -> torch.Tensor:
    if isinstance(images, torch.Tensor):
        if images.is_meta:
            raise ValueError("images are on the meta device, where they have no values")
        return images.detach().cpu()
    pictures = images if isinstance(images, list | tuple) else []
    modes = {mode for each in pictures if isinstance(mode := getattr(each, "mode", "L"), str)}
    if unknown := sorted(modes.difference(_MODES)):
        raise TypeError(
            f"PIL pictures must have a mode of {', '.join(_MODES)}; got {', '.join(unknown)}: "
            'convert them, picture.convert("RGB")'
        )
    if pictures and all(isinstance(each, torch.Tensor) for each in pictures):
        _check_one_shape([tuple(each.shape) for each in pictures])
        return _as_tensor(torch.stack([each.detach().cpu() for each in pictures]))
    if pictures and all(hasattr(each, "mode") for each in pictures):
        _check_one_shape([np.asarray(each).shape for each in pictures])
    try:
        array = np.asarray(images)
    except ValueError as error:
        _check_one_shape([np.shape(each) for each in pictures])
        raise ValueError(f"images must all have one shape: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(
            "images must be a tensor, an array, or a list of arrays or PIL pictures; got "
            f"{_describe(images)}"
        )
    # torch reads neither another byte order nor negative strides.
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=("C", "W")))


def _check_one_shape(shapes: list[tuple[int, ...]]) -> None:
    """Raise ValueError, with two that differ, unless all pictures have one shape."""
    if other := [shape for shape in shapes if shape != shapes[0]]:
        raise ValueError(
            f"images must all have one shape; got {shapes[0]} and {other[0]}: resize and convert "
            "them to one size and mode"
        )


def _describe(images: Any) -> str:
    """Return what was given in place of pictures, and what makes pictures of it."""
    if isinstance(images, str | os.PathLike):
        return f"the path {str(images)!r}: open its pictures, PIL.Image.open(path)"
    if isinstance(images, Iterator):
        return f"a {type(images).__name__}: pass list(images)"
    if isinstance(images, list | tuple) and images and isinstance(images[0], str | os.PathLike):
        return f"a list of paths, such as {str(images[0])!r}: open them, PIL.Image.open(path)"
    return f"{type(images).__name__} of {np.asarray(images).dtype}"


def _check_shape(shape: tuple[int, ...]) -> None:
    expected = "images must have shape (N, H, W) or (N, H, W, C)"
    if len(shape) not in (3, 4):
        raise ValueError(f"{expected}; got {shape}")
    if len(shape) == 4 and shape[1] in _CHANNELS and shape[3] > max(_CHANNELS):
        raise ValueError(
            f"{expected}; got {shape}, which looks like (N, C, H, W): permute it, "
            "images.permute(0, 2, 3, 1)"
        )
    if len(shape) == 3 and shape[2] == 3 and min(shape[:2]) > max(_CHANNELS):
        raise ValueError(
            f"{expected}; got {shape}, which looks like one picture (H, W, C): pass images[None]; "
            "greys that are 3 pixels wide need a last dimension of 1"
        )


def to_pil(images: Any) -> list[Image]:
    """Return PIL pictures of mode "L" or "RGB".

    Args:
        images: (N, H, W[, C]), C 1 or 3, uint8 or float in [0, 1].

    Raises:
        ImportError: pillow is not installed.
        ValueError: a picture has another number of channels.
    """
    create = extras.load("PIL.Image", "to_pil").fromarray
    pixels = as_pixels(images)
    if pixels.ndim == 4 and pixels.shape[3] not in (1, 3):
        raise ValueError(f"a picture must have 1 or 3 channels; got {pixels.shape[3]}")
    if pixels.ndim == 4 and pixels.shape[3] == 1:
        pixels = pixels[..., 0]
    return [create(picture.numpy()) for picture in (pixels * 255).round().byte()]
