"""Images as tokens: codebook, sequence layout, the token constraint, sampling."""

import numpy as np
import pytest
import torch
from support.model_zoo import PAD, VOCAB
from support.patched_models import patched_model
from support.saved_adapters import TOKENIZER, rewrite

from moe_kernels.imaging import (
    IGNORE_INDEX,
    CaptionedImages,
    ImageCollator,
    ImageTokensProcessor,
    ImageVocabulary,
    PatchTokenizer,
    SampleRow,
    count_distinct,
    generate_image_codes,
    image_prompt,
    image_sequence,
    mean_pairwise_distance,
    mixed_sequence,
    nearest_distances,
    nearest_indices,
    plot_samples,
    to_pil,
)

CODES, TOKENS = 8, 6


@pytest.fixture
def vocabulary():
    return ImageVocabulary(VOCAB, CODES)


def pictures(count=40, height=8, width=12, channels=None, seed=0):
    """Return smooth uint8 pictures."""
    noise = np.random.default_rng(seed)
    shape = (count, height, width) if channels is None else (count, height, width, channels)
    return (np.sort(noise.random(shape), axis=2) * 255).astype(np.uint8)


# --- tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return PatchTokenizer.fit(pictures(), num_codes=16)


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_codes_are_the_nearest_entries_in_raster_order(channels):
    images = pictures(channels=channels)
    tokenizer = PatchTokenizer.fit(images, num_codes=16, patch_size=4)
    codes = tokenizer.encode(images)
    assert codes.shape == (40, 2 * 3) and codes.dtype == torch.int64
    # The patch in row 1, column 2 is token 1 * 3 + 2.
    patch = torch.from_numpy(images[7, 4:8, 8:12]).flatten().float() / 255
    assert codes[7, 5] == (tokenizer.codebook - patch).square().sum(1).argmin()


def test_decode_puts_entries_back_where_they_were():
    codebook = torch.arange(4.0).div(4).unsqueeze(1).expand(4, 4)
    tokenizer = PatchTokenizer(codebook, 2, (4, 6))
    codes = torch.tensor([[0, 1, 2, 3, 0, 1]])
    image = tokenizer.decode(codes)
    assert image.shape == (1, 4, 6)
    assert image[0, ::2, ::2].flatten().tolist() == [0, 0.25, 0.5, 0.75, 0, 0.25]
    assert torch.equal(tokenizer.encode(image), codes)


def test_more_codes_reconstruct_better_and_all_are_used():
    images = pictures(200)
    few, many = (PatchTokenizer.fit(images, num_codes=codes) for codes in (4, 32))
    assert many.reconstruction_error(images) < few.reconstruction_error(images)
    usage = many.codebook_usage(many.encode(images))
    assert usage.shape == (32,) and usage.sum() == 200 * many.tokens_per_image
    assert (usage > 0).all()


def test_uint8_and_float_pictures_are_the_same(tokenizer):
    images = pictures()
    codes = tokenizer.encode(images)
    assert torch.equal(codes, tokenizer.encode(torch.from_numpy(images)))
    assert torch.equal(codes, tokenizer.encode(images / 255.0))


def test_fit_is_repeatable_and_subsamples_patches():
    images = pictures()
    first, second = (PatchTokenizer.fit(images, num_codes=8, max_patches=50) for _ in range(2))
    assert torch.equal(first.codebook, second.codebook)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    loaded = PatchTokenizer.load(tmp_path / "tokenizer")
    assert torch.equal(loaded.codebook, tokenizer.codebook)
    assert (loaded.patch_size, loaded.image_shape) == (4, (8, 12))
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == [
        "image_tokenizer.safetensors",
        "image_tokenizer_config.json",
    ]


