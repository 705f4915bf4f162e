"""Docstrings begin with a verb phrase, or with a noun and its object."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKED = ("benchmarks", "examples", "moe_kernels", "python", "setup.py", "tests", "tools")
FILES = sorted(
    file
    for path in map(ROOT.joinpath, CHECKED)
    for file in ([path] if path.is_file() else path.rglob("*.py"))
)
# These words begin a clause without a subject, which a reader cannot take in on its own.
VAGUE = re.compile(r"(What|Which|Of|Whether|How|Those|As|That|Where)\b")


def first_lines(source):
    """Yield the line number and first line of every docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text.splitlines()[0]


def vague_lines(source):
    return [(number, line) for number, line in first_lines(source) if VAGUE.match(line)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_do_not_begin_with_a_clause(file):
    found = [f"{file}:{number}: {line}" for number, line in vague_lines(file.read_text())]
    assert not found, "begin with a verb, or with a noun and its object:\n" + "\n".join(found)


def test_the_check_finds_vague_lines_everywhere():
    source = (
        '"""What it is."""\nclass A:\n    """As B."""\n    def f(self):\n        """Of A."""\n'
        'def g():\n    """Return the ratio of a whole."""\n    def h():\n        """How."""\n'
    )
    assert sorted(vague_lines(source)) == [
        (1, "What it is."),
        (3, "As B."),
        (5, "Of A."),
        (9, "How."),
    ]
