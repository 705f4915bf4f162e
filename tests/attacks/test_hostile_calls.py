"""Calls of the ops with one or two wrong arguments: refused, or computed, and never a crash."""

import math

import pytest
import torch

from moe_kernels.ops import LoraWeights, moe_mlp
from moe_kernels.testing import SHAPES, make_moe_inputs, working_backends

CALLS = 20_000
NUMBERS = (0, -1, -2, 3, 7, 2**31 - 1, 2**31, 2**40, -(2**63), 2**63 - 1, math.nan, math.inf, 1e38)
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.bool)
DTYPES += (torch.complex64, torch.uint8, torch.float8_e4m3fn)


def damaged(tensor, random):
    """Return something else than a tensor that an op expects."""
    size = list(tensor.shape)
    axis = random.randrange(len(size))
    changes = {
        "value": lambda: (
            tensor.detach()
            .clone()
            .index_fill_(
                axis, torch.tensor([random.randrange(size[axis])]), as_value(tensor, random)
            )
        ),
        "dtype": lambda: tensor.detach().to(random.choice(DTYPES)),
        "shorter": lambda: tensor.narrow(axis, 0, random.randrange(size[axis])),
        "longer": lambda: torch.cat([tensor, tensor], axis),
        "turned": lambda: tensor.transpose(axis, -1),
        "strided": lambda: torch.cat([tensor, tensor], axis).narrow(axis, 1, size[axis]),
        "expanded": lambda: tensor.narrow(axis, 0, 1).expand(size),
        "reshaped": lambda: tensor.unsqueeze(axis),
        "flat": lambda: tensor.flatten(),
        "number": lambda: tensor.flatten()[0],
        "meta": lambda: tensor.to("meta"),
        "sparse": lambda: tensor.detach().to_sparse(),
        "nothing": lambda: None,
        "no tensor": lambda: random.choice([3, "x", [1, 2], tensor.tolist()]),
    }
    return changes[random.choice(sorted(changes))]()


def as_value(tensor, random):
    number = random.choice(NUMBERS)
    if tensor.is_floating_point():
        return number
    limits = torch.iinfo(tensor.dtype)
    return int(min(max(number, limits.min), limits.max)) if math.isfinite(number) else -1


@pytest.mark.parametrize("backend", sorted({*working_backends(), "reference"} - {"triton", "cuda"}))
def test_a_hostile_call_is_refused_or_computed(backend, attack):
    whole = make_moe_inputs(SHAPES["tiny"], seed=3).to(torch.float32)
    for number in attack.tries(CALLS):
        random = attack.random(number)
        arguments = whole._asdict()
        for name in random.sample(sorted(arguments), random.choice([1, 1, 2])):
            value = arguments[name]
            if isinstance(value, LoraWeights):
                field = random.choice(value._fields)
                arguments[name] = value._replace(**{field: damaged(getattr(value, field), random)})
            elif value is not None:
                arguments[name] = damaged(value, random)
        try:
            out = moe_mlp(**arguments, backend=backend)
        except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError) as error:
            assert str(error), number
        else:
            assert out.shape == arguments["hidden_states"].shape, number
