"""VQTokenizer: round trips, files, repeatability, refusals, and failures while fitting."""

import copy
import warnings

import numpy as np
import pytest
import torch
from support.saved_adapters import TOKENIZER, rewrite

from moe_kernels.imaging import (
    CodebookTokenizer,
    FittingError,
    PatchTokenizer,
    VQTokenizer,
    load_image_tokenizer,
)
from moe_kernels.imaging.tokenizer import warn_if_collapsed
from moe_kernels.imaging.vq import _Codebook
from moe_kernels.testing import assert_close

SETTINGS = {"num_codes": 16, "width": 16, "code_dim": 4, "steps": 60, "progress": False}


def pictures(count=64, shape=(12, 16, 3), seed=0):
    """Return uint8 pictures of discs in two colours."""
    noise = np.random.default_rng(seed)
    height, width = shape[:2]
    rows, columns = np.mgrid[:height, :width]
    centre = noise.random((2, count, 1, 1)) * [[[[height]]], [[[width]]]]
    inside = np.hypot(rows - centre[0], columns - centre[1]) < 5
    colours = noise.random((2, count, 1, 1, *shape[2:])) * 255
    mask = inside.reshape(*inside.shape, *[1] * (len(shape) - 2))
    return np.where(mask, *colours).astype(np.uint8)


@pytest.fixture(scope="module")
def fitted():
    return VQTokenizer.fit(pictures(), **SETTINGS)


def test_round_trip(fitted):
    images = pictures(seed=1)
    codes = fitted.encode(images)
    assert fitted.grid == (3, 4) and fitted.tokens_per_image == 12
    assert codes.shape == (64, 12) and codes.dtype == torch.int64
    decoded = fitted.decode(codes)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    assert decoded.min() >= 0 and decoded.max() <= 1
    assert torch.equal(codes, fitted.encode(torch.from_numpy(images) / 255))
    assert fitted.codebook.shape == (16, 4) and fitted.codebook.dtype == torch.float32
    assert fitted.encode(images[:0]).shape == (0, 12)
    assert fitted.decode(codes[:0]).shape == (0, 12, 16, 3)


def test_learns():
    """The error on held-out pictures is below that of the mean picture."""
    images, held_out = pictures(shape=(12, 16)), pictures(shape=(12, 16), seed=1)
    flat = float(np.square((held_out - images.mean(0)) / 255).mean())
    report = VQTokenizer.fit(images, **SETTINGS | {"steps": 150}).measure(held_out)
    assert report.mean_squared_error < flat / 2
    assert report.num_codes == 16 and report.codes_used > 8
    assert 4 < report.perplexity <= report.codes_used


