"""Frozen weights of experts that stay packed, in NF4 or block FP8: their formats and values.

A backend gets a packed stack as two tensors, see :class:`PackedWeights`. The dtype of the first
says which format it is. A weight's value is a product in float32, rounded once to the dtype that
the op computes in.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_kernels.ops import checks
from moe_kernels.ops.dtypes import FLOATS

# The values of the 16 codes, in float32 (QLoRA, arXiv 2305.14314); csrc/cpu/simd/unpack.h has them
# too.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP8_BLOCK = 128  # rows, and columns, that share a scale
_FP8 = torch.float8_e4m3fn
_OF_QUANT_STATE = ("quant_type", "nested", "absmax", "shape", "dtype", "blocksize")
_FROZEN = "a packed base is frozen and gets no gradient"


class PackedWeights:
    """A frozen stack (E, n, k) that stays packed: :class:`Nf4Weights` or :class:`Fp8Weights`.

    Attributes:
        shape: (E, n, k), of the weights.
        dtype: the dtype in which an op computes with them.
        stack: (E, n, ...) as the kernels take it, uint8 for NF4 and float8_e4m3fn for FP8.
        scales: float32, as the kernels take them.
        fields: the names of the attributes that hold both as they were given.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    stack: Tensor
    scales: Tensor
    fields: ClassVar[tuple[str, str]]

    @property
    def device(self) -> torch.device:
        """Device of the packed weights."""
        return self.stack.device

    def check_frozen(self, prefix: str = "") -> None:
        """Raise ValueError if a tensor that was given requires grad, or does so since."""
        for name in self.fields:
            checks.frozen(prefix + name, getattr(self, name), _FROZEN)

    def dequantise(self) -> Tensor:
        """Return the weights (E, n, k) in ``dtype``, those that the kernels compute with."""
        return unpack(self.stack, self.scales, self.dtype)


