"""Console command ``moe-kernels``: each program by its name.

A program is imported when it is called, since most take seconds to import and need packages of the
extra ``demo``.
"""

import difflib
import importlib
import importlib.metadata
import importlib.util
import sys
from typing import NamedTuple

from moe_kernels import extras

# Package -> its distribution, of those that programs import beyond the library's own dependencies.
_OF_PROGRAMS = {
    "accelerate": "accelerate",
    "matplotlib": "matplotlib",
    "mlxtend": "mlxtend",
    "rich": "rich",
    "sklearn": "scikit-learn",
    "tokenizers": "tokenizers",
}


class Command(NamedTuple):
    """Name of the module whose ``main(arguments)`` a command runs, and the list's line on it."""

    module: str
    summary: str

    @property
    def is_program(self) -> bool:
        return self.module.startswith("moe_kernels.programs.")


COMMANDS = {
    "info": Command("moe_kernels.info", "versions, build, backends, and why one is missing"),
    "demo": Command(
        "moe_kernels.programs.demo", "pretrain a small text model and teach it to draw digits"
    ),
    "train-text-to-image": Command(
        "moe_kernels.programs.train_text_to_image", "teach a pretrained model to draw pictures"
    ),
    "generate-images": Command(
        "moe_kernels.programs.generate_images", "draw with a trained adapter"
    ),
    "draw": Command(
        "moe_kernels.programs.draw", "teach a pretrained model to draw in colour, and serve a page"
    ),
    "analyze-routing": Command(
        "moe_kernels.programs.analyze_routing", "measure which experts serve which modality"
    ),
    "convert": Command(
        "moe_kernels.programs.convert_dense_to_moe",
        "convert a dense model to a Mixture of Experts, and heal it",
    ),
    "extend": Command(
        "moe_kernels.programs.extend_experts", "add experts for pictures in MoExtend's three stages"
    ),
    "estimate-memory": Command(
        "moe_kernels.programs.estimate_memory", "say how much memory full-size models need"
    ),
    "tune": Command("moe_kernels.tune", "time Triton's tiles on this GPU, and store the best"),
}


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: moe-kernels COMMAND [OPTION ...]", "", "commands:", *lines, "",
         "moe-kernels COMMAND --help explains a command; moe-kernels --version prints the version."]
    )  # fmt: skip


def missing_packages(command: Command) -> str | None:
    """Say which packages a command lacks and how to install them; None: it lacks none."""
    if not command.is_program:
        return None
    absent = [
        name for package, name in _OF_PROGRAMS.items() if importlib.util.find_spec(package) is None
    ]
    if not absent:
        return None
    how = extras.advice(*absent, extra="demo,images")
    return f"not installed: {', '.join(absent)}; {how}"


def refuse(problem: str) -> int:
    """Print why a call cannot be run, and return its exit code."""
    print(f"moe-kernels: {problem}", file=sys.stderr)
    return 2


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: the name of the command, then its own; None for those of the process
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(importlib.metadata.version("modality-moe-kernels"))
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        return refuse(f"no command {name}{guess} (moe-kernels --help lists them)")
    if problem := missing_packages(COMMANDS[name]):
        return refuse(f"{name}: {problem}")
    return importlib.import_module(COMMANDS[name].module).main(rest) or 0
