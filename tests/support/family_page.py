"""The page that says what patch_model gives each family, and the line of the README about it."""

import re

from support.families import FAMILIES, VERSION, Family
from support.family_checks import TARGETS, Outcome

_HEAD = (
    "| experts of transformers | model | experts | attention | router | added experts | "
    "added tokens | generation | why not |\n" + "|---" * 9 + "|\n"
)
# Names that a reader may look for, by family.
_KNOWN = {
    "mixtral": "Mixtral",
    "olmoe": "OLMoE",
    "qwen3_moe": "Qwen3-MoE",
    "qwen3_next": "Qwen3-Next",
    "deepseek_v3": "DeepSeek-V3",
    "glm4_moe": "GLM-4.5",
    "gpt_oss": "gpt-oss",
    "kimi_linear": "Kimi-Linear",
    "minimax_m2": "MiniMax-M2",
    "nemotron_h": "Nemotron-H",
}
_PADDING = "padded batches: transformers' own logits depend on what padding holds"
_COLUMNS = {"extension": "added experts", "tokens": "added tokens"}


def row(name: str, outcome: Outcome) -> str:
    """Return a family's line of the table."""
    family = FAMILIES[name]
    start = [f"`{family.experts}`", f"`{family.model}`"]
    if not outcome.supported:
        cells = ["no", "", "", "", "", ""]
    else:
        cells = [_target(target, outcome) for target in TARGETS]
        cells += ["no" if kind in outcome.refused else "yes" for kind in _COLUMNS]
        cells.append(_generation(family, outcome))
    return "| " + " | ".join([*start, *cells, _why_not(family.model, outcome)]) + " |"


def _target(target: str, outcome: Outcome) -> str:
    if target in outcome.refused:
        return "no"
    if target == "experts" and outcome.backend:
        return f"by `{outcome.backend}`"
    adapted = outcome.layers[target]
    if target != "attention" or adapted == outcome.num_layers:
        return "yes"
    return f"{adapted} of {outcome.num_layers} layers"


def _generation(family: Family, outcome: Outcome) -> str:
    if not family.takes_ids:
        return "not tried: takes embeddings"
    return "yes" if outcome.cache_is_exact else "yes; cache not compared"


def _why_not(model: str, outcome: Outcome) -> str:
    """Return the reasons of refusals, each once, without what the columns say already."""
    kinds: dict[str, list[str]] = {}
    refused = outcome.refused
    if not outcome.supported:
        refused = {"experts": refused["experts"]}  # the others follow
    for kind, reason in refused.items():
        reason = reason.removeprefix(f"{model} is not supported: ")
        reason = reason.removesuffix(". docs/patching.md says which layouts are")
        reason = re.sub(r"^layer \d+( cannot be extended)?: | \(leave [^)]*\)", "", reason)
        kinds.setdefault(reason.replace("|", "\\|"), []).append(_COLUMNS.get(kind, kind))
    reasons = [f"{', '.join(names)}: {reason}" for reason, names in kinds.items()]
    if not outcome.padding_is_inert:
        reasons.append(_PADDING)
    return "; ".join(reasons)


def table(outcomes: dict[str, Outcome]) -> str:
    """Return the table of all families."""
    return _HEAD + "\n".join(row(name, outcome) for name, outcome in sorted(outcomes.items()))


def summary(page: str) -> str:
    """Return how many classes a page's table has as supported, and the names of a few."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (yes|no|by `\w+`) \|", page, re.MULTILINE)
    supported = {experts for experts, _, given in rows if given == "yes"}
    models = {model for _, model, given in rows if given == "yes"}
    slowly = {experts for experts, _, given in rows if given.startswith("by")} - supported
    names = [label for name, label in _KNOWN.items() if FAMILIES[name].model in models]
    version = ".".join(map(str, VERSION))
    return (
        f"{len(supported)} of the {len({experts for experts, *_ in rows})} classes of experts in "
        f"transformers {version}, among them {', '.join(names[:-1])} and {names[-1]}"
        + (f', and {len(slowly)} more on the slow backend "reference" alone' if slowly else "")
    )
