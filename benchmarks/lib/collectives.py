"""Bytes and messages that ranks send in a training step of a patched model, by formula.

Sizes follow from the parameters alone, also of a model on the device meta. Frozen parameters have
no gradient: they are gathered, and nothing of them is reduced. tests/scale/test_sent.py and
test_sent_by_zero.py count what torch and DeepSpeed send, and compare.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

BUCKET = 25 * 2**20  # bytes of DDP's buckets
PERSISTENT = 100_000  # ZeRO-3 keeps smaller parameters whole (stage3_param_persistence_threshold)
_BF16 = 2  # bytes: DeepSpeed's bf16 casts adapters too


@dataclass(frozen=True)
class Collective:
    """One message of all ranks to each other.

    Attributes:
        kind: "all-gather", "reduce-scatter", "all-reduce" or "broadcast".
        size: bytes of the whole tensor, gathered or not yet reduced.
        ranks: that take part.
        place: "all": of all nodes; "node": of one node; "rail": one of each node.
    """

    kind: str
    size: int
    ranks: int
    place: str = "all"

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, and receives, by a ring."""
        if self.kind == "broadcast":
            return self.size
        return self._passes * self.size * (self.ranks - 1) / self.ranks

    @property
    def hops(self) -> int:
        """Messages of a ring that wait for each other."""
        return self._passes * (self.ranks - 1)

    @property
    def _passes(self) -> int:
        return 2 if self.kind == "all-reduce" else 1


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together.

    Attributes:
        parameters: of the unit alone.
        kept: they stay whole from the forward to the backward pass.
    """

    parameters: tuple[Tensor, ...]
    kept: bool


def units(model: nn.Module, *, sharded_first: bool = False, reshard: bool = True) -> list[Unit]:
    """Return the units of ``fully_shard`` of each layer and of the model.

    Args:
        model: a patched model.
        sharded_first: it was sharded when it was patched, so that autograd gathers each added
            parameter by itself.
        reshard: ``reshard_after_forward`` of the layers. The root keeps its parameters.
    """
    added = [each for each in model.parameters() if each.requires_grad and sharded_first]
    seen = {id(each) for each in added}
    found = [Unit((each,), True) for each in added]
    for module in (*model.model.layers, model):
        own = tuple(each for each in module.parameters() if id(each) not in seen)
        seen.update(map(id, own))
        found.append(Unit(own, module is model or not reshard))
    return found


def fsdp2(
    found: Iterable[Unit], shards: int, replicas: int = 1, *, evenly: bool = True
) -> Iterator[Collective]:
    """Yield the collectives of FSDP2; with ``replicas``, of HSDP, whose shards are a node's ranks.

    Args:
        found: see :func:`units`.
        shards: ranks over which a parameter is sharded.
        replicas: of each shard.
        evenly: parameters are placed by ``shard_evenly``; else their first dimension is sharded,
            and padded, even if it is the number of experts.
    """
    place = "node" if replicas > 1 else "all"

    def padded(parameters: Iterable[Tensor]) -> int:
        return sum(_padded(each, shards, evenly) for each in parameters)

    for unit in found:
        whole = padded(unit.parameters)
        for _ in range(1 if unit.kept else 2):
            yield Collective("all-gather", whole, shards, place)
        trained = [each for each in unit.parameters if each.requires_grad]
        if trained:
            size = padded(trained)
            yield Collective("reduce-scatter", size, shards, place)
            if replicas > 1:
                yield Collective("all-reduce", size // shards, replicas, "rail")


def ddp(model: nn.Module, ranks: int) -> Iterator[Collective]:
    """Yield the collectives of DDP; its buckets end at whole parameters, these anywhere."""
    buffers = sum(each.nbytes for each in model.buffers())
    if buffers:
        yield Collective("broadcast", buffers, ranks)
    size = sum(each.nbytes for each in _trained(model))
    for start in range(0, size, BUCKET):
        yield Collective("all-reduce", min(BUCKET, size - start), ranks)


def zero2(model: nn.Module, ranks: int) -> Iterator[Collective]:
    """Yield the collectives of ZeRO-2 in bf16, which reduces gradients for all ranks."""
    size = sum(each.numel() for each in _trained(model))
    yield Collective("all-reduce", _BF16 * size, ranks)
    yield Collective("all-gather", _BF16 * _multiple(size, 2 * ranks), ranks)


def zero3(model: nn.Module, ranks: int, persistent: int = PERSISTENT) -> Iterator[Collective]:
    """Yield the collectives of ZeRO-3 in bf16, as if each pass gathered all at once.

    It gathers module by module, and what comes next together: ``stage3_prefetch_bucket_size``.
    ``stage3_max_reuse_distance`` can spare the last layer and the head the second time.
    """
    parameters = list(model.parameters())
    sharded = [each for each in parameters if each.numel() > persistent]
    size = _BF16 * sum(_multiple(each.numel(), ranks) for each in sharded)
    yield Collective("all-gather", size, ranks)
    yield Collective("all-gather", size, ranks)
    trained = sum(_multiple(each.numel(), ranks) for each in _trained(model))
    yield Collective("reduce-scatter", _BF16 * trained, ranks)
    for each in parameters:
        if each.numel() <= persistent:  # after the step, frozen ones too
            yield Collective("all-gather", _BF16 * _multiple(each.numel(), ranks), ranks)


def active(model: nn.Module) -> tuple[float, float]:
    """Return how many weights a token meets: of the base, and of the adapters of its modality.

    Of experts it meets the share that its router chooses. Embeddings are read, not multiplied.
    """
    config = model.config
    number = model.model.layers[-1].mlp.experts.num_experts
    share = config.num_experts_per_tok / number
    base = model.lm_head.weight.numel()
    adapters = 0.0
    for parameter in model.model.layers.parameters():
        of_experts = parameter.ndim - parameter.requires_grad == 3 and number in parameter.shape
        count = parameter.numel() * (share if of_experts else 1)
        if parameter.requires_grad:
            adapters += count
        elif parameter.ndim > 1:
            base += count
    return base, adapters


def mask_cost(model: nn.Module) -> float:
    """Return the low-rank work of a batch of one modality alone, as a share of the base's.

    The base takes 4 operations a weight and token: forward, and the gradient of its input. An
    adapter takes 6, since its weights have gradients too. Attention scores are left out.
    """
    base, adapters = active(model)
    return 6 * adapters / (4 * base)


def waiting(most: float, mean: float, cost: float) -> float:
    """Return the time that a step loses to its slowest rank, as a share of a balanced step.

    Args:
        most: share of the modality in the tokens of the rank that has most of it.
        mean: share in the tokens of all ranks.
        cost: see :func:`mask_cost`.
    """
    return cost * (most - mean) / (1 + cost * mean)


def expected_most(sequences: int, share: float, ranks: int) -> float:
    """Return the expected largest share of a modality in a rank's batch.

    Each rank draws ``sequences`` whole sequences, each of the modality with probability ``share``.
    """
    below, total = 0.0, 0.0
    for k in range(sequences):
        below += math.comb(sequences, k) * share**k * (1 - share) ** (sequences - k)
        total += 1 - below**ranks
    return total / sequences


def _trained(model: nn.Module) -> list[Tensor]:
    return [each for each in model.parameters() if each.requires_grad]


def _padded(parameter: Tensor, shards: int, evenly: bool) -> int:
    """Return the bytes of a parameter that is padded to equal shards."""
    if evenly and any(size % shards == 0 for size in parameter.shape):
        return parameter.nbytes
    rows = parameter.shape[0]
    return parameter.nbytes // rows * _multiple(rows, shards)


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
