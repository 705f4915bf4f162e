"""Command lines of the programs: options declared as dataclass fields, exit codes, the console."""

from __future__ import annotations

import argparse
import dataclasses
import dis
import inspect
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import huggingface_hub
import torch
import transformers
from rich.console import Console
from safetensors import SafetensorError
from transformers import HfArgumentParser

import moe_kernels

console = Console(highlight=False)
_LARGEST = 2**31 - 1  # of an integer without a limit of its own; beyond it, libraries overflow


# --- options


def option(default: Any, help: str, **arguments: Any) -> Any:
    """Return a dataclass field that is an option of the command line.

    Args:
        default: `dataclasses.MISSING` for a required option
        arguments: of `argparse.ArgumentParser.add_argument`, and what :class:`Options` checks:
            `at_least`, `at_most` and `above`, limits of numbers; `is_file` and `is_folder`, for
            paths. `positional` options are given without their name.
    """
    metadata = {"help": help, **arguments}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def spelling(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Options:
    """Base class of dataclasses with fields made by :func:`option`.

    Other fields are settings that the command line does not offer.
    """

    def __post_init__(self) -> None:
        """Check the limits.

        Raises:
            ValueError: a value is outside its limits, or a file or folder does not exist.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for each in value if isinstance(value, list) else [value]:
                if each is not None:
                    _check(spelling(field.name), each, field.metadata)

    def pick(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def of(self, *groups: type) -> dict[str, Any]:
        """Return the values of the fields that these classes declare."""
        return self.pick(*(name for group in groups for name in inspect.get_annotations(group)))


def _check(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if "at_least" in limits and not limits["at_least"] <= value < math.inf:
        raise ValueError(f"{name} must be at least {limits['at_least']}")
    most = limits.get("at_most", _LARGEST if isinstance(value, int) else None)
    if most is not None and not value <= most:
        raise ValueError(f"{name} must be at most {most:,}")
    if "above" in limits and not limits["above"] < value < math.inf:
        raise ValueError(f"{name} must be above {limits['above']}")
    if limits.get("is_file") and not Path(value).is_file():
        raise ValueError(f"{name}: {value} is not a file")
    if limits.get("is_folder") and not Path(value).is_dir():
        raise ValueError(f"{name}: there is no folder {value}")


class OptionParser(HfArgumentParser):
    """Parser for one dataclass of options.

    Unlike `HfArgumentParser`, it spells names with hyphens only, gives flags no value, shows
    defaults, and groups options by the class that first declares them.
    """

    _group = None  # the one that options are being added to

    def __init__(self, options: type[Options], description: str, prog: str | None = None):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(options, prog=prog, description=description, formatter_class=formatter)

    def _add_dataclass_arguments(self, dtype: type[Options]) -> None:
        hints = get_type_hints(dtype)
        fields = [field for field in dataclasses.fields(dtype) if "help" in field.metadata]
        owners = {name: owner for owner in dtype.__mro__ for name in inspect.get_annotations(owner)}
        for owner in dtype.__mro__:
            if not any(owners[field.name] is owner for field in fields):
                continue
            self._group = self.add_argument_group(inspect.getdoc(owner).splitlines()[0].rstrip("."))
            for field in fields:
                if owners[field.name] is owner:
                    field.type = hints[field.name]
                    self._parse_dataclass_field(self, field)

    def add_argument(self, *names: str, **arguments: Any) -> argparse.Action:
        if self._group is None:  # --help
            return super().add_argument(*names, **arguments)
        name, default = names[-1], arguments.get("default")
        for check in ("at_least", "at_most", "above", "is_file", "is_folder"):
            arguments.pop(check, None)
        if "const" in arguments:
            arguments = {"action": "store_true", "help": arguments["help"]}
        elif arguments.pop("positional", False):
            name = name.removeprefix("--")
            if not arguments.pop("required", False):
                arguments["nargs"] = "?"
        elif default not in (None, []):
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            arguments["help"] += f"; default: {shown}"
        return self._group.add_argument(name, **arguments)


Parsed = TypeVar("Parsed", bound=Options)


def parse(
    options: type[Parsed],
    arguments: list[str] | None,
    description: str,
    *,
    prog: str | None = None,
    quick: Mapping[str, Any] | None = None,
) -> Parsed:
    """Parse a command line; end with exit code 2 where an option is refused.

    Args:
        arguments: None for those of the process
        prog: name of the program in its usage; None: that of the file that was started
        quick: other defaults, for a program with an option --quick
    """
    parser = OptionParser(options, description, prog)
    given = parser.parse_args(arguments)
    if quick and given.quick:
        parser.set_defaults(**quick)
        given = parser.parse_args(arguments)
    try:
        return options(**vars(given))
    except (ValueError, OSError) as error:
        parser.error(str(error))


# --- running


# What a user can mend: files, a full disk, too little memory, a missing package.
_MENDABLE = (OSError, ImportError, MemoryError, torch.OutOfMemoryError, SafetensorError)
# The same, if one of these packages refuses what it was given. Python and the libraries beneath
# raise it for faults of a program too, such as an item that is not in a list.
_REFUSALS = (ValueError, ArithmeticError)
_REFUSING = [
    Path(module.__file__).parent for module in (moe_kernels, transformers, huggingface_hub)
]
# torch raises a RuntimeError with these words where memory, a disk or a file is at fault.
_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
_OF_FILES = ("inline_container", "PytorchStreamWriter", "PytorchStreamReader")


def exit_code(work: Callable[[], Any]) -> int:
    """Run a program and return its exit code: an error that its user can mend becomes one line.

    Any other error keeps its traceback, since it is a fault of the program.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        work()
    except KeyboardInterrupt:
        console.print("stopped; the same command continues from here")
        return 130
    except (*_MENDABLE, *_REFUSALS, RuntimeError) as error:
        if (problem := _problem(error, Path(work.__code__.co_filename).parent)) is None:
            raise
        console.print(f"error: {problem}", markup=False, soft_wrap=True)
        return 1
    return 0


def _problem(error: Exception, folder: Path) -> str | None:
    """Return in one line what a user can mend; None for a fault of the program in ``folder``."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(words in text for words in _OF_MEMORY):
        why = f" ({text})" if text else ""
        return f"there is too little memory{why}; a smaller batch, or model, needs less"
    if any(words in text for words in _OF_FILES):
        return f"a file could not be written or read to its end; is the disk full? ({text})"
    is_mendable = isinstance(error, _MENDABLE) or _is_refusal(error, folder)
    return (text or type(error).__name__) if is_mendable else None


def _is_refusal(error: Exception, folder: Path) -> bool:
    """Return whether a `raise` in ``folder``, in our package or in transformers raised it."""
    if not isinstance(error, _REFUSALS):
        return False
    place = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    code = place.tb_frame.f_code
    is_raise = dis.opname[code.co_code[place.tb_lasti]] == "RAISE_VARARGS"
    file = Path(os.path.abspath(code.co_filename))
    return is_raise and any(file.is_relative_to(each.absolute()) for each in (*_REFUSING, folder))
