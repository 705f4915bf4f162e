"""The page of redundancy.py: every figure and every verdict is computed from the JSON."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from shared.files import write_text

from moe_kernels.analysis import ExpertRedundancy, RoutingStatistics
from studies.redundancy.plots import RANKS, draw_pictures
from studies.report import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Get,
    Results,
    cost_rows,
    difference,
    in_short,
    interval,
    mean_and_interval,
    mean_and_spread,
    outcome,
    paired,
    parameters,
    present,
    table,
    test_nll,
    tuning_section,
    values,
    verdict_on,
    verdicts,
)

NAME = "redundancy"
# Nats a token of the running mean of the training loss; "steps to a fixed loss" is to this one.
FIXED_LOSS, WINDOW = {"digits": 1.3, "emoji": 2.5}, 20
C1 = (
    "plora", "plora-attention", "plora-experts", "copy", "added-experts", "rows", "all-tokens",
    "full",
)  # fmt: skip
EMOJI = ("emoji-plora", "emoji-rows", "emoji-all-tokens", "emoji-full")
REAL = ("real-plora", "real-rows", "real-all-tokens", "real-full", "real-full-slow")
BASES = {
    "The small OLMoE, digits": C1,
    "The small OLMoE, emoji": EMOJI,
    "The pretrained model, digits": REAL,
}
CHANGES_TEXT = ("all_tokens", "full")
SOURCE = ("source-dense", "source-8x6", "source-16x4", "source-copy")
OWN_RATE = ("own-rate-experts", "own-rate-copy", "own-rate-added-experts", "own-rate-plora")
GW = "gromov_wasserstein"
STARTS = {
    "Added rows": ("plora", "init-gaussian", "init-mean", "init-permuted", f"init-{GW}"),
    "Added rows, variants of Gromov-Wasserstein": (
        "plora", "init-gaussian", "init-mean", "init-permuted",
        *(f"init-{GW}-{name}" for name in ("cosine", "euclidean", "exact", "embedding", "head")),
    ),
    "Added rows, 500 pictures to learn from": (
        "few-normal", "few-gaussian", "few-permuted", f"few-{GW}",
    ),
    "Added rows, emoji": ("emoji-plora", "emoji-permuted", f"emoji-{GW}"),
    "Adapters": ("plora", "lora-permuted", f"lora-{GW}"),
}  # fmt: skip
METHODS = {
    "plora": "masked LoRA, experts and attention, r 16",
    "peft": "PEFT's LoRA of the same modules on all tokens, whole embedding and head",
    "full": "full fine-tuning",
}
DESCRIBED = {
    "plora": "masked LoRA, experts and attention, r 16",
    "plora-attention": "masked LoRA, attention alone",
    "plora-experts": "masked LoRA, experts alone",
    "experts": "masked LoRA, experts alone",
    "copy": "a feed-forward network of its own for image tokens",
    "added-experts": "experts added for image tokens (MoExtend)",
    "rows": "added rows alone",
    "all-tokens": "the same LoRA on all tokens",
    "full": "full fine-tuning",
    "full-slow": "full fine-tuning at a fifth of that rate",
    "source-dense": "the dense parent (2 experts, both chosen), r 16",
    "source-8x6": "8 experts, 6 chosen, r 11",
    "source-16x4": "16 experts, 4 chosen, r 8",
    "source-copy": "the dense parent with a feed-forward network for image tokens",
    **{f"rank-{r}": f"masked LoRA, experts and attention, r {r}" for r in (4, 32, 128)},
}


def described(name: str) -> str:
    return DESCRIBED[re.sub("^(emoji|real|own-rate)-", "", name)]


def running_mean(loss: Sequence[float]) -> np.ndarray:
    return np.convolve(loss, np.ones(WINDOW) / WINDOW, mode="valid")


def steps_to_fixed_loss(result: Results, fixed: float = FIXED_LOSS["digits"]) -> float:
    """NaN where it was not reached, or where training diverged later."""
    reached = np.flatnonzero(running_mean(result["loss"]) <= fixed)
    reached = reached if math.isfinite(test_nll(result)) else ()
    return float(reached[0] + WINDOW) if len(reached) else math.nan


# --- what was done


def heading(data: Results) -> str:
    budget, seeds = data["budget"], len(next(iter(data["runs"].values()))["seeds"])
    text = budget["text"]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    set_aside = budget["core_hours"] + budget["core_hours_later"]
    taken = data["seconds"] / 3600
    return f"""# Do the claims hold? The evidence for expert redundancy

