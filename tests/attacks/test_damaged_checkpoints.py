"""Bit flips and cuts in the file from which healing goes on: refused, or without effect."""

import pytest
import torch

from moe_kernels.conversion import checkpoints


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}": torch.randn(7, 5, generator=generator) for i in range(4)}
    path = tmp_path / "healing.pt"
    checkpoints.save(path, {"described": {"steps": 3}, "step": 2, "parameters": tensors})
    return path


def describe(state):
    tensors = {name: (t.dtype, t.tolist()) for name, t in state["parameters"].items()}
    return {name: value for name, value in state.items() if name != "parameters"} | tensors


def test_a_flipped_bit_is_refused_or_without_effect(file, attack):
    content, expected = file.read_bytes(), describe(checkpoints.read(file))
    refused = []
    for number in attack.tries(8 * len(content)):
        damaged = bytearray(content)
        damaged[number // 8] ^= 1 << number % 8
        file.write_bytes(damaged)
        try:
            # Between the records are padding and dates, in which a flip changes nothing.
            assert describe(checkpoints.read(file)) == expected, number
        except ValueError as error:
            assert "is damaged" in str(error) or "of another version" in str(error)
            refused.append(number)
    assert refused


def test_a_cut_file_is_refused(file, attack):
    content = file.read_bytes()
    for length in attack.tries(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is damaged"):
            checkpoints.read(file)


def test_a_flipped_bit_of_any_value_is_refused(file, attack):
    content, values = file.read_bytes(), checkpoints.read(file)["parameters"]["layers.2"]
    start = content.index(values.numpy().tobytes())
    for number in attack.tries(8 * values.numel() * values.itemsize):
        damaged = bytearray(content)
        damaged[start + number // 8] ^= 1 << number % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="the checksum of .* differs"):
            checkpoints.read(file)
