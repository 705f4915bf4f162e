"""Map from a frozen encoder's features to a language model's embeddings."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels.layers.resident import Resident
from moe_kernels.layers.whole import whole


class _Linear(Resident, nn.Linear):
    """Linear layer of a projector."""


class ModalityProjector(nn.Module):
    """An MLP with GELU between its linear layers, as LLaVA-1.5's: (..., d) -> (..., H).

    Args:
        in_features: d, of the encoder.
        out_features: H, of the language model.
        hidden_features: between the layers; None: H.
        num_layers: linear layers; 1: a linear map.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int | None = None,
        num_layers: int = 2,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        hidden_features = out_features if hidden_features is None else hidden_features
        sizes = [in_features, *[hidden_features] * (num_layers - 1), out_features]
        if num_layers < 1 or min(sizes) < 1:
            raise ValueError(
                f"a projector needs at least one layer and sizes of at least 1, got {num_layers} "
                f"layers and sizes {sizes}"
            )
        self.in_features, self.hidden_features, self.num_layers = sizes[0], sizes[-2], num_layers
        layers: list[nn.Module] = []
        for size, following in zip(sizes, sizes[1:], strict=False):
            layers += [_Linear(size, following, device=device, dtype=dtype), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, features: Tensor) -> Tensor:
        """(..., d) -> (..., H), in the projector's dtype."""
        if features.shape[-1] != self.in_features:
            raise ValueError(
                f"features must be (..., {self.in_features}), got {tuple(features.shape)}"
            )
        values = features.to(self.layers[0].weight.dtype)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                values = F.linear(values, whole(layer.weight), whole(layer.bias))
            else:
                values = layer(values)
        return values

    def settings(self) -> dict[str, int]:
        """Return the arguments that :class:`ModalityProjector` was made with, except H."""
        return {
            "in_features": self.in_features,
            "hidden_features": self.hidden_features,
            "num_layers": self.num_layers,
        }
