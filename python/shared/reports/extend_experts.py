"""The report of extend_experts.py: its page, its figures, and its table on the terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from moe_kernels.moextend import LayerScores, plot_layer_scores
from shared.cli import console
from shared.files import save_figure, write_text
from shared.reports.losses import plot_losses

_COLUMNS = 4
_RIGHT, _WRONG = "tab:green", "tab:red"

_PAGE = """# Added experts: {title}

| | |
|---|---|
{rows}

## Answers to questions about held-out pictures

{count} questions of each task. An answer is right if greedy generation writes all of it.

{answers}

![Questions about held-out pictures, and the answers](answers.png)

## Added experts by layer

![Scores of the layers](scores.png)

{experts}

## Training

![Losses](training.png)

## Loading

The base is `{base}`. To load the extended model:

```python
from transformers import AutoModelForCausalLM
from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.moextend import ExpertExtender

model = AutoModelForCausalLM.from_pretrained({base!r}, dtype={dtype!r})
patched = patch_model(model, ModalityLoraConfig.from_adapter({adapter!r}))
patched.load_adapter({adapter!r})
projector = ExpertExtender(model).projector()    # saved with the adapter
```

The figures of "experts tuned" were measured on a model loaded this way. `load_encoder({encoder!r})`
of `python/shared/encoder.py` loads the frozen encoder.
"""


def write_pages(
    report: dict[str, Any], scores: LayerScores, pictures: np.ndarray, out: Path
) -> None:
    """Write answers.png, scores.png, training.png and report.md, and print a table.

    pictures: (N, H, W[, 3]) uint8, which the report's "shown" indexes
    """
    save_figure(plot_answers(report["shown"], pictures), out / "answers.png")
    chosen = [int(layer) for layer in report["extension"]["experts"]]
    plot_layer_scores(scores, out / "scores.png", chosen=chosen)
    histories = {
        "alignment: the projector": report["training"]["align"],
        "fine-tuning: the added experts": report["training"]["tune"],
    }
    figure = plot_losses(histories, "nats a token of the answers")
    save_figure(figure, out / "training.png")
    write_text(out / "report.md", page(report, out))
    table = Table(show_header=False, show_lines=True)
    for row in (*rows_of(report), ("answers right", _states(report))):
        table.add_row(*row)
    console.print(table)
    console.print(f"written to {out}; report.md has all figures", markup=False, soft_wrap=True)


# --- figures


def plot_answers(shown: list[dict[str, Any]], pictures: np.ndarray) -> Figure:
    """Return a figure of questions, their pictures, and answers before and after fine-tuning."""
    rows = -(-len(shown) // _COLUMNS)
    figure = Figure(figsize=(3.2 * _COLUMNS, 3.1 * rows), layout="constrained")
    panels = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for panel in panels:
        panel.axis("off")
    for panel, each in zip(panels, shown, strict=False):
        _draw_question(panel, each, pictures)
    figure.suptitle("Held-out pictures, and the answers of the model (green: right)")
    return figure


def _draw_question(panel: Axes, each: dict[str, Any], pictures: np.ndarray) -> None:
    panel.imshow(np.concatenate(list(pictures[each["pictures"]]), axis=1), cmap="gray_r")
    panel.set_title(each["question"], fontsize=10)
    lines = (("projector alone", "aligned"), ("with experts", "tuned"))
    for number, (label, state) in enumerate(lines):
        written = textwrap.shorten(each[state] or "(nothing)", 28, placeholder="...")
        colour = _RIGHT if each[state] == each["answer"] else _WRONG
        panel.text(
            0.5, -0.04 - 0.11 * number, f"{label}: {written}", color=colour, fontsize=10,
            transform=panel.transAxes, ha="center", va="top",
        )  # fmt: skip
    panel.text(
        0.5, -0.26, f"right: {each['answer']}", fontsize=8, color="0.4",
        transform=panel.transAxes, ha="center", va="top",
    )  # fmt: skip


# --- text


def rows_of(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the table's rows: a name, and its figures."""
    parameters, text = report["parameters"], report["text"]
    encoder, disturbance = report["encoder"], report["disturbance"]
    step_0, tuned = disturbance["step_0"], disturbance["tuned"]
    changed = text["logits_changed_by_training"]
    return [
        (
            "parameters trained by fine-tuning",
            f"{parameters['added']:,}: {parameters['share']:.2%} of the base's "
            f"{parameters['base']:,}; the projector has {parameters['projector']:,}",
        ),
        (
            "held-out text, nats a token",
            f"{text['nll_before_training']:.6f} before, {text['nll_after_training']:.6f} after",
        ),
        ("text logits that changed", f"{changed:,}"),
        *(
            (
                f"step 0: {rows}",
                f"{each['output_change']:.2%} change of the logits, {each['changed_rows']:.1%} of "
                f"rows changed, {each['rerouted_rows']:.1%} sent to other experts",
            )
            for rows, each in step_0.items()
        ),
        (
            "tuned: text",
            f"{tuned['text']['output_change']:.2%} change of the logits, "
            f"{tuned['text']['changed_rows']:.1%} of rows changed",
        ),
        (
            "the encoder alone, on held-out pictures",
            f"{encoder['accuracy']['test']:.1%} named correctly",
        ),
    ]


def _states(report: dict[str, Any]) -> str:
    return "\n".join(
        f"{state}: " + ", ".join(f"{task} {share:.1%}" for task, share in each["accuracy"].items())
        for state, each in report["answers"]["states"].items()
    )


def page(report: dict[str, Any], out: Path) -> str:
    """Return the text of report.md."""
    settings = report["settings"]
    rows = "\n".join(f"| {name} | {value} |" for name, value in rows_of(report))
    return _PAGE.format(
        title=f"{settings['data']}, {', '.join(settings['tasks'])}",
        rows=rows,
        count=report["answers"]["count"],
        answers=answers_table(report["answers"]),
        experts=experts_table(report),
        base=report["base"],
        dtype=settings["dtype"],
        adapter=str(out / "adapter"),
        encoder=str(out / "encoder"),
    )


def answers_table(answers: dict[str, Any]) -> str:
    tasks = list(answers["commonest_answer"])
    lines = [f"| | {' | '.join(tasks)} | nats a token |", "|---" * (len(tasks) + 2) + "|"]
    for state, each in answers["states"].items():
        shares = " | ".join(f"{each['accuracy'][task]:.1%}" for task in tasks)
        lines.append(f"| {state} | {shares} | {each['nll']:.3f} |")
    shares = " | ".join(f"{answers['commonest_answer'][task]:.1%}" for task in tasks)
    lines.append(f"| always the commonest answer | {shares} | |")
    return "\n".join(lines)


def experts_table(report: dict[str, Any]) -> str:
    """Return a Markdown table of the extended layers."""
    extension, scores = report["extension"], report["scores"]
    sources = extension["sources"] or {}
    lines = ["| layer | score d | added experts | copies of |", "|---|---|---|---|"]
    for layer, number in extension["experts"].items():
        copied = ", ".join(map(str, sources.get(layer, ()))) or extension["init"]
        lines.append(f"| {layer} | {scores[int(layer)]:.4f} | {number} | {copied} |")
    gate = extension["modality"]
    rows = f"rows of the modality {gate!r}" if gate else "all rows (no gate)"
    calibration = extension["calibration"] or "none"
    last = f"Available to {rows}, which the scores count; calibration: {calibration}."
    return "\n".join([*lines, "", last])
