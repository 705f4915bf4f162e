"""Packages that only some functions need: each is in an extra of the distribution, or in none."""

from importlib import import_module
from types import ModuleType

# What is imported -> the package that has it, and the extra of pyproject.toml that names this one.
PACKAGES = {
    "ot": ("POT", "ot"),
    "PIL": ("pillow", "images"),
    "sklearn": ("scikit-learn", "images"),
    "matplotlib": ("matplotlib", "plots"),
    "fastapi": ("fastapi", "serve"),
    "uvicorn": ("uvicorn", "serve"),
    "gguf": ("gguf", None),
    "peft": ("peft", None),
}


def load(module: str, user: str) -> ModuleType:
    """Import a module of a package that may be missing, or say what to install.

    A function that needs one calls this first: whoever lacks it must not wait for a result that
    cannot be given.

    Args:
        module: to import; its package is one of :data:`PACKAGES`.
        user: what needs it, for the message.

    Raises:
        ImportError: the package is not installed.

    Example:
        >>> extras.load("matplotlib", "plot_samples")
    """
    root = module.partition(".")[0]
    package, extra = PACKAGES[root]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or root).partition(".")[0] != root:  # a package that this one needs
            raise
        raise ImportError(f"{user} needs {package}: {advice(package, extra=extra)}") from error


def advice(*packages: str, extra: str | None) -> str:
    """Return what installs packages: the command for them, and that for the extra that has them."""
    command = f"pip install {' '.join(packages)}"
    if extra is None:
        return command
    return f'{command}, or from a checkout pip install --no-build-isolation ".[{extra}]"'
