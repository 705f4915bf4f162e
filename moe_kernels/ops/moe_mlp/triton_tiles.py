"""Which tiles the Triton kernels of ``moe_mlp`` use: a function of shapes and dtype alone.

Never of the routing, so that a row's bits do not follow what else is in the batch.
"""

from typing import NamedTuple

import torch

from moe_kernels.ops.moe_mlp.weights import ExpertWeights


class Tiles(NamedTuple):
    """The shape of a tile, and how it is run.

    Attributes:
        m: rows.
        n: columns of a plain product.
        n_gated: columns of gate, and as many of up, where both are held at once.
        k: depth of a step.
        group: row tiles that take the same weights one after the other.
        warps: of a program.
        stages: of the pipeline of loads.
    """

    m: int
    n: int
    n_gated: int
    k: int
    group: int
    warps: int
    stages: int


# By the average number of rows of an expert, from this number on. Chosen by what the compiler made
# of them (`make check-gpu-code`), not yet by a GPU; few rows want many small programs.
HALF = ((64, Tiles(128, 128, 64, 64, 8, 8, 3)), (0, Tiles(16, 64, 64, 64, 8, 4, 4)))
FLOAT32 = ((64, Tiles(64, 64, 32, 32, 8, 4, 3)), (0, Tiles(16, 64, 32, 32, 8, 4, 3)))


def choose_tiles(rows: int, weights: ExpertWeights) -> Tiles:
    """The tiles for ``rows`` pairs of a token and one of its experts."""
    table = FLOAT32 if weights.gate_up_proj.dtype == torch.float32 else HALF
    average = rows // weights.num_experts
    return next(tiles for least, tiles in table if average >= least)
