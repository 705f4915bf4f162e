"""Tables of the page of drawing.py out of the reports of other programs: bases, and pictures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from moe_kernels.programs.shared.answers import answers_table
from moe_kernels.programs.shared.files import read_json
from studies import report
from studies.report import Block, NotMeasured, Results

# Aims that were set before the runs.
PERPLEXITY, DIGITS, COMBINATIONS = 23.0, 0.9, 0.85
# Sheets of a run of train-text-to-image that the page shows, without the guidance in their names.
_SHEETS = ("samples", "held-out", "failures")
_COLOURS = 256
# Keys of reports that the JSON leaves out: long lists, and folders of a machine.
_LEFT_OUT = {"grad_norm", "loss", "nearest", "out", "read"}
GROUPS, ATTRIBUTES = ("trained", "held_out"), ("digit", "colour", "place", "caption")


def read_reports(convert: list[Path], runs: Mapping[str, Path]) -> Results:
    """Return the reports as the JSON keeps them.

    convert: of moe-kernels convert; runs: of moe-kernels train-text-to-image, by name
    """
    found = {name: brief(read_json(file)) for name, file in runs.items()}
    return found | {"convert": [brief(read_json(file)) for file in convert]}


def brief(found: Any) -> Any:
    """Return a report without its long lists, and with short paths."""
    if isinstance(found, dict):
        return {key: brief(value) for key, value in found.items() if key not in _LEFT_OUT}
    if isinstance(found, list):
        return [brief(each) for each in found]
    if isinstance(found, str) and Path(found).is_absolute():
        path = Path(found)
        # Of a folder "model" it is the one around it that has a name of its own.
        return f"{path.parent.name}/model" if path.name == "model" else path.name
    return found


def base_of(data: Results) -> tuple[Results, Results]:
    """Return the first report of moe-kernels convert, and its conversion that was chosen."""
    first = data["convert"][0]
    (row,) = [
        each for each in first["conversions"] if each["model"] == first["best_by_choice_text"]
    ]
    return first, row


# --- the bases


def bases(data: Results) -> str:
    """Table of all conversions: their settings, and perplexity before and after healing."""
    heads = (
        "E", "k", "shared expert", "split", "refitted on", "trains", "temperature", "healed on",
        "neurons a token", "before healing", "after", "minutes of healing",
    )  # fmt: skip
    reports = data["convert"]
    dense = f"{reports[0]['dense']['perplexity']['test']:.2f}"
    rows = [["the dense parent", *[""] * 7, "100 %", dense, "", ""]]
    rows += [_base(each, row) for each in reports for row in each["conversions"]]
    return report.table(heads, rows)


def _base(given: dict[str, Any], row: dict[str, Any]) -> list[str]:
    settings, healed = given["settings"], "after" in row
    shared, width = settings["shared_expert"], given["dense"]["intermediate_size"]
    share = (shared + (width - shared) * row["top_k"] / row["num_experts"]) / width
    minutes = row["healing"]["seconds"] / 60 if healed else 0
    return [
        str(row["num_experts"]), str(row["top_k"]), f"{shared:,}" if shared else "none",
        row["split"], _tokens(settings["refit_tokens"]),
        settings["train"] if healed else "", f"{settings['temperature']:g}" if healed else "",
        _tokens(row["healing"]["tokens"]) if healed else "", f"{100 * share:.0f} %",
        f"{row['before']['test']:.2f}", f"{row['after']['test']:.2f}" if healed else "",
        f"{minutes:.0f}" if healed else "",
    ]  # fmt: skip


def _tokens(count: int) -> str:
    return f"{count:,} tokens" if count else "not"


def answers(data: Results) -> str:
    """Answers of the dense parent, of the base as it was split, and healed."""
    columns = _measured_more(data, "answers", "--answer-tokens")
    names = ("dense parent", "split", "healed")
    return answers_table(dict(zip(names, columns, strict=True))).strip()


def other_texts(data: Results) -> str:
    """Table of the base's perplexity on further texts."""
    columns = _measured_more(data, "perplexity", "--more-texts")
    rows = [[name, *(f"{each[name]:.2f}" for each in columns)] for name in columns[-1]]
    return report.table(["text", "dense parent", "before healing", "after"], rows)


