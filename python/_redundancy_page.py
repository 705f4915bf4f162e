"""The page of redundancy.py: every figure and every verdict is computed from the JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _runs import save_figure, write_text
from matplotlib.figure import Figure
from scipy import stats

from moe_kernels.analysis import (
    ExpertRedundancy,
    RoutingStatistics,
    plot_divergence,
    plot_expert_load,
    plot_redundancy,
)
from moe_kernels.imaging import PatchTokenizer

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
# Titles, runs, and whether each Gromov-Wasserstein start is held against every control.
STARTS = (
    ("Added rows", (
        "plora", "init-gaussian", "init-mean", "init-permuted", "init-gromov_wasserstein",
    )),
    ("Added rows, variants of Gromov-Wasserstein", (
        "plora", *(f"init-gromov_wasserstein-{name}"
                   for name in ("cosine", "euclidean", "exact", "embedding", "head")),
    )),
    ("Added rows, 500 pictures to learn from",
     ("few-normal", "few-gaussian", "few-permuted", "few-gromov_wasserstein")),
    ("Added rows, emoji", ("emoji-plora", "emoji-permuted", "emoji-gromov_wasserstein")),
    ("Adapters", ("plora", "lora-permuted", "lora-gromov_wasserstein")),
)  # fmt: skip
METHODS = {
    "plora": "masked LoRA, experts and attention, r 16",
    "peft": "PEFT's LoRA on the same weights, on all tokens",
    "full": "full fine-tuning",
}
DESCRIBED = {
    "plora": "masked LoRA, experts and attention, r 16",
    "plora-attention": "masked LoRA, attention alone",
    "plora-experts": "masked LoRA, experts alone",
    "copy": "a feed-forward copy for image tokens",
    "added-experts": "experts added for image tokens (MoExtend)",
    "rows": "added rows alone",
    "all-tokens": "the same LoRA on all tokens",
    "full": "full fine-tuning",
    "full-slow": "full fine-tuning at a fifth of that rate",
    "source-dense": "the dense parent (2 experts, both chosen), r 16",
    "source-8x6": "8 experts, 6 chosen, r 11",
    "source-16x4": "16 experts, 4 chosen, r 8",
    "source-copy": "the dense parent with a feed-forward copy",
}
OUTCOMES = ("**Holds here:**", "**Does not hold here:**", "**Undecided:**")
Results = dict[str, Any]


# --- figures out of the JSON


def values(data: Results, name: str, get: Callable[[Results], float]) -> np.ndarray:
    """One number for each seed, in the order of the seeds."""
    seeds = data["runs"][name]["seeds"]
    return np.array([get(seeds[seed]) for seed in sorted(seeds, key=int)], dtype=float)


def test_nll(result: Results) -> float:
    return result["test_nll"]


def running_mean(loss: Sequence[float]) -> np.ndarray:
    return np.convolve(loss, np.ones(WINDOW) / WINDOW, mode="valid")


def steps_to_fixed_loss(result: Results, fixed: float = FIXED_LOSS["digits"]) -> float:
    """NaN where it was not reached."""
    reached = np.flatnonzero(running_mean(result["loss"]) <= fixed)
    return float(reached[0] + WINDOW) if len(reached) else math.nan


def mean_and_spread(numbers: np.ndarray, digits: int = 3) -> str:
    """Mean and standard deviation over the seeds that have a number."""
    there = numbers[np.isfinite(numbers)]
    if not len(there):
        return "never"
    spread = f" ± {there.std(ddof=1):.{digits}f}" if len(there) > 1 else ""
    missing = f" ({len(there)} of {len(numbers)} seeds)" if len(there) < len(numbers) else ""
    return f"{there.mean():.{digits}f}{spread}{missing}"


def interval(numbers: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t; infinite with one seed."""
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return mean, -math.inf, math.inf
    half = stats.t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers))
    return mean, mean - half, mean + half


