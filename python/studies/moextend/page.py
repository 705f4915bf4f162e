"""The page of moextend.py: every figure and every verdict is computed from the JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from shared.files import write_text

from moe_kernels.moextend import LayerScores
from studies.moextend.figures import (
    CALIBRATIONS,
    CODE,
    COST,
    LAYERS,
    LEARNERS,
    METHODS,
    NAME,
    NUMBERS,
    RANDOM,
    SCORED,
    STARTS,
    accuracy,
    all_methods,
    at_step_0,
    changed_logits,
    count_or_zero,
    forgotten,
    grounds,
    layer_scores,
    plain,
    plain_forgotten,
    since_start,
    tried_rates,
    words,
    words_lost,
)
from studies.moextend.intro import heading
from studies.moextend.plots import draw_pictures
from studies.report import (
    FAILS,
    HOLDS,
    OUTCOMES,
    Results,
    all_verdicts,
    cost_rows,
    difference,
    hold_together,
    interval,
    mean_and_spread,
    paired,
    parameters,
    present,
    table,
    test_nll,
    values,
    verdict,
    verdict_on,
    verdicts,
)


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
             "change after training", f"text logits changed, of {text_logits(data):,}"],
            [text_row(data, name, label) for name, label in described.items()],
        ),
        "Other text without ids: source code held out, and questions in words, of which the base "
        f"answers {mean_and_spread(grounds(data, words), 1)} %.",
        table(
            ["what trains", "code: change of loss", "logits changed", "words: change of loss",
             "logits changed", "right, %"],
            [plain_row(data, name, label) for name, label in described.items()],
        ),
        "Of runs on code the change of loss on code is what they learn.",
        text_verdict(data),
        *forgetting_verdicts(data),
        *comparisons_of_forgetting(data),
    ]))  # fmt: skip


def text_logits(data: Results) -> int:
    """Of the documentation held out."""
    first = next(iter(next(iter(data["runs"].values()))["seeds"].values()))
    return first["text"]["held_out_tokens"] * data["budget"]["text"]["vocab_size"]


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
                values(data, name, at_step_0), f"{label}: adding alone makes text worse",
                "change of text loss at step 0, nats a token", above=True,
            ))  # fmt: skip
        found.append(verdict_on(
            values(data, name, forgotten), f"{label}: text is forgotten",
            "change of text loss, nats a token", above=True,
        ))  # fmt: skip
        found.append(verdict_on(
            words_lost(data, name), f"{label}: questions in words are forgotten",
            "no longer right, percentage points", above=True,
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
            data, name, other,
            f"{described[name]}: forgets less text than: {described[other]}"
            + (", each at the rate at which it learns most" if other != "full-slow" else ""),
            forgotten, "difference of the changes of text loss, nats a token",
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
    claim = (
        "experts behind a gate, masked LoRA and the projector leave every text logit the bits that "
        "it had before training and before experts were added"
    )
    found = (
        f"{len(masked)} runs on {tokens // len(masked):,} tokens of documentation, code and "
        f"questions without ids each, {changed:,} logits changed"
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
        ("gated", "projector",
         "experts behind a gate by token learn more than the projector, if it trains on, with a "
         "third of the parameters"),
        ("sequence", "projector",
         "experts behind a gate by sequence learn more than the projector, if it trains on"),
        ("lora", "gated", "masked LoRA learns more than experts behind a gate by token"),
        ("lora-sequence", "sequence",
         "masked LoRA by sequence learns more than experts behind a gate by sequence"),
        ("lora-all-tokens", "published",
         "LoRA on all tokens learns more than experts without a gate"),
        ("sequence", "gated", "a gate by sequence learns more than a gate by token"),
        ("published", "gated", "as published more is learnt than with a gate by token"),
        ("full", "sequence", "full fine-tuning learns more than experts behind a gate by sequence"),
        ("full-slow", "sequence",
         "full fine-tuning at a low rate learns more than experts behind a gate by sequence"),
    )  # fmt: skip
    return "\n\n".join(filter(None, [
        "## 2. Do added experts learn the task?",
        "\n".join(rows),
        *(verdict_on(since_start(data, name), f"{label}: the task is learnt beyond the start",
                     "test loss less the aligned projector's, nats a token")
          for name, label in described.items() if name in LEARNERS),
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
        ("code-lora", "code-gated", "masked LoRA learns more code than gated experts"),
        ("code-lora-all-tokens", "code-published",
         "LoRA on all tokens learns more code than experts without a gate"),
        ("code-full", "code-gated", "full fine-tuning learns more code than gated experts"),
        ("code-gated", "code-layers-random",
         "the top half by shift is a better choice for code than one random half"),
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
        "Where a random half is the top half itself, the two are one run: that seed says nothing.",
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
            SCORED[scored], "; ".join(listed(sorted(top_half(each))) for each in scores),
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
                data,
                name,
                baseline,
                f"{described[name]}, twice the parameters, is better than: {described[baseline]}",
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
        return "## 7. What a training step costs\n\nNot measured."
    first = next(iter(data["cost"]))
    return "\n\n".join([
        "## 7. What a training step costs",
        "Forward, backward and AdamW on a CPU, of the same model and made-up features, without a "
        "projector: each in a process of its own, in turn, "
        f"{len(data['cost'][first])} rounds; peak memory above the loaded model's.",
        table(
            ["what trains", "parameters", "tokens/s", "time over that of gated experts", "MiB"],
            cost_rows(data, COST, first),
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
        "<details><summary>Settings and figures, run by run</summary>",
        table(
            ["run", "seed", "layers", "parameters", "lr", "loss", "digit, %", "sum, %",
             "change of text loss", "seconds"],
            rows,
        ),
        "</details>",
    ])  # fmt: skip


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
        "What is learnt, as the change of loss from the start (mean and 95 % interval), against "
        "what is forgotten (mean and range over seeds). Lower and further left is better; in the "
        "grey strip nothing is forgotten, and points stand side by side.",
        picture,
        "The learning rate was chosen by what is learnt alone. At others a method forgets less, "
        f"and learns less. On seed {data['tuning']['seed']}, by test questions:",
        "![the same at each learning rate](moextend-rates.png)",
        as_much_with_less(tried),
        "<details><summary>Every rate that was tried</summary>",
        table(["what trains", "lr", "test loss on the task", "change of text loss"], rows),
        "</details>",
    ])  # fmt: skip


def as_much_with_less(tried: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Against experts as published, at the rate at which these learn most, on the tuning seed."""
    said = []
    for ours, points in tried.items():
        task, kind = ours.split(": ", 1)
        if kind != "added experts, as published" or not points:
            continue
        change, loss = min(points.values(), key=lambda point: point[1])
        rivals = [
            f"{other.split(': ', 1)[1]} at lr {lr} ({rival[1]:.3f}, {rival[0]:+.4f})"
            for other, theirs in tried.items() if other.startswith(task) and other != ours
            for lr, rival in theirs.items() if rival[0] < change and rival[1] < loss
        ]  # fmt: skip
        found = "; ".join(rivals) if rivals else "nothing that was tried"
        said.append(
            f"- {task}: of what trains text too, {found} learnt more and forgot less than experts "
            f"as published do where they learn most ({loss:.3f}, {change:+.4f})."
        )
    return "One seed and no interval; test loss and change of text loss:\n\n" + "\n".join(said)


