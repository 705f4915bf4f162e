"""Imports inside the package and between programs: no circles, and arrows that point down only.

Every import statement counts, wherever it stands: one inside a function or behind TYPE_CHECKING is
the usual way to hide a circle. Names that are imported from strings (``import_module``) are not
seen. ``python tests/test_imports.py [FOLDER]`` prints what is wrong in another copy of the package.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "moe_kernels"
ROOT = Path(__file__).parent.parent / PACKAGE

# room -> the rooms right below it; a room may import whatever is below it, however far.
BELOW = {
    "__init__": ("ops", "models", "registration", "_version"),
    "programs": ("__init__", "conversion", "extension", "imaging", "info", "training"),
    "extension": ("moextend",),
    "training": ("analysis",),
    "moextend": ("analysis", "modalities"),
    "modalities": ("imaging",),
    "analysis": ("models", "figures"),
    "conversion": ("models",),
    "imaging": ("models", "figures"),
    "models": (
        "layers",
        "init",
        "tensor_files",
        "schema",
        "modes",
        "progress",
        "registration",
        "_version",
    ),
    "layers": ("ops",),
    "tune": ("testing", "files", "progress"),
    "testing": ("ops",),
    "ops": ("backends",),
    "info": ("backends", "models"),
    "backends": ("_native",),
    "_native": ("_nvrtc",),
    "_nvrtc": ("_cuda_sources", "env", "files", "_version"),
    "_cuda_sources": (),
    "arguments": (),
    "env": (),
    "extras": (),
    "figures": ("files",),
    "tensor_files": ("files",),
    "files": (),
    "init": ("arguments", "extras"),
    "modes": (),
    "progress": (),
    "registration": (),
    "schema": (),
    "_version": (),
}
# (importer, imported, where): imports that are not made when the module is loaded.
LATE = {
    (PACKAGE, f"{PACKAGE}.models", "TYPE_CHECKING"),
    # Only --model needs transformers, which takes seconds to import.
    (f"{PACKAGE}.info", f"{PACKAGE}.models.support", "function"),
}

# folder beside the package -> its room of shared parts, which imports nothing else of the folder
SHARED = {
    "python": "studies",
    "moe_kernels/programs": "shared",
    "benchmarks": "lib",
    "tests": "support",
}


class Import(NamedTuple):
    """One import of a module of the package by another.

    ``where`` is "module", "function" or "TYPE_CHECKING".
    """

    importer: str
    imported: str
    where: str


def module_files(root: Path, package: str | None = PACKAGE) -> dict[str, Path]:
    """Map each module's dotted name to its file; ``package`` None: ``root`` is on the path."""
    files = {}
    for path in sorted(root.rglob("*.py")):
        parts = [*filter(None, [package]), *path.relative_to(root).with_suffix("").parts]
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def read_imports(root: Path, package: str | None = PACKAGE) -> set[Import]:
    files = module_files(root, package)
    return {
        Import(name, imported, where)
        for name, path in files.items()
        for node, where in import_nodes(ast.parse(path.read_text()), "module")
        for imported in imported_modules(node, files)
    }


def import_nodes(tree: ast.AST, where: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, where
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from import_nodes(node, "function")
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from import_nodes(node, "TYPE_CHECKING")
        else:
            yield from import_nodes(node, where)


def imported_modules(node: ast.Import | ast.ImportFrom, files: dict[str, Path]) -> list[str]:
    """List those of ``files`` that a statement names; ``from a import b`` may name a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in files]
    assert node.level == 0, f"relative import of {node.module}"
    submodules = [f"{node.module}.{alias.name}" for alias in node.names]
    named = [name if name in files else node.module for name in submodules]
    return [name for name in named if name in files]


def circles(imports: set[Import]) -> list[list[str]]:
    """List the groups of modules that import each other, directly or not."""
    direct: dict[str, set[str]] = {}
    for each in imports:
        direct.setdefault(each.importer, set()).add(each.imported)
    reached = {name: reachable(name, direct) for name in direct}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached.get(other, ())))
        for name in direct
        if name in reached[name]
    }
    return [list(group) for group in sorted(groups)]


def reachable(name: str, direct: dict[str, set[str]]) -> set[str]:
    found, pending = set(), [name]
    while pending:
        new = direct.get(pending.pop(), set()) - found
        found |= new
        pending += new
    return found


def room(module: str) -> str:
    return "__init__" if module == PACKAGE else module.split(".")[1]


def upward(imports: set[Import]) -> list[str]:
    """List the imports of a room that is not below the importer's."""
    direct = {name: set(below) for name, below in BELOW.items()}
    allowed = {name: {name} | reachable(name, direct) for name in BELOW}
    return sorted(
        f"{each.importer} -> {each.imported} ({each.where})"
        for each in imports
        if room(each.imported) not in allowed[room(each.importer)]
    )


def late(imports: set[Import]) -> set[Import]:
    return {each for each in imports if each.where != "module"}


def test_every_room_has_its_place():
    assert {room(module) for module in module_files(ROOT)} == set(BELOW)


def test_no_modules_import_each_other():
    assert circles(read_imports(ROOT)) == []


def test_arrows_point_down():
    assert upward(read_imports(ROOT)) == []


def test_imports_stand_at_the_top_of_their_module():
    assert late(read_imports(ROOT)) == LATE


@pytest.mark.parametrize(("folder", "shared"), SHARED.items())
def test_programs_and_tests_have_no_circles(folder, shared):
    package = folder.replace("/", ".") if folder.startswith(PACKAGE) else None
    imports = read_imports(ROOT.parent / folder, package)
    assert circles(imports) == []
    room_of_shared = f"{package}.{shared}." if package else f"{shared}."
    below = {i.imported for i in imports if i.importer.startswith(room_of_shared)}
    assert below and all(f"{name}.".startswith(room_of_shared) for name in below)


def test_the_reader_sees_circles_and_arrows_up(tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "__init__.py").touch()
    (tmp_path / "ops" / "__init__.py").write_text(
        f"def late():\n    from {PACKAGE}.models import a\n"
    )
    (tmp_path / "models" / "__init__.py").touch()
    (tmp_path / "models" / "a.py").write_text(f"import {PACKAGE}.models.b\n")
    (tmp_path / "models" / "b.py").write_text(
        f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {PACKAGE}.models import a\n"
    )
    imports = read_imports(tmp_path)
    assert circles(imports) == [[f"{PACKAGE}.models.a", f"{PACKAGE}.models.b"]]
    assert upward(imports) == [f"{PACKAGE}.ops -> {PACKAGE}.models.a (function)"]
    assert {each.where for each in late(imports)} == {"function", "TYPE_CHECKING"}


if __name__ == "__main__":
    found = read_imports(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    print("circles:", *circles(found), sep="\n  ")
    print("arrows up:", *upward(found), sep="\n  ")
    print("late imports:", *sorted(late(found)), sep="\n  ")
