"""Pictures to discrete codes and back, by a small convolutional VQ-VAE.

The loss is that of van den Oord et al. (arXiv 1711.00937), with the codebook as moving averages of
the encoder's vectors (their appendix A.1) and unused entries drawn anew from the batch, as in
Jukebox (arXiv 2005.00341).
"""

from __future__ import annotations

import copy
import math
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from moe_kernels.imaging.pixels import as_pixels
from moe_kernels.imaging.tokenizer import (
    CodebookTokenizer,
    channels_of,
    check_geometry,
    nearest_entries,
    warn_if_collapsed,
)

_COMMITMENT = 0.25
_DECAY = 0.98
_MAX_GRAD_NORM = 1.0
_WARMUP = 50  # steps
_KEEP_EVERY = 50  # steps
_REVIVE_EVERY = 20  # steps
_REVIVE_UNTIL = 0.8  # of all steps: afterwards entries settle
_DEAD = 0.03  # of the use that each entry has on average


class FittingError(FloatingPointError):
    """A loss or gradient was not finite.

    Attributes:
        step: at which.
        last_good: the tokenizer at the last step that was kept.
    """

    def __init__(self, message: str, step: int, last_good: VQTokenizer):
        super().__init__(message)
        self.step, self.last_good = step, last_good


class VQTokenizer(CodebookTokenizer):
    """An encoder, a codebook and a decoder, learnt together; made by :meth:`fit` or :meth:`load`.

    A code stands for a square of ``downsample`` pixels, but encoder and decoder see its
    surroundings too, as patches do not.

    codebook: (num_codes, code_dim) float32, in the encoder's space
    image_shape: (H, W) or (H, W, C); H and W are multiples of ``downsample``
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
        """Learns all three. On the CPU, the same seed and thread count give the same bits.

        Args:
            images: (N, H, W[, C]), uint8, or float in [0, 1].
            num_codes: entries of the codebook.
            downsample: side in pixels of the square that a code stands for, a power of 2.
            width: channels inside the network, a multiple of 16.
            code_dim: of an entry.
            steps: of AdamW, with a warm-up and a cosine to zero.
            batch_size: images a step.
            lr: the largest learning rate.
            seed: of weights and batches; the global generators are left as they were.
            device: to train on; the tokenizer itself works on the CPU.
            progress: show a tqdm bar.

        Warns:
            UserWarning: fewer than a tenth of the codes are in use on these images.

        Raises:
            ValueError: images or settings that do not fit, before any work.
            FittingError: a loss or gradient is not finite; it names the step and holds the
                tokenizer at the last step that was kept.
        """
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
    def _restore(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Self:
        network = _Autoencoder(
            **{name: config[name] for name in ("channels", "downsample", "width", "code_dim")}
        )
        codebook = tensors.pop("codebook")
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"the weights are not those of the config: {error}") from error
        return cls(network, codebook, tuple(config["image_shape"]))


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


class _Autoencoder(nn.Module):
    """encoder: (N, C, H, W) -> (N, code_dim, rows, columns); decoder: back."""

    def __init__(self, channels: int, downsample: int, width: int, code_dim: int):
        super().__init__()
        self.sizes = {
            "channels": channels,
            "downsample": downsample,
            "width": width,
            "code_dim": code_dim,
        }
        halvings = int(math.log2(downsample))
        # Half the width at all resolutions above that of the codes, where pixels are many.
        widths = [channels, *[width // 2] * (halvings - 1), width]
        down = [
            layer
            for before, after in zip(widths[:-1], widths[1:], strict=True)
            for layer in (nn.Conv2d(before, after, 4, 2, 1), nn.SiLU())
        ]
        up = [
            layer
            for before, after in zip(widths[:0:-1], widths[-2::-1], strict=True)
            for layer in (nn.SiLU(), nn.ConvTranspose2d(before, after, 4, 2, 1))
        ]
        self.encoder = nn.Sequential(
            *down[:-1],
            _Residual(width),
            _Residual(width),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, code_dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code_dim, width, 3, padding=1),
            _Residual(width),
            _Residual(width),
            nn.GroupNorm(8, width),
            *up,
        )


class _Codebook:
    """Moving averages of the vectors that chose each entry; entries out of use start anew.

    vectors: (n, d), the first that the encoder gave; entries: (num_codes, d)
    """

    def __init__(self, vectors: torch.Tensor, num_codes: int):
        self.entries = _draw(vectors, num_codes)
        self.sums = self.entries.clone()
        self.counts = torch.ones(num_codes, device=vectors.device)

    def update(self, vectors: torch.Tensor, codes: torch.Tensor) -> None:
        counts = torch.bincount(codes, minlength=len(self.entries))
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        self.counts.lerp_(counts.float(), 1 - _DECAY)
        self.sums.lerp_(sums, 1 - _DECAY)
        # An entry that is not chosen any more stays where it was.
        chosen = (self.counts > 1e-3)[:, None]
        self.entries = torch.where(chosen, self.sums / self.counts[:, None], self.entries)

    def revive(self, vectors: torch.Tensor) -> None:
        """Entries that hardly any vector chooses move to vectors of this batch."""
        mean = self.counts.mean()
        dead = (self.counts < _DEAD * mean).nonzero().flatten()
        self.entries[dead] = _draw(vectors, len(dead))
        self.counts[dead] = mean
        self.sums[dead] = self.entries[dead] * mean


class _Fit:
    """A training: the network, its codebook, and the last state that is known to be good.

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
        # Errors are weighed by the spread of the pixels, so that the commitment's weight means
        # the same for all pictures.
        self.variance = pixels.var().clamp(min=1e-6)
        with torch.no_grad():
            first = as_vectors(network.encoder(self._batch()))
        self.codebook = _Codebook(first, num_codes)
        self._keep(0)

    def run(self, progress: bool) -> VQTokenizer:
        """All steps; the tokenizer that they made."""
        with tqdm(total=self.steps, desc="fitting", unit="step", disable=not progress) as bar:
            for step in range(self.steps):
                loss, vectors, codes = self._forward()
                if step % _KEEP_EVERY == 0:
                    bar.set_postfix(loss=f"{float(loss.detach()):.4f}", refresh=False)
                self._update(step, loss)
                self.codebook.update(vectors, codes)
                if step % _REVIVE_EVERY == 0 and step < _REVIVE_UNTIL * self.steps:
                    self.codebook.revive(vectors)
                bar.update()
        self._check(self._is_finite(), "a weight", self.steps)
        return self._tokenizer(self.network.state_dict(), self.codebook.entries)

    def _forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = self._batch()
        grid = self.network.encoder(batch)
        vectors = as_vectors(grid)
        codes = nearest_entries(vectors.detach(), self.codebook.entries)
        entries = self.codebook.entries[codes]
        commitment = F.mse_loss(vectors, entries)
        # Straight-through: the decoder reads the entries, the encoder gets their gradient.
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
        # Before the update: what is kept has just shown a finite loss and gradient.
        if step % _KEEP_EVERY == 0:
            self._keep(step)
        self.optimizer.step()

    def _batch(self) -> torch.Tensor:
        chosen = torch.randint(len(self.pixels), (self.batch_size,))
        return self.pixels[chosen].to(next(self.network.parameters()).device)

    def _keep(self, step: int) -> None:
        weights = copy.deepcopy(self.network.state_dict())
        self.kept = (step, weights, self.codebook.entries.clone())

    def _is_finite(self) -> torch.Tensor:
        tensors = [*self.network.parameters(), self.codebook.entries]
        return torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()

    def _check(self, finite: torch.Tensor, what: str, step: int) -> None:
        if finite:
            return
        kept, weights, entries = self.kept
        raise FittingError(
            f"{what} is not finite at step {step} of {self.steps}; the error's last_good is the "
            f"tokenizer at step {kept}. Try a lower lr than {self.lr}",
            step,
            self._tokenizer(weights, entries),
        )

    def _tokenizer(self, weights: dict[str, torch.Tensor], entries: torch.Tensor) -> VQTokenizer:
        network = _Autoencoder(**self.network.sizes)
        network.load_state_dict(weights)
        return VQTokenizer(network, entries, self.image_shape)


def to_channels_first(pixels: torch.Tensor) -> torch.Tensor:
    """(N, H, W[, C]) -> (N, C, H, W)"""
    return (pixels if pixels.ndim == 4 else pixels[..., None]).permute(0, 3, 1, 2).contiguous()


def as_vectors(grid: torch.Tensor) -> torch.Tensor:
    """(N, d, rows, columns) -> (N * rows * columns, d), in raster order"""
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


def _draw(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """(n, d) -> (count, d) of them at random, all different as long as there are enough."""
    order = torch.randperm(len(vectors)).repeat(1 + count // len(vectors))
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
        raise ValueError("there are no images to learn from")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1; got {steps} and {batch_size}")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be positive; got {lr}")
