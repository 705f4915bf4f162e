"""The page of moextend.py: every figure and every verdict is computed from the JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _results_page import (
    FAILS,
    HOLDS,
    Results,
    difference,
    in_short,
    mean_and_spread,
    parameters,
    present,
    table,
    test_nll,
    tuning_section,
    values,
    verdict,
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
    "lora": "masked LoRA",
    "lora-all-tokens": "the same LoRA on all tokens",
    "projector": "the projector goes on alone",
    "full": "full fine-tuning",
}
CODE = {
    "code-gated": "experts, gated by the task's id",
    "code-published": "experts, no gate (as published)",
    "code-full": "full fine-tuning",
}
LAYERS = {
    "sequence": "top half by shift",
    "layers-interval": "every second",
    "layers-first-half": "first half",
    "layers-second-half": "second half",
    "layers-random": "a random half",
    "layers-all": "all (twice the parameters)",
}
CALIBRATIONS = {
    "sequence": "additive (published code)",
    "calibration-multiplicative": "multiplicative (paper)",
    "calibration-none": "none",
}
STARTS = {
    "sequence": "copy of the most selected",
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


def grounds(data: Results, get: Callable[[Results], float]) -> np.ndarray:
    return np.array([get(data["grounds"][seed]) for seed in sorted(data["grounds"], key=int)])


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
two) right. Pictures are MNIST digits, which a small convolutional encoder learnt to tell apart (it
names {mean_and_spread(seen, 1)} % of those held out) and which is frozen then; a projector learns
for {budget["align_steps"]} steps to hand what it sees to the frozen base. From there each method
learns for {budget["steps"]} steps of {budget["batch"]} questions, with the projector frozen.
{seeds} seeds of everything: base, encoder, pictures held out, order. A toy: what holds here need
not hold for forty-seven billion parameters, and the reverse.

Loss is in nats a token of the answers to {2 * budget["held_out_questions"]:,} questions about
{budget["encoder"]["held_out"] // 2} pictures that neither the encoder nor any training question
saw; an answer is right where greedy generation writes it to the end of the line. ± is the standard
deviation over seeds. Learning rates were chosen on seed {data["tuning"]["seed"]}, which is not
among those reported, by the loss on questions about other held-out pictures (of code, on other
modules); variants of a method take its rate:

{tuning_section(data)}

Set aside before the runs were made: {budget["core_hours"]} hours of a core. Taken:
{data["seconds"] / 3600:.1f} hours of processes with {data["threads"]} thread(s), beside other work;
{versions}."""


def text_row(data: Results, name: str, label: str) -> list[str]:
    step_0 = values(data, name, lambda r: r["text_nll_at_step_0"])
    before = values(data, name, lambda r: r["text"]["nll_before_training"])
    return [
        label, mean_and_spread(before), mean_and_spread(step_0 - before),
        mean_and_spread(values(data, name, forgotten)),
        count_or_zero(values(data, name, changed_logits)),
        mean_and_spread(values(data, name, words), 1),
    ]  # fmt: skip


def text_section(data: Results) -> str:
    names = present(data, [*METHODS, *CODE])
    rows = [text_row(data, name, METHODS[name]) for name in present(data, METHODS)]
    rows += [text_row(data, name, f"code: {CODE[name]}") for name in present(data, CODE)]
    aligned = grounds(data, words)
    parts = [
        "## 1. Is text kept?",
        "Documentation held out, the same tokens before and after; and questions in words, of "
        f"which the base answers {mean_and_spread(aligned, 1)} %. Step 0 is right after the "
        "experts were added.",
        table(
            ["what trains", "text loss before", "change at step 0", "change after training",
             "text logits changed", "questions in words right, %"],
            rows,
        ),
    ]  # fmt: skip
    parts.append(text_verdict(data))
    if "published" in names:
        parts += [
            verdict(data, "published", other, f"MoExtend as published forgets less text than "
                    f"{METHODS[other]}", forgotten, "change of text loss, nats a token")
            for other in present(data, ["full", "lora-all-tokens"])
        ]  # fmt: skip
    if {"code-published", "code-full"} <= set(names):
        parts.append(verdict(
            data, "code-published", "code-full",
            "on code, experts without a gate forget less text than full fine-tuning",
            forgotten, "change of text loss, nats a token",
        ))  # fmt: skip
    return "\n\n".join(filter(None, parts))


def text_verdict(data: Results) -> str:
    masked = [
        result["text"]
        for run in data["runs"].values()
        if run["settings"]["method"] in ("lora", "projector")
        or (run["settings"]["method"] == "extension" and run["settings"]["gate"] != "none")
        for result in run["seeds"].values()
    ]
    if not masked:
        return ""
    tokens = sum(text["held_out_tokens"] for text in masked)
    changed = sum(text["logits_changed_by_training"] for text in masked)
    claim = "experts behind a gate, masked LoRA and the projector leave every text logit its bits"
    found = f"{len(masked)} runs, {tokens:,} text tokens, {changed:,} logits changed"
    return f"{FAILS if changed else HOLDS} {claim} ({found})."


