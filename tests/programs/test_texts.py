"""Texts that come with Python: parts, blocks and refusals."""

import pytest
from support.programs import imported


@pytest.fixture(scope="module")
def texts():
    with imported("shared.texts") as module:
        yield module


def test_parts_share_no_paragraph(texts):
    parts = {
        part: {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}
        for part, text in texts.documentation().items()
    }
    assert parts.keys() == {"train", "choice", "test"}
    assert not parts["train"] & parts["test"] and not parts["train"] & parts["choice"]
    assert not parts["choice"] & parts["test"]
    assert min(map(len, parts.values())) > 100


def test_a_later_text_keeps_what_an_earlier_one_shares(texts):
    parts = {"a": "one\n\ntwo\n\nthree", "b": "two  \n\nfour", "c": "three\n\nfour"}
    kept = texts.without_shared_paragraphs(parts)
    assert kept == {"a": "one", "b": "two  ", "c": "three\n\nfour"}
    assert list(kept) == ["a", "b", "c"] and texts.without_shared_paragraphs({}) == {}


def test_a_text_shorter_than_a_block_is_refused(texts):
    with pytest.raises(ValueError, match="less than one block of 8"):
        texts.text_blocks(tokenizer, "abc", 8, 8)


def tokenizer(text, **_):
    from types import SimpleNamespace

    import torch

    return SimpleNamespace(input_ids=torch.tensor([[ord(letter) for letter in text]]))
