"""All implementations that are compared, by name: ``kind`` or ``kind:variant``.

To add one, write a function (problem, variant) -> Runner and enter it in ``KINDS``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lib.cases import Problem
from lib.providers import bounds, competitors, ours
from lib.providers.runner import Runner
from moe_kernels import backends

GROUPED, PEFT = "hf:grouped_mm", "peft:grouped_mm"
ACCELERATED = "peft_accelerated"
OURS = ("ours", "block", ACCELERATED)  # starts of the names of this package's providers
SPLIT = "split:masked"  # it keeps less memory than "split:gathered"
SPLITS = (SPLIT, "split:gathered", "split:compiled")
# transformers' own experts that can win in training.
HF_TRAINING = ("hf:eager", "hf:grouped_mm")
# By what an added expert is timed in: the kinds without it, with rows in it, with no row in it.
ADDED_KINDS = {
    "op": ("ours_base", "ours_added", "ours_added_text"),
    "MoE block": ("block", "block_added", "block_added_text"),
}


def hf_decode(tokens: int) -> tuple[str, ...]:
    """transformers' own experts that can win in decoding.

    batched_mm copies the weights of every row, so it can win with a single token alone.
    """
    return (*HF_TRAINING, "hf:batched_mm") if tokens == 1 else HF_TRAINING


@dataclass(frozen=True)
class Kind:
    """Providers that differ in their variant: a backend, or an implementation."""

    set_up: Callable[[Problem, str], Runner]
    variants: Callable[[], list[str]] = lambda: [""]


def set_up_provider(name: str, problem: Problem) -> Runner:
    """Return the named provider, set up on a problem.

    Raises:
        Unavailable: it does not run here.
        KeyError: there is no such provider.
    """
    kind, _, variant = name.partition(":")
    return KINDS[kind].set_up(problem, variant)


def provider_names() -> list[str]:
    """Names of all providers."""
    return [
        f"{kind}:{variant}" if variant else kind
        for kind, entry in KINDS.items()
        for variant in entry.variants()
    ]


def _backends() -> list[str]:
    return list(backends.NAMES)


def _experts_implementations() -> list[str]:
    ours = "moe_kernels"  # registered by the package itself
    return sorted({"eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()} - {ours})


KINDS: dict[str, Kind] = {
    "bound": Kind(bounds.gemms),
    "read": Kind(bounds.reading),
    "ours": Kind(ours.adapted, _backends),
    "ours_text": Kind(ours.adapted_text, _backends),
    "ours_base": Kind(ours.base, _backends),
    "ours_added": Kind(ours.added, _backends),
    "ours_added_text": Kind(ours.added_text, _backends),
    "block": Kind(ours.block, _backends),
    "block_added": Kind(ours.block_added, _backends),
    "block_added_text": Kind(ours.block_added_text, _backends),
    "hf": Kind(competitors.hf, _experts_implementations),
    "hf_compiled": Kind(competitors.hf_compiled, lambda: ["grouped_mm"]),
    "peft": Kind(competitors.peft, _experts_implementations),
    ACCELERATED: Kind(ours.peft_accelerated, _backends),
    "liger": Kind(competitors.liger),
    "scattermoe": Kind(competitors.scattermoe),
    "split": Kind(competitors.split, lambda: ["masked", "gathered", "compiled"]),
}

HF = tuple(name for name in provider_names() if name.startswith("hf:"))
BASE_COMPETITORS = (*HF, "hf_compiled:grouped_mm", "liger")  # without adapters
