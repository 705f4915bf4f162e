"""Arrays of pictures: every dtype and layout has one meaning, or a refusal that says what to do."""

import numpy as np
import pytest
import torch
from PIL import Image

from moe_kernels.imaging import PatchTokenizer, VQTokenizer, to_pil
from moe_kernels.imaging.pixels import as_pixels

BYTES = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(BYTES).float() / 255


@pytest.mark.parametrize(
    "images",
    [
        BYTES,
        torch.from_numpy(BYTES),
        list(BYTES),
        [Image.fromarray(picture) for picture in BYTES],
        BYTES / 255,
        (BYTES / 255).astype(">f4"),
        (BYTES / 255).astype(np.float32),
        np.asfortranarray(BYTES),
        BYTES[:, ::-1][:, ::-1],
        torch.from_numpy(BYTES).float().div(255).requires_grad_(),
    ],
    ids=range(10),
)
def test_the_same_pictures_in_other_arrays(images):
    pixels = as_pixels(images)
    assert pixels.dtype == torch.float32 and not pixels.requires_grad
    torch.testing.assert_close(pixels, EXPECTED, rtol=0, atol=1e-6)


def test_an_array_that_runs_backwards():
    torch.testing.assert_close(as_pixels(BYTES[:, ::-1]), EXPECTED.flip(1))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (BYTES.astype(np.float32), ValueError, "divide values 0..255 by 255, or convert"),
        (BYTES / 127.5 - 1, ValueError, "must lie in"),
        (np.full((2, 4, 4), np.nan), ValueError, "got nan..nan"),
        (BYTES.astype(np.int64), TypeError, "got torch.int64: convert values 0..255 to uint8"),
        (BYTES.astype(np.uint16), TypeError, "divide those of 16 bits by 65535"),
        (BYTES.astype(bool), TypeError, "got torch.bool"),
        (BYTES.astype(complex), TypeError, "or PIL pictures; got .* complex128"),
        (torch.from_numpy(BYTES).cfloat(), TypeError, "got torch.complex64"),
        ([Image.new("P", (4, 4))] * 2, TypeError, "mode of L, RGB, RGBA; got P: convert them"),
        ([Image.new("CMYK", (4, 4))] * 2, TypeError, "got CMYK"),
        ([Image.new("I;16", (4, 4))] * 2, TypeError, "got I;16"),
        (["a.png", "b.png"], TypeError, "got a list of paths, such as .a.png.: open them"),
        ([BYTES[0], BYTES[1, :4]], ValueError, "must all have one shape"),
        (torch.empty(2, 4, 4, device="meta"), ValueError, "on the meta device"),
        (BYTES.transpose(0, 3, 1, 2), ValueError, r"looks like \(N, C, H, W\): permute it"),
        (np.zeros((2, 1, 28, 28)), ValueError, r"looks like \(N, C, H, W\)"),
        (BYTES[0], ValueError, r"looks like one picture \(H, W, C\): pass images\[None\]"),
        (BYTES[0, 0, 0], ValueError, r"must have shape \(N, H, W\) or"),
    ],
    ids=range(18),
)
def test_another_meaning_is_refused(images, error, message):
    with pytest.raises(error, match=message):
        as_pixels(images)
    with pytest.raises(error, match=message):
        to_pil(images)
    with pytest.raises(error, match=message):
        PatchTokenizer.fit(images, num_codes=2, patch_size=1)
    with pytest.raises(error, match=message):
        VQTokenizer.fit(images, num_codes=2, downsample=2, steps=1)


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4, 4, 3), (5, 4, 3), (2, 3, 3, 4), (0, 4, 4)])
def test_small_pictures_are_not_taken_for_something_else(shape):
    assert as_pixels(np.zeros(shape, np.uint8)).shape == shape


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_codes_of_any_integer_dtype(dtype):
    codebook = torch.arange(100.0)[:, None].expand(-1, 4) / 100
    tokenizer = PatchTokenizer(codebook, 2, (4, 4))
    codes = torch.tensor([[0, 1, 98, 99]])
    assert torch.equal(tokenizer.decode(codes.to(dtype)), tokenizer.decode(codes))
    assert torch.equal(tokenizer.codebook_usage(codes.to(dtype)), tokenizer.codebook_usage(codes))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.tensor([[0, 1, 2, 100]]), r"lie in 0..99; got 0..100"),
        (torch.tensor([[0, 1, 2, -1]]), r"lie in 0..99; got -1..2"),
        (torch.tensor([[0.0, 1, 2, 3]]), "must be integers; got torch.float32"),
        (torch.tensor([[True] * 4]), "must be integers; got torch.bool"),
    ],
    ids=range(4),
)
def test_what_is_no_code(codes, message):
    tokenizer = PatchTokenizer(torch.rand(100, 4), 2, (4, 4))
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(codes)
    with pytest.raises(ValueError, match=message):
        tokenizer.codebook_usage(codes)
