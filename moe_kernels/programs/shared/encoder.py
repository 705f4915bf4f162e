"""A frozen encoder of real pictures, trained beforehand on the pictures' names."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels.programs.shared.files import replacing, write_text
from moe_kernels.programs.shared.pictures import DIGITS, CaptionedPictures, digits, emoji
from moe_kernels.programs.shared.stages import Workspace
from moe_kernels.programs.shared.texts import PARTS


@dataclass(frozen=True)
class EncoderSettings:
    """Settings of the pictures and of the encoder.

    emoji: folder of their npm package; None for handwritten digits, which have their own size
    held_out: pictures that neither the encoder nor a training question sees; one half decides
        (choice), the other is reported (test)
    """

    emoji: str | None = None
    size: int = 32
    held_out: int = 1000
    features: int = 64
    steps: int = 400
    batch: int = 64
    learning_rate: float = 2e-3
    seed: int = 0
    device: str = "cpu"


class Encoder(nn.Module):
    """Three convolutions, (B, C, H, W) float32 -> (B, 16, d): 4x4 positions in raster order."""

    def __init__(self, channels: int, features: int, classes: int):
        super().__init__()
        widths = (channels, features // 4, features // 2, features)
        layers: list[nn.Module] = []
        for width, following in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(width, following, 3, 2, 1), nn.BatchNorm2d(following), nn.GELU()]
        # Features get unit variance, so that projectors need no scaling of their own.
        last = nn.BatchNorm2d(features, affine=False)
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), last)
        self.classes = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)

    def classify(self, images: Tensor) -> Tensor:
        return self.classes(self(images).mean(1))


@dataclass(frozen=True)
class EncodedPictures:
    """Output of the encoder.

    features: (N, 16, d) float32; labels: (N,) int64, indices into names
    """

    features: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def read_pictures(settings: EncoderSettings) -> CaptionedPictures:
    """Read pictures, named by the words of answers: "seven", or "food & drink"."""
    if settings.emoji is not None:
        return emoji(Path(settings.emoji), settings.size, caption="category")
    pictures = digits()
    return CaptionedPictures(pictures.images, DIGITS, pictures.labels)


def split_pictures(
    pictures: CaptionedPictures, held_out: int, seed: int
) -> dict[str, CaptionedPictures]:
    """Split pictures into parts; no picture is in two."""
    learnt, rest = pictures.split(held_out, seed)
    choice, test = rest.split(held_out // 2, seed)
    return dict(zip(PARTS, (learnt, choice, test), strict=True))


def as_input(images: np.ndarray) -> Tensor:
    """Convert (N, H, W[, 3]) uint8 into (N, C, H, W) float32 in -1..1."""
    tensor = torch.from_numpy(images).float() / 127.5 - 1
    return tensor[:, None] if tensor.ndim == 3 else tensor.movedim(-1, 1)


def fit_encoder(settings: EncoderSettings, images: Tensor, labels: Tensor, classes: int) -> Encoder:
    torch.manual_seed(settings.seed)
    encoder = Encoder(images.shape[1], settings.features, classes).to(settings.device)
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=settings.learning_rate)
    for _ in range(settings.steps):
        at = torch.randint(len(labels), (settings.batch,))
        logits = encoder.classify(images[at].to(settings.device))
        F.cross_entropy(logits, labels[at].to(settings.device)).backward()
        optimiser.step()
        optimiser.zero_grad()
    return encoder.eval()


def train_encoder(settings: EncoderSettings, workspace: Workspace) -> dict[str, Any]:
    """Train the encoder on the pictures' names; save it, and its features of all pictures."""
    parts = split_pictures(read_pictures(settings), settings.held_out, settings.seed)
    images = {part: as_input(pictures.images) for part, pictures in parts.items()}
    labels = {part: torch.from_numpy(pictures.labels).long() for part, pictures in parts.items()}
    names, channels = parts["train"].names, images["train"].shape[1]
    encoder = fit_encoder(settings, images["train"], labels["train"], len(names))
    tensors = {f"labels-{part}": labels[part] for part in PARTS}
    accuracy = {}
    with torch.no_grad():
        for part in PARTS:
            batches = [batch.to(settings.device) for batch in images[part].split(500)]
            features = torch.cat([encoder(batch).cpu() for batch in batches])
            tensors[f"features-{part}"] = features.contiguous()
            found = torch.cat([encoder.classify(batch).argmax(1).cpu() for batch in batches])
            accuracy[part] = float((found == labels[part]).double().mean())
    described = {"names": names, "settings": asdict(settings), "channels": channels}
    write_text(workspace.folder / "encoder.json", json.dumps(described))
    for name, saved in (("encoder", encoder.state_dict()), ("features", tensors)):
        with replacing(workspace.folder / f"{name}.safetensors") as temporary:
            save_file(saved, temporary)
    return {"names": names, "accuracy": accuracy, "pictures": {p: len(labels[p]) for p in PARTS}}


def load_encoder(folder: Path) -> Encoder:
    """Load the encoder that :func:`train_encoder` saved, frozen and in eval mode."""
    described = json.loads((folder / "encoder.json").read_text())
    features = described["settings"]["features"]
    encoder = Encoder(described["channels"], features, len(described["names"]))
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
    return encoder.eval().requires_grad_(False)


def load_encoded(folder: Path) -> dict[str, EncodedPictures]:
    """Load the features that :func:`train_encoder` saved, by part."""
    names = tuple(json.loads((folder / "encoder.json").read_text())["names"])
    tensors = load_file(folder / "features.safetensors")
    return {
        part: EncodedPictures(tensors[f"features-{part}"], tensors[f"labels-{part}"], names)
        for part in PARTS
    }
