"""Recipes of parametrised experts: stored data from which the op unpacks them itself.

The op unpacks tile by tile, so that no layer exists in full size. The one recipe that is known is
bitsandbytes' NF4 (``replace_parameter_4bit``).
"""

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList

from moe_kernels.ops import Nf4Weights
from moe_kernels.ops.gradients import PLAIN

_BITSANDBYTES = "bitsandbytes.nn.parametrize", "Bnb4bitParametrization"
_SAMPLE = 2**16  # weights, a multiple of every block


def nf4(stored: ParametrizationList) -> Nf4Weights | None:
    """Return the recipe of a weight that bitsandbytes has packed in NF4; None: it has none.

    Packed are two codes a byte of a stack with rows of whole bytes. Scales that are quantised
    themselves are expanded, at each call: kept for all layers, they would take an eighth of the
    codes' memory.
    """
    if not is_of_bitsandbytes(stored):
        return None
    packed = stored.original
    if packed.is_meta or type(packed) not in PLAIN:
        return None
    try:
        return Nf4Weights.from_quant_state(packed, stored[0].quant_state)
    except (TypeError, ValueError):  # stored in another way than the op reads
        return None


def is_of_bitsandbytes(stored: ParametrizationList) -> bool:
    """Return whether bitsandbytes' parametrisation, and no other, computes a weight."""
    classes = [(type(each).__module__, type(each).__qualname__) for each in stored]
    return classes == [_BITSANDBYTES]


def gives(recipe: Nf4Weights, weight: Tensor) -> bool:
    """Return whether a recipe unpacks to a weight's bits, by a sample of its first and last values.

    A library may round in another way on some device.
    """
    if (recipe.shape, recipe.dtype) != (tuple(weight.shape), weight.dtype):
        return False
    flat, number = weight.flatten(), weight.numel()
    last = max(number - _SAMPLE, 0)
    ends = slice(0, min(number, _SAMPLE)), slice(last - last % recipe.block, number)
    return all(torch.equal(_values(recipe, end), flat[end]) for end in ends)


def _values(recipe: Nf4Weights, part: slice) -> Tensor:
    """Return the values of a part of a recipe that begins with a block, flat."""
    block = recipe.block
    codes = recipe.packed.view(-1)[part.start // 2 : part.stop // 2]
    absmax = recipe.scales[part.start // block : -(-part.stop // block)]
    shape = 1, 1, 2 * codes.numel()
    return Nf4Weights(codes, absmax, shape, recipe.dtype, block).dequantise().flatten()
