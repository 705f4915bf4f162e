"""The report of moe-kernels extend: its page, its figures, and its table on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_kernels.figures import draw_picture, printable
from moe_kernels.moextend import LayerScores, plot_layer_scores
from moe_kernels.programs.shared.cli import console
from moe_kernels.programs.shared.files import QUICK_NOTE, save_figure, write_text
from moe_kernels.programs.shared.reports.losses import plot_losses
from moe_kernels.programs.shared.tables import markdown_table, print_rows, text_rows

_COLUMNS = 4
_INCHES = 3.2  # width of a column
_STEP = 1.08  # one picture to the next, in their width
_RIGHT, _WRONG = "tab:green", "tab:red"
_STATES = {"projector alone": "aligned", "with experts": "tuned"}  # whose answers are shown

_PAGE = """# Added experts: {title}

{figures}

## Answers to questions about held-out pictures

{report[answers][count]} questions of each task. An answer is right if greedy generation writes all
of it.

{answers}

![Questions about held-out pictures, and the answers](answers.png)

## Added experts by layer

![Scores of the layers](scores.png)

{experts}

## Training

![Losses](training.png)

## Loading

The base is `{report[base]}`. To load the extended model:

```python
from transformers import AutoModelForCausalLM
from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.moextend import ExpertExtender

model = AutoModelForCausalLM.from_pretrained({report[base]!r}, dtype={report[settings][dtype]!r})
patched = patch_model(model, ModalityLoraConfig.from_adapter({adapter!r}))
patched.load_adapter({adapter!r})
projector = ExpertExtender(model).projector()    # saved with the adapter
```