def paired(
    data: Results, name: str, baseline: str, get: Callable[[Results], float] = test_nll
) -> np.ndarray:
    """A figure less the baseline's, on the seeds that both have."""
    first, second = (data["runs"][n]["seeds"] for n in (name, baseline))
    seeds = sorted(first.keys() & second.keys(), key=int)
    return np.array([get(first[seed]) - get(second[seed]) for seed in seeds])


def difference(data: Results, name: str, baseline: str) -> str:
    """How far test loss is from the baseline's, seed by seed."""
    mean, low, high = interval(paired(data, name, baseline))
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def verdict(
    data: Results, name: str, baseline: str, claim: str,
    get: Callable[[Results], float] = test_nll, of: str = "test loss",
) -> str:  # fmt: skip
    """claim: what holds if ``name`` has the lower loss"""
    mean, low, high = interval(paired(data, name, baseline, get))
    found = f"difference in {of} {mean:+.3f} nats a token, 95 % interval {low:+.3f} to {high:+.3f}"
    outcome = OUTCOMES[0] if high < 0 else OUTCOMES[1] if low > 0 else OUTCOMES[2]
    return f"{outcome} {claim} ({found})."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def described(name: str) -> str:
    return DESCRIBED[re.sub("^(emoji|real|own-rate)-", "", name)]


def present(data: Results, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in data["runs"]]


# --- sections


def heading(data: Results) -> str:
    budget, seeds = data["budget"], len(next(iter(data["runs"].values()))["seeds"])
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return f"""# Do the claims hold? The evidence for expert redundancy

Written by `make results` from `redundancy.json`; nothing here is typed by hand, verdicts included:
a claim holds, or does not, where the 95 % interval of the paired difference over seeds (Student's
t) leaves out zero: it, or its reverse. The claims are those of arXiv 2503.22517
([methods.md](../methods.md), A). Each interval is of its own comparison: of many, one in
twenty leaves out zero by chance.

Base: an OLMoE of {budget["text"]["layers"]} layers, H {budget["text"]["hidden_size"]},
{budget["text"]["experts"]} experts of {budget["text"]["intermediate_size"]},
{budget["text"]["experts_per_token"]} chosen, that has learnt Python's own documentation for
{budget["text"]["text_steps"]} steps; or a dense Llama of the same size that was split and healed
for {budget["heal_steps"]} steps. It learns {budget["images"]:,} MNIST digits at most, as
7x7 codes of {budget["digit_codes"]}, for {budget["steps"]} steps of {budget["batch"]}.
{seeds} seeds of everything: base, pictures held out, adapters, order. A toy: what holds here need
not hold for seven billion parameters, and the reverse.{_others(data)}

All that trains in a run shares one learning rate, but for section 3. Added rows alone want a larger
one than adapters do, so some of what separates methods is what their rate makes of the rows.

Loss is in nats an image token on {budget["held_out"] // 2} held-out pictures; ± is the standard
deviation over seeds. Learning rates were chosen on seed {data["tuning"]["seed"]}, which is not
among those reported, by the loss on {budget["held_out"] // 2} other held-out pictures:

{tuning_table(data)}

Set aside before the runs were made: {budget["core_hours"]} hours of a core, and half an hour
more when the first seed had shown that section 3 needs two learning rates. Taken:
{data["seconds"] / 3600:.1f} hours of processes with one thread, beside other work; {versions}."""


def tuning_table(data: Results) -> str:
    tuned = data["tuning"]["choice_nll"]
    rates = list(dict.fromkeys(rate for losses in tuned.values() for rate in losses))
    rows = [
        [trains, *(f"**{loss:.3f}**" if loss == min(losses.values()) else f"{loss:.3f}"
                   for loss in losses.values())]
        for trains, losses in tuned.items()
    ]  # fmt: skip
    return table(["what trains", *(f"lr {rate}" for rate in rates)], rows)


