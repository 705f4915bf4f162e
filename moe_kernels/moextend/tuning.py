"""Count the experts that routers select, before and after tuning a change to the routers alone."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from moe_kernels.analysis import RoutingRecorder
from moe_kernels.arguments import as_integer
from moe_kernels.models import experts, offload, routers, sharding
from moe_kernels.models.added_experts import count_experts
from moe_kernels.models.handle import PatchState
from moe_kernels.models.padding import find_real
from moe_kernels.models.parts import router_linear
from moe_kernels.models.ranks import Ranks
from moe_kernels.models.routers import RoutingFinder
from moe_kernels.modes import ending_with, evaluating, training_only
from moe_kernels.moextend.scores import LayerScores, check_count, check_num_experts
from moe_kernels.progress import Bar, bar

Batch = Mapping[str, Any]
# seconds to wait for other ranks: to begin, and to end, as they may have more batches
_TIMEOUT = 300.0
_TIMEOUT_OF_TUNING = 1800.0


def score_layers(
    patched: PatchState,
    dataloader: Iterable[Batch],
    steps: int,
    *,
    modality: str,
    lr: float,
    count: str,
    progress: bool,
) -> LayerScores:
    """See :meth:`moe_kernels.moextend.ExpertExtender.score_layers`."""
    requested, steps = steps, as_integer(steps)
    if steps is None or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {requested!r}")
    if not lr > 0:
        raise ValueError(f"lr must be above 0, got {lr}")
    check_count(count)
    sharding.check_whole(patched.model, "score_layers")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "score_layers tunes the routers by gradients: call it outside of torch.inference_mode()"
        )
    counted = modality if count == "modality" else None
    with _together() as all_began:
        batches = [_with_labels(batch) for batch in itertools.islice(dataloader, steps)]
        if not batches:
            raise ValueError("the dataloader gave no batch")
        all_began()
        with (
            bar(total=steps + 2 * len(batches), desc="scoring layers", shown=progress) as shown,
            evaluating(patched.model),
            training_only(patched.model, ()),
            _tunable_routers(patched) as changes,
        ):
            before, widths = _count(patched, batches, counted, shown)
            _tune(patched, batches, steps, lr, changes, shown)
            after, _ = _count(patched, batches, counted, shown)
    device = offload.device_of_model(patched.model)
    before, after = _sum_over_ranks(before, device), _sum_over_ranks(after, device)
    _check_seen(before, counted)
    return LayerScores(tuple(patched.moe_layers), before, after, widths, modality, count)


def _with_labels(batch: Batch) -> dict[str, Any]:
    """Return a batch with labels, as keyword arguments of a forward with a loss."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be a mapping to the model's arguments, got {type(batch)}")
    batch = dict(batch)
    if batch.get("input_ids") is None and (
        batch.get("inputs_embeds") is None or batch.get("modality_ids") is None
    ):
        raise ValueError(
            "a batch has no ids: it needs input_ids, or inputs_embeds with modality_ids, "
            f"got {sorted(batch)}"
        )
    if batch.get("labels") is None:
        if batch.get("input_ids") is None:
            raise ValueError("a batch of inputs_embeds needs labels")
        batch["labels"] = _next_tokens(**batch)
    return batch


def _next_tokens(
    input_ids: Tensor, attention_mask: Any = None, modality_ids: Tensor | None = None, **_: Any
) -> Tensor:
    """Return the ids as labels, -100 on padding.

    Padding is what ``attention_mask`` leaves out, or -1 in ``modality_ids``.
    """
    labels = input_ids
    if (real := find_real(attention_mask, labels.shape[1])) is not None:
        labels = labels.masked_fill(~real.to(labels.device), -100)
    if modality_ids is not None:
        labels = labels.masked_fill(modality_ids.to(labels.device) < 0, -100)
    return labels


