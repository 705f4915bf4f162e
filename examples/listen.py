"""Teach a text model to hear and to see: recorded speech and digits in, text out.

    apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-wav        # real speech, CC-BY-SA
    python examples/listen.py /usr/share/asterisk/sounds 600

It answers in which language a recording speaks, and which digit a picture of scikit-learn shows, by
masked low-rank updates and a projector for each. The last number is of steps. SOUNDS/LANGUAGE_*/**
must have WAV files, mono and of 16 bits. The text model has random weights, so that the example
needs no others; a pretrained one is patched in the same way.
"""

import random
import sys
import wave
from pathlib import Path

import tokenizers
import torch
from sklearn.datasets import load_digits
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers import TrainingArguments as Arguments

from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.modalities import ModalityCollator, add_placeholders, joining_placeholders
from moe_kernels.moextend import ExpertExtender
from moe_kernels.training import AdapterTrainer

BANDS, STACKED, SECONDS = 40, 4, 1.5


def log_mel(samples: torch.Tensor, rate: int) -> torch.Tensor:
    """Return the log energy of a waveform (n,) in BANDS bands, every 10 ms: (frames, BANDS)."""
    size, hop = rate // 31, rate // 100
    window = torch.hann_window(size)
    power = torch.stft(samples, size, hop, window=window, return_complex=True).abs().square()
    top = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700))  # of the mel scale
    edges = 700 * (10 ** (torch.linspace(0, top, BANDS + 2) / 2595) - 1)[:, None]
    at = torch.linspace(0, rate / 2, len(power))
    rising = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles @ power + 1e-6).log10().T


def hear(file: Path) -> torch.Tensor:
    """Return features (n, BANDS * STACKED) of the first SECONDS of a recording, 25 a second."""
    with wave.open(str(file)) as sound:
        rate = sound.getframerate()
        data = sound.readframes(min(sound.getnframes(), int(rate * SECONDS)))
    samples = torch.frombuffer(bytearray(data), dtype=torch.int16).float() / 2**15
    frames = log_mel(samples, rate)
    return frames[: len(frames) // STACKED * STACKED].reshape(-1, BANDS * STACKED) / 3


def read_all(folder: Path) -> list[tuple[str, torch.Tensor, str]]:
    """Return (modality, features, answer) of all recordings and pictures, in random order."""
    files = sorted(file for file in folder.rglob("*.wav") if file.parent.name != "silence")
    files = [file for file in files if file.stat().st_size > 4000]  # some are empty
    sounds = {file.read_bytes(): file for file in files}.values()  # each recording once
    found = [("audio", hear(f), f.relative_to(folder).parts[0].split("_")[0]) for f in sounds]
    digits = load_digits()
    for picture, label in zip(torch.tensor(digits.images).float(), digits.target, strict=True):
        found.append(("image", picture / 8 - 1, str(label)))  # eight rows of eight pixels
    random.Random(0).shuffle(found)
    return found


def main(folder: str, steps: str) -> None:
    """Train on nine tenths, and print how many of the others are answered rightly."""
    set_seed(0)
    items = read_all(Path(folder))
    words = {word: i for i, word in enumerate(["<pad>", "is", *sorted({it[2] for it in items})])}
    words_model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    words_model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_model, pad_token="<pad>")
    config = MixtralConfig(
        vocab_size=len(words), hidden_size=96, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=8,
    )  # fmt: skip
    model = MixtralForCausalLM(config)

    widths = {"image": 8, "audio": BANDS * STACKED}
    patched = patch_model(model, ModalityLoraConfig(r=16, modalities=tuple(widths)))
    for name, width in widths.items():
        ExpertExtender(model).add_projector(width, modality=name)  # it adds no expert
    placeholders = add_placeholders(model, tokenizer)
    data = []
    for name, features, answer in items:
        sample = tokenizer(f"<{name}> is {answer}") | {"features": {name: [features]}}
        data.append(sample | {"labels": [-100, -100, words[answer]]})
    held_out, learnt = data[: len(data) // 10], data[len(data) // 10 :]
    collate = ModalityCollator(placeholders, tokenizer.pad_token_id, "left")
    args = Arguments("out/listen", remove_unused_columns=False, max_steps=int(steps),
                     per_device_train_batch_size=32, learning_rate=3e-3, report_to="none",
                     save_strategy="no", lr_scheduler_type="cosine")  # fmt: skip
    with joining_placeholders(model, placeholders):
        AdapterTrainer(patched, args, train_dataset=learnt, data_collator=collate).train()
        for name, token_id in placeholders.items():
            asked = [each for each in held_out if each["input_ids"][0] == token_id]
            with torch.no_grad():
                logits = model.eval()(**collate(asked)).logits[:, -2]
            truth = torch.tensor([each["labels"][-1] for each in asked])
            right = (logits.argmax(-1) == truth).float().mean()
            commonest = truth.bincount().max() / len(truth)
            print(f"{name}: {right:.0%} of {len(asked)} (always the commonest: {commonest:.0%})")


if __name__ == "__main__":
    main(*sys.argv[1:])
