"""The pages: their links resolve, and the paths that they name exist."""

import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from support.model_zoo import make_model
from support.text_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_kernels.imaging import VQTokenizer

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "examples/*.md", "python/*.md")
    for page in ROOT.glob(pattern)
)
FENCED = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = "benchmarks|csrc|docs|examples|moe_kernels|python|tests|tools"
# Of a path with a placeholder, such as tests/ops/test_<op>.py, the folder has to exist.
PATH = re.compile(rf"(?<![\w/.-])((?:{FOLDERS})/[\w/.-]*\w)(?![\w.-]*<)")


def anchor(heading):
    """Return the anchor that GitHub gives to a heading."""
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
    """Paths in backticks and in commands start at the root of the repository."""
    text = page.read_text()
    code = re.findall(r"`([^`\n]+)`", FENCED.sub("", text)) + [m[0] for m in FENCED.finditer(text)]
    missing = {path for piece in code for path in PATH.findall(piece) if not (ROOT / path).exists()}
    assert not missing, f"{name(page)} names {sorted(missing)}"


def test_sources_name_pages_that_exist():
    for folder in FOLDERS.split("|"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                for page in re.findall(r"\bdocs/[\w/]+\.md\b", file.read_text()):
                    assert (ROOT / page).exists(), f"{name(file)} names {page}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_stay_plain(page):
    """A page has one title, and every table and code block is closed."""
    text = page.read_text()
    assert text.startswith("# ") and text.endswith("\n")
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) % 2 == 0
    assert len(re.findall(r"^# ", FENCED.sub("", text), re.MULTILINE)) == 1


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.filterwarnings("ignore:the tokenizer has collapsed")
def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    """Train, save, load and draw, as written, with a tiny model and a short fit."""
    model, fit = make_model("olmoe"), VQTokenizer.fit
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: deepcopy(model))
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda _: make_tokenizer(pad_token="<pad>")
    )
    monkeypatch.setattr(VQTokenizer, "fit", lambda *a, **k: fit(*a, **k, steps=2, width=16))
    images = torch.randint(0, 256, (9, 8, 8, 3), dtype=torch.uint8).numpy()
    names = {"images": images, "captions": ["a red cat"] * 9}
    readme = (ROOT / "README.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(code, names)
    assert (tmp_path / "apple.png").stat().st_size > 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, names["model"].get_parameter(name))


def test_every_drawing_has_its_code(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, ROOT / "tools/draw_figures.py", "--output", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs/images").glob("*.svg")}
