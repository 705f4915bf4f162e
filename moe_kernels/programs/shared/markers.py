"""Generated text between markers in a Markdown page that is written by hand.

A block stands on lines of its own, an inline value within a sentence:

    <!-- bench:training -->
    (a table)
    <!-- /bench:training -->

    It takes <!-- study:hours -->12<!-- /study:hours --> hours.
"""

import re
from collections.abc import Mapping


def names(page: str, prefix: str) -> list[str]:
    """Names of all markers with ``prefix``, in the order of the page.

    Raises:
        ValueError: a marker is not closed, or closed without being open.
    """
    return [opening[2] for opening, _ in _pairs(page, prefix)]


def fill(page: str, blocks: Mapping[str, str], prefix: str) -> str:
    """Return the page with the text between each pair of markers replaced.

    Text between ``<!-- PREFIX:NAME -->`` and ``<!-- /PREFIX:NAME -->`` becomes ``blocks[NAME]``:
    as paragraphs of its own where the opening marker ends a line, else within the line. A name may
    occur several times. The caller checks that every block has a marker in some page.

    Args:
        page: the text of the page.
        blocks: text by name, in Markdown.
        prefix: kind of the markers; those of other kinds stay as they are.

    Raises:
        ValueError: a marker has no block, is not closed, or is closed without being open; or the
            text of an inline marker has more than one line.

    Example:
        >>> fill("in <!-- a:n -->1<!-- /a:n --> h", {"n": "2"}, "a")
        'in <!-- a:n -->2<!-- /a:n --> h'
    """
    parts, end = [], 0
    for opening, closing in _pairs(page, prefix):
        name = opening[2]
        if name not in blocks:
            known = ", ".join(sorted(blocks)) or "none"
            raise ValueError(f"there is no text for the marker {opening[0]}; there are: {known}")
        text = blocks[name].strip("\n")
        if page.startswith("\n", opening.end()):
            text = f"\n\n{text}\n\n"
        elif "\n" in text:
            raise ValueError(f"{opening[0]} stands within a line, but its text has several lines")
        parts += [page[end : opening.end()], text]
        end = closing.start()
    return "".join([*parts, page[end:]])


def _pairs(page: str, prefix: str) -> list[tuple[re.Match, re.Match]]:
    """Opening and closing markers, in the order of the page."""
    found = list(re.finditer(rf"<!-- (/?){re.escape(prefix)}:([\w.-]+) -->", page))
    pairs = list(zip(found[::2], found[1::2], strict=False))
    for opening, closing in pairs:
        if opening[1] or not closing[1] or opening[2] != closing[2]:
            raise ValueError(f"{opening[0]} is followed by {closing[0]}, not by its closing marker")
    if len(found) % 2:
        raise ValueError(f"{found[-1][0]} stands alone: markers come in pairs")
    return pairs
