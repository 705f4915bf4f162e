"""The trainable low-rank pairs of one projection, one pair for each added modality."""

from collections.abc import Sequence

import torch
from torch import nn

from moe_kernels.layers.resident import Resident
from moe_kernels.layers.whole import whole
from moe_kernels.ops import LoraWeights

DEFAULT = "default"  # name of the adapter that is there from the beginning
ONLY = (DEFAULT,)
BASE = "base"  # stands for no adapter
_MARK = "@"  # between the name of a parameter and that of its adapter, if it is another


def name_for(parameter: str, adapter: str) -> str:
    """Return the name under which a module keeps an adapter's own values of a parameter."""
    return parameter if adapter == DEFAULT else f"{parameter}{_MARK}{adapter}"


def split_name(name: str) -> tuple[str, str]:
    """Return a parameter's name without its adapter, and this one's name."""
    parameter, mark, adapter = name.partition(_MARK)
    return (parameter, adapter) if mark else (name, DEFAULT)


class ModalityLora(Resident):
    """Parameters ``lora_A`` and ``lora_B`` of one projection, for M added modalities.

    Those of a further adapter are ``lora_A@NAME`` and ``lora_B@NAME``, of the same shapes.

    For a linear layer ``lora_A`` is (M, r, in) and ``lora_B`` (M, out, r). With ``num_experts`` E
    they are (M, E, r, in), or (M, 1, r, in) with ``shared_A``, and (M, E, out, r). As in LoRA
    (arXiv 2106.09685) A is random and B zero, so that training starts at the base model.

    Args:
        num_modalities: M.
        in_features: inner size of the projection.
        out_features: outer size of the projection.
        r: rank.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        num_experts: E for stacked experts, None for a linear layer.
        shared_A: one A for all experts.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_modalities: int,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        *,
        num_experts: int | None = None,
        shared_A: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        shape_A, shape_B = pair_shapes(
            num_modalities,
            in_features,
            out_features,
            r,
            num_experts=num_experts,
            shared_A=shared_A,
        )
        self.lora_A = nn.Parameter(torch.empty(shape_A, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(shape_B, device=device, dtype=dtype))
        self.num_modalities, self.r, self.lora_alpha = num_modalities, r, lora_alpha
        self._scaling = self._make_scaling()
        self.reset_parameters()

    @property
    def scaling(self) -> torch.Tensor:
        """``lora_alpha / r`` for each modality, (M,) float32, beside ``lora_A``.

        It is no buffer: a cast would round it, and where a model gets its values after it was made
        (device meta, ``to_empty``, ``load_state_dict(assign=True)``) nothing would fill it again.
        """
        if self._scaling.device != self.lora_A.device:
            self._scaling = self._make_scaling()
        return self._scaling

    def reset_parameters(self, adapter: str = DEFAULT) -> None:
        """Draw A uniformly within 1/sqrt(in), as ``nn.Linear`` and PEFT do, and set B to zero."""
        lora_A, lora_B = self.pair(adapter)
        bound = lora_A.shape[-1] ** -0.5
        nn.init.uniform_(lora_A, -bound, bound)
        nn.init.zeros_(lora_B)

    def add(self, adapter: str, like: str | None = None) -> None:
        """Make the parameters of a further adapter, with the values of another one or new ones."""
        for name, values in zip(("lora_A", "lora_B"), self.pair(like or DEFAULT), strict=True):
            self.register_parameter(name_for(name, adapter), nn.Parameter(values.detach().clone()))
        if like is None:
            self.reset_parameters(adapter)

    def weights(self, adapters: Sequence[str] = ONLY) -> LoraWeights:
        """Return the tensors as the ops take them.

        Those of several adapters are copied into one: the m-th modality of the a-th of them is
        modality a M + m of the op, so that one launch serves all rows of a mixed batch.
        """
        pairs = [tuple(map(whole, self.pair(adapter))) for adapter in adapters]
        if len(pairs) == 1:
            return LoraWeights(*pairs[0], self.scaling)
        lora_A, lora_B = map(torch.cat, zip(*pairs, strict=True))
        return LoraWeights(lora_A, lora_B, self.scaling.repeat(len(pairs)))

    def pair(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return an adapter's own ``lora_A`` and ``lora_B``."""
        return tuple(getattr(self, name_for(name, adapter)) for name in ("lora_A", "lora_B"))

    def extra_repr(self) -> str:
        return f"lora_A={tuple(self.lora_A.shape)}, lora_B={tuple(self.lora_B.shape)}"

    def _make_scaling(self) -> torch.Tensor:
        values = (self.num_modalities,), self.lora_alpha / self.r
        with torch.inference_mode(False):  # a tensor of inference mode could not train later
            return torch.full(*values, dtype=torch.float32, device=self.lora_A.device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._scaling = self._make_scaling()  # now, not during a forward that may be captured
        return self


def pair_shapes(
    num_modalities: int,
    in_features: int,
    out_features: int,
    r: int,
    *,
    num_experts: int | None,
    shared_A: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of ``lora_A`` and ``lora_B``; arguments as of :class:`ModalityLora`."""
    experts_a = () if num_experts is None else (1 if shared_A else num_experts,)
    experts_b = () if num_experts is None else (num_experts,)
    return (
        (num_modalities, *experts_a, r, in_features),
        (num_modalities, *experts_b, out_features, r),
    )