def question_row(data: Results, name: str, label: str, baseline: str) -> list[str]:
    return [
        label, parameters(data, name),
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
        ("published", "lora-all-tokens",
         "experts without a gate learn more than LoRA on all tokens of as many numbers"),
        ("sequence", "gated", "a gate by sequence learns more than a gate by token"),
        ("sequence", "published", "a gate by sequence learns more than none"),
        ("published", "gated", "without a gate more is learnt than with one by token"),
        ("sequence", "full", "experts behind a gate by sequence learn more than full fine-tuning"),
    )  # fmt: skip
    return "\n\n".join([
        "## 2. Do added experts learn the task?",
        "\n".join(rows),
        *(verdict(data, name, other, claim) for name, other, claim in claims
          if len(present(data, (name, other))) == 2),
    ])  # fmt: skip


def code_section(data: Results) -> str:
    names = present(data, CODE)
    if not names:
        return ""
    before = grounds(data, lambda g: g["code_nll"])
    rows = [
        [CODE[name], parameters(data, name), mean_and_spread(values(data, name, test_nll)),
         mean_and_spread(values(data, name, test_nll) - before),
         mean_and_spread(values(data, name, forgotten))]
        for name in names
    ]  # fmt: skip
    parts = [
        "## 3. A task of text",
        "The standard library's source code, whole modules held out. The base, which has not "
        f"learnt code, has a loss of {mean_and_spread(before)} nats a token. The gate opens where "
        "a sequence is given the task's id.",
        table(["what trains", "parameters", "loss on code", "change", "change of text loss"], rows),
    ]
    claims = (
        ("code-published", "code-gated", "without a gate more code is learnt than with one"),
        ("code-full", "code-gated", "full fine-tuning learns more code than gated experts"),
    )
    parts += [
        verdict(data, name, other, claim)
        for name, other, claim in claims
        if len(present(data, (name, other))) == 2
    ]
    return "\n\n".join(parts)


def layer_section(data: Results) -> str:
    names = present(data, LAYERS)
    if "sequence" not in names or len(names) < 2:
        return ""
    return "\n\n".join([
        "## 4. Is choosing layers by shift worth it?",
        "With a gate by sequence.",
        question_table(data, LAYERS, "sequence"),
        *(verdict(data, "sequence", name,
                  f"the {LAYERS['sequence']} is a better choice than: {LAYERS[name]}")
          for name in names if name not in ("sequence", "layers-all")),
        agreement(data),
        "![layer scores of the first seed](moextend-scores.png)",
        "![scores by layer over seeds](moextend-layers.png)",
    ])  # fmt: skip


def layer_d(data: Results, task: str) -> np.ndarray:
    """(seeds, layers)"""
    found = [data["grounds"][seed][f"scores_{task}"] for seed in sorted(data["grounds"], key=int)]
    return np.array([LayerScores.from_dict(each).d.tolist() for each in found])


def agreement(data: Results) -> str:
    """Do seeds, which share nothing, find the same layers?"""
    rows = []
    for task in ("pictures", "code"):
        d = layer_d(data, task)
        half = max(1, d.shape[1] // 2)
        top = [sorted(np.argsort(-each, kind="stable")[:half].tolist()) for each in d]
        pairs = [(i, j) for i in range(len(d)) for j in range(i)]
        correlations = [stats.spearmanr(d[i], d[j]).statistic for i, j in pairs]
        mean = f"{np.mean(correlations):+.2f}" if pairs else ""
        rows.append([task, "; ".join(", ".join(map(str, each)) for each in top), mean])
    return "Which layers were chosen:\n\n" + table(
        ["task", "top half, seed by seed", "mean rank correlation of scores between seeds"], rows
    )


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
                f"{result['trained_parameters']:,}", f"{test_nll(result):.3f}",
                *(f"{100 * right[kind]:.1f}" if right else "" for kind in ("digit", "sum")),
                f"{forgotten(result):+.4f}", f"{result['seconds']:.0f}",
            ])  # fmt: skip
    return "\n\n".join([
        "## Every run",
        table(
            ["run", "seed", "layers", "parameters", "loss", "digit, %", "sum, %",
             "change of text loss", "seconds"],
            rows,
        ),
    ])  # fmt: skip


# --- pictures


def plot_layers(data: Results) -> Figure:
    """The scores of every seed, by layer, for both tasks."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for panel, task in zip(figure.subplots(1, 2), ("pictures", "code"), strict=True):
        d = layer_d(data, task)
        panel.plot(d.T, "o", color="0.6", markersize=4)
        panel.plot(d.mean(0), "_", color="tab:orange", markersize=20, markeredgewidth=2)
        panel.set(
            title=f"{task}: each seed, and the mean", xlabel="layer", ylabel="score d", ylim=0
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


def draw_pictures(data: Results, folder: Path) -> None:
    first = min(data["grounds"], key=int)
    scores = LayerScores.from_dict(data["grounds"][first]["scores_pictures"])
    save_figure(plot_layer_scores(scores), folder / "moextend-scores.png")
    save_figure(plot_layers(data), folder / "moextend-layers.png")
    save_figure(plot_trade(data), folder / "moextend-trade.png")


def trade_section(data: Results) -> str:
    return "![what is learnt against what is forgotten](moextend-trade.png)"


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
