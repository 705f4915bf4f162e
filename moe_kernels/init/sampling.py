"""Uniform samples from a stream of rows: each row draws a random key, the smallest keys stay."""

from torch import Tensor


def smallest_keys(keys: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` smallest keys in ascending order of index.

    (n,) floats -> (min(n, count),) int64. With random keys this is a uniform sample of the rows
    seen so far: repeat it on the keys of the kept rows and of the new ones.
    """
    return keys.argsort()[:count].sort().values
