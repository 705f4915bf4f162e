"""Initial values of added experts: copies of existing experts, their mean, or random."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels.arguments import as_integer
from moe_kernels.layers import AddedExperts
from moe_kernels.models import offload
from moe_kernels.models.added_experts import added_experts, count_experts
from moe_kernels.models.forms import form_of
from moe_kernels.models.parts import LayerParts, router_linear
from moe_kernels.moextend.scores import LayerScores

INITS = ("most_selected", "most_selected_tuned", "random", "mean")
_COPY_NOISE = 0.01


def copies_most_selected(init: str | int) -> bool:
    """Return whether an init needs layer scores."""
    return str(init).startswith("most_selected")


def settle_init(init: str | int, scores: LayerScores | None) -> str | int:
    """Return the init; an expert's id becomes Python's integer.

    Raises:
        ValueError: it is unknown, or needs scores and has none.
    """
    settled = init if isinstance(init, str) else as_integer(init)
    if settled is None or (isinstance(settled, str) and settled not in INITS):
        raise ValueError(
            f"unknown init {init!r}; the inits are {', '.join(INITS)}, or an expert's id"
        )
    if copies_most_selected(settled) and scores is None:
        raise ValueError(
            f"init={init!r} copies the experts that the routers select most: call score_layers "
            "first, or give scores="
        )
    return settled


def sources(
    init: str | int, layers: dict[int, LayerParts], numbers: dict[int, int], scores: LayerScores
) -> dict[int, tuple[int, ...]] | None:
    """Choose the experts to copy, by layer: n different ones of the most selected; None: no copies.

    Raises:
        ValueError: an expert that a layer does not have, or scores of another model.
    """
    if init in ("random", "mean"):
        return None
    if isinstance(init, int):
        for index in numbers:
            available = count_experts(layers[index])
            if not 0 <= init < available:
                raise ValueError(f"layer {index} has experts 0..{available - 1}, not {init}")
        return {index: (init,) * number for index, number in numbers.items()}
    found = {}
    for index, number in numbers.items():
        if index not in scores.layers:
            raise ValueError(
                f"the scores are of layers {scores.layers}, not of layer {index}: score that layer "
                "too, or choose another init"
            )
        ranked = scores.most_selected(index, tuned=init == "most_selected_tuned")
        if len(ranked) > count_experts(layers[index]):
            raise ValueError(
                f"the scores are of {len(ranked)} experts in layer {index}, it has "
                f"{count_experts(layers[index])}"
            )
        found[index] = tuple(ranked[i % len(ranked)] for i in range(number))
    return found


@torch.no_grad()
def fill(
    added: AddedExperts,
    parts: LayerParts,
    init: str | int,
    copied: Sequence[int] | None,
    std: float,
    generator: torch.Generator,
) -> None:
    """Give new experts of a layer their values.

    Copies of one expert would always get equal gradients. A little noise on the router columns of
    all copies but the first separates them.
    """
    for name, stacks in _stacks(parts).items():
        parameter = getattr(added, name)
        if init == "random" and name.endswith("bias"):
            parameter.zero_()
        elif init == "random":
            parameter.copy_(_randn(parameter.shape, generator) * std)
        elif copied is None:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            parameter.copy_(stacks[0].mean(0, dtype=dtype).expand_as(parameter))
        else:
            for value, expert in zip(parameter, copied, strict=True):
                value.copy_(_pick(stacks, expert))
    if init != "random":
        _separate_copies(added.router_columns, copied, generator)
    if added.calibration is not None:
        added.calibration.reset_parameters(generator)


def _randn(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _separate_copies(
    columns: Tensor, copied: Sequence[int] | None, generator: torch.Generator
) -> None:
    """Add noise to router columns (X, H), except the first of each source."""
    seen = set()
    for place, column in enumerate(columns):
        source = None if copied is None else copied[place]
        if source in seen:
            noise = _randn(column.shape, generator).to(column)
            column.add_(noise, alpha=_COPY_NOISE * column.float().std().item())
        seen.add(source)


def _stacks(parts: LayerParts) -> dict[str, list[Tensor]]:
    """Map an added parameter's name to the base's stack, then each earlier extension's."""
    form = form_of(parts.experts)
    base = dict(zip(("gate_up_proj", "down_proj"), form.stacks(parts.experts), strict=True))
    base |= form.biases(parts.experts, ())
    if getattr(parts.router, "bias", None) is not None:
        base["router_bias"] = offload.value(parts.router, "bias")
    base["router_columns"] = offload.value(router_linear(parts.router), "weight")
    earlier = added_experts(parts.layer)
    return {
        name: [weight, *(getattr(each, name) for each in earlier)] for name, weight in base.items()
    }


def _pick(stacks: list[Tensor], expert: int) -> Tensor:
    for stack in stacks:
        if expert < stack.shape[0]:
            return stack[expert]
        expert -= stack.shape[0]
    raise IndexError(expert)