@dataclass(frozen=True, eq=False)
class Nf4Weights(PackedWeights):
    """A frozen stack of experts in 4-bit NF4, in the layout of bitsandbytes.

    Attributes:
        packed: uint8, two codes a byte in the order of the flattened stack, the first in the high
            half. Any shape with E * n * k / 2 elements; contiguous.
        absmax: float32, the largest absolute value of each block of the flattened stack. Scales
            that are quantised themselves must be expanded first. Any shape.
        shape: (E, n, k) of the stack, k even.
        dtype: the dtype to compute in.
        block: weights with one scale, a power of two.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, size or device; scales that require grad.

    Example, codes with their scales::

        Nf4Weights(codes, scales, (num_experts, 2 * intermediate, hidden), torch.bfloat16)

    :meth:`from_quant_state` takes what bitsandbytes has packed.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int, int]
    dtype: torch.dtype
    block: int = 64
    fields = "packed", "absmax"

    def __post_init__(self):
        checks.tensors(packed=self.packed, absmax=self.absmax)
        checks.dtype("packed", self.packed, (torch.uint8,))
        checks.contiguous("packed", self.packed)
        _check_common(self, self.packed.device)
        _check_nf4(self.shape, self.block)
        experts, rows, columns = self.shape
        number = experts * rows * columns
        for name, tensor, size in (
            ("packed", self.packed, number // 2),
            ("absmax", self.absmax, -(-number // self.block)),
        ):
            if tensor.numel() != size:
                raise ValueError(
                    f"{name} must have {size} elements for weights {self.shape} in blocks of "
                    f"{self.block}, got {tensor.numel()}"
                )

    @classmethod
    def from_quant_state(cls, packed: Tensor, quant_state: Any) -> "Nf4Weights":
        """Return a stack that bitsandbytes has packed; nested scales are expanded in a copy.

        Args:
            packed: the codes, uint8, as ``quantize_4bit`` returns them.
            quant_state: their ``QuantState``, of a stack (E, n, k).

        Raises:
            TypeError: not a ``QuantState``, or codes of another dtype.
            ValueError: codes of another type than NF4, or what the class refuses.

        Example, the experts of ``replace_parameter_4bit``::

            stored = experts.parametrizations.gate_up_proj
            Nf4Weights.from_quant_state(stored.original, stored[0].quant_state)
        """
        if missing := [name for name in _OF_QUANT_STATE if not hasattr(quant_state, name)]:
            raise TypeError(
                f"quant_state must be a QuantState of bitsandbytes, got "
                f"{type(quant_state).__name__} without {missing[0]}"
            )
        if quant_state.quant_type != "nf4":
            raise ValueError(
                f"the codes are {quant_state.quant_type}, not nf4: pack with quant_type='nf4', or "
                "unpack them (bitsandbytes.functional.dequantize_4bit)"
            )
        scales, shape = _expanded(quant_state), tuple(quant_state.shape)
        return cls(packed, scales, shape, quant_state.dtype, quant_state.blocksize)

    @property
    def stack(self) -> Tensor:
        """The codes as (E, n, k / 2)."""
        experts, rows, columns = self.shape
        return self.packed.reshape(experts, rows, columns // 2)

    @property
    def scales(self) -> Tensor:
        """The scales as (blocks,)."""
        return self.absmax.reshape(-1)


@dataclass(frozen=True, eq=False)
class Fp8Weights(PackedWeights):
    """A frozen stack of experts in FP8 with one scale for each block of 128 x 128.

    It is the layout of DeepSeek's checkpoints and of transformers' ``FineGrainedFP8``.

    Attributes:
        weight: (E, n, k), float8_e4m3fn, contiguous.
        scale_inv: (E, ceil(n / 128), ceil(k / 128)), float32: what a stored value is times.
        dtype: the dtype to compute in.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, size or device; a tensor that requires grad.

    Example, the experts of a module of transformers::

        Fp8Weights(experts.gate_up_proj, experts.gate_up_proj_scale_inv, torch.bfloat16)
    """

    weight: Tensor
    scale_inv: Tensor
    dtype: torch.dtype
    fields = "weight", "scale_inv"

    def __post_init__(self):
        checks.tensors(weight=self.weight, scale_inv=self.scale_inv)
        checks.dtype("weight", self.weight, (_FP8,))
        checks.contiguous("weight", self.weight)
        _check_common(self, self.weight.device)
        experts, rows, columns = self.shape
        checks.shape("scale_inv", self.scale_inv, (experts, *map(_fp8_blocks, (rows, columns))))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, n, k)."""
        return tuple(self.weight.shape)

    @property
    def stack(self) -> Tensor:
        """The stored values (E, n, k)."""
        return self.weight

    @property
    def scales(self) -> Tensor:
        """The scales of the blocks."""
        return self.scale_inv


def _expanded(quant_state: Any) -> Tensor:
    """Return the scales of a ``QuantState`` in float32, as bitsandbytes expands them."""
    if not quant_state.nested:
        return quant_state.absmax
    from bitsandbytes.functional import dequantize_blockwise

    with torch.no_grad():
        scales = dequantize_blockwise(quant_state.absmax, quant_state.state2)
        return scales.add_(quant_state.offset).float()


def _check_common(weights: PackedWeights, device: torch.device) -> None:
    shape = weights.shape
    sizes = (int, torch.SymInt)
    is_shape = isinstance(shape, tuple) and all(isinstance(size, sizes) for size in shape)
    if not is_shape or len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            "packed weights must be a stack, their shape a tuple (E, n, k) of integers, got "
            f"{shape!r}"
        )
    if weights.dtype not in FLOATS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise TypeError(f"dtype must be {names}, got {weights.dtype}")
    name = weights.fields[1]
    scales = getattr(weights, name)
    if scales.dtype == torch.uint8:
        raise TypeError(
            f"{name} must be float32, got uint8: scales that are quantised themselves "
            "(compress_statistics=True) are expanded by Nf4Weights.from_quant_state"
        )
    checks.dtype(name, scales, (torch.float32,))
    checks.device(name, scales, device)
    weights.check_frozen()


def _check_nf4(shape: tuple[int, int, int], block: int) -> None:
    if type(block) is not int or block < 2 or block & (block - 1):
        raise ValueError(f"block must be a power of two from 2 on, got {block!r}")
    if shape[2] % 2:
        raise ValueError(
            f"rows of packed 4-bit weights must be whole bytes, k even, got {tuple(shape)}"
        )


