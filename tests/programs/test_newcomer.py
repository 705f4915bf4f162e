"""``examples/newcomer.py``, as a newcomer runs it: two processes, own pictures, a small base."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.programs import save_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = Path(__file__).parents[2] / "examples" / "newcomer.py"
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def make_base(folder):
    """Save a small dense Llama with random weights, whose tokens are bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_byte_tokenizer(folder)


def make_pictures(folder):
    """Save squares of two colours, in sizes of their own; captions are as spreadsheets write them.

    A mark begins the file, each field stands in quotes, and the last line is empty.
    """
    folder.mkdir()
    with (folder / "captions.csv").open("w", encoding="utf-8-sig", newline="") as file:
        lines = csv.writer(file, quoting=csv.QUOTE_ALL)
        for number in range(8):
            name, colour = list(COLOURS.items())[number % 2]
            Image.new("RGB", (20 + number, 40), colour).save(folder / f"{number}.png")
            lines.writerow([f"{number}.png", f"a {name} square, plain"])
        lines.writerow([])


def run(*arguments, **options):
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Learn sixty steps; return the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("newcomer")
    make_base(folder / "base")
    make_pictures(folder / "pictures")
    said = run("learn", "base", "pictures", "out", "60", cwd=folder)
    return folder / "out", said


def test_the_script_is_short():
    assert len(SCRIPT.read_text().splitlines()) <= 55


@pytest.mark.slow
def test_a_wrong_call_is_told_the_right_one():
    command = [sys.executable, str(SCRIPT), "draw", "out"]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    assert "newcomer.py learn" in said and "Traceback" not in said


def test_text_keeps_every_bit(out):
    assert re.search("tokens changed by the adapters +0 of 24", out[1])


def test_a_new_process_draws_in_the_pictures_colours(out, tmp_path):
    """The small base learns no more than this in as few steps: red, blue, and nothing green."""
    run("draw", str(out[0]), "a red square, plain", str(tmp_path / "drawn.png"))
    drawn = np.asarray(Image.open(tmp_path / "drawn.png"))
    assert drawn.shape == (256, 256, 3)
    red, green, blue = drawn.reshape(-1, 3).mean(0)
    assert green < 80 and red + blue > 180, (red, green, blue)