def test_codes_are_the_nearest_entries_in_raster_order(fitted):
    images = pictures(2, seed=2)
    network = copy.deepcopy(fitted.network)
    tokenizer = VQTokenizer(network, fitted.codebook, fitted.image_shape)
    codes = tokenizer.encode(images)
    grid = network.encoder(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    for row in range(3):
        for column in range(4):
            distances = (fitted.codebook - grid[1, :, row, column]).square().sum(1)
            assert distances.argmin() == codes[1, row * 4 + column]

    read = []
    network.decoder.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    tokenizer.decode(codes)
    assert torch.equal(read[0][1, :, 1, 2], fitted.codebook[codes[1, 6]])


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1)])
@pytest.mark.parametrize("downsample", [2, 8])
def test_channels_and_sizes(shape, downsample):
    settings = SETTINGS | {"steps": 2, "downsample": downsample}
    images = pictures(20, shape)
    tokenizer = VQTokenizer.fit(images, **settings)
    assert tokenizer.grid == (8 // downsample, 8 // downsample)
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape


def test_the_same_seed_gives_the_same_bits_and_leaves_the_generator_alone(fitted):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    again = VQTokenizer.fit(pictures(), **SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    other = VQTokenizer.fit(pictures(), **SETTINGS | {"seed": 1})
    for name, tensor in fitted._tensors().items():
        assert torch.equal(again._tensors()[name], tensor), name
    assert not torch.equal(other.codebook, fitted.codebook)


@pytest.mark.parametrize("kind", ["patch", "vq"])
def test_the_same_bits_after_save_and_load(kind, fitted, tmp_path):
    images = pictures(seed=1)
    tokenizer = fitted if kind == "vq" else PatchTokenizer.fit(images, num_codes=16)
    tokenizer.save(tmp_path)
    loaded = load_image_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    codes = tokenizer.encode(images)
    assert torch.equal(loaded.encode(images), codes)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    assert torch.equal(loaded.codebook, tokenizer.codebook)
    for name in ("num_codes", "tokens_per_image", "grid", "image_shape"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    with pytest.raises(ValueError, match=f"of type '{kind}'"):
        (PatchTokenizer if kind == "vq" else VQTokenizer).load(tmp_path)


def test_load_refuses(fitted, tmp_path):
    for change, message in (
        ({"type": "dalle"}, r"unknown type 'dalle'; the types are patch, vq"),
        ({"width": 32}, r"has shape .*, not \("),
        ({"num_codes": 8}, "16 codes"),
    ):
        fitted.save(tmp_path)
        rewrite(tmp_path, lambda config, change=change: config.update(change), names=TOKENIZER)
        with pytest.raises(ValueError, match=message):
            load_image_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_image_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample": 3}, "power of 2"),
        ({"downsample": 1}, "power of 2"),
        ({"downsample": 8}, "do not divide"),
        ({"width": 24}, "multiple of 16"),
        ({"num_codes": 0}, "num_codes"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": float("nan")}, "lr"),
        ({"images": pictures(0)}, "images is empty"),
        ({"images": np.full((2, 8, 8), np.nan)}, r"\[0, 1\]"),
    ],
)
def test_fit_refuses(change, message):
    arguments = {"images": pictures(4)} | SETTINGS | change
    with pytest.raises(ValueError, match=message):
        VQTokenizer.fit(**arguments)


def test_encode_and_decode_refuse(fitted):
    with pytest.raises(ValueError, match=r"\(12, 16, 3\)"):
        fitted.encode(pictures(shape=(16, 12, 3)))
    with pytest.raises(ValueError, match=r"0\.\.15"):
        fitted.decode(torch.full((1, 12), 16))


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state():
    with pytest.raises(FittingError, match="not finite at step 1 of 60.*at step 0") as error:
        VQTokenizer.fit(pictures(), **SETTINGS | {"lr": 1e30})
    assert error.value.step == 1
    last_good = error.value.last_good
    assert all(torch.isfinite(tensor).all() for tensor in last_good._tensors().values())
    assert last_good.decode(last_good.encode(pictures())).isfinite().all()


def test_what_is_kept_is_the_state_before_the_failure(monkeypatch):
    """If the loss of step 70 is not finite, ``last_good`` has the weights of step 50."""
    from moe_kernels.imaging import vq

    kept, original, losses = {}, vq.F.mse_loss, []

    def mse_loss(*tensors):
        losses.append(1)  # called twice per step
        return original(*tensors) * (float("nan") if len(losses) > 140 else 1)

    original_keep = vq._Fit._keep

    def keep(self, step):
        original_keep(self, step)
        kept[step] = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}

    monkeypatch.setattr(vq.F, "mse_loss", mse_loss)
    monkeypatch.setattr(vq._Fit, "_keep", keep)
    with pytest.raises(FittingError, match="at step 70 of 200.*at step 50") as error:
        VQTokenizer.fit(pictures(), **SETTINGS | {"steps": 200})
    for name, tensor in kept[50].items():
        assert torch.equal(error.value.last_good.network.state_dict()[name], tensor)


def test_codebook_follows_its_vectors_and_unused_entries_stay_or_start_anew():
    torch.manual_seed(0)
    codebook = _Codebook(torch.randn(4, 3), 4)
    unused = codebook.entries[3].clone()
    vectors, codes = torch.randn(30, 3), torch.arange(30) % 3
    for _ in range(2000):
        codebook.update(vectors, codes)
    for code in range(3):
        assert_close(codebook.entries[code], vectors[codes == code].mean(0))
    assert_close(codebook.entries[3], unused)
    kept = codebook.entries[:3].clone()
    codebook.revive(vectors)
    assert torch.equal(codebook.entries[:3], kept)
    assert (vectors == codebook.entries[3]).all(1).any()
    codebook.update(vectors[:0], codes[:0])  # a revived entry survives steps without use
    assert (vectors - codebook.entries[3]).abs().sum(1).min() < 1e-5
    assert len(_Codebook(torch.randn(2, 3), 5).entries) == 5


# --- collapse


@pytest.mark.parametrize("fit", ["patch", "vq"])
def test_a_collapsed_tokenizer_is_warned_of(fit):
    """A tokenizer with 64 codes for flat pictures warns; the threshold is a tenth of the codes."""
    if fit == "vq":
        flat = np.full((32, 8, 8), 200, np.uint8)
        settings = SETTINGS | {"num_codes": 64}
        with pytest.warns(UserWarning, match=r"collapsed: [1-6] of 64 codes are in use \(\d\.\d%"):
            VQTokenizer.fit(flat, **settings)
    else:
        # K-means over distinct patches never collapses, so test the check itself.
        usage = torch.zeros(64, dtype=torch.int64)
        usage[:6] = 5
        with pytest.warns(UserWarning, match=r"collapsed: 6 of 64 codes are in use \(9\.4%\)"):
            warn_if_collapsed(usage)
        usage[6] = 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_if_collapsed(usage)


def test_fit_does_not_warn_where_codes_are_used():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PatchTokenizer.fit(pictures(), num_codes=16)
        VQTokenizer.fit(pictures(), **SETTINGS)


# --- a user's own tokenizer class


def test_a_tokenizer_of_ones_own_is_saved_and_loaded_too(tmp_path):
    class MeanTokenizer(CodebookTokenizer):
        """Codes the mean brightness of each square."""

        type_name = "mean"

        def _vectors(self, pixels):
            side = self.image_shape[0] // self.grid[0]
            return pixels.unfold(1, side, side).unfold(2, side, side).mean((3, 4)).reshape(-1, 1)

        def _pictures(self, entries):
            side = self.image_shape[0] // self.grid[0]
            return entries[..., 0].repeat_interleave(side, 1).repeat_interleave(side, 2)

        def _config(self):
            return {"side": self.image_shape[0] // self.grid[0]}

        @classmethod
        def _restore(cls, config, tensors):
            return cls(tensors["codebook"], tuple(config["image_shape"]), config["side"])

    try:
        tokenizer = MeanTokenizer(torch.linspace(0, 1, 5)[:, None], (4, 6), 2)
        tokenizer.save(tmp_path)
        loaded = load_image_tokenizer(tmp_path)
        codes = torch.tensor([[0, 1, 2, 3, 4, 0]])
        assert type(loaded) is MeanTokenizer
        assert torch.equal(loaded.encode(loaded.decode(codes)), codes)
    finally:
        CodebookTokenizer._types.pop("mean")