def _others(data: Results) -> str:
    """What the heading says of emoji and of a pretrained base, where there are such runs."""
    budget, said = data["budget"], ""
    if EMOJI[0] in data["runs"]:
        size = budget["emoji_size"]
        said += (
            f"\n\nAlso Twitter's emoji with their names as captions, {size}x{size} in colour, as "
            f"{(size // 4) ** 2} codes of {budget['emoji_codes']}, on "
            f"{len(data['runs'][EMOJI[0]]['seeds'])} of the seeds; learning rates are "
            "those of digits."
        )
    if names := present(data, REAL):
        runs = [data["runs"][name] for name in names]
        rates = ", ".join(
            f"{described(name)} {run['settings']['lr']:g}"
            for name, run in zip(names, runs, strict=True)
        )
        settings, real = runs[0]["settings"], data["real"]
        said += (
            "\n\nAlso a pretrained base ([how it was made](../../python/README.md)), "
            f"{real['name']} ({real['layers']} layers, H {real['hidden_size']}, {real['experts']} "
            f"experts, {real['top_k']} chosen), "
            f"{len(runs[0]['seeds'])} seeds of pictures, adapters and order, on the one base; "
            f"{settings['steps']} steps of {budget['real_batch']}, {budget['real_pictures']} "
            "pictures reported: too little to learn to draw, enough to see what text costs. "
            f"Learning rates not tuned: {rates}. In bfloat16, full fine-tuning in float32."
        )
    return said


def text_section(data: Results) -> str:
    parts = ["## 1. Is text kept?"]
    for title, names in BASES.items():
        if rows := [text_row(data, name) for name in present(data, names)]:
            head = ["what trains", "text loss before", "after", "change", "text logits changed"]
            parts += [f"**{title}**", table(head, rows)]
    return "\n\n".join([*parts, text_verdict(data)])


def text_row(data: Results, name: str) -> list[str]:
    before, after, changed = (
        values(data, name, lambda result: result["text"][key])  # noqa: B023
        for key in (
            "nll_before_training", "nll_after_training", "logits_changed_by_training",
        )
    )  # fmt: skip
    return [
        described(name), mean_and_spread(before), mean_and_spread(after),
        mean_and_spread(after - before), f"{changed.mean():,.0f}" if changed.any() else "0",
    ]  # fmt: skip


def text_verdict(data: Results) -> str:
    masked = [
        result["text"]
        for name, run in data["runs"].items() if run["settings"]["method"] not in CHANGES_TEXT
        for result in run["seeds"].values()
    ]  # fmt: skip
    tokens = sum(text["held_out_tokens"] for text in masked)
    changed = sum(text["logits_changed_by_training"] for text in masked)
    claim = "training on image tokens alone leaves every text logit its bits"
    found = f"{len(masked)} runs, {tokens:,} text tokens, {changed:,} logits changed"
    return f"{OUTCOMES[1] if changed else OUTCOMES[0]} {claim} ({found})."


def budget_section(data: Results) -> str:
    rows = []
    for name in present(data, C1):
        samples = lambda key: values(data, name, lambda r: key(r["samples"]))  # noqa: B023, E731
        rows.append([
            described(name), parameters(data, name),
            mean_and_spread(values(data, name, test_nll)),
            mean_and_spread(100 * samples(lambda s: s["read_as_their_caption"]), 1),
            mean_and_spread(samples(lambda s: s["distinct"] / s["count"]), 2),
            mean_and_spread(samples(lambda s: s["nearest_training_distance"]["generated"]), 2),
        ])  # fmt: skip
    parts = [
        "## 2. Is the budget small?",
        table(
            ["what trains", "parameters", "image loss", "read as their caption, %", "distinct",
             "distance to the nearest training picture"],
            rows,
        ),
    ]  # fmt: skip
    if any(name.startswith("rank-") for name in data["runs"]):
        parts.append("![loss against parameters](redundancy-parameters.png)")
    if len(present(data, ("plora", "rows"))) == 2:
        parts.append(verdict(data, "plora", "rows", "adapters add to what added rows alone learn"))
    if len(present(data, ("plora", "own-rate-plora"))) == 2:
        parts.append(verdict(
            data, "own-rate-plora", "plora",
            "masked LoRA does better where added rows have a learning rate of their own",
        ))  # fmt: skip
    for title, names in list(BASES.items())[1:]:
        if names := present(data, names):
            rows = [
                [described(name), parameters(data, name),
                 mean_and_spread(values(data, name, test_nll)), difference(data, name, names[0])]
                for name in names
            ]  # fmt: skip
            head = ["what trains", "parameters", "image loss", "less the first row's (95 %)"]
            parts += [f"**{title}**", table(head, rows)]
    return "\n\n".join(parts)


