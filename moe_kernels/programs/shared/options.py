"""Options that several programs share, one class for each group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

import moe_kernels
from moe_kernels.programs.shared.cli import Options, option
from moe_kernels.programs.shared.models import DTYPES
from moe_kernels.programs.shared.texts import held_out_text, text_blocks

LARGEST_SEED = 2**32 - 1  # numpy's and scikit-learn's


def out_folder(name: str) -> Any:
    """Return the option --out of a program."""
    return option(Path("out") / name, "folder of the results")


@dataclass(kw_only=True)
class RunOptions(Options):
    """Run."""

    seed: int = option(0, "seed of all random numbers", at_least=0, at_most=LARGEST_SEED)
    device: str | None = option(None, "cpu or cuda; default: cuda where available")
    out: Path = out_folder("")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {self.device} cannot be used: {_usable()}") from error
        if device.type == "meta":
            raise ValueError(f"--device meta holds no numbers: {_usable()}")
        if device.type == "cpu":
            self.device = "cpu"  # without an index


def _usable() -> str:
    """Return the devices that this machine has, in the words of an error."""
    count = torch.cuda.device_count()
    if count == 0:
        return "give cpu (torch finds no CUDA device here)"
    return "give cpu, cuda or cuda:0" + (f" to cuda:{count - 1}" if count > 1 else "")


@dataclass(kw_only=True)
class BackendOptions(RunOptions):
    """Kernels."""

    backend: str | None = option(
        None, "kernels of moe_kernels; default: the fastest available",
        choices=moe_kernels.backends.NAMES,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        device = torch.empty(0, device=self.device).device
        try:
            self.backend = moe_kernels.backends.select(self.backend, device)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"--backend on {self.device}: {error}") from error


@dataclass(kw_only=True)
class ModelOptions(BackendOptions):
    """Base model."""

    dtype: str = option("bfloat16", "dtype of the base model", choices=DTYPES)


def text_file(kind: str) -> Any:
    """Return an option for a text; None stands for Python's documentation."""
    help = f"file of {kind} text; default: Python's documentation"
    return option(None, help, metavar="FILE", is_file=True)


@dataclass(kw_only=True)
class TextOptions(Options):
    """Held-out text."""

    text: str | None = text_file("held-out")
    text_tokens: int = option(2048, "tokens of held-out text to measure", at_least=1)
    text_block: int = option(128, "tokens in a block of text", at_least=2)

    def text_blocks(self, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        """Return (blocks, block) token ids of held-out text.

        Raises:
            ValueError: the text is shorter than one block.
        """
        text = held_out_text(self.text)
        blocks = text_blocks(tokenizer, text, self.text_block, self.text_block)
        return blocks[: max(1, self.text_tokens // self.text_block)]