def _measured_more(data: Results, what: str, option: str) -> list[Any]:
    """Return what was measured of the dense parent, of the base as it was split, and healed."""
    first, row = base_of(data)
    found = [first["dense"].get("more", {}), row.get("more_before", {}), row.get("more_after", {})]
    if not all(what in each for each in found):
        raise NotMeasured(f"a report of moe-kernels convert with {option}")
    return [each[what] for each in found]


# --- what it was taught


def taught(data: Results, name: str) -> str:
    """Say what a run trained, on how much, for how long, and what became of text."""
    run = data[name]
    settings, parameters, loss = run["settings"], run["parameters"], run["image"]
    return (
        f"{settings['steps']:,} steps of {settings['batch']} pictures, "
        f"{run['image_tokenizer']['tokens_per_image']} tokens each out of "
        f"{run['image_tokenizer']['codes']:,} codes, in {run['seconds']['teach'] / 60:.0f} minutes "
        f"on a CPU; {parameters['trained']:,} of {parameters['total']:,} parameters train. Loss on "
        f"held-out pictures, nats a token: {loss['nll_start']:.2f} before, {loss['nll_end']:.2f} "
        f"after, and {loss['nll_adapters_off']:.2f} with the adapters off. {_course(run)} "
        f"{_kept(run['text'])}"
    )


def _kept(text: dict[str, Any]) -> str:
    """Say what training changed of text, and patching before it."""
    return (
        f"Text logits changed: {text['logits_changed_by_training']:,}, on "
        f"{text['held_out_tokens']:,} tokens. Patching itself rounds, before any training: at the "
        "median token, the logit that moves most moves by "
        f"{text['median_logit_difference_to_unpatched']:.2f}"
    )


def _course(run: dict[str, Any]) -> str:
    """Say whether the held-out loss was still falling at the end."""
    curve = run["training"]["held_out"]
    (before, earlier), (end, last) = curve[-2:]
    step, lowest = min(curve, key=lambda point: point[1])
    if step < end:
        return (
            f"The loss was lowest, {lowest:.2f}, after {step:,} steps: from there on pictures are "
            "learnt by heart."
        )
    fall = 100 * (1 - last / earlier)
    return f"The loss still fell by {fall:.1f} % in the last {end - before:,} steps."


def read(data: Results, name: str) -> str:
    """Table of what a reader tells of a run's drawings, by guidance, and of real pictures."""
    run = data[name]
    made = {f"guidance {scale}": each["read_right"] for scale, each in run["samples"].items()}
    made |= {
        "real pictures, through the image tokenizer": run["reader"]["tokenized"],
        "real pictures": run["reader"]["raw"],
    }
    heads = [
        f"{group}: {'all' if attribute == 'caption' else attribute}"
        for group in ("trained", "held out")
        for attribute in ATTRIBUTES
    ]
    rows = [
        [what, *(_share(found[group][kind]) for group in GROUPS for kind in ATTRIBUTES)]
        for what, found in made.items()
    ]
    return report.table(["drawings", *heads], rows)


def _share(found: dict[str, Any]) -> str:
    return f"{100 * found['share']:.0f}"


def _interval(found: dict[str, Any]) -> str:
    """Say a share with its 95 % interval, in which drawings of a caption do not count apart."""
    half = 1.96 * found["standard_error_over_captions"]
    low, high = max(0.0, found["share"] - half), min(1.0, found["share"] + half)
    return (
        f"{100 * found['share']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) of {found['count']:,}"
    )


def best_guidance(run: dict[str, Any]) -> str:
    """Return the scale at which most captions of training are read right.

    Where no reader tells, it is the smallest.
    """
    samples = run["samples"]
    if not run.get("reader"):
        return min(samples, key=float)
    return max(
        samples, key=lambda scale: samples[scale]["read_right"]["trained"]["caption"]["share"]
    )


