"""The page of moextend.py: every figure and every verdict is computed from the JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from _moextend_runs import DRAWS
from _results_page import (
    FAILS,
    HOLDS,
    Results,
    difference,
    in_short,
    interval,
    mean_and_spread,
    paired,
    parameters,
    present,
    table,
    test_nll,
    tuning_section,
    values,
    verdict,
    verdict_on,
    verdicts,
)
from _runs import save_figure, write_text
from matplotlib.figure import Figure
from scipy import stats

from moe_kernels.extension import LayerScores, plot_layer_scores

NAME = "moextend"
METHODS = {
    "gated": "experts, gate by token",
    "sequence": "experts, gate by sequence",
    "published": "experts, no gate (as published)",
    "no-gate": "experts, no gate, our start",
    "lora": "masked LoRA",
    "lora-sequence": "masked LoRA by sequence",
    "lora-all-tokens": "the same LoRA on all tokens",
    "projector": "the projector goes on alone",
    "full": "full fine-tuning",
    "full-slow": "full fine-tuning, at a low rate",
}
CODE = {
    "code-gated": "experts, gated by the task's id",
    "code-published": "experts, no gate (as published)",
    "code-no-gate": "experts, no gate, our start",
    "code-lora": "masked LoRA",
    "code-lora-all-tokens": "the same LoRA on all tokens",
    "code-full": "full fine-tuning",
    "code-layers-random": "experts, gated, a random half of the layers",
}
RANDOM = tuple(f"layers-{draw}" for draw in DRAWS)
LAYERS = {
    "sequence": "top half by shift",
    "layers-interval": "every second",
    "layers-first-half": "first half",
    "layers-second-half": "second half",
    **{name: f"a random half ({name[-1]})" for name in RANDOM},
    "layers-all": "all (twice the parameters)",
}
CALIBRATIONS = {
    "sequence": "additive (published code)",
    "calibration-multiplicative": "multiplicative (paper)",
    "calibration-none": "none",
}
STARTS = {
    "sequence": "copy of the most selected",
    "published": "copy of the most selected after tuning (published; no gate)",
    "init-mean": "mean of the base's",
    "init-random": "random",
}
NUMBERS = {
    "sequence": "one in each of the top half",
    "two-experts": "two in each of the top half",
    "layers-all": "one in every layer",
}
COST = {
    "gated": "added experts, gated, every second layer",
    "published": "added experts, no gate, every second layer",
    "experts": "all experts and routers of these layers",
    "full": "full fine-tuning",
}


# --- figures out of the JSON


def accuracy(kind: str) -> Callable[[Results], float]:
    return lambda result: 100 * result["test"]["accuracy"][kind]


def words(result: Results) -> float:
    """Questions in words, without pictures: per cent right, over both kinds alike."""
    return 100 * float(np.mean(list(result["words"]["accuracy"].values())))


def forgotten(result: Results) -> float:
    return result["text"]["nll_after_training"] - result["text"]["nll_before_training"]


def changed_logits(result: Results) -> float:
    return result["text"]["logits_changed_by_training"]


def at_step_0(result: Results) -> float:
    return result["text_nll_at_step_0"] - result["text"]["nll_before_training"]


def plain(kind: str, figure: str) -> Callable[[Results], float]:
    """Of text without ids, "code" or "words"."""
    return lambda result: result["plain"][kind][figure]


def plain_forgotten(kind: str) -> Callable[[Results], float]:
    before, after = plain(kind, "nll_before"), plain(kind, "nll_after")
    return lambda result: after(result) - before(result)


def grounds(data: Results, get: Callable[[Results], float]) -> np.ndarray:
    return np.array([get(data["grounds"][seed]) for seed in sorted(data["grounds"], key=int)])


def words_lost(data: Results, name: str) -> np.ndarray:
    """Per cent of questions in words, seed by seed, that the base answers and a run does not."""
    seeds = data["runs"][name]["seeds"]
    return np.array([
        words(data["grounds"][seed]) - words(seeds[seed]) for seed in sorted(seeds, key=int)
    ])  # fmt: skip


def count_or_zero(numbers: np.ndarray) -> str:
    return "0" if not numbers.any() else f"{numbers.mean():,.0f}"


# --- sections


def heading(data: Results) -> str:
    budget, text = data["budget"], data["budget"]["text"]
    seeds = len(next(iter(data["runs"].values()))["seeds"])
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    seen = grounds(data, lambda g: 100 * g["encoder_accuracy"]["test"])
    read = {
        kind: grounds(data, lambda g, kind=kind: 100 * g["words"]["accuracy"][kind])
        for kind in ("digit", "sum")
    }
    learnt = grounds(data, lambda g: 100 * g["words_learnt"])
    there = {
        kind: grounds(data, lambda g, kind=kind: g["prompts_learnt"][kind])
        for kind in ("digit", "sum")
    }
    return f"""# What do added experts buy? The evidence for MoExtend

