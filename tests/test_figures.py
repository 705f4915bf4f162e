"""Figures of the library: edges of pictures, what labels say, and that none lies over another."""

import warnings

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from support.figures import boxes, check_texts, frames

from moe_kernels import figures
from moe_kernels.analysis import (
    ExpertRedundancy,
    RoutingStatistics,
    plot_divergence,
    plot_expert_load,
    plot_redundancy,
    plot_specialisation,
)
from moe_kernels.imaging import SampleRow, plot_samples
from moe_kernels.moextend import LayerScores, plot_layer_scores

TAW = "\N{SYRIAC LETTER TAW}"


# --- texts


def test_a_character_that_the_font_lacks_is_escaped():
    assert figures.printable(f"caf\xe9 {TAW}\N{CJK UNIFIED IDEOGRAPH-732B}\0") == (
        "caf\xe9 \\u072c\\u732b\\x00"
    )


def test_texts_are_cut_and_wrapped():
    assert figures.printable("a\n b\tc ") == "a b c"
    assert figures.printable("a" * 40, 28) == "a" * 25 + "..."
    assert figures.printable("one two three", width=8) == "one two\nthree"


@pytest.mark.parametrize("text", [f"{TAW} \ud800", "$5 and $6", r"$\nothing$", "$x_", "\n$^$"])
def test_no_text_warns_or_is_read_as_a_formula(text):
    figure = Figure()
    drawn = figure.text(0.5, 0.5, figures.printable(text))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (((_, box),)) = boxes(figure)
    # A formula would be drawn without its dollar signs.
    drawn.set(parse_math=False, text=drawn.get_text().replace(r"\$", "$"))
    assert box.width == boxes(figure)[0][1].width


# --- pictures beside their captions


def rows_of(captions, count=2, real=2):
    white = torch.ones(max(count, real), 6, 8, 3)
    misread = torch.arange(count) == 0
    return [SampleRow(text, white[:count], white[:real], misread, white[:count])
            for text in captions]  # fmt: skip


def test_every_picture_has_an_edge():
    panel = plot_samples(rows_of("ab"), "title").axes[0]
    framed = frames(panel)
    extents = [
        (left, top, right - left, bottom - top)
        for left, right, bottom, top in (image.get_extent() for image in panel.images)
    ]
    assert len(extents) == 2 * (2 + 2 + 2)
    assert [box for _, box in framed] == [pytest.approx(extent) for extent in extents]
    red, thin = to_rgba("red"), framed[1][0]
    assert [colour for colour, _ in framed] == [red, thin, red, *[thin] * 9]
    assert max(thin[:3]) < 0.9, "as white as the page"


@pytest.mark.parametrize(("count", "real"), [(1, 1), (2, 3), (6, 3)])
@pytest.mark.parametrize("through_tokenizer", [False, True])
def test_headings_say_what_went_through_the_tokenizer(count, real, through_tokenizer):
    captions = ["a long caption " * 9, "short", f"{TAW} for $5 or $6"]
    rows = rows_of(captions, count, real)
    figure = plot_samples(rows, "title", through_tokenizer=through_tokenizer)
    check_texts(figure)
    told = ", through the tokenizer" if through_tokenizer else ""
    written = {text.get_text().replace("\n", " ") for text in figure.axes[0].texts}
    assert {f"nearest in training{told}", f"real, held out{told}"} <= written
    assert r"\u072c for \$5 or \$6" in written


# --- scores of layers


def scores_of(layers=6, experts=16, **given):
    counts = torch.randint(1, 50, (2, layers, experts), generator=torch.Generator().manual_seed(0))
    return LayerScores(tuple(range(layers)), *counts, (experts,) * layers, **given)


@pytest.mark.parametrize("layers", [2, 48])
def test_the_colours_of_scores_are_labelled_below_their_panel(layers):
    figure = plot_layer_scores(scores_of(layers, modality="image", count="all"))
    check_texts(figure)
    heat, bars, bar = figure.axes
    assert heat.get_title() == "change of each expert's share of selections"
    assert bar.get_xlabel() == "share after tuning - share before" and not bar.get_ylabel()
    assert bar.get_window_extent().y1 < heat.get_window_extent().y0
    assert bar.xaxis.label.get_window_extent().x1 < bars.get_window_extent().x0


@pytest.mark.parametrize(
    ("given", "ending"),
    [
        ({"modality": "image", "count": "modality"}, "on image data; image tokens counted"),
        ({"modality": "image", "count": "all"}, "on image data; all tokens counted"),
        ({}, "on unnamed data"),
    ],
)
def test_the_title_of_scores_names_the_modality(given, ending):
    assert plot_layer_scores(scores_of(**given)).get_suptitle().endswith(ending)
    assert plot_layer_scores(scores_of(**given), title="mine").get_suptitle() == "mine"


# --- routing


def statistics_of(names=("text", "image"), layers=4, experts=16):
    counts = torch.randint(
        0, 99, (layers, len(names), experts), generator=torch.Generator().manual_seed(0)
    )
    named = tuple(f"model.layers.{layer}.mlp" for layer in range(layers))
    return RoutingStatistics(names, named, counts, counts.sum(-1), torch.ones(layers, len(names)))


@pytest.mark.parametrize(
    "names", [("text", "image"), ("text", "handwritten_music_of_the_baroque"), (TAW, "$a$")]
)
@pytest.mark.parametrize(("layers", "experts"), [(2, 4), (48, 128)])
def test_no_label_of_routing_lies_over_another(names, layers, experts):
    statistics = statistics_of(names, layers, experts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (
            plot_expert_load(statistics),
            plot_expert_load(statistics, modalities=names[:1]),
            plot_specialisation(statistics, modalities=names),
            plot_divergence(statistics, modalities=names),
        ):
            check_texts(figure)


def test_the_colours_of_loads_are_labelled_below_their_panels():
    *panels, divergence, bar = plot_expert_load(statistics_of()).axes
    boxes(bar.figure)
    assert bar.get_xlabel() == "load / even load" and not bar.get_ylabel()
    for panel in panels:
        assert bar.get_window_extent().y1 < panel.get_window_extent().y0
    assert bar.get_window_extent().x1 < divergence.get_window_extent().x0


def test_the_legend_of_redundancy_covers_no_line_and_explains_the_bands():
    pairs = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    pairs = (pairs + pairs.mT) / 2
    layers = tuple(f"model.layers.{layer}.mlp" for layer in range(4))
    found = ExpertRedundancy("cka", "image", 50, layers, tuple(pairs))
    figure = plot_redundancy(found, found)
    check_texts(figure)
    (panel,) = figure.axes
    legend = panel.get_legend()
    assert legend.get_texts()[-1].get_text() == "band: least to most similar pair"
    assert legend.get_window_extent().y0 >= panel.get_window_extent().y1
