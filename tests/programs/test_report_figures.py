"""Figures of the programs and of the studies: what they say, and that no text lies over another."""

import copy
import dataclasses
import json
import warnings

import numpy as np
import pytest
from support.figures import boxes, check_texts, frames
from support.programs import STUDIES, imported

RESULTS = STUDIES.parent / "docs" / "results"


@pytest.fixture(scope="module")
def programs():
    """Import the modules that draw for the programs."""
    with imported("extend_experts"):
        from moe_kernels.programs.shared import files
        from moe_kernels.programs.shared.reports import demo, extend_experts, losses

        yield {"files": files, "demo": demo, "extend": extend_experts, "losses": losses}


# --- training.png


def history(steps, every=5):
    """Return what a training of so many steps tells of its losses."""
    training = [(step, 5 - step / (2 * steps)) for step in range(every, steps + 1, every)]
    return {"loss": training or [(steps, 4.5)], "held_out": [(0, 5.0), (steps, 4.0)]}


@pytest.mark.parametrize("steps", [3, 20, 1400])
@pytest.mark.parametrize("log", [False, True])
def test_ticks_of_losses_are_whole_steps(programs, steps, log):
    histories = {"one": history(steps), "two": history(steps)}
    figure = programs["losses"].plot_losses(histories, "nats a token", log=log)
    check_texts(figure)
    for panel in figure.axes:
        assert len(panel.get_xticks()) > 1
        assert all(tick == int(tick) for tick in panel.get_xticks())
        training = panel.lines[0]
        assert len(training.get_xdata()) > 1 or training.get_marker() != "None", "not to be seen"


# --- answers.png


def shown(answer, *pictures):
    return {
        "pictures": list(pictures), "question": "Which digit is this?", "answer": "seven",
        "aligned": answer, "tuned": "seven",
    }  # fmt: skip


@pytest.mark.parametrize("answer", ["", "\N{SYRIAC LETTER TAW}", r"$\no$", "x" * 99, "a b " * 30])
def test_answers_of_any_letters_are_shown_below_framed_pictures(programs, answer):
    pictures = np.zeros((3, 28, 28), np.uint8)
    asked = [shown(answer, 0), shown(answer, 1, 2), *[shown(answer, 2)] * 3]
    figure = programs["extend"].plot_answers(asked, pictures)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_texts(figure)
    sizes = set()
    for panel, each in zip(figure.axes, asked, strict=False):
        (low, _), (high, _) = panel.transData.transform([(0, 0), (1, 0)])
        sizes.add(round(high - low))
        assert len(panel.images) == len(frames(panel)) == len(each["pictures"])
        assert not any(edge.get_clip_on() for edge in panel.patches)
        below = [text.get_window_extent().y1 for text in panel.texts]
        assert max(below) < panel.get_window_extent().y0
        first = panel.texts[0].get_text()
        assert first.startswith("projector alone: ") and len(first) < 60
    assert len(sizes) == 1, "pictures of several sizes"


# --- samples.png


@pytest.fixture
def four_drawings(programs):
    """Return the tokens of twelve pictures of two captions, and codes of four of them."""
    from moe_kernels.imaging import PatchTokenizer
    from moe_kernels.programs.shared import drawing, pictures

    images = (np.arange(12 * 64) % 251).astype(np.uint8).reshape(12, 8, 8)
    parts = pictures.CaptionedPictures(images, ("a cat", "a dog"), np.arange(12) % 2)
    tokenizer = PatchTokenizer.fit(images, patch_size=4, num_codes=4)
    encoded = pictures.TokenizedPictures.encode(tokenizer, parts)
    return drawing.PictureTokens(tokenizer, encoded, encoded), encoded.codes[:4].tolist()


def test_real_pictures_of_samples_are_told_to_be_through_the_tokenizer(four_drawings):
    from moe_kernels.programs.shared.reports.text_to_image import plot_drawings

    tokens, codes = four_drawings
    figure = plot_drawings(
        codes, {"read": [0, 1, 1, 1], "nearest": [0] * 4}, [0, 1], tokens, "title", nearest=True
    )
    check_texts(figure)
    written = {text.get_text().replace("\n", " ") for text in figure.axes[0].texts}
    assert {
        "nearest in training, through the tokenizer", "real, held out, through the tokenizer",
    } <= written  # fmt: skip


def test_failures_are_named_by_what_was_asked_and_read(four_drawings):
    from moe_kernels.programs.shared.reports.text_to_image import plot_failures

    tokens, codes = four_drawings
    asked, samples = [0, 0, 1, 1], {"read": [0, 1, 1, 0], "nearest": [0] * 4}
    figure = plot_failures(codes, samples, asked, tokens, "guidance 2")
    check_texts(figure)
    assert figure.get_suptitle() == "guidance 2: 2 of 4 read as another caption"
    written = [text.get_text().replace("\n", " ") for text in figure.axes[0].texts]
    assert {"a cat; read: a dog", "a dog; read: a cat"} <= set(written)
    assert plot_failures(codes, samples, samples["read"], tokens, "all right") is None


