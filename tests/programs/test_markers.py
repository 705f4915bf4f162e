"""Text between markers in Markdown pages."""

import pytest
from support.programs import imported


@pytest.fixture(scope="module")
def markers():
    with imported("shared.markers") as module:
        yield module


BLOCK = "# Page\n\n<!-- a:table -->\n\nold\n\n<!-- /a:table -->\nend\n"
INLINE = "It takes <!-- a:hours -->1<!-- /a:hours --> hours; <!-- b:x -->y<!-- /b:x -->."


def test_a_block_stands_on_lines_of_its_own(markers):
    filled = markers.fill(BLOCK, {"table": "new\nlines\n"}, "a")
    assert filled == BLOCK.replace("old", "new\nlines")
    assert markers.fill(filled, {"table": "new\nlines\n"}, "a") == filled


def test_a_value_stands_within_its_line_and_other_markers_stay(markers):
    assert markers.names(INLINE, "a") == ["hours"] and markers.names(INLINE, "b") == ["x"]
    assert markers.fill(INLINE, {"hours": "12\n", "unused": ""}, "a") == INLINE.replace("1", "12")


def test_text_is_taken_as_it_is(markers):
    assert r"\1 \g<0>" in markers.fill(BLOCK, {"table": r"\1 \g<0>"}, "a")


@pytest.mark.parametrize(
    ("page", "blocks", "message"),
    [
        (BLOCK, {"other": ""}, "no text for the marker <!-- a:table -->; there are: other"),
        (INLINE, {"hours": "1\n2"}, "stands within a line"),
        ("<!-- a:x -->", {"x": ""}, "stands alone"),
        ("<!-- /a:x -->", {"x": ""}, "stands alone"),
        ("<!-- a:x -->1<!-- /a:y -->", {"x": ""}, "followed by <!-- /a:y -->"),
        ("<!-- /a:x -->1<!-- a:x -->", {"x": ""}, "followed by"),
        ("<!-- a:x -->1<!-- a:y -->2<!-- /a:y --><!-- /a:x -->", {"x": ""}, "followed by"),
    ],
)
def test_a_page_that_cannot_be_filled_is_refused(markers, page, blocks, message):
    with pytest.raises(ValueError, match=message):
        markers.fill(page, blocks, "a")