@contextlib.contextmanager
def _tunable_routers(patched: PatchState) -> Iterator[list[nn.Parameter]]:
    """Let each router add a trainable change (E, H), zero at first, to its weight; yield them."""
    find, layers = RoutingFinder(), patched.moe_layers
    for index, parts in layers.items():
        if problem := routers.problem(parts, find):
            raise ValueError(f"layer {index} cannot be scored: {problem}")
        check_num_experts(index, count_experts(parts))
    tuned = [parts.router for parts in layers.values()]
    plain = [router for router in tuned if not routers.is_attached(router)]

    def restore() -> None:
        for router in tuned:
            routers.tune(router, None)
        for router in plain:
            routers.detach(router)

    with ending_with(restore):
        for router, parts in zip(tuned, layers.values(), strict=True):
            if router in plain:
                context = experts.context_of(parts.experts)
                routers.attach(router, context, None, find(router))
            routing = routers.routing_of(router)
            if routing.top_k == 1 and routing.normalise:
                raise ValueError(
                    "with top-1 and normalised scores no loss reaches the routers: choose the "
                    "layers by their indices"
                )
            weight = router_linear(router).weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            device = offload.device_of(router_linear(router), weight)
            change = torch.zeros_like(weight, dtype=dtype, device=device)
            routers.tune(router, nn.Parameter(change))
        yield [router.__dict__["_tuned"] for router in tuned]


@contextlib.contextmanager
def _together() -> Iterator[Callable[[], None]]:
    """Let all ranks leave together, with an error if any has one: a sum over them would hang.

    Yields:
        A function that waits until all ranks have called it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield lambda: None
        return
    ranks = Ranks(tuple(range(dist.get_world_size())), "score_layers", _TIMEOUT)

    def all_began() -> None:
        ranks.meet()
        ranks.timeout = _TIMEOUT_OF_TUNING

    with ranks.leaving_together():
        yield all_began


def _sum_over_ranks(counts: Tensor, device: torch.device) -> Tensor:
    """Return the sum of counts over all ranks, so that these choose the same layers."""
    if not (dist.is_available() and dist.is_initialized()):
        return counts
    total = counts.contiguous().to(device)  # where the backend can send it
    dist.all_reduce(total)
    return total.to(counts.device)


def _tune(
    patched: PatchState,
    batches: list[dict[str, Any]],
    steps: int,
    lr: float,
    changes: list[nn.Parameter],
    shown: Bar,
) -> None:
    optimiser = torch.optim.AdamW(changes, lr=lr, weight_decay=0.0)
    for batch in itertools.islice(itertools.cycle(batches), steps):
        with torch.enable_grad():
            loss = patched.model(**batch).loss
            # Not backward(), which would leave gradients on other parameters.
            grads = torch.autograd.grad(loss, changes, allow_unused=True)
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"the loss became {loss.item()} while the routers were tuned, and nothing has "
                "changed: lower lr, or look for batches without labels"
            )
        for change, grad in zip(changes, grads, strict=True):
            change.grad = grad
        optimiser.step()
        shown.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        shown.update()


@torch.no_grad()
def _count(
    patched: PatchState, batches: list[dict[str, Any]], modality: str | None, shown: Bar
) -> tuple[Tensor, tuple[int, ...]]:
    """Return selections (L, E) of this rank's batches, and the number of experts of each layer."""
    with RoutingRecorder(patched.model) as recorder:
        for batch in batches:
            patched.model(**{name: value for name, value in batch.items() if name != "labels"})
            shown.update()
    seen = recorder.statistics()
    if modality is None:
        return seen.counts.sum(1), seen.num_experts
    return seen.counts[:, seen.modalities.index(modality)], seen.num_experts


def _check_seen(counts: Tensor, modality: str | None) -> None:
    if not counts.sum(1).all():
        raise ValueError(
            f"the batches have no token of {'any' if modality is None else repr(modality)} "
            "modality: give modality_ids, or tokens that add_modality_tokens made"
        )
