"""Cases, and their inputs, which are made directly in the dtype that is timed."""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from moe_kernels.ops import LoraWeights
from moe_kernels.testing import SHAPES, MoeInputs, Shape, make_routing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCALING = 2.0  # lora_alpha / r, as with the usual lora_alpha = 2 r
DECODE_TOKENS = (1, 8, 64)  # the targets for decoding
ADDED_SHARE = 0.1  # the added expert's share of all routed rows, in its targets


@dataclass(frozen=True)
class Case:
    """One MoE layer, its routing, and the share of its rows that are image."""

    name: str  # of the shape, in moe_kernels.testing.SHAPES
    shape: Shape
    dtype: str = "bfloat16"
    routing: str = "balanced"
    image_share: float = 0.5
    device: str = "cpu"
    seed: int = 0

    @classmethod
    def named(cls, name: str, *, T=None, E=None, r=None, **settings) -> "Case":
        """Return a case of a named shape; ``T``, ``E`` and ``r`` replace its own."""
        changes = {key: value for key, value in (("T", T), ("E", E), ("r", r)) if value is not None}
        return cls(name, replace(SHAPES[name], **changes), **settings)

    @classmethod
    def from_description(cls, data: Mapping) -> "Case":
        """Return the case that :meth:`describe` described."""
        values = dict(data)
        sizes = {field.name: values.pop(field.name) for field in fields(Shape)}
        return cls(values.pop("shape"), Shape(**sizes), **values)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def num_image(self) -> int:
        """Number of image tokens; half a token is rounded up."""
        return int(self.shape.T * self.image_share + 0.5)

    @property
    def rows(self) -> int:
        """Pairs of a token and one of its experts."""
        return self.shape.T * self.shape.K

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""
        return 3 * self.shape.H * self.shape.I * self.torch_dtype.itemsize

    @property
    def forward_flops(self) -> int:
        """Operations of the base's expert GEMMs; a backward to the inputs takes as many."""
        return 6 * self.rows * self.shape.H * self.shape.I

    def describe(self) -> dict:
        """The case as plain data."""
        data = asdict(self)
        return {"shape": data.pop("name"), **data.pop("shape"), **data}


@dataclass(frozen=True)
class Problem:
    """The tensors of a case; adapters are float32, with values that the base's dtype can hold."""

    case: Case
    inputs: MoeInputs
    grad_out: Tensor  # (T, H)

    @property
    def hit_experts(self) -> Tensor:
        """Ids of the experts that some token chose."""
        return self.inputs.topk_ids.unique()

    @functools.cached_property
    def added_expert(self) -> tuple[Tensor, Tensor]:
        """gate_up_proj (1, 2I, H) and down_proj (1, H, I) of one more expert, in float32."""
        generator = torch.Generator().manual_seed(self.case.seed)
        stacks = self.inputs.gate_up_proj, self.inputs.down_proj
        values = (torch.randn(w.shape[1:], generator=generator) / w.shape[2] ** 0.5 for w in stacks)
        return tuple(value.to(w).float()[None] for value, w in zip(values, stacks, strict=True))

    @property
    def ids_with_added(self) -> Tensor:
        """(T, K): ``topk_ids``, but image rows have the added expert, E, in place of their last."""
        ids = self.inputs.topk_ids.clone()
        ids[self.inputs.modality_ids == 1, -1] = self.case.shape.E
        return ids


def make_problem(case: Case, layer: int = 0, weights_of: Problem | None = None) -> Problem:
    """Return the inputs of a case.

    Args:
        case: the case.
        layer: changes routing, hidden states and weights.
        weights_of: another problem whose weights and adapters to use instead.
    """
    shape, generator = case.shape, torch.Generator().manual_seed(case.seed + layer)

    def randn(*size: int, fan_in: int = 1) -> Tensor:
        tensor = torch.randn(*size, generator=generator) / fan_in**0.5
        return tensor.to(case.device, case.torch_dtype)

    def lora(out: int, inner: int) -> LoraWeights:
        a = randn(1, shape.E, shape.r, inner, fan_in=inner).float()
        b = randn(1, shape.E, out, shape.r, fan_in=shape.r).float()
        return LoraWeights(a, b, torch.tensor([SCALING], device=case.device))

    ids, weights = make_routing(shape.T, shape.K, shape.E, kind=case.routing, generator=generator)
    modality_ids = torch.zeros(shape.T, dtype=torch.int64)
    modality_ids[torch.randperm(shape.T, generator=generator)[: case.num_image]] = 1
    if weights_of is None:
        stacks = _weights(shape.E, shape.H, shape.I, case.torch_dtype, case.device, case.seed)
        gate_up_proj, down_proj = (w.roll(layer, dims=0) if layer else w for w in stacks)
        loras = lora(2 * shape.I, shape.H), lora(shape.H, shape.I)
    else:
        _, _, _, gate_up_proj, down_proj, _, *loras = weights_of.inputs[:8]
    inputs = MoeInputs(
        hidden_states=randn(shape.T, shape.H),
        topk_ids=ids.to(case.device),
        topk_weights=weights.to(case.device, case.torch_dtype),
        gate_up_proj=gate_up_proj,
        down_proj=down_proj,
        modality_ids=modality_ids.to(case.device),
        gate_up_lora=loras[0],
        down_lora=loras[1],
        extra_gate_up_proj=None,
        extra_down_proj=None,
    )
    return Problem(case, inputs, randn(shape.T, shape.H))


@functools.lru_cache(maxsize=1)  # consecutive cases share the largest tensors; two would not fit
def _weights(
    E: int, hidden: int, inter: int, dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    gate_up_proj = torch.empty(E, 2 * inter, hidden, dtype=dtype, device=device)
    down_proj = torch.empty(E, hidden, inter, dtype=dtype, device=device)
    for tensor in (gate_up_proj, down_proj):
        tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
    return gate_up_proj, down_proj


def forget_weights() -> None:
    """Release the weights that consecutive cases share."""
    _weights.cache_clear()
