"""Types that a user's program sees: complete annotations, and a script that mypy checks."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.reference_tool import load_tool

ROOT = Path(__file__).parent.parent
SCRIPT = "tests/support/users_script.py"
# Without arguments, these hold values that a type checker takes for Any.
GENERIC = {
    *("dict", "list", "set", "tuple", "type"),
    *("Callable", "Iterable", "Iterator", "Mapping", "PathLike", "Sequence"),
}


def public_functions():
    """Yield the name and the function of every public name, and of the members of its classes."""
    for module in map(importlib.import_module, load_tool().MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            elif inspect.isclass(value):
                for member, function in members(value):
                    yield f"{module.__name__}.{name}.{member}", function


def members(cls):
    """Yield the public methods and properties that this package gives a class, and its start."""
    for name, value in inspect.getmembers_static(cls):
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        public = not name.startswith("_") or name in ("__init__", "__call__")
        if public and inspect.isfunction(function) and is_ours(function):
            yield name, inspect.unwrap(function)


def is_ours(function):
    return (function.__module__ or "").startswith("moe_kernels")


def gaps(function):
    """List what the annotations of a function leave open."""
    signature = inspect.signature(function)
    given = {name: each.annotation for name, each in signature.parameters.items()}
    given |= {} if function.__name__ == "__init__" else {"return": signature.return_annotation}
    given = {name: given[name] for name in given if name not in ("self", "cls")}
    found = [f"{name} has no type" for name, type_ in given.items() if type_ is inspect._empty]
    found += ["return is Any"] * (written(given.get("return")) == "Any")
    return found + [f"{name} has a bare {each}" for name in given for each in bare(given[name])]


def written(type_):
    return type_ if isinstance(type_, str) else inspect.formatannotation(type_).split(".")[-1]


def bare(type_):
    """List the generic types in an annotation that have no arguments."""
    text = type_ if isinstance(type_, str) else inspect.formatannotation(type_)
    tree = ast.parse(text, mode="eval")
    with_arguments = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    names = {id(n): getattr(n, "id", getattr(n, "attr", None)) for n in ast.walk(tree)}
    return [name for each, name in names.items() if name in GENERIC and each not in with_arguments]


def test_public_functions_say_all_types():
    found = {name: gaps(function) for name, function in public_functions()}
    assert len(found) > 200  # it looks at methods too
    assert {name: each for name, each in found.items() if each} == {}


def test_the_annotations_that_are_missed():
    def function(a, b: dict, *c: "list[tuple]", d: dict[str, int] | None = None) -> Any: ...

    expected = ["a has no type", "return is Any", "b has a bare dict", "c has a bare tuple"]
    assert gaps(function) == expected


# Bodies of our functions are not checked: a user sees signatures.
SETTINGS = """
[mypy]
strict = True
cache_dir = {cache}
[mypy-moe_kernels.*]
ignore_errors = True
[mypy-{skipped}]
follow_imports = skip
"""
# Most of what torch imports, which says nothing of tensors, takes mypy half a minute.
OF_TORCH = (
    "_dynamo _export _functorch _higher_order_ops _inductor _subclasses ao distributed export fx "
    "onnx"
)
SKIPPED = ",".join(["transformers.*", "sympy.*", *(f"torch.{part}.*" for part in OF_TORCH.split())])


def check(script, skipped, folder):
    """Return what mypy says of a script."""
    settings = folder / "mypy.ini"
    settings.write_text(SETTINGS.format(cache=ROOT / ".mypy_cache", skipped=skipped))
    command = [sys.executable, "-m", "mypy", "--config-file", settings, script]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.stderr == ""
    return result.stdout


@pytest.mark.parametrize(
    "skipped",
    [
        pytest.param(SKIPPED, id="transformers taken for Any"),
        pytest.param("nothing", id="all", marks=pytest.mark.slow),
    ],
)
def test_a_users_script_sees_types(skipped, tmp_path):
    assert check(SCRIPT, skipped, tmp_path).startswith("Success")