def test_a_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("moe_kernels.tensor_files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        PatchTokenizer.fit(pictures(), num_codes=8).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_load_refuses_another_format(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    rewrite(tmp_path, lambda config: config.update(num_codes=4), names=TOKENIZER)
    with pytest.raises(ValueError, match="16 codes"):
        PatchTokenizer.load(tmp_path)
    rewrite(tmp_path, lambda config: config.update(type="vqvae"), names=TOKENIZER)
    with pytest.raises(ValueError, match="holds a tokenizer of type 'vqvae'"):
        PatchTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((2, 9, 12), np.uint8), ValueError, "do not divide"),
        (np.zeros((12, 8), np.uint8), ValueError, "shape"),
        (np.zeros((2, 8, 12), np.int64), TypeError, "uint8"),
        (np.full((2, 8, 12), 3.0), ValueError, r"\[0, 1\]"),
        (np.full((2, 8, 12), np.nan), ValueError, r"\[0, 1\]"),
        (np.zeros((2, 8, 12), np.uint8), ValueError, "distinct patches"),
    ],
)
def test_fit_refuses(images, error, message):
    with pytest.raises(error, match=message):
        PatchTokenizer.fit(images, num_codes=16)


def test_encode_and_decode_refuse_what_does_not_fit(tokenizer):
    with pytest.raises(ValueError, match=r"\(8, 12\)"):
        tokenizer.encode(pictures(height=12))
    with pytest.raises(ValueError, match="integers"):
        tokenizer.decode(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"0\.\.15"):
        tokenizer.decode(torch.full((2, 6), 16))
    with pytest.raises(ValueError, match="not finite"):
        PatchTokenizer(torch.full((4, 16), float("nan")), 4, (8, 12))
    with pytest.raises(ValueError, match="codebook must have shape"):
        PatchTokenizer(torch.zeros(4, 15), 4, (8, 12))
    assert tokenizer.encode(pictures(0)).shape == (0, 6)


# --- layout


def test_vocabulary_is_begin_end_codes(vocabulary):
    assert (vocabulary.begin_id, vocabulary.end_id) == (VOCAB, VOCAB + 1)
    assert vocabulary.code_ids == range(VOCAB + 2, VOCAB + 2 + CODES)
    assert vocabulary.token_ids == range(VOCAB, VOCAB + ImageVocabulary.size(CODES))
    assert ImageVocabulary.from_token_ids(vocabulary.token_ids) == vocabulary
    codes = torch.tensor([0, CODES - 1])
    assert torch.equal(vocabulary.codes_of(vocabulary.ids_of(codes)), codes)
    for bad in (torch.tensor([-1]), torch.tensor([CODES])):
        with pytest.raises(ValueError, match=r"0\.\.7"):
            vocabulary.ids_of(bad)
    with pytest.raises(ValueError, match="image codes"):
        vocabulary.codes_of(torch.tensor([vocabulary.end_id]))
    with pytest.raises(ValueError, match="num_codes"):
        ImageVocabulary.from_token_ids(range(10, 12))


def test_labels_stand_on_codes_and_end_only(vocabulary):
    sample = image_sequence([5, 6, 7], torch.tensor([3, 0, 2]), vocabulary)
    first = vocabulary.code_ids.start
    picture = [first + 3, first, first + 2, vocabulary.end_id]
    assert sample["input_ids"].tolist() == [5, 6, 7, vocabulary.begin_id, *picture]
    assert sample["labels"].tolist() == [IGNORE_INDEX] * 4 + picture