def parameters(data: Results, name: str) -> str:
    return f"{values(data, name, lambda result: result['trained_parameters'])[0]:,.0f}"


def source_section(data: Results) -> str:
    names = present(data, SOURCE)
    rows = [
        [
            DESCRIBED[name], f"{values(data, name, lambda r: r['trained_parameters'])[0]:,.0f}",
            mean_and_spread(values(data, name, lambda r: r["text"]["nll_unpatched"])),
            mean_and_spread(values(data, name, test_nll)),
            "" if name == "source-dense" else difference(data, name, "source-dense"),
        ]
        for name in names
    ]  # fmt: skip
    parts = [
        "## 3. Is redundancy of experts the source?",
        "At equal trained parameters, data and steps: the same dense parent, and Mixtures of "
        "Experts made of it. Experts alone are adapted. In this section, but for single layers, "
        "added rows learn at a rate of their own, the one that rows alone do best with.",
        table(
            ["model", "parameters", "text loss", "image loss", "less the dense parent's (95 %)"],
            rows,
        ),
    ]
    parts += [
        verdict(data, name, "source-dense",
                f"a Mixture of Experts ({DESCRIBED[name]}) learns pictures better than its dense "
                "parent")
        for name in names if "x" in name
    ]  # fmt: skip
    if "source-copy" in names:
        parts.append(verdict(
            data, "source-dense", "source-copy",
            "low-rank updates do better than a feed-forward copy for the modality",
        ))  # fmt: skip
    if len(names := present(data, OWN_RATE)) == len(OWN_RATE):
        rows = [
            [described(name), parameters(data, name),
             mean_and_spread(values(data, name, test_nll)), difference(data, name, names[0])]
            for name in names
        ]  # fmt: skip
        head = ["what trains", "parameters", "image loss", "less the first row's (95 %)"]
        parts += [
            "On the OLMoE, what the authors argue against at as many trained parameters; in the "
            "last row attention's adapters too:",
            table(head, rows),
        ]
        parts += [
            verdict(data, names[0], name,
                    f"masked LoRA on the experts does better than {described(name)}")
            for name in ("own-rate-copy", "own-rate-added-experts")
        ]  # fmt: skip
    if correlation := layer_correlation(data):
        parts.append(correlation)
    return "\n\n".join(parts)


