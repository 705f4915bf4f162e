"""The reference that ``make docs`` builds: it has the public names, and all links resolve."""

import re
from importlib import import_module

import pytest
from support.reference_tool import load_tool

from moe_kernels import backends


@pytest.fixture(scope="module")
def tool():
    return load_tool()


@pytest.mark.filterwarnings("error:::pdoc")
def test_the_pages_have_the_public_names_and_their_links_resolve(tool, tmp_path):
    assert tool.build(tmp_path) == []
    for name in tool.MODULES:
        text = (tmp_path / f"{name.replace('.', '/')}.html").read_text()
        found = set(re.findall(r'<section id="(\w+)">', text))
        public = set(import_module(name).__all__)
        assert found == {each for each in public if f"{name}.{each}" not in tool.MODULES}
        assert not re.search(r'id="(\w+\.)?_(?!_init__")', text)
    page = (tmp_path / "index.html").read_text()
    assert 'href="moe_kernels/imaging.html"' in page and 'href="docs/patching.html"' in page


def undocumented():
    pass


def test_what_does_not_resolve_is_named(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "MODULES", ("moe_kernels.backends",))
    monkeypatch.setattr(tool, "PAGES", ())
    monkeypatch.setattr(backends, "__all__", ["available", "undocumented"])
    monkeypatch.setattr(backends, "undocumented", undocumented, raising=False)
    page = "nothing"
    monkeypatch.setattr(backends.available, "__doc__", f"See :func:`nowhere`, docs/{page}.md.")
    assert tool.build(tmp_path) == [
        "moe_kernels.backends.undocumented has no docstring",
        "moe_kernels.backends.available: nowhere",
        "moe_kernels/backends.html: ../index.html",
        "moe_kernels/backends.html: ../docs/nothing.html",
    ]


def test_examples_become_blocks_of_code_and_stars_stay(tool):
    assert tool.as_markdown("Args:\n    **more: x * y.") == "Args:\n    \\*\\*more: x * y."
    text = "Do it.\n\nExample:\n    >>> 1 + 1\n    2\n\nMore::\n\n    code"
    assert tool.as_markdown(text) == (
        "Do it.\n\nExample:\n    ```pycon\n    >>> 1 + 1\n    2\n    ```\n\nMore:\n\n    code"
    )