Written by `python python/redundancy.py --page` from `redundancy.json`; figures and verdicts are
computed. A claim holds, or does not, where the 95 % interval of the paired difference over seeds
(Student's t) leaves out zero. The claims are those of arXiv 2503.22517
([methods.md](../methods.md), A).

Base: an OLMoE of {text["layers"]} layers, H {text["hidden_size"]}, {text["experts"]} experts of
{text["intermediate_size"]}, {text["experts_per_token"]} chosen, that has learnt Python's own
documentation for {text["text_steps"]} steps; or a dense Llama of the same size that was split and
healed for {budget["heal_steps"]} steps. It learns MNIST digits ({budget["images"]:,} there are,
{budget["held_out"]} of them held out), as 7x7 codes of {budget["digit_codes"]}, for
{budget["steps"]} steps of {budget["batch"]}: less than once each. {seeds} seeds of everything:
base, pictures held out, adapters, order. A toy: what holds here need not hold for seven billion
parameters, and the reverse.{others(data)}

All that trains in a run shares one learning rate, but for the rows marked so in section 3. Added
rows alone want a larger one than adapters do, so some of what separates methods elsewhere is what
their rate makes of the rows.

Loss is in nats an image token on {budget["held_out"] // 2} held-out pictures; ± is the standard
deviation over seeds. Learning rates were chosen on one seed, {data["tuning"]["seed"]}, which is not
among those reported, by the loss on {budget["held_out"] // 2} other held-out pictures; runs of
another rank, start, base or number of pictures take the rate of their kind:

{tuning_section(data)}

Set aside before the runs were made: {budget["core_hours"]} hours of a core;
{budget["core_hours_later"]} more when the first seed, which is one of those reported, had shown
that section 3 needs two learning rates (its runs at one rate are in the last table, as
`shared-rate-`). Taken: {taken:.1f} hours, beside other work on the machine:
{"kept" if taken <= set_aside else "exceeded"}. {versions}; processes of {data["threads"]}
thread(s).
"""


def others(data: Results) -> str:
    """What the heading says of emoji and of a pretrained base, where there are such runs."""
    budget, said = data["budget"], ""
    if EMOJI[0] in data["runs"]:
        size, seeds = budget["emoji_size"], len(data["runs"][EMOJI[0]]["seeds"])
        said += (
            f"\n\nAlso Twitter's emoji with their names as captions, {size}x{size} in colour, as "
            f"{(size // 4) ** 2} codes of {budget['emoji_codes']}, on {seeds} of the seeds; "
            "learning rates are those of digits. No classifier reads them, and none are drawn here."
        )
    if names := present(data, REAL):
        runs = [data["runs"][name] for name in names]
        rates = "; ".join(
            f"{described(name)}: {run['settings']['lr']:g}"
            for name, run in zip(names, runs, strict=True)
        )
        settings, real = runs[0]["settings"], data["real"]
        said += (
            f"\n\nAlso a pretrained base, {real['name']} ([how it was made](../text_to_image.md)): "
            f"{real['layers']} layers, H {real['hidden_size']}, {real['experts']} experts, "
            f"{real['top_k']} chosen. {len(runs[0]['seeds'])} seeds of pictures, adapters and "
            f"order, on the one base; {settings['steps']} steps of {budget['real_batch']}, "
            f"{budget['real_pictures']} pictures reported: too little to learn to draw, enough to "
            f"see what text costs. Learning rates not tuned: {rates}. In bfloat16, full "
            "fine-tuning in float32."
        )
    return said


# --- 1 and 2: text, and the budget


def text_section(data: Results) -> str:
    parts = [
        "## 1. Is text kept?",
        "Bits are compared before and after training, of the same (patched) model. Patching itself "
        "rounds in another order: the last column. Learning rates were chosen for the loss on "
        "images alone and no text is mixed in, so the rows that change text could change it less "
        "at lower rates.",
    ]
    head = [
        "what trains", "seeds", "text loss unpatched", "before", "after", "change",
        "text logits changed", "median difference to unpatched",
    ]  # fmt: skip
    for title, names in BASES.items():
        if rows := [text_row(data, name) for name in present(data, names)]:
            parts += [f"**{title}**", table(head, rows)]
    return "\n\n".join([*parts, text_verdict(data)])


def text_row(data: Results, name: str) -> list[str]:
    def text(key: str) -> np.ndarray:
        return values(data, name, lambda result: result["text"][key])

    before, after = text("nll_before_training"), text("nll_after_training")
    changed = text("logits_changed_by_training")
    return [
        described(name), str(len(before)), mean_and_spread(text("nll_unpatched")),
        mean_and_spread(before), mean_and_spread(after), mean_and_spread(after - before),
        f"{changed.mean():,.0f}" if changed.any() else "0",
        f"{text('median_logit_difference_to_unpatched').mean():.1g}"
        if data["runs"][name]["settings"]["method"] not in CHANGES_TEXT else "",
    ]  # fmt: skip


def text_verdict(data: Results) -> str:
    masked = [
        result["text"]
        for name, run in data["runs"].items() if run["settings"]["method"] not in CHANGES_TEXT
        for result in run["seeds"].values()
    ]  # fmt: skip
    tokens = sorted({text["held_out_tokens"] for text in masked})
    changed = sum(text["logits_changed_by_training"] for text in masked)
    claim = "training on image tokens alone leaves every text logit its bits"
    found = f"{len(masked)} runs, each on {' or '.join(f'{n:,}' for n in tokens)} text tokens"
    return f"{FAILS if changed else HOLDS} {claim} ({found}; {changed:,} logits changed)."


def budget_section(data: Results) -> str:
    names = present(data, C1)
    head = [
        "what trains", "parameters", "share", "image loss", "less the first row's (95 %)",
        "read as their caption, %", "distance to each other", "to the nearest training picture",
    ]  # fmt: skip
    rows = [sample_row(data, name, names[0]) for name in names]
    parts = [
        "## 2. Is the budget small?",
        table(head, [*rows, real_row(data, names)]),
        "Ten captions, so 10 % are read right by chance; noise is far from other pictures too, so "
        "the distances mean nothing where the pictures are not read.",
    ]
    if ranks := present(data, RANKS):
        head = ["what trains", "parameters", "image loss", "less r 16's (95 %)"]
        rows = [loss_row(data, name, "plora") for name in ranks if "plora" in ranks]
        parts += ["All ranks at the learning rate of r 16:", table(head, rows)]
        parts.append("![loss against parameters](redundancy-parameters.png)")
    parts += verdicts(data, [
        ("own-rate-plora", "rows", "adapters add to what added rows alone learn (at the same rate "
         "of the rows)"),
        ("plora", "plora-attention", "adapters of the experts add to those of attention"),
        ("plora", "full", "masked LoRA reaches a lower image loss than full fine-tuning"),
        ("plora", "all-tokens", "masked LoRA reaches a lower image loss than LoRA on all tokens"),
        ("own-rate-plora", "plora",
         "masked LoRA does better where added rows have a learning rate of their own"),
    ])  # fmt: skip
    head = ["what trains", "parameters", "image loss", "less the first row's (95 %)"]
    for title, names in list(BASES.items())[1:]:
        if names := present(data, names):
            rows = [loss_row(data, name, names[0]) for name in names]
            parts += [f"**{title}**", table(head, rows)]
    parts.append(
        "With two seeds an interval is 13 standard errors wide to each side: read it as no answer."
        if present(data, REAL) else ""
    )  # fmt: skip
    return "\n\n".join(filter(None, parts))


def loss_row(data: Results, name: str, baseline: str) -> list[str]:
    return [
        described(name), parameters(data, name), mean_and_spread(values(data, name, test_nll)),
        difference(data, name, baseline),
    ]  # fmt: skip


def sample_row(data: Results, name: str, baseline: str) -> list[str]:
    def samples(get: Get) -> np.ndarray:
        return values(data, name, lambda result: get(result["samples"]))

    cells = loss_row(data, name, baseline)
    if "full" in data["runs"]:
        trained = lambda result: result["trained_parameters"]  # noqa: E731
        share = values(data, name, trained)[0] / values(data, "full", trained)[0]
        cells.insert(2, f"{100 * share:.1f} %")
    else:
        cells.insert(2, "")
    return [
        *cells,
        mean_and_spread(100 * samples(lambda s: s["read_as_their_caption"]), 1),
        mean_and_spread(samples(lambda s: s["pairwise_distance"]["generated"]), 2),
        mean_and_spread(samples(lambda s: s["nearest_training_distance"]["generated"]), 2),
    ]


def real_row(data: Results, names: Sequence[str]) -> list[str]:
    """Held-out pictures in the place of drawn ones."""
    get = [
        lambda s: 100 * s["classifier_held_out_accuracy"]["tokenized"],
        lambda s: s["pairwise_distance"]["held_out_real"],
        lambda s: s["nearest_training_distance"]["held_out_real"],
    ]
    cells = [
        mean_and_spread(values(data, names[0], lambda r, g=g: g(r["samples"])), digits)
        for g, digits in zip(get, (1, 2, 2), strict=True)
    ]
    return ["real pictures, held out", "", "", "", "", *cells]


# --- 3: the source


def source_section(data: Results) -> str:
    names = present(data, SOURCE)
    if SOURCE[0] not in names:
        return ""
    head = [
        "model", "parameters", "of the adapters a token meets", "text loss", "image loss",
        "less the dense parent's (95 %)",
    ]  # fmt: skip
    parts = [
        "## 3. Is redundancy of experts the source?",
        "At equal trained parameters, data and steps: the same dense parent, and Mixtures of "
        "Experts made of it, experts alone adapted. Equal in all, not at a token: of K experts in "
        "E a token meets K/E of the adapters. The Mixtures of Experts differ in their text too, "
        "and alone were healed. Added rows learn at a rate of their own in these two tables, the "
        "best that was tried for rows alone.",
        table(head, [source_row(data, name) for name in names]),
        *verdicts(data, [
            *((name, "source-dense", f"a Mixture of Experts ({described(name)}) reaches a lower "
               "image loss than its dense parent") for name in ("source-8x6", "source-16x4")),
            ("source-dense", "source-copy", "on the dense parent, low-rank updates do better than "
             "a feed-forward network for image tokens of as many parameters"),
        ]),
    ]  # fmt: skip
    if len(names := present(data, OWN_RATE)) == len(OWN_RATE):
        head = ["what trains", "parameters", "image loss", "less the first row's (95 %)"]
        parts += [
            "On the OLMoE, what the authors argue against at as many trained parameters; in the "
            "last row attention's adapters too:",
            table(head, [loss_row(data, name, names[0]) for name in names]),
            *verdicts(data, [
                ("own-rate-experts", "rows", "low-rank updates of the experts add to what added "
                 "rows alone learn"),
                ("own-rate-plora", "own-rate-experts", "attention's adapters add to the experts'"),
                *(("own-rate-experts", name, "masked LoRA on the experts does better than "
                   f"{described(name)}") for name in ("own-rate-copy", "own-rate-added-experts")),
            ]),
        ]  # fmt: skip
    layers = layer_part(data)
    return "\n\n".join([*parts, *layers, *source_verdict(data, layers)])


def source_row(data: Results, name: str) -> list[str]:
    settings = data["runs"][name]["settings"]
    experts, top_k = map(int, settings["base"].split("x"))
    share = 1.0 if settings["method"] == "copy" else top_k / experts
    return [
        described(name), parameters(data, name), f"{100 * share:.0f} %",
        mean_and_spread(values(data, name, lambda r: r["text"]["nll_unpatched"])),
        mean_and_spread(values(data, name, test_nll)), difference(data, name, "source-dense"),
    ]  # fmt: skip


def source_verdict(data: Results, layers: Sequence[str]) -> list[str]:
    """One line for the whole question, from the tests above."""
    needed = {
        "Mixtures of Experts reach a lower loss than their dense parent": [
            ("source-8x6", "source-dense"), ("source-16x4", "source-dense"),
        ],
        "updates of the experts add to added rows": [("own-rate-experts", "rows")],
        "they do better than a network of its own": [("own-rate-experts", "own-rate-copy")],
        "and than added experts": [("own-rate-experts", "own-rate-added-experts")],
    }  # fmt: skip
    if any(
        name not in data["runs"] for pairs in needed.values() for pair in pairs for name in pair
    ):
        return []
    found = {
        claim: [outcome(*interval(paired(data, *pair))[1:]) for pair in pairs]
        for claim, pairs in needed.items()
    }
    if layers:
        claim = "layers whose experts are more alike gain more"
        found[claim] = [next(o for o in (HOLDS, FAILS, UNDECIDED) if layers[-1].startswith(o))]
    every = [each for outcomes in found.values() for each in outcomes]
    says = HOLDS if set(every) == {HOLDS} else FAILS if FAILS in every else UNDECIDED
    answers = {HOLDS: "yes", FAILS: "no, the reverse", UNDECIDED: "not shown"}
    listed = "; ".join(
        f"{claim}: {', '.join(dict.fromkeys(answers[each] for each in outcomes))}"
        for claim, outcomes in found.items()
    )
    return [f"{says} redundancy of the experts is what makes room for the modality ({listed})."]


def layer_part(data: Results) -> list[str]:
    """Does a layer learn more where its experts are more alike? The verdict comes last."""
    layers = sorted(name for name in data["runs"] if name.startswith("layer-"))
    if len(layers) < 2 or "plora" not in data["runs"]:
        return []
    indices = [int(name.removeprefix("layer-")) for name in layers]
    alike = {
        modality: np.array([
            ExpertRedundancy.from_dict(result["look_before"]["redundancy"][modality])
            .mean()[indices].tolist()
            for _, result in sorted(data["runs"]["plora"]["seeds"].items(), key=lambda x: int(x[0]))
        ])
        for modality in ("text", "image")
    }  # fmt: skip
    losses = np.array([values(data, name, test_nll) for name in layers]).T
    head = ["layer", "similarity on text", "on image rows", "image loss, this layer adapted"]
    rows = [
        [str(layer), *(mean_and_spread(alike[modality][:, i]) for modality in alike),
         mean_and_spread(losses[:, i])]
        for i, layer in enumerate(indices)
    ]  # fmt: skip
    between, p = joint_rank_correlation(alike["text"], -losses)
    within, p_within = residual_correlation(alike["text"], -losses)
    says = UNDECIDED if p_within >= 0.05 else HOLDS if within > 0 else FAILS
    return [
        "One layer's experts adapted at a time, beside how alike they were before (CKA; image rows "
        "as they are before training):",
        table(head, rows),
        f"Between layers, rank correlation of similarity on text with low loss {between:+.2f} in "
        f"the mean of seeds; of all orders of the layers, the same in every seed, {100 * p:.0f} % "
        "give as much. Depth goes with both, so this says little.",
        f"{says} where the experts of a layer are more alike than they are in other seeds, "
        f"adapting it gains more (correlation of what is left after means of layers and seeds "
        f"{within:+.2f}, p {p_within:.2g} by permutation within seeds).",
    ]


def joint_rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(seeds, layers) each: mean Spearman correlation, and the share of permutations of layers,
    common to the seeds, that have as high a one."""

    def mean(order: Sequence[int]) -> float:
        pairs = zip(x, y[:, list(order)], strict=True)
        return float(np.mean([stats.spearmanr(a, b).statistic for a, b in pairs]))

    layers = range(x.shape[1])
    found = mean(layers)
    every = [mean(order) for order in itertools.permutations(layers)]
    return found, float(np.mean([each >= found - 1e-12 for each in every]))


def residual_correlation(
    x: np.ndarray, y: np.ndarray, permutations: int = 9999
) -> tuple[float, float]:
    """(seeds, layers) each: Pearson's correlation without the means of layers and seeds, and its
    two-sided p by permutations of the layers within seeds."""

    def residuals(z: np.ndarray) -> np.ndarray:
        return z - z.mean(0) - z.mean(1, keepdims=True) + z.mean()

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        scale = math.sqrt(float((a**2).sum() * (b**2).sum()))
        return float((a * b).sum()) / scale if scale > 1e-12 else 0.0

    x, y = residuals(x), residuals(y)
    found, rng = correlation(x, y), np.random.default_rng(0)
    drawn = [abs(correlation(x, rng.permuted(y, axis=1))) for _ in range(permutations)]
    return found, (1 + sum(each >= abs(found) - 1e-12 for each in drawn)) / (1 + permutations)


# --- 4: starts


def start_section(data: Results) -> str:
    parts = [
        "## 4. Does a Gromov-Wasserstein start help?",
        f"Steps until the mean of the last {WINDOW} training losses is at most "
        f"{FIXED_LOSS['digits']} (emoji: {FIXED_LOSS['emoji']}); a failure never is, or diverges. "
        'The package\'s defaults are "normal" rows and "zero" adapters, and every start learns at '
        "the rate that was tuned for these: it is theirs that is favoured. Gradient norms are "
        "those before clipping to 1.",
    ]
    helped = []
    for title, names in STARTS.items():
        names = present(data, names)
        tried = [name for name in names if GW in name]
        controls = [name for name in names if GW not in name]
        if not tried or not controls:
            continue
        parts += [f"**{title}**", table(
            ["start", "steps", "less the first row's (95 %)", "failures", "image loss",
             "less the first row's (95 %)", "largest gradient norm", "ratio (95 %)"],
            [start_row(data, name, names[0]) for name in names],
        )]  # fmt: skip
        lines = [start_verdict(data, name, controls, title) for name in tried]
        helped += [name for name in tried if beaten(data, name, controls)[:2] != (False, False)]
        parts += lines
    if len(parts) < 3:
        return ""
    parts.append(
        "A start beats all of its controls in loss or in steps, see above."
        if helped
        else "No such start beats all of its controls in loss or in steps: the demo does without."
    )
    return "\n\n".join(parts)


def steps_of(data: Results, name: str) -> Get:
    fixed = FIXED_LOSS[data["runs"][name]["settings"]["data"]]
    return lambda result: steps_to_fixed_loss(result, fixed)


def log_gradient(result: Results) -> float:
    return math.log(result["largest_gradient_norm"])


def start_row(data: Results, name: str, baseline: str) -> list[str]:
    steps = values(data, name, steps_of(data, name))
    cells = [
        start_label(data, name), mean_and_spread(steps, 0), "", str(int(np.isnan(steps).sum())),
        mean_and_spread(values(data, name, test_nll)), difference(data, name, baseline),
        mean_and_spread(values(data, name, lambda r: r["largest_gradient_norm"]), 1), "",
    ]  # fmt: skip
    if name != baseline:
        slower = paired(data, name, baseline, steps_of(data, name))
        cells[2] = mean_and_interval(slower[np.isfinite(slower)], 0) if len(slower) else ""
        ratio = np.exp(interval(paired(data, name, baseline, log_gradient)))
        cells[7] = f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"
    return cells


def outcomes_of(data: Results, name: str, controls: Sequence[str]) -> dict[str, list[str]]:
    """By measure, that of each control: test loss, steps, largest gradient."""
    measures = {
        "loss": test_nll, "steps": steps_of(data, name), "largest gradient": log_gradient,
    }  # fmt: skip
    return {
        what: [outcome(*interval(paired(data, name, control, get))[1:]) for control in controls]
        for what, get in measures.items()
    }


def beaten(data: Results, name: str, controls: Sequence[str]) -> tuple[bool, ...]:
    """Whether all controls are, by measure."""
    return tuple(set(each) == {HOLDS} for each in outcomes_of(data, name, controls).values())


def start_verdict(data: Results, name: str, controls: Sequence[str], title: str) -> str:
    """Holds where every control is beaten in the loss, in the steps, or in the gradient."""
    found = outcomes_of(data, name, controls)
    if any(beaten(data, name, controls)):
        says = HOLDS
    else:
        says = FAILS if FAILS in found["loss"] else UNDECIDED
    counts = "; ".join(
        f"{what}: better than {outcomes.count(HOLDS)} of {len(controls)}, worse than "
        f"{outcomes.count(FAILS)}"
        for what, outcomes in found.items()
    )
    label, where = start_label(data, name), title.lower()
    return f"{says} the start {label} beats all of its controls in something ({where}; {counts})."


def start_label(data: Results, name: str) -> str:
    settings = data["runs"][name]["settings"]
    if name == "plora":
        return "normal rows, zero adapters"
    label = settings["lora_init"] if settings["lora_init"] != "zero" else settings["init"]
    if settings["solver"] != "semirelaxed":
        label += f", {settings['solver']}"
    if settings["feature_metric"] != "euclidean":
        label += f", {settings['feature_metric']} for patches"
    if settings["row_metric"] != "cosine":
        label += f", {settings['row_metric']} for rows"
    if settings["init_where"] != "both":
        label += f", {settings['init_where']} alone"
    return label.replace("_", "-")


# --- 5: routing


def routing_section(data: Results) -> str:
    if "plora" not in data["runs"]:
        return ""
    looks = {
        when: [result[f"look_{when}"] for result in data["runs"]["plora"]["seeds"].values()]
        for when in ("before", "after")
    }
    head = [
        "", "divergence, bits", "text-only experts", "image-only", "agnostic", "unused",
        "similarity on text", "on image rows",
    ]  # fmt: skip
    change = {
        what: get(looks["after"]) - get(looks["before"])
        for what, get in (
            ("divergence", divergence),
            ("similarity", lambda several: similarity(several, "image")),
        )
    }
    first = RoutingStatistics.from_dict(looks["after"][0]["routing"])
    return "\n\n".join([
        "## 5. Routing and redundancy before and after",
        "Masked LoRA on experts and attention; before training added rows are random, so what "
        "changes is the rows and all that comes of them, not the experts alone. Of "
        f"{int(first.exists().sum())} experts, one is of a modality alone where it has 90 % of the "
        "two loads, and unused where each gives it less than a tenth of an even share. Similarity "
        "is debiased linear CKA of two experts' outputs on the same rows; on text it stays.",
        table(head, [routing_row(when, several) for when, several in looks.items()]),
        verdict_on(-change["divergence"], "the loads of text and images grow apart with training",
                   "mean divergence of layers before less after, bits"),
        verdict_on(change["similarity"],
                   "outputs of experts on image rows become less alike with training", "CKA"),
        "Which experts, seed by seed and layer by layer, is in the JSON; of the first seed, after:",
        kinds_table(first),
        *(f"![{what}, first seed](redundancy-{file}.png)" for what, file in (
            ("loads before training", "routing-before"),
            ("loads after training", "routing-after"),
            ("specialisation before training", "specialisation-before"),
            ("specialisation after training", "specialisation-after"),
            ("divergence by layer", "divergence"),
            ("similarity of experts on image rows, and its least and most alike pair",
             "similarity"),
        )),
    ])  # fmt: skip


def routing_row(when: str, looks: Sequence[Results]) -> list[str]:
    statistics = [RoutingStatistics.from_dict(look["routing"]) for look in looks]
    kinds = [each.expert_kinds("text", "image") for each in statistics]
    return [
        when, mean_and_spread(divergence(looks)),
        *(mean_and_spread(np.array([float(getattr(k, kind).sum()) for k in kinds]), 1)
          for kind in ("only_first", "only_second", "agnostic", "unused")),
        *(mean_and_spread(similarity(looks, modality)) for modality in ("text", "image")),
    ]  # fmt: skip


def divergence(looks: Sequence[Results]) -> np.ndarray:
    """Mean over layers, one number a seed."""
    statistics = [RoutingStatistics.from_dict(look["routing"]) for look in looks]
    return np.array([float(each.divergence("text", "image").mean()) for each in statistics])


def similarity(looks: Sequence[Results], modality: str) -> np.ndarray:
    """Mean of pairs of experts and of layers, one number a seed."""
    every = [ExpertRedundancy.from_dict(look["redundancy"][modality]).mean() for look in looks]
    return np.array([float(means.nanmean()) for means in every])


def kinds_table(statistics: RoutingStatistics) -> str:
    """Experts' numbers by layer: what serves one modality alone, and what serves neither."""
    unused = statistics.unused("text", "image")
    share = statistics.specialisation("text", "image").masked_fill(unused, torch.nan)
    kinds = (share <= 0.1, share >= 0.9, unused)
    rows = [
        [str(layer), *(", ".join(map(str, kind[layer].nonzero().flatten().tolist())) or "none"
                       for kind in kinds)]
        for layer in range(len(statistics.layers))
    ]  # fmt: skip
    return table(["layer", "text-only", "image-only", "unused"], rows)


# --- 6 and 7: samples, cost


def samples_section(data: Results) -> str:
    if "plora" not in data["runs"]:
        return ""
    galleries = [result["gallery"] for result in data["runs"]["plora"]["seeds"].values()]
    rows = []
    for guidance in galleries[0]["guidance"]:
        drawn = [gallery["guidance"][guidance] for gallery in galleries]
        each = len(drawn[0]["read"]) // len(galleries[0]["captions"])
        right = [np.mean([read == i // each for i, read in enumerate(d["read"])]) for d in drawn]
        pairs = [zip(d["codes"], d["nearest"], strict=True) for d in drawn]
        copies = [np.mean([codes == nearest for codes, nearest in pair]) for pair in pairs]
        rows.append([guidance, mean_and_spread(100 * np.array(right), 1),
                     mean_and_spread(100 * np.array(copies), 1)])  # fmt: skip
    return "\n\n".join([
        "## 6. Samples",
        table(["guidance", "read as their caption, %", "the same codes as a training picture, %"],
              rows),
        f"{len(drawn[0]['read'])} pictures a seed and guidance, of masked LoRA on experts and "
        "attention. No picture was learnt twice, so that there are no copies shows little. Those "
        "of the first seed, beside the nearest training pictures:",
        "![samples](redundancy-samples.png)",
    ])  # fmt: skip


def cost_section(data: Results) -> str:
    if not data["cost"]:
        return ""
    return "\n\n".join([
        "## 7. What a training step costs",
        f"On the small OLMoE, with AdamW, each method in a process of its own, in turn, "
        f"{len(data['cost']['plora'])} rounds, "
        f"{data['threads']} thread(s) of {data['machine']['processor']}; ratios round by round; "
        "peak memory above the loaded model's. Larger models and kernels: [cpu.md](cpu.md).",
        table(
            ["method", "parameters", "tokens/s", "masked LoRA is faster, x", "peak MiB"],
            cost_rows(data, METHODS, "plora"),
        ),
    ])  # fmt: skip


def runs_section(data: Results) -> str:
    rows = [
        [name, seed, f"{result['lr']:g}", f"{result['trained_parameters']:,}",
         f"{test_nll(result):.3f}",
         f"{result['text']['nll_after_training'] - result['text']['nll_before_training']:+.4f}",
         f"{result['seconds']:.0f}"]
        for name, run in data["runs"].items()
        for seed, result in sorted(run["seeds"].items(), key=lambda item: int(item[0]))
    ]  # fmt: skip
    return "\n\n".join([
        "## Every run",
        table(
            ["run", "seed", "lr", "parameters", "image loss", "change of text loss", "seconds"],
            rows,
        ),
    ])  # fmt: skip


def page(data: Results) -> str:
    found: list[Callable[[Results], str]] = [
        text_section, budget_section, source_section, start_section, routing_section,
        samples_section, cost_section, runs_section,
    ]  # fmt: skip
    sections = [section(data) for section in found]
    parts = (heading(data), in_short(sections), *sections)
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def write_page(file: Path, folder: Path) -> None:
    """The page and its pictures, from the JSON alone."""
    data = json.loads(file.read_text())
    draw_pictures(data, folder)
    write_text(folder / f"{NAME}.md", page(data))
