"""Texts that packages bring along, to heal a converted model on. Nothing is downloaded here."""

from __future__ import annotations

import ast
import bz2
import html
import importlib.util
import random
import re
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

from moe_kernels.programs.shared.files import write_text
from moe_kernels.programs.shared.texts import documentation

# Packages with much prose in their docstrings; those that are not installed are left out.
_DOCUMENTED = (
    "torch", "transformers", "sklearn", "numpy", "scipy", "matplotlib", "networkx", "sympy", "nltk",
    "accelerate", "datasets",
)  # fmt: skip
_SHORTEST_DOCSTRING, _SHORTEST_ARTICLE = 600, 1500  # characters
_DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = ("gensim/test/test_data/lee.cor", "gensim/test/test_data/lee_background.cor")
# Characters of each kind in the healing text.
_WIKIPEDIA, _DOCSTRINGS, _SOURCES = 2_400_000, 2_000_000, 800_000


def write_texts(wheel: Path, folder: Path) -> dict[str, Path]:
    """Write the texts that heal and measure a converted model; return their files by name.

    Files that are there stay as they are: the docstrings change with every package that is
    installed, and a model that is healed on another text is another model.

    Args:
        wheel: the package gensim as a wheel, for two texts that its tests use: some articles of
            Wikipedia, and news of the Australian Broadcasting Corporation
        folder: where the files go

    Returns:
        "heal": nine of ten articles, docstrings of installed packages, and sources of the standard
        library; "choice": every tenth article; "news" and "python", parts of Python's own
        documentation: two other kinds of text

    Raises:
        ValueError: the wheel does not hold the texts.
    """
    files = {name: folder / f"{name}.txt" for name in ("heal", "choice", "news", "python")}
    if not all(file.exists() for file in files.values()):
        articles, news = read_wheel(wheel)
        heal = "\n\n".join(text for index, text in enumerate(articles) if index % 10)
        parts = heal[:_WIKIPEDIA], docstrings()[:_DOCSTRINGS], _sources()[:_SOURCES]
        texts = {"heal": "\n\n".join(parts), "choice": "\n\n".join(articles[::10]), "news": news}
        texts["python"] = documentation()["test"]
        folder.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            write_text(file, texts[name])
    return files


def read_wheel(wheel: Path) -> tuple[list[str], str]:
    """Return the articles of Wikipedia and the news that gensim's wheel holds.

    Raises:
        ValueError: the file is no such wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as members:
            dump = bz2.decompress(members.read(_DUMP)).decode()
            news = "".join(members.read(name).decode(errors="replace") for name in _NEWS)
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel} is no wheel of gensim with its tests' texts: {error}") from error
    pages = re.findall(r"<title>.*?</title>.*?<text[^>]*>(.*?)</text>", dump, re.DOTALL)
    articles = (plain_text(page) for page in pages if not page.startswith("#REDIRECT"))
    return [text for text in articles if len(text) > _SHORTEST_ARTICLE], news


def plain_text(page: str) -> str:
    """Return an article's prose: without templates, tables, references, links' targets, lists."""
    text = html.unescape(page)
    text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->", "", text, flags=re.DOTALL)
    for _ in range(6):  # they nest
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*?\|\}", "", text, flags=re.DOTALL)
    pictures = r"\[\[(?:File|Image|Category)[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]"
    text = re.sub(pictures, "", text)
    text = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?\S*\s?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^>]+>", "", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = re.split(r"==\s*(?:References|See also|External links|Notes)\s*==", text)[0]
    lines = (line for line in text.split("\n") if not line.startswith(tuple("*|#:;{!")))
    return "\n".join(lines).strip()


def docstrings() -> str:
    """Return long docstrings of the packages that are installed, each once, in random order."""
    found = dict.fromkeys(text for package in _DOCUMENTED for text in _docstrings_of(package))
    texts = list(found)
    random.Random(0).shuffle(texts)
    return "\n\n".join(texts)


def _docstrings_of(package: str) -> Iterator[str]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return
    folder = Path(next(iter(spec.submodule_search_locations)))
    for path in sorted(folder.rglob("*.py")):
        if "test" in str(path.relative_to(folder.parent)):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        except (SyntaxError, ValueError):  # templates, and files of another Python
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node)
                if text and len(text) > _SHORTEST_DOCSTRING:
                    yield text


def _sources() -> str:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
