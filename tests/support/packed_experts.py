"""Experts packed in 4 bits by parametrisations: one that must be read, and bitsandbytes' NF4."""

import copy
from functools import partial
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from moe_kernels.models.parts import all_experts
from moe_kernels.ops import Nf4Weights, quantise_nf4

STACKS = ("gate_up_proj", "up_proj", "down_proj")
_BLOCK = 8
# By module, not in it: a copied reference would free what it refers to twice.
_last: WeakKeyDictionary[nn.Module, StorageWeakRef] = WeakKeyDictionary()


class Unpacks(nn.Module):
    """Parametrisation that counts how often it unpacks, and knows what it unpacked last."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def forward(self, codes: Tensor) -> Tensor:
        self.reads += 1
        weight = self.unpack(codes)
        _last[self] = StorageWeakRef(weight.untyped_storage())
        return weight


class FourBits(Unpacks):
    """Unpacks two codes of a byte, and multiplies each block by its scale."""

    def __init__(self, scales: Tensor, shape: torch.Size, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("scales", scales)
        self.shape, self.dtype = shape, dtype

    def unpack(self, codes: Tensor) -> Tensor:
        values = torch.stack([codes & 15, codes >> 4], -1).to(torch.float32) - 8
        values = values.reshape(-1, _BLOCK) * self.scales
        return values.reshape(self.shape).to(self.dtype)


class Bnb4bitParametrization(Unpacks):
    """Stands for bitsandbytes' parametrisation where that is not installed.

    Args:
        state: what bitsandbytes keeps of a weight.
        factor: 1: as bitsandbytes unpacks.
    """

    __module__ = "bitsandbytes.nn.parametrize"

    def __init__(self, state: SimpleNamespace, factor: float = 1.0):
        super().__init__()
        self.quant_state, self.factor = state, factor

    def unpack(self, codes: Tensor) -> Tensor:
        state = self.quant_state
        weights = Nf4Weights(codes, state.absmax, state.shape, state.dtype, state.blocksize)
        return weights.dequantise() * self.factor


def pack(module: nn.Module, name: str) -> None:
    """Replace a weight by codes of 4 bits and the parametrisation that unpacks them."""
    weight = getattr(module, name).detach()
    blocks = weight.float().reshape(-1, _BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True) / 7
    codes = ((blocks / scales).round() + 8).to(torch.uint8).reshape(-1, 2)
    packed = nn.Parameter(codes[:, 0] | codes[:, 1] << 4, requires_grad=False)
    setattr(module, name, packed)
    unpack = FourBits(scales, weight.shape, weight.dtype)
    register_parametrization(module, name, unpack, unsafe=True)


def pack_experts(model: nn.Module) -> nn.Module:
    """Pack all stacks of experts of a model, and return it."""
    for experts in all_experts(model).values():
        for name in STACKS:
            if hasattr(experts, name):
                pack(experts, name)
    return model


def pack_in_nf4(model: nn.Module, factor: float = 1.0) -> nn.Module:
    """Pack all stacks of experts of a model as bitsandbytes would, and return it."""
    for experts in all_experts(model).values():
        for name in filter(partial(hasattr, experts), STACKS):
            found = quantise_nf4(getattr(experts, name))
            state = SimpleNamespace(
                absmax=found.absmax, shape=found.shape, dtype=found.dtype, blocksize=found.block,
                quant_type="nf4", nested=False,
            )  # fmt: skip
            setattr(experts, name, nn.Parameter(found.packed[:, None], requires_grad=False))
            unpack = Bnb4bitParametrization(state, factor)
            register_parametrization(experts, name, unpack, unsafe=True)
    return model


def dequantised(model: nn.Module, plain: nn.Module) -> nn.Module:
    """Return a copy of ``plain`` with the values that the packed model's experts have."""
    plain = copy.deepcopy(plain)
    for name, experts in all_experts(plain).items():
        packed = model.get_submodule(name)
        for stack in STACKS:
            if is_parametrized(packed, stack):
                getattr(experts, stack).data.copy_(getattr(packed, stack))
    return plain


def reads(model: nn.Module) -> int:
    """Return how often the model's packed weights have been unpacked."""
    return sum(each.reads for each in model.modules() if isinstance(each, Unpacks))


def kept(model: nn.Module) -> int:
    """Return how many of the weights that were unpacked last are still in memory."""
    return sum(not _last[each].expired() for each in model.modules() if isinstance(each, Unpacks))