def test_collator_pads_on_the_left(vocabulary):
    codes = torch.zeros(2, 3, dtype=torch.int64)
    dataset = CaptionedImages([[5], [6, 7, 8]], codes, vocabulary)
    batch = ImageCollator(PAD)([dataset[0], dataset[1]])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["input_ids"][0, :3].tolist() == [PAD, PAD, 5]
    assert batch["attention_mask"][0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert batch["labels"][0, :4].tolist() == [IGNORE_INDEX] * 4
    assert "labels" not in ImageCollator(PAD)([{"input_ids": torch.tensor([1])}])


def test_no_label_is_predicted_from_padding(vocabulary):
    """A label at position t is predicted at t - 1: none at the first token of a padded row."""
    pieces = ([5, 6, 7, 8], [9])
    samples = [
        mixed_sequence([text, torch.tensor([1, 2])], vocabulary, text_labels=True)
        for text in pieces
    ]
    kept = [sample["labels"].clone() for sample in samples]
    batch = ImageCollator(PAD)(samples)
    targets = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    assert targets == sum(len(sample["labels"]) - 1 for sample in samples)
    assert all(torch.equal(s["labels"], k) for s, k in zip(samples, kept, strict=True))


def test_caption_dropout(vocabulary):
    codes = torch.zeros(400, 3, dtype=torch.int64)
    captions = [[5, 6]] * 400
    dataset = CaptionedImages(captions, codes, vocabulary, caption_dropout=0.25, empty_caption=[9])
    assert 60 < sum(bool(sample["input_ids"][0] == 9) for sample in dataset) < 140
    for share, expected in ((0.0, 6 + 1), (1.0, 4 + 1)):
        sample = CaptionedImages(captions, codes, vocabulary, caption_dropout=share)[0]
        assert len(sample["input_ids"]) == expected
    with pytest.raises(ValueError, match="caption_dropout"):
        CaptionedImages(captions, codes, vocabulary, caption_dropout=1.5)
    with pytest.raises(ValueError, match="1 captions for 400"):
        CaptionedImages([[5]], codes, vocabulary)


@pytest.mark.parametrize(
    "rows",
    [
        [torch.tensor([1, 2]), torch.tensor([3, 4])],
        [[1, 2], [3, 4]],
        (np.array([1, 2]), np.array([3, 4], dtype=np.uint8)),
        np.array([[1, 2], [3, 4]], dtype=np.int16),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8),
    ],
    ids=range(5),
)
def test_codes_may_be_a_list_of_rows(vocabulary, rows):
    expected = CaptionedImages([[5], [6]], torch.tensor([[1, 2], [3, 4]]), vocabulary)
    found = CaptionedImages([[5], [6]], rows, vocabulary)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_there_may_be_no_pictures_yet(vocabulary):
    assert len(CaptionedImages([], [], vocabulary)) == 0
    assert len(CaptionedImages([], torch.empty(0, 4, dtype=torch.int64), vocabulary)) == 0


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([torch.tensor([1, 2]), torch.tensor([0.5, 1.0])], r"float32 \(2,\) for picture 1"),
        ([[1, 2], [[3, 4]]], r"int64 \(1, 2\) for picture 1"),
        ([1, 2], r"int64 \(\) for picture 0"),
        (torch.ones(2, 4, dtype=torch.bool), r"bool \(4,\) for picture 0"),
    ],
    ids=range(4),
)
def test_codes_that_are_not_rows_of_integers_are_refused(vocabulary, rows, found):
    with pytest.raises(ValueError, match=rf"codes must be integers \(N, tokens\); got .*{found}"):
        CaptionedImages([[5], [6]], rows, vocabulary)


def test_caption_dropout_follows_seed_epoch_and_draw(vocabulary):
    captions, codes = [[1, 2]] * 64, torch.zeros(64, 4, dtype=torch.long)

    def dropped(dataset, epoch=None, order=range(64)):
        if epoch is not None:
            dataset.set_epoch(epoch)
        return {index for index in order if dataset[index]["input_ids"][0] == 9}

    def make(seed=0):
        options = {"caption_dropout": 0.5, "empty_caption": [9], "seed": seed}
        return CaptionedImages(captions, codes, vocabulary, **options)

    first = dropped(make(), 3)
    assert 16 < len(first) < 48
    # Neither earlier draws, nor the order, nor the global generator change the dropped captions.
    other = make()
    dropped(other)
    torch.manual_seed(5)
    assert dropped(other, 3, reversed(range(64))) == first
    assert dropped(make(), 4) != first and dropped(make(seed=1), 3) != first
    assert dropped(other) != first, "without set_epoch a second pass drops the same captions"


