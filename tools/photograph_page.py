"""Draw and chat on a served page in a headless Chromium, and write its picture.

    moe-kernels draw --serve --base MODEL --run RUN
    python tools/photograph_page.py http://127.0.0.1:8000 docs/images/draw_page.png

--captions and --questions say what to ask; by default the first captions of the page.
"""

import argparse
import io
import json
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

from support.browser import browsing, find  # noqa: E402

MOST_BYTES = 150_000
PATIENCE = 120  # seconds that an answer of a large model may take
QUESTIONS = ["What is the capital of France?", "Write two sentences about the sea."]


def draw(page, captions):
    """Type the captions, and wait for the pictures of each."""
    page.wait("document.querySelector('#captions button')")
    for number, caption in enumerate(captions, 1):
        page.value("document.querySelector('#caption').value = ''")
        page.type("#caption", caption)
        page.click("#draw button.main")
        page.wait(f"document.querySelectorAll('.drawing figcaption').length == {number}", PATIENCE)


def chat(page, questions):
    """Ask the questions, and wait for the comparison of each answer."""
    for number, question in enumerate(questions, 1):
        page.type("#message", question)
        page.click("#chat button.main")
        page.wait(f"document.querySelectorAll('.check').length == {number}", PATIENCE)


def quantised(png):
    """Return the bytes of a PNG with as many of 256 colours as fit below MOST_BYTES."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (256, 128, 64, 32):
        file = io.BytesIO()
        picture.quantize(colours, dither=Image.Dither.NONE).save(file, format="png", optimize=True)
        if file.tell() < MOST_BYTES:
            return file.getvalue()
    raise SystemExit(f"the picture has {file.tell():,} bytes: make the window smaller")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("output", type=Path)
    parser.add_argument("--captions", nargs="+", help="default: the first two of the page")
    parser.add_argument("--questions", nargs="+", default=QUESTIONS)
    parser.add_argument("--guidance", type=float, help="default: the page's")
    parser.add_argument("--size", type=int, nargs=2, default=(1240, 860))
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args(arguments)
    if find() is None:
        raise SystemExit("no Chromium on the path: apt-get install chromium")
    with browsing() as page:
        page.open(given.address, *given.size, dark=given.dark)
        page.wait("document.querySelector('#captions button')")
        if given.guidance is not None:
            slide = "$('guidance').value = {}, $('guidance').oninput()"
            page.value(slide.format(given.guidance))
        chips = "[...document.querySelectorAll('#captions button')].map(b => b.textContent)"
        draw(page, given.captions or page.value(chips)[:2])
        chat(page, given.questions)
        page.value("document.activeElement.blur(), window.scrollTo(0, 0)")
        given.output.write_bytes(quantised(page.picture()))
        if page.problems:
            raise SystemExit(f"the page has problems: {json.dumps(page.problems)}")


if __name__ == "__main__":
    main()