def test_reconstructions_stand_beside_held_out_pictures(four_drawings):
    from moe_kernels.programs.shared.reports.text_to_image import plot_reconstruction

    tokens, _ = four_drawings
    figure = plot_reconstruction(tokens, [1])
    check_texts(figure)
    written = {text.get_text().replace("\n", " ") for text in figure.axes[0].texts}
    assert {'"a dog"', "through the tokenizer", "real, held out"} == written
    assert len(figure.axes[0].images) == 8
    assert plot_reconstruction(tokens, [2]) is None


# --- --quick


@pytest.mark.parametrize("layout", ["constrained", None])
def test_a_note_is_a_line_below_the_figure(programs, layout, tmp_path):
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    heights = []
    for note in ("", programs["files"].QUICK_NOTE):
        figure = Figure(figsize=(7, 2), layout=layout)
        figure.subplots().set(xlabel="step", title="title")
        programs["files"].save_figure(figure, tmp_path / "figure.png", note)
        heights.append(len(imread(tmp_path / "figure.png")))
        assert [text.get_text() for text in figure.texts] == ([note] if note else [])
    assert figure.texts[0].get_window_extent().y1 < 0, "over the figure"
    assert heights[1] > heights[0], "cut off"


def test_quick_results_are_known_by_their_budget():
    with imported("moextend"):
        from studies.moextend import study
        from studies.sweep import is_quick

        budget = dataclasses.asdict(study.QUICK) | {"core_hours": 2.5}
        made, published = study.study(), json.loads((RESULTS / "moextend.json").read_text())
        assert is_quick(made, json.loads(json.dumps({"budget": budget})))
        assert not is_quick(made, published)


# --- the studies


@pytest.fixture(scope="module")
def moextend():
    """Return the pictures' module of the study, and its published results."""
    with imported("moextend"):
        from studies.moextend import plots

        yield plots, json.loads((RESULTS / "moextend.json").read_text())


def test_runs_that_change_no_text_have_a_panel_without_numbers(moextend):
    plots, data = moextend
    figure = plots.plot_trade(data)
    check_texts(figure)
    kept, lost = figure.axes
    assert kept.get_title() == "text keeps its bits" and not len(kept.get_xticks())
    assert len(kept.containers) == 5 and len(lost.containers) == 5
    drawn = [bars.lines[0].get_xdata()[0] for bars in lost.containers]
    assert min(drawn) > 0 and lost.get_xlim()[0] == 0
    assert len({bars.lines[0].get_color() for bars in kept.containers + lost.containers}) == 10


def test_ticks_of_changes_that_are_tiny_do_not_touch(moextend):
    plots, data = moextend
    data = copy.deepcopy(data)
    runs = [seed for run in data["runs"].values() for seed in run["seeds"].values()]
    rates = [rate for tried in data["tuning"]["figures"].values() for rate in tried.values()]
    for text in (found["text"] for found in runs + rates if "text" in found):
        change = text["nll_after_training"] - text["nll_before_training"]
        text["nll_after_training"] = text["nll_before_training"] + 1e-4 * (change > 0)
    for figure in (plots.plot_trade(data), plots.plot_rates(data)):
        check_texts(figure)


def test_rates_are_told_by_markers(moextend):
    plots, data = moextend
    figure = plots.plot_rates(data)
    check_texts(figure)
    assert not any(panel.texts for panel in figure.axes)
    (legend,) = figure.legends
    keys = {line.get_label(): line.get_marker() for line in legend.get_lines()}
    rates = [keys[f"learning rate {lr}"] for lr in ("0.0001", "0.0003", "0.001", "0.003", "0.01")]
    assert len(set(rates)) == 5 and {"full", "all tokens"} <= keys.keys()
    for panel in figure.axes:
        assert {line.get_marker() for line in panel.lines} == {*rates, "None"}
        assert legend.get_window_extent().x0 > panel.get_window_extent().x1


def test_titles_of_layers_stay_above_their_panels(moextend):
    plots, data = moextend
    figure = plots.plot_layers(data)
    check_texts(figure)
    for panel in figure.axes:
        title, box = panel.title.get_window_extent(), panel.get_window_extent()
        assert box.x0 <= title.x0 and title.x1 <= box.x1
        assert all(tick == int(tick) for tick in panel.get_xticks())


def test_pictures_of_the_gallery_are_told_to_be_through_the_tokenizer():
    with imported("redundancy"):
        from studies.redundancy import plots

        data = json.loads((RESULTS / "redundancy.json").read_text())
        gallery = data["runs"]["plora"]["seeds"]["0"]["gallery"]
        figure = plots.plot_gallery(gallery)
    check_texts(figure)
    panel = figure.axes[0]
    assert len(panel.images) == len(frames(panel))
    written = {text.get_text().replace("\n", " ") for text, _ in boxes(figure)}
    assert {
        "nearest in training, through the tokenizer", "real, held out, through the tokenizer",
    } <= written  # fmt: skip