# --- generation


def test_processor_allows_codes_then_end_then_text(vocabulary):
    processor = ImageTokensProcessor(vocabulary, tokens_per_image=2)
    code = vocabulary.code_ids.start
    scores = torch.zeros(1, VOCAB + 2 + CODES)

    def allowed(*ids):
        kept = processor(torch.tensor([ids]), scores)[0].isfinite()
        return kept.nonzero().flatten().tolist()

    codes, text = list(vocabulary.code_ids), list(range(VOCAB))
    assert allowed(5, 6) == text
    assert allowed(vocabulary.begin_id) == codes
    assert allowed(5, vocabulary.begin_id, code) == codes
    assert allowed(5, vocabulary.begin_id, code, code) == [vocabulary.end_id]
    assert allowed(5, vocabulary.begin_id, code, code, vocabulary.end_id) == text
    # The codes of a second picture are counted from zero.
    second = (vocabulary.begin_id, code, code, vocabulary.end_id, 5, vocabulary.begin_id)
    assert allowed(*second) == codes


def test_processor_follows_each_row_of_a_batch(vocabulary):
    processor = ImageTokensProcessor(vocabulary, tokens_per_image=1)
    ids = torch.tensor([[5, 6], [5, vocabulary.begin_id], [vocabulary.begin_id, VOCAB + 2]])
    kept = processor(ids, torch.randn(3, VOCAB + 2 + CODES)).isfinite().sum(1)
    assert kept.tolist() == [VOCAB, CODES, 1]
    with pytest.raises(ValueError, match="scores 48 tokens"):
        processor(ids, torch.zeros(3, VOCAB))
    with pytest.raises(ValueError, match="tokens_per_image"):
        ImageTokensProcessor(vocabulary, 0)


def test_suppressed_image_tokens_are_an_error_and_no_text(vocabulary):
    """The scores are those of a generate() call that still has its default suppress_tokens."""
    processor = ImageTokensProcessor(vocabulary, tokens_per_image=2)
    scores = torch.randn(2, vocabulary.token_ids.stop)
    scores[:, vocabulary.token_ids.start :] = float("-inf")
    outside, inside = torch.tensor([[1, 2]]), torch.tensor([[1, vocabulary.begin_id]])
    assert processor(outside, scores[:1]).isfinite().any()
    with pytest.raises(ValueError, match=r"suppress_tokens=\[\]"):
        processor(torch.cat([outside, inside]), scores)


@pytest.fixture(scope="module")
def painter():
    model, patched = patched_model("olmoe", num_tokens=ImageVocabulary.size(CODES), scale=0.5)
    return model, ImageVocabulary.from_token_ids(patched.modality_token_ids("image"))


def draw(painter, captions, **options):
    model, vocabulary = painter
    options = {"pad_token_id": PAD} | options
    return generate_image_codes(model, captions, vocabulary, TOKENS, **options)


def test_generate_image_codes(painter):
    captions = [[5, 6, 7], [8], [9, 10], [5, 6, 7]] * 5
    codes = draw(painter, captions, seed=0, batch_size=8)
    assert codes.shape == (20, TOKENS) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < CODES
    assert torch.equal(codes, draw(painter, captions, seed=0, batch_size=8))
    assert not torch.equal(codes, draw(painter, captions, seed=1, batch_size=8))
    assert count_distinct(codes) > 10
    assert draw(painter, []).shape == (0, TOKENS)