def _check_plain(weight: Tensor) -> None:
    """Raise unless this is a stack (E, n, k) of floats that can be packed."""
    checks.tensors(weight=weight)
    checks.floating("weight", weight)
    checks.ndim("weight", weight, 3)
    if not weight.numel():
        raise ValueError(f"weight must have experts, rows and columns, got {tuple(weight.shape)}")


def _fp8_blocks(size: int) -> int:
    return -(-size // FP8_BLOCK)


def quantise_nf4(weight: Tensor, *, block: int = 64) -> Nf4Weights:
    """Pack a stack (E, n, k) in NF4, each weight as the nearest code of its block's scale.

    Raises:
        TypeError: not a tensor of floats.
        ValueError: not a stack, an odd k, or a block that is no power of two.
    """
    _check_plain(weight)
    _check_nf4(weight.shape, block)
    flat = weight.detach().float().flatten()
    number = flat.numel()
    padded = flat.new_zeros(-(-number // block) * block)
    padded[:number] = flat
    blocks = padded.view(-1, block)
    absmax = blocks.abs().amax(1)
    codes = nf4_values(weight.device)
    between = (codes[1:] + codes[:-1]) / 2
    scaled = blocks / torch.where(absmax > 0, absmax, 1)[:, None]
    indices = torch.bucketize(scaled.flatten()[:number], between).to(torch.uint8).view(-1, 2)
    packed = indices[:, 0] << 4 | indices[:, 1]
    return Nf4Weights(packed, absmax, tuple(weight.shape), weight.dtype, block)


def quantise_fp8(weight: Tensor) -> Fp8Weights:
    """Pack a stack (E, n, k) in FP8, the largest weight of a block as the largest FP8 value.

    Raises:
        TypeError: not a tensor of floats.
        ValueError: not a stack.
    """
    _check_plain(weight)
    experts, rows, columns = weight.shape
    high, wide = _fp8_blocks(rows), _fp8_blocks(columns)
    padded = torch.zeros(experts, high * FP8_BLOCK, wide * FP8_BLOCK, device=weight.device)
    padded[:, :rows, :columns] = weight.detach()
    blocks = padded.view(experts, high, FP8_BLOCK, wide, FP8_BLOCK)
    largest = blocks.abs().amax((2, 4))
    scale = torch.where(largest > 0, largest / torch.finfo(_FP8).max, 1)
    stored = (blocks / scale[:, :, None, :, None]).view_as(padded)[:, :rows, :columns]
    return Fp8Weights(stored.to(_FP8).contiguous(), scale, weight.dtype)


@functools.cache
def nf4_values(device: torch.device) -> Tensor:
    """Return the values of the 16 codes on a device, (16,) float32."""
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def is_packed(stack: Tensor) -> bool:
    """Return whether a stack is packed, as its dtype says."""
    return stack.dtype in (torch.uint8, _FP8)


def unpacked_shape(stack: Tensor) -> tuple[int, int, int]:
    """Return the shape (E, n, k) of the weights of a stack, packed or not."""
    experts, rows, columns = stack.shape
    return experts, rows, 2 * columns if stack.dtype == torch.uint8 else columns


def nf4_block(stack: Tensor, scales: Tensor) -> int:
    """Return the number of weights with one scale: the power of two that fits the sizes.

    Several fit where one scale is all, and then any does.
    """
    block = 2
    while -(-2 * stack.numel() // block) > scales.numel():
        block *= 2
    return block


def unpack(stack: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights of a packed stack in ``dtype``."""
    shape = unpacked_shape(stack)
    if stack.dtype == torch.uint8:
        codes = torch.stack([stack >> 4, stack & 15], -1).flatten().int()
        values = nf4_values(stack.device)[codes]
        factors = scales.repeat_interleave(nf4_block(stack, scales))[: codes.numel()]
        return (values * factors).view(shape).to(dtype)
    factors = scales.repeat_interleave(FP8_BLOCK, 1)[:, : shape[1]]
    factors = factors.repeat_interleave(FP8_BLOCK, 2)[..., : shape[2]]
    return (stack.float() * factors).to(dtype)
