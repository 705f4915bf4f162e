"""The pages: their links resolve, and the paths that they name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "python/*.md")
    for page in ROOT.glob(pattern)
)
FENCED = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = "benchmarks|csrc|docs|moe_kernels|python|tests|tools"
PATH = re.compile(rf"(?<![\w/.-])((?:{FOLDERS})/[\w/.-]*\w)")


def anchor(heading):
    """The anchor that GitHub gives to a heading."""
    words = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return words.replace(" ", "-")


def anchors(page):
    text = FENCED.sub("", page.read_text())
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    text = FENCED.sub("", page.read_text())
    for target in LINK.findall(text):
        if re.match(r"https?:", target):
            continue
        file, _, fragment = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{name(page)}: {target}"
        if fragment:
            assert fragment in anchors(found), f"{name(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_exist(page):
    """Paths in backticks and in commands, from the root of the repository."""
    text = page.read_text()
    code = re.findall(r"`([^`\n]+)`", FENCED.sub("", text)) + [m[0] for m in FENCED.finditer(text)]
    missing = {path for piece in code for path in PATH.findall(piece) if not (ROOT / path).exists()}
    assert not missing, f"{name(page)} names {sorted(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_stay_plain(page):
    """A page has one title, and every table and code block is closed."""
    text = page.read_text()
    assert text.startswith("# ") and text.endswith("\n")
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) % 2 == 0
    assert len(re.findall(r"^# ", FENCED.sub("", text), re.MULTILINE)) == 1


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
