"""An image tokenizer learnt as a small convolutional VQ-VAE.

The loss is that of van den Oord et al. (arXiv 1711.00937). Codebook entries are moving averages of
the encoder's vectors (their appendix A.1). Unused entries are replaced by vectors of the batch, as
in Jukebox (arXiv 2005.00341).
"""

from __future__ import annotations

import copy
import math
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from moe_kernels import arguments, schema, tensor_files
from moe_kernels.imaging.pixels import as_pixels
from moe_kernels.imaging.tokenizer import (
    CodebookTokenizer,
    channels_of,
    check_geometry,
    nearest_entries,
    warn_if_collapsed,
)
from moe_kernels.progress import bar
from moe_kernels.tensor_files import TensorFile

_SIZES = ("channels", "downsample", "width", "code_dim")
_COMMITMENT = 0.25
_DECAY = 0.98
_MAX_GRAD_NORM = 1.0
_WARMUP = 50  # steps
_KEEP_EVERY = 50  # steps
_REVIVE_EVERY = 20  # steps
_REVIVE_UNTIL = 0.8  # share of all steps; entries settle in the remaining ones
_DEAD = 0.03  # an entry with less than this share of the average use is dead


class FittingError(FloatingPointError):
    """Raised when a loss, gradient or weight is not finite while fitting.

    Attributes:
        step: the step at which it happened.
        last_good: the tokenizer of the last kept state.
    """

    def __init__(self, message: str, step: int, last_good: VQTokenizer):
        super().__init__(message)
        self.step, self.last_good = step, last_good