def layer_correlation(data: Results) -> str:
    """Does adapting a layer gain more where its experts are more alike?"""
    layers = sorted(name for name in data["runs"] if name.startswith("layer-"))
    if not layers or "plora" not in data["runs"]:
        return ""
    indices = [int(name.removeprefix("layer-")) for name in layers]
    similarity = [
        ExpertRedundancy.from_dict(result["look_before"]["redundancy"]["text"]).mean()[indices]
        for _, result in sorted(data["runs"]["plora"]["seeds"].items(), key=lambda x: int(x[0]))
    ]
    gains = -np.array([values(data, name, test_nll) for name in layers]).T
    rank_correlations = [
        stats.spearmanr(means.numpy(), gain).statistic
        for means, gain in zip(similarity, gains, strict=True)
    ]
    mean, low, high = interval(np.array(rank_correlations))
    rows = [
        [str(indices[i]),
         mean_and_spread(np.array([float(means[i]) for means in similarity])),
         mean_and_spread(values(data, name, test_nll))]
        for i, name in enumerate(layers)
    ]  # fmt: skip
    claim = "adapting a layer gains more where its experts are more alike"
    outcome = OUTCOMES[0] if low > 0 else OUTCOMES[1] if high < 0 else OUTCOMES[2]
    return "\n\n".join([
        "One layer's experts adapted at a time, beside how alike they were before (CKA on text):",
        table(["layer", "similarity of its experts", "image loss, this layer adapted"], rows),
        f"{outcome} {claim} (rank correlation over the {len(layers)} layers of a seed {mean:+.2f}, "
        f"95 % interval {low:+.2f} to {high:+.2f}).",
    ])  # fmt: skip


def start_section(data: Results) -> str:
    parts = [
        "## 4. Does a Gromov-Wasserstein start help?",
        f"Steps until the mean of the last {WINDOW} training losses is at most "
        f"{FIXED_LOSS['digits']} (emoji: {FIXED_LOSS['emoji']}); failures are runs that never are. "
        f'"normal" and "zero" are the package\'s defaults.',
    ]
    for title, names in STARTS:
        if len(names := present(data, names)) > 1:
            rows = [start_row(data, name, names[0]) for name in names]
            parts += [f"**{title}**", table(
                ["start", "steps", "failures", "image loss", "less the first row's (95 %)",
                 "largest gradient norm"],
                rows,
            )]  # fmt: skip
            parts += [
                verdict(data, name, control, f"the start {start_label(data, name)} beats "
                                             f"{start_label(data, control)} ({title.lower()})")
                for name in names if "gromov_wasserstein" in name
                for control in names if "gromov_wasserstein" not in control
            ]  # fmt: skip
    return "\n\n".join(parts)


def start_row(data: Results, name: str, baseline: str) -> list[str]:
    fixed = FIXED_LOSS[data["runs"][name]["settings"]["data"]]
    steps = values(data, name, lambda result: steps_to_fixed_loss(result, fixed))
    return [
        start_label(data, name), mean_and_spread(steps, 0), str(int(np.isnan(steps).sum())),
        mean_and_spread(values(data, name, test_nll)),
        "" if name == baseline else difference(data, name, baseline),
        mean_and_spread(values(data, name, lambda r: r["largest_gradient_norm"]), 2),
    ]  # fmt: skip


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


def routing_section(data: Results) -> str:
    if "plora" not in data["runs"]:
        return ""
    rows = []
    for when in ("look_before", "look_after"):
        looks = [result[when] for result in data["runs"]["plora"]["seeds"].values()]
        statistics = [RoutingStatistics.from_dict(look["routing"]) for look in looks]
        kinds = [s.expert_kinds("text", "image") for s in statistics]
        divergences = [float(s.divergence("text", "image").mean()) for s in statistics]
        rows.append([
            when.removeprefix("look_"),
            mean_and_spread(np.array(divergences)),
            *(mean_and_spread(np.array([float(getattr(k, kind).sum()) for k in kinds]), 1)
              for kind in ("only_first", "only_second", "agnostic", "unused")),
            *(mean_and_spread(redundancy(looks, modality)) for modality in ("text", "image")),
        ])  # fmt: skip
    return "\n\n".join([
        "## 5. Routing and redundancy before and after",
        table(
            ["", "divergence, bits", "text-only experts", "image-only", "agnostic", "unused",
             "similarity on text", "on pictures"],
            rows,
        ),
        redundancy_verdict(data),
        "![routing after training](redundancy-routing.png)",
        "![divergence by layer](redundancy-divergence.png)",
        "![similarity of experts on image rows](redundancy-similarity.png)",
    ])  # fmt: skip


