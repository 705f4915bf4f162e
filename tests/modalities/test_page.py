"""The code of docs/modalities.md, which runs as written, with a tiny model."""

import importlib.util
import math
import re
import wave
from pathlib import Path

import pytest
import torch
from support.model_zoo import make_model
from support.text_tokenizer import make_tokenizer

from moe_kernels.imaging import ImageCollator
from moe_kernels.testing import relative_rms

PAGE = Path(__file__).parents[2] / "docs/modalities.md"
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
# section -> the one whose names it goes on with
AFTER = {"Training": "Placeholders", "Chat templates": "Training"}
READING = "Reading pictures without added experts"


def code_of(section, number=None):
    """Return the code of a section, or one block, after that of sections it goes on from."""
    earlier = code_of(AFTER[section]) if section in AFTER else ""
    _, *parts = SECTION.split(PAGE.read_text())
    texts = dict(zip(parts[::2], parts[1::2], strict=True))
    blocks = re.findall(r"```python\n(.*?)```", texts[section], re.DOTALL)
    return earlier + "".join(blocks if number is None else blocks[number : number + 1])


def listen():
    """Return the module of examples/listen.py."""
    pytest.importorskip("sklearn")
    path = PAGE.parents[1] / "examples/listen.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = make_tokenizer(pad_token="<pad>")
    return {"torch": torch, "model": make_model("olmoe"), "tokenizer": tokenizer}


def test_chats_after_training_after_placeholders(names, tmp_path):
    model = names["model"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    path = tmp_path / "base"
    model.save_pretrained(path)
    names["name"] = str(path)
    exec(code_of("Chat templates"), names)
    loaded = names["patched"].model
    assert loaded is not model
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert names["batch"]["labels"][0, -3:].tolist() == [4, 5, 2]
    assert (names["batch"]["labels"][0, :-3] == -100).all()
    with names["joining_placeholders"](model, names["placeholders"]):
        assert model(**names["batch"]).loss.isfinite()
    assert (tmp_path / "my-adapter").is_dir()


def test_pictures_are_told_apart_without_added_experts(names, capsys):
    """The lines of the page teach a model to name two kinds of features it has not seen."""
    kinds = torch.randn(2, 6)
    pictures = [kinds[i % 2] + 0.1 * torch.randn(3, 6) for i in range(16)]
    names |= {"features": pictures, "captions": ["a cat", "red dog"] * 8}
    names["tokenizer"].eos_token = "</s>"
    text = torch.tensor([[3, 4, 5, 6]])
    train, ask = code_of(READING, number=0), code_of(READING, number=1)
    assert len(train.splitlines()) - 6 <= 10  # beside the imports
    exec(train, names)
    model = names["model"]
    assert names["patched"].extensions == []
    for kind, answer in enumerate(("a cat", "red dog")):
        names["features"] = [kinds[kind] + 0.1 * torch.randn(3, 6)]
        exec(ask, names)
        written = capsys.readouterr().out.strip().removesuffix(" </s>")
        assert written.endswith(answer)
    with names["patched"].text_only():
        kept = model(text).logits
        names["patched"].unpatch()
        assert relative_rms(model(text).logits, kept) < 1e-5


def test_sounds_as_tokens(names):
    """A sound becomes a picture of one channel, codes in the order of time, and comes back."""
    at = torch.arange(8000) / 8000
    waves = [torch.sin(6.28 * pitch * (1 + at) * at) for pitch in (200, 300, 500, 800)]
    waves += [each * torch.rand(8000) for each in waves]
    names |= {"waves": waves, "captions": ["a dog", "a cat"] * 4}
    exec(code_of("Audio"), names)
    for wave_ in waves:
        frames = names["log_mel"](wave_, 8000)
        assert torch.equal(frames, listen().log_mel(wave_, 8000))
    assert names["spectrogram"].shape == (1, 64, 40) and names["codes"].shape == (1, 40)
    restored = names["audio_tokenizer"].decode(names["audio_tokenizer"].encode(names["pictures"]))
    assert (restored - names["pictures"]).square().mean() < names["pictures"].var() / 4
    collate = ImageCollator(0)
    names["model"](**collate([names["data"][0], names["data"][1]])).loss.backward()


@pytest.mark.parametrize("rate", [8000, 16000])
def test_a_tone_is_loudest_in_its_band(rate):
    at = torch.arange(rate) / rate
    top = 2595 * math.log10(1 + rate / 2 / 700)
    for pitch in (440.0, 1000.0, 3000.0):
        frames = listen().log_mel(torch.sin(2 * math.pi * pitch * at), rate)
        assert frames.shape == (101, 40)
        band = 2595 * math.log10(1 + pitch / 700) / top * 41 - 1
        assert abs(frames[20:80].mean(0).argmax() - band) <= 1


SPEECH = Path("/usr/share/asterisk/sounds")  # of Debian's asterisk-core-sounds-*-wav


@pytest.fixture
def sounds(tmp_path):
    """Return the folder of recorded speech, if it is installed; else make whistles in two ways.

    The made ones rise in one "language" and fall in the other.
    """
    if len(list(SPEECH.glob("??_*/digits/1.wav"))) > 1:
        return SPEECH
    at = torch.arange(6000) / 8000
    for language, slope in (("up", 1), ("down", -1)):
        folder = tmp_path / "sounds" / f"{language}_made"
        folder.mkdir(parents=True)
        for number in range(120):
            pitch = 800 + 5 * number + slope * 600 * at
            samples = torch.sin(6.28 * pitch * at) * 20000
            with wave.open(str(folder / f"{number}.wav"), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes(samples.short().numpy().tobytes())
    return tmp_path / "sounds"


def test_a_model_hears_and_sees(sounds, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    listen().main(str(sounds), "40")
    said = capsys.readouterr().out
    for name in ("image", "audio"):
        right, commonest = re.search(rf"{name}: (\d+)% of .*commonest: (\d+)%", said).groups()
        assert int(right) > int(commonest) + 15
