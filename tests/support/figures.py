"""Look at the objects of a figure: what is written where."""


def boxes(figure):
    """Draw the figure, and return its visible texts, each with its box in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    FigureCanvasAgg(figure).draw()
    hidden = set(hidden_texts(figure))
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    return [(text, text.get_window_extent()) for text in texts if text not in hidden]


def hidden_texts(figure):
    """Yield labels of ticks that are not drawn: out of view, or of axes that are off."""
    for panel in figure.axes:
        for axis in (panel.xaxis, panel.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not (panel.axison and low <= tick.get_loc() <= high):
                    yield from (tick.label1, tick.label2)


def overlapping(found):
    """Return the pairs of texts whose boxes overlap by more than a pixel."""
    from matplotlib.transforms import Bbox

    small = [(text, Bbox.from_extents(box.x0 + 1, box.y0 + 1, box.x1 - 1, box.y1 - 1))
             for text, box in found]  # fmt: skip
    return [
        (one.get_text(), other.get_text())
        for number, (one, box) in enumerate(small)
        for other, another in small[:number]
        if box.overlaps(another)
    ]


def outside(figure, found):
    """Return the texts that reach out of the figure by more than a pixel."""
    width, height = figure.get_size_inches() * figure.dpi
    return [
        text.get_text() for text, box in found
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]  # fmt: skip


def check_texts(figure):
    """Raise where texts lie over one another, or reach out of the figure."""
    found = boxes(figure)
    assert not overlapping(found), overlapping(found)
    assert not outside(figure, found), outside(figure, found)


def frames(panel):
    """Return the colour and the box of each frame, the box as (x, y, width, height)."""
    return [(patch.get_edgecolor(), patch.get_bbox().bounds) for patch in panel.patches]