def page(data: Results) -> str:
    sections = [
        section(data)
        for section in (
            text_section, task_section, trade_section, code_section, layer_section,
            variants_section, disturbance_section, cost_section, runs_section,
        )
    ]  # fmt: skip
    together = joint_verdicts(sections)
    parts = (heading(data, text_verdict(data)), *sections[:-1], together, sections[-1])
    return "\n\n".join(part for part in parts if part) + "\n"


def joint_verdicts(sections: Sequence[str]) -> str:
    """Which verdicts stay if all of them are to be right together."""
    said = all_verdicts(sections)
    kept = [line for line in hold_together(said) if not line.startswith(OUTCOMES[2])]
    count = sum(", p " in line for line in said)
    decided = sum(", p " in line and not line.startswith(OUTCOMES[2]) for line in said)
    listed = "".join(f"\n- {line}" for line in kept) or "\n- none"
    return (
        f"## All verdicts together\n\n{count} verdicts have a p, {decided} are decided, each by "
        f"its own interval; if nothing were true, {0.05 * count:.1f} of them would be by chance. "
        f"With a joint error of at most 5 % (Holm) these {len(kept)} remain:\n{listed}"
    )


def write_page(file: Path, folder: Path) -> None:
    """The page and its pictures, from the JSON alone."""
    data = json.loads(file.read_text())
    draw_pictures(data, folder)
    write_text(folder / f"{NAME}.md", page(data))