Written by `make results` from `moextend.json`; nothing here is typed by hand, verdicts included: a
claim holds, or does not, where the 95 % interval of the paired difference over seeds (Student's t)
leaves out zero: it, or its reverse. Each interval is of its own comparison: of many, one in twenty
leaves out zero by chance. The method is that of arXiv 2408.03511
([extension.md](../extension.md)).

Base: an OLMoE of {text["layers"]} layers, H {text["hidden_size"]}, {text["experts"]} experts of
{text["intermediate_size"]}, {text["experts_per_token"]} chosen, that has learnt Python's own
documentation and {budget["word_questions"]:,} questions in words (" six six two / What is their
sum? eight") for {text["text_steps"]} steps. Of such questions it answers
{mean_and_spread(read["digit"], 1)} % (which digit) and {mean_and_spread(read["sum"], 1)} % (sum of
two) right. That is memory: {mean_and_spread(learnt, 1)} % of those asked here are among those that
it learnt, which are {mean_and_spread(there["digit"], 0)} and {mean_and_spread(there["sum"], 0)}
different ones. Pictures are MNIST digits, which a small convolutional encoder learnt to tell apart
(it names {mean_and_spread(seen, 1)} % of those held out) and which is frozen then; a projector
learns for {budget["align_steps"]} steps to hand what it sees to the frozen base. From there each
method learns for {budget["steps"]} steps of {budget["batch"]} questions, with the projector frozen.
{seeds} seeds of everything: base, encoder, pictures held out, order. A toy: what holds here need
not hold for forty-seven billion parameters, and the reverse.

Loss is in nats a token of the answers to {2 * budget["held_out_questions"]:,} questions about
{budget["encoder"]["held_out"] // 2} pictures that neither the encoder nor any training question
saw; an answer is right where greedy generation writes it to the end of the line. ± is the standard
deviation over seeds. Learning rates were chosen on seed {data["tuning"]["seed"]}, which is not
among those reported, by the loss on questions about other held-out pictures (of code, on other
modules). Each kind of training has a rate of its own, also each start, calibration and number of
experts; those behind a gate are tuned with experts in every second layer, whatever layers their
runs have, so that no choice of layers is at home. What computes the same on the task shares a rate:
without a gate from our start as with one by sequence, LoRA by sequence as on all tokens.

{tuning_tables(data)}

Set aside before the runs were made: {budget["core_hours"]} hours of a core. Taken:
{data["seconds"] / 3600:.1f} hours of processes with {data["threads"]} thread(s), beside other work;
{versions}."""


def tuning_tables(data: Results) -> str:
    """One for each list of rates that was tried."""
    grids: dict[tuple[str, ...], dict[str, Any]] = {}
    for trains, losses in data["tuning"]["choice_nll"].items():
        grids.setdefault(tuple(losses), {})[trains] = losses
    return "\n\n".join(
        tuning_section({"tuning": data["tuning"] | {"choice_nll": tried}})
        for tried in grids.values()
    )


def all_methods(data: Results) -> dict[str, str]:
    """Runs of both tasks that the page compares in what they do to text."""
    described = METHODS | {name: f"code: {label}" for name, label in CODE.items()}
    return {name: described[name] for name in present(data, described)}


def patching(result: Results) -> float:
    return result["max_abs_logit_difference_by_patching"]


def text_row(data: Results, name: str, label: str) -> list[str]:
    before = values(data, name, lambda r: r["text"]["nll_before_training"])
    return [
        label, mean_and_spread(before), f"{values(data, name, patching).max():.1e}",
        mean_and_spread(values(data, name, at_step_0)),
        mean_and_spread(values(data, name, forgotten)),
        count_or_zero(values(data, name, changed_logits)),
    ]  # fmt: skip


def plain_row(data: Results, name: str, label: str) -> list[str]:
    cells = [label]
    for kind in ("code", "words"):
        cells += [
            mean_and_spread(values(data, name, plain_forgotten(kind))),
            count_or_zero(values(data, name, plain(kind, "logits_changed"))),
        ]
    return [*cells, mean_and_spread(values(data, name, words), 1)]


def text_section(data: Results) -> str:
    described = all_methods(data)
    return "\n\n".join(filter(None, [
        "## 1. Is text kept?",
        "Documentation held out, the same tokens before and after. Patching alone is what rounding "
        "changes against the plain model, the largest difference of a logit; step 0 is right after "
        "the experts were added.",
        table(
            ["what trains", "text loss before", "patching alone", "change at step 0",
             "change after training", "text logits changed"],
            [text_row(data, name, label) for name, label in described.items()],
        ),
        "Other text without ids: source code held out, and questions in words, of which the base "
        f"answers {mean_and_spread(grounds(data, words), 1)} %.",
        table(
            ["what trains", "code: change of loss", "logits changed", "words: change of loss",
             "logits changed", "right, %"],
            [plain_row(data, name, label) for name, label in described.items()],
        ),
        text_verdict(data),
        *forgetting_verdicts(data),
        *comparisons_of_forgetting(data),
    ]))  # fmt: skip


def forgetting_verdicts(data: Results) -> list[str]:
    """Against zero, of all that changes text."""
    described, found = all_methods(data), []
    ungated = [
        name for name in described
        if name in ("published", "no-gate", "lora-all-tokens", "full", "full-slow")
        or name in ("code-published", "code-no-gate", "code-lora-all-tokens", "code-full")
    ]  # fmt: skip
    for name in ungated:
        label = described[name]
        if name.endswith(("published", "no-gate")):
            found.append(verdict_on(
                -values(data, name, at_step_0), f"{label}: adding alone makes text worse",
                "text loss before less at step 0, nats a token",
            ))  # fmt: skip
        found.append(verdict_on(
            -values(data, name, forgotten), f"{label}: text is forgotten",
            "text loss before less after, nats a token",
        ))  # fmt: skip
        found.append(verdict_on(
            -words_lost(data, name), f"{label}: questions in words are forgotten",
            "answered right after less before, %",
        ))  # fmt: skip
    return found


def comparisons_of_forgetting(data: Results) -> list[str]:
    claims = (
        ("published", "full"), ("published", "full-slow"), ("published", "lora-all-tokens"),
        ("no-gate", "published"), ("code-published", "code-full"),
        ("code-published", "code-lora-all-tokens"),
    )  # fmt: skip
    described = all_methods(data)
    return [
        verdict(
            data, name, other, f"{described[name]}: forgets less text than: {described[other]}",
            forgotten, "change of text loss, nats a token",
        )
        for name, other in claims
        if len(present(data, (name, other))) == 2
    ]  # fmt: skip


def is_masked(settings: dict[str, Any]) -> bool:
    """Whether what trained may not reach text without ids."""
    if settings["method"] == "extension":
        return settings["gate"] != "none"
    return settings["method"] in ("lora", "projector")


def text_verdict(data: Results) -> str:
    masked = [
        result
        for run in data["runs"].values()
        if is_masked(run["settings"])
        for result in run["seeds"].values()
    ]
    if not masked:
        return ""
    tokens = sum(result["text"]["held_out_tokens"] for result in masked)
    changed = sum(result["text"]["logits_changed_by_training"] for result in masked)
    for each in (each for result in masked for each in result["plain"].values()):
        tokens, changed = tokens + each["tokens"], changed + each["logits_changed"]
    claim = "experts behind a gate, masked LoRA and the projector leave every text logit its bits"
    found = (
        f"{len(masked)} runs, {tokens:,} tokens of documentation, code and questions without ids, "
        f"{changed:,} logits changed"
    )
    return f"{FAILS if changed else HOLDS} {claim} ({found})."


def sized(data: Results, name: str, baseline: str) -> str:
    """Parameters, and how many times the baseline's."""
    if name == baseline:
        return parameters(data, name)
    here, there = (
        values(data, each, lambda result: result["trained_parameters"])[0]
        for each in (name, baseline)
    )
    return f"{parameters(data, name)} ({here / there:.2f} times)"


def question_row(data: Results, name: str, label: str, baseline: str) -> list[str]:
    return [
        label, sized(data, name, baseline),
        *(mean_and_spread(values(data, name, accuracy(kind)), 1) for kind in ("digit", "sum")),
        mean_and_spread(values(data, name, test_nll)),
        "" if name == baseline else difference(data, name, baseline),
    ]  # fmt: skip


def question_table(data: Results, described: dict[str, str], baseline: str) -> str:
    return table(
        ["", "parameters", "which digit, % right", "sum of two, % right", "loss",
         f"less that of: {described[baseline]} (95 %)"],
        [question_row(data, name, described[name], baseline) for name in present(data, described)],
    )  # fmt: skip


def task_section(data: Results) -> str:
    if not {"gated", "published"} & set(data["runs"]):
        return ""
    described = {name: label for name, label in METHODS.items() if name in data["runs"]}
    baseline = "gated" if "gated" in described else next(iter(described))
    before = {
        kind: grounds(data, lambda g, kind=kind: 100 * g["test"]["accuracy"][kind])
        for kind in ("digit", "sum")
    }
    common = {
        kind: grounds(data, lambda g, kind=kind: 100 * g["most_common_answer"][kind])
        for kind in ("digit", "sum")
    }
    start = ["where all start: the aligned projector", "",
             *(mean_and_spread(before[kind], 1) for kind in ("digit", "sum")),
             mean_and_spread(grounds(data, lambda g: g["test"]["nll"])), ""]  # fmt: skip
    chance = ["always the commonest answer", "",
              *(mean_and_spread(common[kind], 1) for kind in ("digit", "sum")), "", ""]  # fmt: skip
    learnt = question_table(data, described, baseline).splitlines()
    rows = [*learnt[:2], *("| " + " | ".join(row) + " |" for row in (chance, start)), *learnt[2:]]
    claims = (
        ("gated", "projector", "experts behind a gate add to what the projector learns alone"),
        ("gated", "lora", "experts behind a gate learn more than masked LoRA of as many numbers"),
        ("sequence", "lora-sequence",
         "experts behind a gate by sequence learn more than masked LoRA by sequence"),
        ("published", "lora-all-tokens",
         "experts without a gate learn more than LoRA on all tokens of as many numbers"),
        ("sequence", "gated", "a gate by sequence learns more than a gate by token"),
        ("published", "gated", "as published more is learnt than with a gate by token"),
        ("sequence", "full", "experts behind a gate by sequence learn more than full fine-tuning"),
        ("sequence", "full-slow", 
         "experts behind a gate by sequence learn more than full fine-tuning at a low rate"),
    )  # fmt: skip
    return "\n\n".join(filter(None, [
        "## 2. Do added experts learn the task?",
        "\n".join(rows),
        same_on_the_task(data, (("sequence", "no-gate"), ("lora-sequence", "lora-all-tokens"))),
        *verdicts(data, claims),
    ]))  # fmt: skip


def same_on_the_task(data: Results, pairs: tuple[tuple[str, str], ...]) -> str:
    """How far apart runs are that should compute the same there, and differ in text alone."""
    described = all_methods(data)
    said = [
        f"{described[name]}; {described[other]}: "
        f"{np.abs(paired(data, name, other)).max():.1e} nats a token"
        for name, other in pairs
        if len(present(data, (name, other))) == 2
    ]
    if not said:
        return ""
    listed = "".join(f"\n- {each}" for each in said)
    return (
        "Where all tokens of a sequence have the task's id, being chosen by all tokens, or adapted "
        "on all, is the same on the task, and only text tells the two apart. Training makes "
        f"rounding larger; the largest difference of their losses on the task:\n{listed}"
    )


def code_section(data: Results) -> str:
    names = present(data, CODE)
    if not names:
        return ""
    before = grounds(data, lambda g: g["code_nll"])
    baseline = names[0]
    rows = [
        [CODE[name], sized(data, name, baseline), mean_and_spread(values(data, name, test_nll)),
         mean_and_spread(values(data, name, test_nll) - before),
         mean_and_spread(values(data, name, forgotten))]
        for name in names
    ]  # fmt: skip
    claims = (
        ("code-published", "code-gated", "as published more code is learnt than with a gate"),
        ("code-gated", "code-lora", "gated experts learn more code than masked LoRA"),
        ("code-published", "code-lora-all-tokens",
         "experts without a gate learn more code than LoRA on all tokens"),
        ("code-full", "code-gated", "full fine-tuning learns more code than gated experts"),
        ("code-gated", "code-layers-random",
         "the top half by shift is a better choice for code than a random half"),
    )  # fmt: skip
    return "\n\n".join(filter(None, [
        "## 3. A task of text",
        "The standard library's source code, whole modules held out. The base, which has not "
        f"learnt code, has a loss of {mean_and_spread(before)} nats a token. The gate opens where "
        "a sequence is given the task's id.",
        table(["what trains", "parameters", "loss on code", "change", "change of text loss"], rows),
        same_on_the_task(
            data, (("code-gated", "code-no-gate"), ("code-lora", "code-lora-all-tokens"))
        ),
        *verdicts(data, claims),
    ]))  # fmt: skip


def layer_section(data: Results) -> str:
    names = present(data, LAYERS)
    if "sequence" not in names or len(names) < 2:
        return ""
    fixed = [name for name in names if name not in ("sequence", "layers-all", *RANDOM)]
    return "\n\n".join(filter(None, [
        "## 4. Is choosing layers by shift worth it?",
        "With a gate by sequence, all halves at one rate, which was chosen with every second "
        "layer. Random halves are drawn without putting back, over seeds and draws.",
        question_table(data, LAYERS, "sequence"),
        *(verdict(data, "sequence", name,
                  f"the {LAYERS['sequence']} is a better choice than: {LAYERS[name]}")
          for name in fixed),
        random_verdict(data),
        overlaps(data),
        agreement(data),
        "![layer scores of the first seed](moextend-scores.png)",
        "![scores by layer over seeds](moextend-layers.png)",
    ]))  # fmt: skip


def random_verdict(data: Results) -> str:
    """By the mean over a seed's random halves."""
    there = present(data, RANDOM)
    if not there:
        return ""
    apart = np.mean([paired(data, "sequence", name) for name in there], axis=0)
    _, low, high = interval(apart)
    said = verdict_on(
        apart, f"the {LAYERS['sequence']} is a better choice than a random half",
        f"test loss less the mean of {len(there)} random halves, nats a token",
    )  # fmt: skip
    if len(apart) < 2:
        return said
    return (
        f"{said}\n\nThis interval rules out that choosing by shift gains more than "
        f"{max(0.0, -low):.3f} nats a token over a random half, or loses more than "
        f"{max(0.0, high):.3f}."
    )


def overlaps(data: Results) -> str:
    there = present(data, RANDOM)
    if not there:
        return ""
    rows = []
    for seed, result in sorted(data["runs"]["sequence"]["seeds"].items(), key=lambda i: int(i[0])):
        halves = [data["runs"][name]["seeds"][seed]["layers"] for name in there]
        rows.append([
            seed, listed(result["layers"]),
            *(f"{listed(half)} ({len(set(half) & set(result['layers']))})" for half in halves),
        ])  # fmt: skip
    return "What was drawn, with how many layers it shares with the top half:\n\n" + table(
        ["seed", "top half", *(LAYERS[name] for name in there)], rows
    )


def listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def layer_scores(data: Results, scored: str, found: str = "scores") -> list[LayerScores]:
    """Seed by seed; scored: task and gate, such as "code-modality"."""
    return [
        LayerScores.from_dict(data["grounds"][seed][found][scored])
        for seed in sorted(data["grounds"], key=int)
    ]


def rank_correlation(first: LayerScores, second: LayerScores) -> float:
    return float(stats.spearmanr(first.d, second.d).statistic)


def top_half(scores: LayerScores) -> set[int]:
    return set(scores.order[: max(1, len(scores.layers) // 2)])


def agreement(data: Results) -> str:
    """Are a seed's scores the same by other questions, and do seeds agree?"""
    rows = []
    for scored in next(iter(data["grounds"].values()))["scores_again"]:
        scores = layer_scores(data, scored)
        again = layer_scores(data, scored, "scores_again")
        twice = list(zip(scores, again, strict=True))
        rows.append([
            scored, "; ".join(listed(sorted(top_half(each))) for each in scores),
            mean_and_spread(np.array([rank_correlation(*each) for each in twice]), 2),
            "; ".join(str(len(top_half(a) & top_half(b))) for a, b in twice),
            f"{np.mean(pairs):+.2f}"
            if (pairs := [rank_correlation(a, b) for a, b in combinations(scores, 2)]) else "",
        ])  # fmt: skip
    return (
        "Which layers were chosen, and whether scores are more than noise: each seed's layers were "
        "scored twice, by questions (blocks of code) of which none is in both; runs use the first. "
        "Seeds share MNIST and the documentation; their bases, encoders and pictures held out "
        "differ.\n\n"
        + table(
            ["task and gate", "top half, seed by seed", "rank correlation of a seed's two scores",
             "layers that both top halves have", "mean rank correlation between seeds"],
            rows,
        )
    )  # fmt: skip


def variants_section(data: Results) -> str:
    parts = ["## 5. Calibration, starts, and how many", "With a gate by sequence."]
    for title, described in (
        ("Calibration", CALIBRATIONS), ("Starts", STARTS), ("How many", NUMBERS),
    ):  # fmt: skip
        names = present(data, described)
        if len(names) < 2 or names[0] != "sequence":
            continue
        baseline = names[0]
        parts += [f"**{title}**", question_table(data, described, baseline)]
        parts += [
            verdict(
                data, name, baseline, f"{described[name]} is better than: {described[baseline]}"
            )
            if title == "How many"
            else verdict(
                data, baseline, name, f"{described[baseline]} is better than: {described[name]}"
            )
            for name in names[1:]
        ]
    parts += verdicts(data, [(
        "two-experts", "layers-all",
        "two experts in each of the top half learn more than one in every layer, at equal "
        "parameters",
    )])  # fmt: skip
    return "\n\n".join(parts) if len(parts) > 2 else ""


def disturbance_section(data: Results) -> str:
    described = {**METHODS, "init-mean": "gate by sequence, mean of the base's",
                 "init-random": "gate by sequence, random", **CODE}  # fmt: skip
    names = [
        name for name in present(data, described)
        if "disturbance" in next(iter(data["runs"][name]["seeds"].values()))
    ]  # fmt: skip
    if not names:
        return ""
    rows = []
    for name in names:
        cells = [("code: " if name in CODE else "") + described[name]]
        for rows_of in ("text", "task"):
            for key, scale in (("output_change", 1), ("changed_rows", 100), ("rerouted_rows", 100)):
                found = values(data, name, lambda r, of=rows_of, k=key: r["disturbance"][of][k])
                cells.append(
                    "0" if not found.any() else mean_and_spread(scale * found, 3 - scale // 50)
                )
        rows.append(cells)
    return "\n\n".join([
        "## 6. What copies change before they learn",
        "Change is ||with - without|| / ||without|| of the logits; rows with another bit; rows "
        "that some layer sends to other experts.",
        table(
            ["", "text: change", "rows, %", "rerouted, %", "task: change", "rows, %",
             "rerouted, %"],
            rows,
        ),
    ])  # fmt: skip


def cost_section(data: Results) -> str:
    if not data["cost"]:
        return ""
    rows, first = [], None
    for method, rounds in data["cost"].items():
        speed, memory = (
            np.array([r[key] for r in rounds]) for key in ("tokens_per_second", "peak_bytes")
        )
        first = speed if first is None else first
        rows.append([
            COST[method], f"{rounds[0]['trained_parameters']:,}", mean_and_spread(speed, 0),
            mean_and_spread(first / speed, 2), mean_and_spread(memory / 2**20, 0),
        ])  # fmt: skip
    return "\n\n".join([
        "## 7. What a training step costs",
        f"Each in a process of its own, in turn, {len(first)} rounds; peak memory above the "
        "loaded model's.",
        table(
            ["what trains", "parameters", "tokens/s", "gated experts are faster by", "MiB"], rows
        ),
    ])  # fmt: skip


def runs_section(data: Results) -> str:
    rows = []
    for name, run in data["runs"].items():
        for seed, result in sorted(run["seeds"].items(), key=lambda item: int(item[0])):
            right = result["test"].get("accuracy", {})
            rows.append([
                name, seed, ", ".join(map(str, result["layers"])),
                f"{result['trained_parameters']:,}", f"{result['lr']:g}",
                f"{test_nll(result):.3f}",
                *(f"{100 * right[kind]:.1f}" if right else "" for kind in ("digit", "sum")),
                f"{forgotten(result):+.4f}", f"{result['seconds']:.0f}",
            ])  # fmt: skip
    return "\n\n".join([
        "## Every run",
        table(
            ["run", "seed", "layers", "parameters", "lr", "loss", "digit, %", "sum, %",
             "change of text loss", "seconds"],
            rows,
        ),
    ])  # fmt: skip


# --- pictures


def plot_layers(data: Results) -> Figure:
    """The scores of every seed, by layer, for both tasks."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    scored = ("pictures-sequence", "code-modality")
    for panel, name in zip(figure.subplots(1, 2), scored, strict=True):
        d = np.array([scores.d.tolist() for scores in layer_scores(data, name)])
        panel.plot(d.T, "o", color="0.6", markersize=4)
        panel.plot(d.mean(0), "_", color="tab:orange", markersize=20, markeredgewidth=2)
        panel.set(
            title=f"{name}: each seed, and the mean", xlabel="layer", ylabel="score d", ylim=0
        )
    return figure


def plot_trade(data: Results) -> Figure:
    """What is learnt against what is forgotten."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    for name in present(data, METHODS):
        x, y = values(data, name, forgotten), values(data, name, test_nll)
        spreads = [each.std(ddof=1) if len(each) > 1 else 0 for each in (y, x)]
        panel.errorbar(x.mean(), y.mean(), *spreads, fmt="o", capsize=3, label=METHODS[name])
    panel.set(xlabel="change of text loss, nats a token", ylabel="loss on answers, nats a token")
    panel.legend(fontsize=8)
    return figure


def tried_rates(data: Results) -> dict[str, dict[str, tuple[float, float]]]:
    """What trains and changes text -> learning rate -> change of text loss, loss on the task."""
    found = {}
    for trains, rates in data["tuning"]["figures"].items():
        # A rate that is too high to train at all leaves none, or no numbers.
        told = {
            lr: figures
            for lr, figures in rates.items()
            if "text" in figures and np.isfinite([forgotten(figures), figures["test_nll"]]).all()
        }
        points = {lr: (forgotten(each), each["test_nll"]) for lr, each in told.items()}
        if any(each["text"]["logits_changed_by_training"] for each in told.values()):
            found[trains] = points
    return found


def plot_rates(data: Results) -> Figure:
    """The trade of learning and forgetting as the learning rate grows, on the tuning seed."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for panel, task in zip(figure.subplots(1, 2), ("pictures", "code"), strict=True):
        for trains, points in tried_rates(data).items():
            if not trains.startswith(task):
                continue
            x, y = zip(*points.values(), strict=True)
            panel.plot(x, y, "o-", label=trains.removeprefix(f"{task}: "))
            for lr, point in points.items():
                panel.annotate(lr, point, fontsize=7)
        panel.set(title=task, xlabel="change of text loss, nats a token", ylabel="loss on the task")
        if panel.lines:
            panel.legend(fontsize=8)
    return figure


def draw_pictures(data: Results, folder: Path) -> None:
    scores = layer_scores(data, "pictures-sequence")[0]
    save_figure(plot_layer_scores(scores), folder / "moextend-scores.png")
    save_figure(plot_layers(data), folder / "moextend-layers.png")
    save_figure(plot_trade(data), folder / "moextend-trade.png")
    save_figure(plot_rates(data), folder / "moextend-rates.png")


def trade_section(data: Results) -> str:
    """Forgetting against learning, at the rates that were chosen and at all that were tried."""
    tried = tried_rates(data)
    picture = "![what is learnt against what is forgotten](moextend-trade.png)"
    if not tried:
        return picture
    rows = [
        [trains, lr, f"{loss:.3f}", f"{change:+.4f}"]
        for trains, points in tried.items()
        for lr, (change, loss) in points.items()
    ]
    return "\n\n".join([
        picture,
        "The learning rate was chosen by what is learnt alone. What each one that was tried learns "
        f"and forgets, on seed {data['tuning']['seed']}:",
        table(["what trains", "lr", "loss on the task", "change of text loss"], rows),
        "![the same at each learning rate](moextend-rates.png)",
    ])  # fmt: skip


def page(data: Results) -> str:
    sections = [
        section(data)
        for section in (
            text_section, task_section, trade_section, code_section, layer_section,
            variants_section, disturbance_section, cost_section, runs_section,
        )
    ]  # fmt: skip
    parts = (heading(data), in_short(sections), *sections)
    return "\n\n".join(part for part in parts if part) + "\n"


def write_page(file: Path, folder: Path) -> None:
    """The page and its pictures, from the JSON alone."""
    data = json.loads(file.read_text())
    draw_pictures(data, folder)
    write_text(folder / f"{NAME}.md", page(data))