def test_generate_image_codes_leaves_the_model_and_the_generator_alone(painter):
    model, _ = painter
    settings = model.generation_config.to_dict()
    model.train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(painter, [[5]], seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.generation_config.to_dict() == settings
    draw(painter, [[5]])
    assert not torch.equal(torch.get_rng_state(), before)
    model.eval()
    with pytest.raises(ValueError, match="temperature"):
        draw(painter, [[5]], temperature=0)


def test_low_temperature_is_the_most_likely_picture_with_or_without_padding(painter):
    model, vocabulary = painter
    caption = [5, 6, 7]
    alone = draw(painter, [caption], temperature=1e-4)
    padded = draw(painter, [caption, [1, 2, 3, 4, 5, 6]], temperature=1e-4)
    assert torch.equal(alone[0], padded[0])
    ids = torch.tensor([image_prompt(caption, vocabulary)])
    for code in alone[0]:
        logits = model(input_ids=ids).logits[0, -1, list(vocabulary.code_ids)]
        assert logits.argmax() == code
        ids = torch.cat([ids, vocabulary.ids_of(code.view(1, 1))], 1)


# --- metrics and plot


def test_metrics_on_pictures_known_by_hand():
    images = torch.zeros(4, 2, 2)
    images[1, 0, 0], images[2, 0, 0], images[3] = 3, 4, 1
    groups = torch.tensor([0, 0, 0, 1])
    assert mean_pairwise_distance(images, groups) == pytest.approx((3 + 4 + 1) / 3)
    assert mean_pairwise_distance(images, torch.arange(4)) == 0
    assert nearest_distances(images[1:], images[:1]).tolist() == [3, 4, 2]
    assert nearest_indices(images[1:], images[:3]).tolist() == [1, 2, 0]
    for nearest in (nearest_distances, nearest_indices):
        assert nearest(images[:0], images).shape == (0,)
    assert count_distinct(torch.tensor([[1, 2], [1, 2], [2, 1]])) == 2


def test_a_copy_is_at_distance_zero():
    images = torch.rand(300, 28, 28)
    assert (nearest_distances(images, images) == 0).all()


def test_plot_samples():
    pictures = torch.rand(3, 8, 8)
    rows = [SampleRow(name, pictures, pictures[:2], torch.arange(3) == 1) for name in "ab"]
    figure = plot_samples(rows, "title")
    assert len(figure.axes[0].images) == 2 * (3 + 2)
    assert [patch.get_edgecolor() for patch in figure.axes[0].patches].count((1, 0, 0, 1)) == 2


def test_plot_samples_in_colour_and_from_pil():
    pictures = torch.rand(3, 6, 8, 3)
    rows = [
        SampleRow("tensors", pictures, pictures[:2], nearest=pictures[:1]),
        SampleRow("PIL", to_pil(pictures), to_pil(pictures[:2]), nearest=to_pil(pictures[:1])),
    ]
    panel = plot_samples(rows, "title").axes[0]
    shown = torch.stack([torch.as_tensor(image.get_array()) for image in panel.images])
    assert shown.shape == (2 * (3 + 2 + 1), 6, 8, 3)
    # Images are drawn block by block: generated of both rows, then nearest, then real.
    assert torch.equal(shown[:3], pictures)
    assert (shown[3:6] - pictures).abs().max() < 1 / 255
    assert torch.equal(shown[6], pictures[0]) and torch.equal(shown[8:10], pictures[:2])
    assert (1, 0, 0, 1) not in {patch.get_edgecolor() for patch in panel.patches}
    with pytest.raises(ValueError, match="no pictures"):
        plot_samples([], "title")
    assert {"generated", "nearest in training", "real, held out"} <= {
        text.get_text().replace("\n", " ") for text in panel.texts
    }


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_to_pil(channels):
    images = pictures(3, channels=channels)
    for given in (images, torch.from_numpy(images) / 255):
        drawn = to_pil(given)
        assert [image.mode for image in drawn] == ["RGB" if channels == 3 else "L"] * 3
        assert drawn[0].size == (12, 8)
        assert (np.stack(drawn).reshape(images.shape) == images).all()
    with pytest.raises(ValueError, match="1 or 3 channels"):
        to_pil(pictures(1, channels=4))
