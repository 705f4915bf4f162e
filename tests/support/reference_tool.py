"""Load the program that builds the reference, which lists the modules with public names."""

import importlib.util
from pathlib import Path
from types import ModuleType

TOOL = Path(__file__).parents[2] / "tools" / "build_reference.py"


def load_tool() -> ModuleType:
    """Return tools/build_reference.py as a module; its ``MODULES`` are the public ones."""
    spec = importlib.util.spec_from_file_location(TOOL.stem, TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
