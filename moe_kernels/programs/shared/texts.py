"""Texts that come with Python, in parts that share no paragraph."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from moe_kernels.programs.shared.files import read_text

PARTS = ("train", "choice", "test")


def documentation() -> dict[str, str]:
    """Return Python's own documentation by part: two of ten topics are for choice and test."""
    from pydoc_data.topics import topics

    return _by_part(topics[name] for name in sorted(topics))


def held_out_text(file: str | None) -> str:
    """Return the text of the file; without a file, documentation kept for tests."""
    return read_text(file) if file else documentation()["test"]


def source_code() -> dict[str, str]:
    """Return the standard library's top-level modules by part, each module in one part."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return _by_part(path.read_text(encoding="utf-8", errors="replace") for path in modules)


def _by_part(texts: Iterable[str]) -> dict[str, str]:
    """Join texts by part, without the paragraphs that they quote from each other."""
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for index, text in enumerate(texts):
        parts[{0: "test", 5: "choice"}.get(index % 10, "train")].append(text)
    return without_shared_paragraphs({part: "\n\n".join(each) for part, each in parts.items()})


def without_shared_paragraphs(texts: dict[str, str]) -> dict[str, str]:
    """Remove from each text the paragraphs that a later text has."""
    kept, seen = {}, set()
    for part, text in reversed(texts.items()):
        paragraphs = text.split("\n\n")
        keys = [" ".join(paragraph.split()) for paragraph in paragraphs]
        pairs = zip(keys, paragraphs, strict=True)
        kept[part] = "\n\n".join(paragraph for key, paragraph in pairs if key not in seen)
        seen.update(keys)
    return {part: kept[part] for part in texts}


def spread(rows: torch.Tensor, most: int) -> torch.Tensor:
    """Return at most ``most`` of the rows, evenly spaced."""
    return rows[:: max(1, len(rows) // most)][:most]


def text_blocks(
    tokenizer: PreTrainedTokenizerBase, text: str, block: int, stride: int
) -> torch.Tensor:
    """Return (blocks, block) token ids, without special tokens.

    Raises:
        ValueError: the text is shorter than one block.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False, add_special_tokens=False)
    ids = ids.input_ids[0]
    if len(ids) < block:
        raise ValueError(f"the text has {len(ids)} tokens, less than one block of {block}")
    return ids.unfold(0, block, stride)