def copies(data: Results, name: str) -> str:
    """Say how many drawings are copies, and how near they are to pictures of training."""
    run = data[name]
    best = best_guidance(run)
    samples = run["samples"][best]
    nearest, shows = samples["nearest_training_distance"], samples["nearest_shows_the_caption"]
    return (
        f"At guidance {best}, {samples['copies_of_a_training_image']['generated']} of "
        f"{samples['count']} drawings are copies of a training picture, and {samples['distinct']} "
        f"are distinct. Of {shows['count']} drawings of captions of training, {shows['right']} are "
        "nearest to a picture that has their caption. The mean distance to the nearest picture "
        f"(Euclidean, colours from 0 to 1) is {nearest['generated']:.2f}, and that of real "
        f"held-out pictures {nearest['held_out_real']:.2f}"
    )


# --- aims


def aims(data: Results) -> str:
    """Table of the aims that were set before the runs, and what was reached."""
    runs, (_, base) = [data["digits"], data["emoji"]], base_of(data)
    best = best_guidance(data["digits"])
    right = data["digits"]["samples"][best]["read_right"]
    digits, combinations = right["trained"]["digit"], right["held_out"]["caption"]
    changed = sum(run["text"]["logits_changed_by_training"] for run in runs)
    perplexity, verdict = base["after"]["test"], {True: "reached", False: "**missed**"}
    rows = [
        [
            f"a base with a perplexity of at most {PERPLEXITY:g} on text that it was not healed on",
            verdict[perplexity <= PERPLEXITY], f"{perplexity:.2f}",
        ],
        [
            f"{100 * DIGITS:g} % of the digits of captions of training are read right",
            verdict[digits["share"] >= DIGITS], f"{_interval(digits)}, guidance {best}",
        ],
        [
            f"{100 * COMBINATIONS:g} % of the held-out combinations are read right in all three",
            verdict[combinations["share"] >= COMBINATIONS],
            f"{_interval(combinations)}, guidance {best}",
        ],
        [
            "text keeps every bit", verdict[changed == 0],
            f"{changed:,} logits changed by {len(runs)} trainings",
        ],
    ]  # fmt: skip
    return report.table(["aim", "", "figure (95 % interval)"], rows)


def headline(data: Results) -> str:
    """Say what share of drawings of held-out combinations is read right."""
    best = best_guidance(data["digits"])
    share = data["digits"]["samples"][best]["read_right"]["held_out"]["caption"]["share"]
    return f"{100 * share:.0f} % of such drawings are read as their caption, at guidance {best}"


def times(data: Results) -> str:
    """Table of the minutes that the steps of `make draw` took."""
    seconds = {"base": data["convert"][0]["seconds"]}
    seconds |= {name: data[name]["seconds"] for name in ("digits", "emoji")}
    minutes = {name: sum(each.values()) / 60 for name, each in seconds.items()}
    minutes["together"] = sum(minutes.values())
    rows = [[name, f"{each:.0f}"] for name, each in minutes.items()]
    return report.table(["step", "minutes"], rows)


# --- pictures


def copy_sheets(runs: Mapping[str, Path], folder: Path) -> None:
    """Copy the sheets of runs, at the guidance that is read best, and their films.

    Sheets get a palette, which makes them a sixth as large.

    runs: reports by name, each in the folder of its run
    """
    for name, file in runs.items():
        best = best_guidance(read_json(file))
        sheets = {sheet: f"{sheet}-guidance-{best}.png" for sheet in _SHEETS}
        for sheet, source in (sheets | {"reconstruction": "reconstruction.png"}).items():
            if (file.parent / source).exists():
                with Image.open(file.parent / source) as drawn:
                    few = drawn.convert("RGB").quantize(_COLOURS, Image.Quantize.FASTOCTREE)
                few.save(folder / f"drawing-{name}-{sheet}.png", optimize=True)
        if (film := file.parent / "film.gif").exists():
            shutil.copyfile(film, folder / f"drawing-{name}-film.gif")


BLOCKS: dict[str, Block] = {
    "aims": aims, "answers": answers, "bases": bases, "copies": copies, "drawings": read,
    "headline": headline, "other-texts": other_texts, "taught": taught, "times": times,
}  # fmt: skip
