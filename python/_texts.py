"""Texts that come with Python: its own documentation, in parts that share no paragraph."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

PARTS = ("train", "choice", "test")


def documentation() -> dict[str, str]:
    """Python's own documentation by part: two of ten topics are for choice and test."""
    from pydoc_data.topics import topics

    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for index, name in enumerate(sorted(topics)):
        part = {0: "test", 5: "choice"}.get(index % 10, "train")
        parts[part] += topics[name].split("\n\n")
    # Topics quote each other: what the test has, no other part may have.
    seen: set[str] = set()
    for part in reversed(PARTS):
        keys = [" ".join(paragraph.split()) for paragraph in parts[part]]
        pairs = zip(keys, parts[part], strict=True)
        parts[part] = [paragraph for key, paragraph in pairs if key not in seen]
        seen.update(keys)
    return {part: "\n\n".join(paragraphs) for part, paragraphs in parts.items()}


def text_blocks(
    tokenizer: PreTrainedTokenizerBase, text: str, block: int, stride: int
) -> torch.Tensor:
    """(blocks, block) token ids, without special tokens"""
    ids = tokenizer(text, return_tensors="pt", verbose=False, add_special_tokens=False)
    ids = ids.input_ids[0]
    if len(ids) < block:
        raise ValueError(f"the text has {len(ids)} tokens, less than one block of {block}")
    return ids.unfold(0, block, stride)