def redundancy_verdict(data: Results) -> str:
    before, after = (
        redundancy([result[when] for result in data["runs"]["plora"]["seeds"].values()], "image")
        for when in ("look_before", "look_after")
    )
    mean, low, high = interval(after - before)
    found = f"{mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    claim = "experts become less alike on image rows with training"
    outcome = OUTCOMES[0] if high < 0 else OUTCOMES[1] if low > 0 else OUTCOMES[2]
    return f"{outcome} {claim} (CKA {found})."


def redundancy(looks: Sequence[Results], modality: str) -> np.ndarray:
    """Mean similarity of two experts, one number a seed."""
    every = [ExpertRedundancy.from_dict(look["redundancy"][modality]).mean() for look in looks]
    return np.array([float(means.nanmean()) for means in every])


def samples_section(data: Results) -> str:
    if "plora" not in data["runs"]:
        return ""
    galleries = [result["gallery"] for result in data["runs"]["plora"]["seeds"].values()]
    rows = []
    for guidance in galleries[0]["guidance"]:
        drawn = [gallery["guidance"][guidance] for gallery in galleries]
        right = [np.mean([read == i // 2 for i, read in enumerate(d["read"])]) for d in drawn]
        pairs = [zip(d["codes"], d["nearest"], strict=True) for d in drawn]
        copies = [np.mean([codes == nearest for codes, nearest in pair]) for pair in pairs]
        rows.append([guidance, mean_and_spread(100 * np.array(right), 1),
                     mean_and_spread(100 * np.array(copies), 1)])  # fmt: skip
    return "\n\n".join([
        "## 6. Samples",
        table(["guidance", "read as their caption, %", "copies of a training picture, %"], rows),
        "Twenty pictures a seed and guidance; those of the first seed, beside the nearest training "
        "pictures:",
        "![samples](redundancy-samples.png)",
    ])  # fmt: skip


def cost_section(data: Results) -> str:
    if not data["cost"]:
        return ""
    rows = []
    first = None
    for method, rounds in data["cost"].items():
        speed, memory = (
            np.array([r[key] for r in rounds]) for key in ("tokens_per_second", "peak_bytes")
        )
        first = speed if first is None else first
        rows.append([
            METHODS[method], f"{rounds[0]['trained_parameters']:,}", mean_and_spread(speed, 0),
            mean_and_spread(first / speed, 2), mean_and_spread(memory / 2**20, 0),
        ])  # fmt: skip
    return "\n\n".join([
        "## 7. What a training step costs",
        f"Each in a process of its own, in turn, {len(first)} rounds; peak memory above the loaded "
        "model's.",
        table(["method", "parameters", "tokens/s", "masked LoRA is faster by", "MiB"], rows),
    ])  # fmt: skip


def runs_section(data: Results) -> str:
    rows = [
        [name, seed, f"{result['trained_parameters']:,}", f"{result['test_nll']:.3f}",
         f"{result['text']['nll_after_training'] - result['text']['nll_before_training']:+.4f}",
         f"{result['seconds']:.0f}"]
        for name, run in data["runs"].items()
        for seed, result in sorted(run["seeds"].items(), key=lambda item: int(item[0]))
    ]  # fmt: skip
    return "\n\n".join([
        "## Every run",
        table(["run", "seed", "parameters", "image loss", "change of text loss", "seconds"], rows),
    ])  # fmt: skip


# --- pictures


def plot_parameters(data: Results) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    ranks = sorted(
        [name for name in data["runs"] if name.startswith("rank-")] + present(data, ["plora"]),
        key=lambda name: values(data, name, lambda r: r["trained_parameters"])[0],
    )
    for names, label in (
        (ranks, "masked LoRA, r 4 to 128"), (present(data, ["rows"]), "added rows alone"),
        (present(data, ["copy"]), "feed-forward copy"), (present(data, ["full"]), "everything"),
    ):  # fmt: skip
        if not names:
            continue
        x = [values(data, name, lambda r: r["trained_parameters"])[0] for name in names]
        y = [values(data, name, test_nll) for name in names]
        spread = [numbers.std(ddof=1) if len(numbers) > 1 else 0 for numbers in y]
        panel.errorbar(
            x, [numbers.mean() for numbers in y], spread, fmt="o-", label=label, capsize=3
        )
    panel.set(xscale="log", xlabel="trained parameters", ylabel="image loss, nats a token")
    panel.legend()
    return figure


def plot_gallery(gallery: Results) -> Figure:
    """Captions downwards; real pictures, then at each guidance two drawn and the nearest real."""
    tokenizer = PatchTokenizer(torch.tensor(gallery["codebook"]), 4, (28, 28))
    captions, blocks = gallery["captions"], [("real, held out", gallery["real"])]
    for guidance, drawn in gallery["guidance"].items():
        blocks.append((f"guidance {guidance}", drawn["codes"]))
        blocks.append(("nearest of training", drawn["nearest"]))
    size = (2.4 + 1.15 * len(blocks), 0.62 * len(captions) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(captions), len(blocks), squeeze=False)
    for column, (heading, codes) in enumerate(blocks):
        pictures = tokenizer.decode(torch.tensor(codes))
        panels[0, column].set_title(heading, fontsize=8)
        for row in range(len(captions)):
            pair = torch.cat(list(pictures[2 * row : 2 * row + 2]), dim=1)
            panels[row, column].imshow(pair.numpy(), cmap="gray_r", vmin=0, vmax=1)
            panels[row, column].set(xticks=[], yticks=[])
    for row, caption in enumerate(captions):
        panels[row, 0].set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def draw_pictures(data: Results, folder: Path) -> None:
    if any(name.startswith("rank-") for name in data["runs"]):
        save_figure(plot_parameters(data), folder / "redundancy-parameters.png")
    if "plora" not in data["runs"]:
        return
    first = min(data["runs"]["plora"]["seeds"], key=int)
    result = data["runs"]["plora"]["seeds"][first]
    before, after = (
        RoutingStatistics.from_dict(result[when]["routing"])
        for when in ("look_before", "look_after")
    )
    save_figure(plot_expert_load(after), folder / "redundancy-routing.png")
    save_figure(
        plot_divergence({"before": before, "after": after}), folder / "redundancy-divergence.png"
    )
    similar = [
        ExpertRedundancy.from_dict(result[when]["redundancy"]["image"])
        for when in ("look_before", "look_after")
    ]
    save_figure(plot_redundancy(*similar), folder / "redundancy-similarity.png")
    save_figure(plot_gallery(result["gallery"]), folder / "redundancy-samples.png")


def in_short(sections: Sequence[str]) -> str:
    """All verdicts, in the order of the sections, by their outcome."""
    lines = [line for section in sections for line in section.split("\n")]
    parts = ["## In short"]
    for outcome in OUTCOMES:
        found = [line.removeprefix(f"{outcome} ") for line in lines if line.startswith(outcome)]
        if found:
            parts.append(f"{outcome}\n" + "".join(f"\n- {line}" for line in found))
    return "\n\n".join(parts)


def page(data: Results) -> str:
    sections = [
        section(data)
        for section in (
            text_section, budget_section, source_section, start_section, routing_section,
            samples_section, cost_section, runs_section,
        )
    ]  # fmt: skip
    parts = (heading(data), in_short(sections), *sections)
    return "\n\n".join(part for part in parts if part) + "\n"


def write_page(file: Path, folder: Path) -> None:
    """The page and its pictures, from the JSON alone."""
    data = json.loads(file.read_text())
    draw_pictures(data, folder)
    write_text(folder / f"{NAME}.md", page(data))
