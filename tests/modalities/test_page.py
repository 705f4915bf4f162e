"""The code of docs/modalities.md, which runs as written, with a tiny model."""

import re
from pathlib import Path

import pytest
import torch
from support.model_zoo import make_model
from support.text_tokenizer import make_tokenizer

PAGE = Path(__file__).parents[2] / "docs/modalities.md"
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
# section -> the one whose names it goes on with
AFTER = {"Training": "Placeholders", "Chat templates": "Training"}


def code_of(section):
    """Return the code of a section, after that of the sections which it goes on from."""
    earlier = code_of(AFTER[section]) if section in AFTER else ""
    _, *parts = SECTION.split(PAGE.read_text())
    texts = dict(zip(parts[::2], parts[1::2], strict=True))
    return earlier + "".join(re.findall(r"```python\n(.*?)```", texts[section], re.DOTALL))


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = make_tokenizer(pad_token="<pad>")
    return {"torch": torch, "model": make_model("olmoe"), "tokenizer": tokenizer}


def test_chats_after_training_after_placeholders(names, tmp_path):
    model = names["model"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    exec(code_of("Chat templates"), names)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert names["batch"]["labels"][0, -3:].tolist() == [4, 5, 2]
    assert (names["batch"]["labels"][0, :-3] == -100).all()
    with names["joining_placeholders"](model, names["placeholders"]):
        assert model(**names["batch"]).loss.isfinite()
    assert (tmp_path / "my-adapter").is_dir()
