"""Files of image tokenizers: their names, and one ValueError that names a damaged one."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.saved_adapters import (
    EARLIER_TOKENIZER,
    SAYS_WHOSE,
    STRANGERS,
    TOKENIZER,
    give_earlier_names,
    rewrite,
    strange,
)
from support.text_tokenizer import make_tokenizer
from transformers import AutoTokenizer

from moe_kernels.imaging import PatchTokenizer, VQTokenizer, load_image_tokenizer

WEIGHTS, CONFIG = TOKENIZER
STRANGE = (None, "4", 0, -1, 4.0, True, [4], 10**9, 10**400, math.nan)


@pytest.fixture(scope="module", params=["patch", "vq"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "patch":
        PatchTokenizer(torch.rand(8, 12), 2, (4, 6, 3)).save(folder)
    else:
        pictures, sizes = torch.rand(4, 8, 8, 3), {"num_codes": 4, "downsample": 4, "width": 16}
        VQTokenizer.fit(pictures, **sizes, steps=1, progress=False).save(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def configure(folder, config):
    """Write a configuration beside the weights, and into their header."""

    def change(header):
        header.clear()
        header.update(config)

    rewrite(folder, change, names=TOKENIZER)


def test_a_whole_tokenizer_is_loaded(copy, saved):
    first, second = load_image_tokenizer(saved), load_image_tokenizer(copy)
    codes = torch.arange(2 * first.tokens_per_image).reshape(2, -1) % first.num_codes
    assert torch.equal(first.decode(codes), second.decode(codes))


def test_earlier_names_are_read_and_give_way(copy):
    tokenizer = load_image_tokenizer(copy)
    give_earlier_names(copy, TOKENIZER, EARLIER_TOKENIZER)
    assert torch.equal(load_image_tokenizer(copy).codebook, tokenizer.codebook)
    tokenizer.save(copy)
    assert sorted(path.name for path in copy.iterdir()) == sorted(TOKENIZER)
    assert torch.equal(load_image_tokenizer(copy).codebook, tokenizer.codebook)


@pytest.mark.parametrize("header", [True, False])
def test_the_configuration_of_a_text_tokenizer_is_not_ours(copy, header):
    """Under the earlier name it used to replace ours, or ours it."""
    tokenizer, text = load_image_tokenizer(copy), make_tokenizer(bos_token="<s>")
    give_earlier_names(copy, TOKENIZER, EARLIER_TOKENIZER)
    weights = copy / EARLIER_TOKENIZER[0]
    if not header:
        save_file(load_file(weights), weights)  # as before there was one
    text.save_pretrained(copy)
    if header:
        assert load_image_tokenizer(copy).num_codes == tokenizer.num_codes
    else:
        with pytest.raises(FileNotFoundError, match=f"no image tokenizer in {copy}: {WEIGHTS} is"):
            load_image_tokenizer(copy)
    tokenizer.save(copy)
    assert weights.exists() is not header
    assert AutoTokenizer.from_pretrained(copy).bos_token == "<s>"
    assert torch.equal(load_image_tokenizer(copy).codebook, tokenizer.codebook)


@pytest.mark.parametrize("content", STRANGERS, ids=lambda content: str(content)[:12])
@pytest.mark.parametrize("name", TOKENIZER)
def test_a_file_of_something_else_is_not_replaced(name, content, tmp_path):
    tokenizer = PatchTokenizer(torch.rand(8, 12), 2, (4, 6, 3))
    with strange(tmp_path, name, content), pytest.raises(FileExistsError, match=SAYS_WHOSE):
        tokenizer.save(tmp_path)


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: str(value)[:10])
def test_every_field_is_checked(copy, value):
    config = json.loads((copy / CONFIG).read_text())
    for name in config:
        changed = config | {name: value}
        configure(copy, changed)
        if changed == config:
            continue
        with pytest.raises(ValueError, match=str(copy)):
            load_image_tokenizer(copy)


def test_every_field_is_needed(copy):
    config = json.loads((copy / CONFIG).read_text())
    for name in config:
        rest = {other: value for other, value in config.items() if other != name}
        configure(copy, rest)
        with pytest.raises(ValueError, match=str(copy)):
            load_image_tokenizer(copy)


@pytest.mark.parametrize("side", STRANGE, ids=lambda value: str(value)[:10])
def test_every_side_of_the_pictures_is_checked(copy, side):
    config = json.loads((copy / CONFIG).read_text())
    for place in range(3):
        shape = list(config["image_shape"])
        shape[place] = side
        configure(copy, config | {"image_shape": shape})
        with pytest.raises(ValueError, match=str(copy)):
            load_image_tokenizer(copy)


def test_the_reason_names_what_is_expected(copy):
    config = json.loads((copy / CONFIG).read_text())
    configure(copy, config | {"image_shape": [8]})
    with pytest.raises(ValueError, match="image_shape must be 2 or 3 integers in 1"):
        load_image_tokenizer(copy)
    if "downsample" in config:
        configure(copy, config | {"channels": 7})
        with pytest.raises(ValueError, match=r"'channels': 7.* are not for images of \("):
            load_image_tokenizer(copy)


def test_a_list_is_no_configuration(copy):
    save_file(load_file(copy / WEIGHTS), copy / WEIGHTS)
    (copy / CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="is damaged: it is a list, not an object"):
        load_image_tokenizer(copy)


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{", b"[" * 100_000, b"\xff\xfe{}"],
                         ids=range(6))  # fmt: skip
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_damaged_files_are_named(copy, name, content):
    """Files of older versions have their configuration in the JSON alone."""
    save_file(load_file(copy / WEIGHTS), copy / WEIGHTS)
    assert load_image_tokenizer(copy).num_codes in (4, 8)
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{copy / name} is damaged"):
        load_image_tokenizer(copy)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(copy, bad):
    tensors = load_file(copy / WEIGHTS)
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1)[-1] = bad
        save_file(tensors | {name: changed}, copy / WEIGHTS, {"format": "pt"})
        with pytest.raises(ValueError, match=f"{name} has 1 values of .* that are not finite"):
            load_image_tokenizer(copy)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64], ids=str)
def test_a_codebook_that_is_not_of_floats_is_refused(copy, dtype):
    tensors = load_file(copy / WEIGHTS)
    save_file(tensors | {"codebook": tensors["codebook"].to(dtype)}, copy / WEIGHTS)
    with pytest.raises(ValueError, match="codebook is .*; tensors must be one of F64"):
        load_image_tokenizer(copy)
    del tensors["codebook"]
    save_file(tensors, copy / WEIGHTS)
    with pytest.raises(ValueError, match="has None codes|lacks 1 tensors, such as codebook"):
        load_image_tokenizer(copy)