class VQTokenizer(CodebookTokenizer):
    """Encoder, codebook and decoder, learnt together; created by :meth:`fit` or :meth:`load`.

    A code stands for a square with a side of ``downsample`` pixels. Unlike with patches, encoder
    and decoder also use the square's surroundings.

    Attributes:
        codebook: (num_codes, code_dim) float32, in the encoder's space.
        image_shape: (H, W) or (H, W, C); H and W are multiples of ``downsample``.
        grid: rows and columns of codes.

    Example:
        >>> import torch
        >>> from moe_kernels.imaging import VQTokenizer
        >>> images = torch.randint(0, 256, (16, 8, 8, 3), dtype=torch.uint8)
        >>> tokenizer = VQTokenizer.fit(images, num_codes=8, width=16, steps=2, progress=False)
        >>> codes = tokenizer.encode(images)
        >>> codes.shape
        torch.Size([16, 4])
        >>> tokenizer.decode(codes).shape
        torch.Size([16, 8, 8, 3])
    """

    type_name = "vq"

    def __init__(self, network: _Autoencoder, codebook: torch.Tensor, image_shape: tuple[int, ...]):
        super().__init__(codebook, image_shape, network.sizes["downsample"])
        self.network = network.cpu().eval().requires_grad_(False)
        code_dim = network.sizes["code_dim"]
        if self.codebook.shape[1] != code_dim:
            raise ValueError(
                f"codebook must have shape (num_codes, {code_dim}); "
                f"got {tuple(self.codebook.shape)}"
            )

    @property
    def downsample(self) -> int:
        """The side in pixels of a code's square."""
        return self.network.sizes["downsample"]

    @classmethod
    def fit(
        cls,
        images: Any,
        *,
        num_codes: int = 512,
        downsample: int = 4,
        width: int = 64,
        code_dim: int = 16,
        steps: int = 5000,
        batch_size: int = 16,
        lr: float = 4e-3,
        seed: int = 0,
        device: str | torch.device = "cpu",
        progress: bool = True,
    ) -> VQTokenizer:
        """Learn encoder, codebook and decoder.

        On the CPU, the same seed and number of threads give the same bits.

        Args:
            images: (N, H, W[, C]), uint8, or float in [0, 1].
            num_codes: number of codebook entries.
            downsample: side in pixels of a code's square, a power of 2.
            width: number of channels inside the network, a multiple of 16.
            code_dim: size of an entry.
            steps: number of AdamW steps, with a warm-up and a cosine decay to zero.
            batch_size: images per step.
            lr: the largest learning rate.
            seed: seed of weights and batches; the global generators are left as they were.
            device: device to train on; the tokenizer itself works on the CPU.
            progress: show a bar or, where there is no terminal, a line every half minute.

        Warns:
            UserWarning: these images use fewer than a tenth of the codes.

        Raises:
            TypeError: images are no pictures, or a number is no integer.
            ValueError: images or settings do not fit. Both are raised before any work.
            FittingError: a loss, gradient or weight is not finite; the error has the step and the
                tokenizer of the last kept state.
        """
        num_codes, downsample, width, code_dim, steps, batch_size = arguments.integers(
            num_codes=num_codes, downsample=downsample, width=width, code_dim=code_dim,
            steps=steps, batch_size=batch_size,
        )  # fmt: skip
        pixels = as_pixels(images)
        image_shape = tuple(pixels.shape[1:])
        _check_settings(image_shape, num_codes, downsample, width, code_dim)
        _check_training(len(pixels), steps, batch_size, lr)
        device = torch.device(device)
        devices = [device] if device.type != "cpu" else []
        with torch.random.fork_rng(devices, device_type=device.type):
            torch.manual_seed(seed)
            network = _Autoencoder(channels_of(image_shape), downsample, width, code_dim)
            fitted = _Fit(
                network.to(device),
                to_channels_first(pixels),
                image_shape,
                num_codes=num_codes,
                steps=steps,
                batch_size=batch_size,
                lr=lr,
            ).run(progress)
        warn_if_collapsed(fitted.codebook_usage(fitted.encode(pixels)))
        return fitted

    def _vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        return as_vectors(self.network.encoder(to_channels_first(pixels)))

    def _pictures(self, entries: torch.Tensor) -> torch.Tensor:
        pictures = self.network.decoder(entries.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return pictures.reshape(len(entries), *self.image_shape)

    def _config(self) -> dict[str, Any]:
        return self.network.sizes

    def _tensors(self) -> dict[str, torch.Tensor]:
        return super()._tensors() | self.network.state_dict()

    @classmethod
    def _check_file(cls, config: dict[str, Any], file: TensorFile) -> None:
        super()._check_file(config, file)
        schema.check(config, dict.fromkeys(_SIZES, int), file.path)
        image_shape, num_codes = tuple(config["image_shape"]), config["num_codes"]
        sizes = {name: config[name] for name in _SIZES}
        settings = {name: size for name, size in sizes.items() if name != "channels"}
        _check_settings(image_shape, num_codes, **settings)
        halvings = sizes["downsample"].bit_length()
        if sizes["channels"] != channels_of(image_shape) or halvings > len(file.shapes):
            raise ValueError(f"{sizes} are not for images of {image_shape}")
        try:
            network = _Autoencoder(**sizes, device="meta")  # no memory of these sizes is taken
        except (RuntimeError, TypeError) as error:  # sizes that overflow
            raise ValueError(f"impossible sizes {sizes}: {error}") from error
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        codebook = {"codebook": (num_codes, sizes["code_dim"])}
        tensor_files.check_shapes(file, shapes | codebook)

    @classmethod
    def _restore(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Self:
        network = _Autoencoder(**{name: config[name] for name in _SIZES}, device="meta")
        codebook = tensors.pop("codebook")
        network.load_state_dict(tensors, assign=True)
        return cls(network, codebook, tuple(config["image_shape"]))


class _Residual(nn.Module):
    def __init__(self, width: int, factory: dict[str, Any]):
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(8, width, **factory),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, **factory),
            nn.GroupNorm(8, width, **factory),
            nn.SiLU(),
            nn.Conv2d(width, width, 1, **factory),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


class _Autoencoder(nn.Module):
    """Network whose encoder maps (N, C, H, W) to (N, code_dim, rows, columns), the decoder back."""

    def __init__(
        self, channels: int, downsample: int, width: int, code_dim: int, device: str = "cpu"
    ):
        super().__init__()
        factory = {"device": device, "dtype": torch.float32}  # whatever torch's defaults are
        self.sizes = {
            "channels": channels,
            "downsample": downsample,
            "width": width,
            "code_dim": code_dim,
        }
        halvings = int(math.log2(downsample))
        # Use half the width at resolutions above that of the codes: they have many pixels.
        widths = [channels, *[width // 2] * (halvings - 1), width]
        down = [
            layer
            for before, after in zip(widths[:-1], widths[1:], strict=True)
            for layer in (nn.Conv2d(before, after, 4, 2, 1, **factory), nn.SiLU())
        ]
        up = [
            layer
            for before, after in zip(widths[:0:-1], widths[-2::-1], strict=True)
            for layer in (nn.SiLU(), nn.ConvTranspose2d(before, after, 4, 2, 1, **factory))
        ]
        self.encoder = nn.Sequential(
            *down[:-1],
            _Residual(width, factory),
            _Residual(width, factory),
            nn.GroupNorm(8, width, **factory),
            nn.SiLU(),
            nn.Conv2d(width, code_dim, 1, **factory),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code_dim, width, 3, padding=1, **factory),
            _Residual(width, factory),
            _Residual(width, factory),
            nn.GroupNorm(8, width, **factory),
            *up,
        )


class _Codebook:
    """Codebook entries as moving averages of the vectors that chose them.

    vectors: (n, d), the encoder's first vectors, from which the initial entries are drawn
    entries: (num_codes, d)
    """

    def __init__(self, vectors: torch.Tensor, num_codes: int):
        self.entries = _draw(vectors, num_codes)
        self.sums = self.entries.clone()
        self.counts = vectors.new_ones(num_codes)

    def update(self, vectors: torch.Tensor, codes: torch.Tensor) -> None:
        counts = torch.bincount(codes, minlength=len(self.entries))
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        self.counts.lerp_(counts.float(), 1 - _DECAY)
        self.sums.lerp_(sums, 1 - _DECAY)
        # An entry that no vector has chosen for a long time keeps its value.
        chosen = (self.counts > 1e-3)[:, None]
        self.entries = torch.where(chosen, self.sums / self.counts[:, None], self.entries)

    def revive(self, vectors: torch.Tensor) -> None:
        """Replace the entries that hardly any vector chooses by vectors of this batch."""
        mean = self.counts.mean()
        dead = (self.counts < _DEAD * mean).nonzero().flatten()
        self.entries[dead] = _draw(vectors, len(dead))
        self.counts[dead] = mean
        self.sums[dead] = self.entries[dead] * mean


class _Fit:
    """State of a training: network, codebook, optimiser, and the last state known to be good.

    pixels: (N, C, H, W) float32
    """

    def __init__(
        self,
        network: _Autoencoder,
        pixels: torch.Tensor,
        image_shape: tuple[int, ...],
        *,
        num_codes: int,
        steps: int,
        batch_size: int,
        lr: float,
    ):
        self.network, self.pixels, self.image_shape = network, pixels, image_shape
        self.steps, self.batch_size, self.lr = steps, batch_size, lr
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr, betas=(0.9, 0.95), weight_decay=0
        )
        # Errors are divided by the variance of the pixels, so that the commitment's relative weight
        # does not depend on the pictures.
        self.variance = pixels.var().clamp(min=1e-6)
        with torch.no_grad():
            first = as_vectors(network.encoder(self._batch()))
        self.codebook = _Codebook(first, num_codes)
        self._keep(0)

    def run(self, progress: bool) -> VQTokenizer:
        """Run all steps and return the fitted tokenizer."""
        with bar(total=self.steps, desc="fitting", shown=progress) as shown:
            for step in range(self.steps):
                loss, vectors, codes = self._forward()
                if step % _KEEP_EVERY == 0:
                    shown.set_postfix(loss=f"{float(loss.detach()):.4f}", refresh=False)
                self._update(step, loss)
                self.codebook.update(vectors, codes)
                if step % _REVIVE_EVERY == 0 and step < _REVIVE_UNTIL * self.steps:
                    self.codebook.revive(vectors)
                shown.update()
        self._check(self._is_finite(), "a weight", self.steps)
        return self._tokenizer(self.network.state_dict(), self.codebook.entries)

    def _forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = self._batch()
        grid = self.network.encoder(batch)
        vectors = as_vectors(grid)
        codes = nearest_entries(vectors.detach(), self.codebook.entries)
        entries = self.codebook.entries[codes]
        commitment = F.mse_loss(vectors, entries)
        # Straight-through: the decoder reads the entries, and their gradient goes to the encoder.
        chosen = vectors + (entries - vectors).detach()
        height, width = grid.shape[2:]
        chosen = chosen.reshape(len(batch), height, width, -1).permute(0, 3, 1, 2)
        error = F.mse_loss(self.network.decoder(chosen), batch) / self.variance
        return error + _COMMITMENT * commitment, vectors.detach(), codes

    def _update(self, step: int, loss: torch.Tensor) -> None:
        self._check(torch.isfinite(loss), "the loss", step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * _schedule(step, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), _MAX_GRAD_NORM)
        self._check(torch.isfinite(norm), "the gradient", step)
        # Keep the state before the update: its loss and gradient are known to be finite.
        if step % _KEEP_EVERY == 0:
            self._keep(step)
        self.optimizer.step()

    def _batch(self) -> torch.Tensor:
        chosen = torch.randint(len(self.pixels), (self.batch_size,), device="cpu")
        return self.pixels[chosen].to(next(self.network.parameters()).device)

    def _keep(self, step: int) -> None:
        weights = copy.deepcopy(self.network.state_dict())
        self.kept = (step, weights, self.codebook.entries.clone())

    def _is_finite(self) -> torch.Tensor:
        tensors = [*self.network.parameters(), self.codebook.entries]
        return torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()

    def _check(self, finite: torch.Tensor, quantity: str, step: int) -> None:
        if finite:
            return
        kept, weights, entries = self.kept
        raise FittingError(
            f"{quantity} is not finite at step {step} of {self.steps}; last_good of this error is "
            f"the tokenizer at step {kept}. Try a lower lr than {self.lr}",
            step,
            self._tokenizer(weights, entries),
        )

    def _tokenizer(self, weights: dict[str, torch.Tensor], entries: torch.Tensor) -> VQTokenizer:
        network = _Autoencoder(**self.network.sizes)
        network.load_state_dict(weights)
        return VQTokenizer(network, entries, self.image_shape)


def to_channels_first(pixels: torch.Tensor) -> torch.Tensor:
    """Permute pictures for convolutions, (N, H, W[, C]) -> (N, C, H, W)."""
    return (pixels if pixels.ndim == 4 else pixels[..., None]).permute(0, 3, 1, 2).contiguous()


def as_vectors(grid: torch.Tensor) -> torch.Tensor:
    """List a grid's vectors in raster order, (N, d, rows, columns) -> (N * rows * columns, d)."""
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


def _draw(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """Draw vectors at random, (n, d) -> (count, d); none is repeated before all are used."""
    order = torch.randperm(len(vectors), device="cpu").repeat(1 + count // len(vectors))
    return vectors[order[:count].to(vectors.device)].clone()


def _schedule(step: int, steps: int) -> float:
    return min(1, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2


def _check_settings(
    image_shape: tuple[int, ...], num_codes: int, downsample: int, width: int, code_dim: int
) -> None:
    if downsample < 2 or downsample & (downsample - 1):
        raise ValueError(f"downsample must be a power of 2, at least 2; got {downsample}")
    check_geometry(downsample, image_shape)
    if width < 16 or width % 16:
        raise ValueError(f"width must be a multiple of 16; got {width}")
    if num_codes < 1 or code_dim < 1:
        raise ValueError(
            f"num_codes and code_dim must be at least 1; got {num_codes} and {code_dim}"
        )


def _check_training(images: int, steps: int, batch_size: int, lr: float) -> None:
    if not images:
        raise ValueError("images is empty: pass at least one image")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1; got {steps} and {batch_size}")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be positive and finite; got {lr}")