The figures of "experts tuned" were measured on a model loaded this way. `load_encoder({encoder!r})`
of `moe_kernels/programs/shared/encoder.py` loads the frozen encoder.
"""


def write_pages(
    report: dict[str, Any], scores: LayerScores, pictures: np.ndarray, out: Path
) -> None:
    """Write answers.png, scores.png, training.png and report.md, and print a table.

    pictures: (N, H, W[, 3]) uint8, which the report's "shown" indexes
    """
    note = QUICK_NOTE if report["settings"]["quick"] else ""
    save_figure(plot_answers(report["shown"], pictures), out / "answers.png", note)
    chosen = [int(layer) for layer in report["extension"]["experts"]]
    save_figure(plot_layer_scores(scores, chosen=chosen), out / "scores.png", note)
    histories = {
        "alignment: the projector": report["training"]["align"],
        "fine-tuning: the added experts": report["training"]["tune"],
    }
    save_figure(plot_losses(histories, "nats a token of the answers"), out / "training.png", note)
    write_text(out / "report.md", page(report, out))
    print_rows(figures(report) | {"answers right": _states(report)})
    console.print(f"written to {out}; report.md has all figures", markup=False, soft_wrap=True)


# --- figures


def plot_answers(shown: list[dict[str, Any]], pictures: np.ndarray) -> Figure:
    """Return a figure of questions, their pictures, and answers before and after fine-tuning.

    Args:
        shown: for each question, its pictures' indices, its text, the right answer, both answers
        pictures: (N, H, W[, 3]) uint8
    """
    rows, width = -(-len(shown) // _COLUMNS), max(len(each["pictures"]) for each in shown) * _STEP
    height = pictures.shape[1] / pictures.shape[2]
    row_inches = _INCHES / width * height + 1.1  # five lines of text, too
    figure = Figure(figsize=(_INCHES * _COLUMNS, row_inches * rows + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    panels = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for panel in panels:
        panel.axis("off")
    for panel, each in zip(panels, shown, strict=False):
        _draw_question(panel, each, pictures)
        middle = (len(each["pictures"]) * _STEP - (_STEP - 1)) / 2
        # One scale for all pictures, alone or in pairs.
        panel.set(xlim=(middle - width / 2, middle + width / 2), ylim=(height, 0), aspect="equal")
    figure.suptitle("Held-out pictures, and the answers of the model (green: right)")
    return figure


def _draw_question(panel: Axes, each: dict[str, Any], pictures: np.ndarray) -> None:
    for place, number in enumerate(each["pictures"]):
        draw_picture(panel, pictures[number] / 255, place * _STEP, 0)
    panel.set_title(printable(each["question"], 40), fontsize=10)
    for y, (label, state) in zip((-4, -18), _STATES.items(), strict=True):
        written = printable(each[state], 20) or "(nothing)"
        colour = _RIGHT if each[state] == each["answer"] else _WRONG
        _write_below(panel, y, f"{label}: {written}", color=colour, fontsize=9)
    right = f"right: {printable(each['answer'], 40)}"
    _write_below(panel, -32, right, color="0.4", fontsize=8)


def _write_below(panel: Axes, points: int, text: str, **options: Any) -> None:
    """Write under a panel, by so many points."""
    panel.annotate(
        text, (0.5, 0), xycoords="axes fraction", xytext=(0, points), textcoords="offset points",
        ha="center", va="top", **options,
    )  # fmt: skip


# --- text


def figures(report: dict[str, Any]) -> dict[str, str]:
    """Return the rows of the table of figures."""
    parameters, encoder = report["parameters"], report["encoder"]
    step_0, tuned = report["disturbance"]["step_0"], report["disturbance"]["tuned"]["text"]
    return {
        "parameters trained by fine-tuning":
        f"{parameters['added']:,}: {parameters['share']:.2%} of the base's "
        f"{parameters['base']:,}; the projector has {parameters['projector']:,}",
        **text_rows(report["text"]),
        **{
            f"step 0: {rows}": f"{_change(each)}, {each['rerouted_rows']:.1%} sent to other experts"
            for rows, each in step_0.items()
        },
        "tuned: text": _change(tuned),
        "the encoder alone, on held-out pictures":
        f"{encoder['accuracy']['test']:.1%} named correctly",
    }  # fmt: skip


def _change(disturbance: dict[str, float]) -> str:
    change, rows = disturbance["output_change"], disturbance["changed_rows"]
    return f"{change:.2%} change of the logits, {rows:.1%} of rows changed"


def _states(report: dict[str, Any]) -> str:
    return "\n".join(
        f"{state}: " + ", ".join(f"{task} {share:.1%}" for task, share in each["accuracy"].items())
        for state, each in report["answers"]["states"].items()
    )


def page(report: dict[str, Any], out: Path) -> str:
    """Return the text of report.md."""
    settings = report["settings"]
    return _PAGE.format(
        title=f"{settings['data']}, {', '.join(settings['tasks'])}",
        figures=markdown_table(("", ""), figures(report).items()),
        answers=answers_table(report["answers"]),
        experts=experts_table(report),
        report=report,
        adapter=str(out / "adapter"),
        encoder=str(out / "encoder"),
    )


def answers_table(answers: dict[str, Any]) -> str:
    """Return a Markdown table of accuracy by task, and loss."""
    commonest = answers["commonest_answer"]

    def shares(accuracy: dict[str, float]) -> list[str]:
        return [f"{accuracy[task]:.1%}" for task in commonest]

    rows = [
        [state, *shares(each["accuracy"]), f"{each['nll']:.3f}"]
        for state, each in answers["states"].items()
    ]
    rows.append(["always the commonest answer", *shares(commonest), ""])
    return markdown_table(["", *commonest, "nats a token"], rows)


def experts_table(report: dict[str, Any]) -> str:
    """Return a Markdown table of the extended layers."""
    extension, scores = report["extension"], report["scores"]
    sources, gate = extension["sources"] or {}, extension["modality"]
    rows = [
        (
            str(layer), f"{scores[int(layer)]:.4f}", str(number),
            ", ".join(map(str, sources.get(layer, ()))) or extension["init"],
        )
        for layer, number in extension["experts"].items()
    ]  # fmt: skip
    table = markdown_table(("layer", "score d", "added experts", "copies of"), rows)
    available = f"rows of the modality {gate!r}" if gate else "all rows (no gate)"
    calibration = extension["calibration"] or "none"
    last = f"Available to {available}, which the scores count; calibration: {calibration}."
    return f"{table}\n\n{last}"
