"""Models that the programs load: damaged files and missing weights are named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_zoo import make_model
from support.programs import imported, save_byte_tokenizer


@pytest.fixture(scope="module")
def models():
    with imported("shared.models") as module:
        yield module


@pytest.fixture
def folder(tmp_path):
    save_byte_tokenizer(tmp_path)
    make_model("mixtral", vocab_size=256).save_pretrained(tmp_path)
    return tmp_path


def load_all(models, folder):
    models.require_experts(str(folder))
    models.load_tokenizer(folder)
    return models.load_causal_lm(folder, torch.float32, "cpu")


FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'{"a": ' + b"[" * 100_000, None],
                         ids=("empty", "null", "list", "deep", "cut off"))  # fmt: skip
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_its_model(models, folder, name, content):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises((ValueError, OSError), match=str(folder)):
        load_all(models, folder)


def test_a_file_that_cannot_be_read_may_be_damaged(models, folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r" cannot be loaded, a file may be damaged \("):
        models.load_config(folder)


def test_missing_weights_are_not_drawn_at_random(models, folder):
    assert not load_all(models, folder).training
    file = folder / "model.safetensors"
    tensors = load_file(file)
    lost = "model.layers.1.self_attn.q_proj.weight"
    save_file({name: t for name, t in tensors.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights: {lost}"):
        load_all(models, folder)


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "/nowhere", "with space", "a..b"])
def test_a_wrong_path_is_no_name_of_the_hub(models, name, monkeypatch):
    monkeypatch.setattr(models.AutoConfig, "from_pretrained", lambda *_: pytest.fail("was asked"))
    where = "" if name.startswith("/") else f" in {Path.cwd()}"
    folder = Path(name)
    with pytest.raises(FileNotFoundError, match=f"^no model: there is no folder {folder}{where}$"):
        models.load_config(name)


def test_a_file_is_no_model(models, tmp_path, monkeypatch):
    (tmp_path / "model").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="^no model: model is a file, not a folder$"):
        models.load_config("model")


def test_a_name_that_may_be_of_the_hub_is_looked_for_there_too(models, monkeypatch):
    def refuse(*_):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", refuse)
    words = "there is no folder my-modl in .*, and none of this name from the hub: We couldn't"
    with pytest.raises(OSError, match=words):
        models.load_config("my-modl")


def test_a_fault_of_memory_is_not_called_damage(models):
    with pytest.raises(MemoryError, match="Unable"), models.reading("model"):
        raise MemoryError("Unable to allocate")
