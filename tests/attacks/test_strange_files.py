"""Damaged and forged files: refused before anything changes, or read as they were written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_zoo import assert_same_snapshot, make_model, randomise, snapshot
from support.saved_adapters import ADAPTER, PEFT, TOKENIZER, places, read, replaced

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.imaging import PatchTokenizer, VQTokenizer, load_image_tokenizer
from moe_kernels.models.peft_format import load_peft_adapter, save_peft_adapter
from moe_kernels.moextend import ExpertExtender

HOSTILE = [
    None, True, -1, 0, 3, 10**9, 2**62, 10**400, 0.5, 1e300, float("nan"), "", "x", "image", "1",
    "\ud800", [], [None], [[1]], {}, {"x": 1}, {"0": -1}, {"image": "x"}, {"0": 10**9},
]  # fmt: skip
PAIRS = ModalityLoraConfig(r=2, lora_alpha=3, rank_pattern={"q_proj": 1})


def save_ours(folder):
    """Save an adapter of everything: pairs, tokens, added experts and a projector."""
    patched = patch_model(make_model("mixtral"), PAIRS)
    add_modality_tokens(patched.model, "image", 3)
    extender = ExpertExtender(patched.model)
    extender.extend([0], 2, init=0, modality="image", calibration="additive")
    extender.add_projector(5, modality="image")
    randomise(patched)
    patched.save_adapter(folder)


def load_ours(folder):
    """Load it as a stranger's adapter is loaded; a ValueError must leave the model as it was."""
    model = make_model("mixtral")
    config = ModalityLoraConfig.from_adapter(folder)
    with unchanged_if_refused(model):
        patched = patch_model(model, config)
    with unchanged_if_refused(model):
        patched.load_adapter(folder)
    return dict(patched.named_trainable_parameters())


def save_peft(folder):
    patched = patch_model(make_model("mixtral"), PAIRS)
    randomise(patched)
    save_peft_adapter(patched, "image", folder)


def load_peft(folder):
    patched = patch_model(make_model("mixtral"), PAIRS)
    with unchanged_if_refused(patched.model):
        load_peft_adapter(patched, "image", folder)
    save_peft_adapter(patched, "image", folder / "again")
    return load_file(folder / "again" / PEFT[0])


def save_patches(folder):
    generator = torch.Generator().manual_seed(0)
    PatchTokenizer(torch.rand(6, 16, generator=generator), 4, (8, 12)).save(folder)


def save_vq(folder):
    images = torch.rand(4, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    VQTokenizer.fit(images, num_codes=6, width=16, steps=1, progress=False).save(folder)


def load_tokenizer(folder):
    return load_image_tokenizer(folder)._tensors()


class unchanged_if_refused:
    """Check that a ValueError leaves a model as it was."""

    def __init__(self, model):
        self.model, self.before = model, snapshot(model)

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if kind is not None and issubclass(kind, ValueError):
            assert_same_snapshot(snapshot(self.model), self.before)


KINDS = {
    "adapter": (save_ours, load_ours, ADAPTER),
    "PEFT's adapter": (save_peft, load_peft, PEFT),
    "patches": (save_patches, load_tokenizer, TOKENIZER),
    "VQ": (save_vq, load_tokenizer, TOKENIZER),
}


@pytest.mark.filterwarnings("ignore:.*is not the configuration of")
@pytest.mark.filterwarnings("ignore:the tokenizer has collapsed")
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_of_the_weights_is_found(kind, attack, tmp_path):
    """A flip that is not found has changed nothing that is read."""
    save, load, (weights, _) = KINDS[kind]
    save(tmp_path)
    data, expected = (tmp_path / weights).read_bytes(), load_file(tmp_path / weights)
    for bit in attack.tries(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / weights).write_bytes(flipped)
        try:
            loaded = load(tmp_path)
        except ValueError:
            continue
        for name, tensor in loaded.items():
            assert torch.equal(tensor, expected[name]), (bit, name)


@pytest.mark.filterwarnings("ignore:the tokenizer has collapsed")
@pytest.mark.parametrize("kind", KINDS)
def test_a_field_of_another_type_or_value(kind, attack, tmp_path):
    """Each is refused by a ValueError before anything changes, or means the same."""
    save, load, names = KINDS[kind]
    save(tmp_path)
    header, tensors = read(tmp_path, names)
    changes = [(path, value) for path in places(header) for value in HOSTILE]
    wrong = []
    for number in attack.tries(len(changes)):
        path, value = changes[number]
        text = json.dumps(replaced(header, path, value))
        metadata = {names[1].removesuffix(".json"): text}
        save_file(tensors, tmp_path / names[0], metadata=metadata)
        (tmp_path / names[1]).write_text(text)
        try:
            load(tmp_path)
        except ValueError:
            continue
        except BaseException as error:
            wrong.append(f"{path} = {value!r:.20}: {error!r:.300}")
    assert not wrong, f"{len(wrong)} of {len(changes)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:the tokenizer has collapsed")
def test_a_file_cut_anywhere(kind, attack, tmp_path):
    save, load, (weights, config) = KINDS[kind]
    save(tmp_path)
    for name in (weights, config):
        data = (tmp_path / name).read_bytes()
        for length in attack.tries(len(data) - 2):
            (tmp_path / name).write_bytes(data[:length])
            if name in (PEFT[1], weights):
                with pytest.raises(ValueError, match="damaged|is not the configuration of"):
                    load(tmp_path)
            else:
                with pytest.warns(UserWarning, match="is not the configuration of"):
                    load(tmp_path)
        (tmp_path / name).write_bytes(data)
