"""New experts of one Mixture-of-Experts layer, with their router columns (MoExtend, 2408.03511)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels.layers.resident import Resident
from moe_kernels.layers.whole import whole
from moe_kernels.ops.dtypes import without_autocast

CALIBRATIONS = ("additive", "multiplicative")
_STD = 0.02


class Calibration(Resident):
    """``B GELU(A v)``, MoExtend's term in the routing of a layer with N experts.

    A (hidden, N) is small and normal, B (N, hidden) is zero, so that training starts at the router
    as it was. "additive" (the published code): v are the softmax probabilities, to which it is
    added after the choice. "multiplicative" (the paper): v are the weights of the chosen experts,
    zero for the others, and each weight is multiplied by one plus it.

    Args:
        form: "additive" or "multiplicative".
        num_experts: N, added ones included.
        hidden_features: between A and B.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        form: str,
        num_experts: int,
        hidden_features: int = 16,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.form = form
        self.calibration_A = nn.Parameter(torch.empty(hidden_features, num_experts, **options))
        self.calibration_B = nn.Parameter(torch.empty(num_experts, hidden_features, **options))
        if not self.calibration_A.is_meta:  # where only shapes count, they may be of any size
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw A from a normal of standard deviation 0.02 by a CPU generator, and set B to zero."""
        A = self.calibration_A
        A.copy_(torch.randn(A.shape, generator=generator, dtype=torch.float32, device="cpu") * _STD)
        nn.init.zeros_(self.calibration_B)

    def forward(self, values: Tensor) -> Tensor:
        """Map the first N columns of (T, at least N) to (T, N), in the dtype of ``values``."""
        with without_autocast(values.device):
            seen = values[:, : self.calibration_A.shape[1]].to(self.calibration_A.dtype)
            hidden = F.gelu(F.linear(seen, whole(self.calibration_A)))
            return F.linear(hidden, whole(self.calibration_B)).to(values.dtype)

    def extra_repr(self) -> str:
        return f"{self.form}, {tuple(self.calibration_A.shape)}"


class AddedExperts(Resident):
    """X experts that one extension added to a layer; not initialised, except the calibration.

    Parameters: ``gate_up_proj`` (X, 2I, H), or (X, I, H) without a gate, and ``down_proj``
    (X, H, I) as :func:`moe_kernels.ops.moe_mlp` takes them, ``router_columns`` (X, H), the new rows
    of the router, and those of ``calibration``. Biases, where the base has them, are frozen:
    ``gate_up_bias`` (X, 2I) or (X, I), ``down_bias`` (X, H) and ``router_bias`` (X,).

    Args:
        num_added: X.
        hidden_features: H.
        intermediate_features: I.
        gated: whether experts have a gate.
        biased: whether both projections have biases.
        router_biased: whether the router has one.
        modality_id: modality of the rows that may choose them; None: all rows may.
        calibration: recalibrates the routing of these rows, or None.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_added: int,
        hidden_features: int,
        intermediate_features: int,
        *,
        gated: bool = True,
        biased: bool = False,
        router_biased: bool = False,
        modality_id: int | None = None,
        calibration: Calibration | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        hidden, inter = hidden_features, intermediate_features
        options = {"device": device, "dtype": dtype}
        rows = 2 * inter if gated else inter
        self.gate_up_proj = nn.Parameter(torch.empty(num_added, rows, hidden, **options))
        self.down_proj = nn.Parameter(torch.empty(num_added, hidden, inter, **options))
        self.router_columns = nn.Parameter(torch.empty(num_added, hidden, **options))
        shapes = {"gate_up_bias": (num_added, rows), "down_bias": (num_added, hidden)}
        shapes = (shapes if biased else {}) | (
            {"router_bias": (num_added,)} if router_biased else {}
        )
        for name in ("gate_up_bias", "down_bias", "router_bias"):
            bias = torch.empty(shapes[name], **options) if name in shapes else None
            self.register_parameter(name, None if bias is None else nn.Parameter(bias, False))
        self.modality_id = modality_id
        self.calibration = calibration

    @property
    def num_added(self) -> int:
        """Number of experts, X."""
        return self.router_columns.shape[0]

    @property
    def ffn_trains(self) -> bool:
        """Return whether ``gate_up_proj`` or ``down_proj`` requires grad."""
        return self.gate_up_proj.requires_grad or self.down_proj.requires_grad

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return ``gate_up_proj`` and ``down_proj`` as the ops take them."""
        return whole(self.gate_up_proj), whole(self.down_proj)

    def bias(self, name: str) -> Tensor | None:
        """Return a bias as a constant, whatever was asked for its gradient; None: there is none."""
        found = getattr(self, name)
        return None if found is None else whole(found).detach()

    def open_to(self, modality_ids: Tensor) -> Tensor | None:
        """Map (T,) ids to (T, 1) bool: rows that may choose these experts. None: all rows."""
        return None if self.modality_id is None else (modality_ids == self.modality_id)[:, None]

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Map (T, H) to (T, X) in a separate GEMM: the base's logits keep their bits."""
        bias, dtype = self.bias("router_bias"), hidden_states.dtype
        bias = None if bias is None else bias.to(dtype)
        return F.linear(hidden_states, whole(self.router_columns).to(dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.num_added}, modality_id={self.modality_id}"
