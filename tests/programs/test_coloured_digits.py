"""Coloured digits: the held-out combinations, the pictures, and the reader that judges drawings."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from support.model_zoo import make_model
from support.programs import imported, save_byte_tokenizer

SIZE = 16


@pytest.fixture(scope="module")
def coloured():
    with imported("shared.coloured_digits") as module:
        yield module


@pytest.fixture(scope="module")
def parts(coloured):
    return coloured.coloured_digits(SIZE, 2000, 120, seed=3)


class NoTokenizer:
    """Codes that are the pixels themselves."""

    def encode(self, images):
        return torch.from_numpy(images).long().flatten(1)

    def decode(self, codes):
        return codes.view(-1, SIZE, SIZE, 3).float() / 255


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_held_out_combinations_are_spread_evenly(coloured, seed):
    numbers = coloured.held_out_combinations(seed)
    assert len(set(numbers.tolist())) == 40 == len(coloured.COMBINATIONS) // 10
    held_out = np.stack(np.unravel_index(numbers, (10, 8, 5)))
    for values, each in zip(held_out, (4, 5, 8), strict=True):
        assert np.unique(values, return_counts=True)[1].tolist() == [each] * (40 // each)
    for first, second in combinations(held_out, 2):
        pairs = np.unique(np.stack([first, second]), axis=1)
        assert len(pairs.T) == 40, "a pair of two attributes is held out twice"


def test_the_seed_decides_which_are_held_out(coloured):
    first, again, other = map(coloured.held_out_combinations, (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()


def test_no_held_out_combination_is_in_training(coloured, parts):
    train, held_out = parts
    assert (len(train), len(held_out)) == (2000, 120)
    assert not set(train.labels) & set(train.unseen) and len(train.unseen) == 40
    assert len(set(train.labels)) == 360, "a combination of training has no picture"
    assert sum(label in train.unseen for label in held_out.labels) == 60
    pairs = np.array([name.split(" ", 3)[1:] for name in train.names])[np.unique(train.labels)]
    for first, second in combinations(pairs.T, 2):
        assert len(set(zip(first, second, strict=True))) == len(set(first)) * len(set(second))
    assert len(train.rows_of_pictures) == len(train), "a picture is there twice"


def test_no_handwriting_of_training_is_held_out(coloured, parts, monkeypatch):
    """Compare the ink alone, whatever its colour and place."""
    seen, paint = [], coloured.paint

    def noted(inks, pairs, size):
        seen.append((inks, pairs))
        return paint(inks, pairs, size)

    monkeypatch.setattr(coloured, "paint", noted)
    coloured.coloured_digits(SIZE, 2000, 120, seed=3)
    train, held_out, to_read = (
        {inks[number].tobytes() for number in pairs[:, 0]} for inks, pairs in seen
    )
    assert not held_out & train and not held_out & to_read


def test_the_same_seed_gives_the_same_pictures(coloured, parts):
    again = coloured.coloured_digits(SIZE, 2000, 120, seed=3)
    for one, other in zip(parts, again, strict=True):
        assert np.array_equal(one.images, other.images)
        assert np.array_equal(one.labels, other.labels)


def direction(rgb):
    """Return the way from white to a colour, which thin strokes go in part."""
    way = 255.0 - np.array(rgb)
    return way / way.max()


def test_a_caption_says_what_the_picture_shows(coloured, parts):
    train, _ = parts
    for image, label in zip(train.images[:200], train.labels[:200], strict=True):
        digit, colour, place = coloured.COMBINATIONS[label]
        article = "an" if colour == "orange" else "a"
        assert train.names[label] == f"{article} {colour} {digit} {place}"
        ink = (image < 255).any(-1)
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        up, left = (np.mean(each[[0, -1]]) < SIZE / 2 - 0.5 for each in (rows, columns))
        if place == "in the centre":
            assert rows[0] >= SIZE // 4 and rows[-1] < SIZE * 3 // 4
        else:
            assert place == f"at the {'top' if up else 'bottom'} {'left' if left else 'right'}"
        darkest = direction(image.reshape(-1, 3)[image.sum(-1).argmin()])
        distances = {
            name: np.linalg.norm(darkest - direction(rgb)) for name, rgb in coloured.COLOURS.items()
        }
        assert min(distances, key=distances.get) == colour


@pytest.mark.parametrize(
    ("count", "held_out", "message"), [(0, 9, "no picture to train on"), (150_000, 9, "at most")]
)
def test_refuses_more_pictures_than_there_are(coloured, count, held_out, message):
    with pytest.raises(ValueError, match=message):
        coloured.coloured_digits(SIZE, count, held_out, seed=0)


# --- the reader


@pytest.fixture(scope="module")
def judge(coloured, parts):
    from moe_kernels.programs.shared import pictures, reader, text_to_image

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_STEPS", 150)
        encode = pictures.TokenizedPictures.encode
        encoded = [encode(NoTokenizer(), part) for part in parts]
        yield text_to_image.Judge(*encoded, NoTokenizer())


def test_the_reader_reads_held_out_combinations_too(judge):
    figures = judge.describe_reader()
    assert figures.keys() == {"raw", "tokenized"}
    for groups in figures.values():
        for kinds in groups.values():
            assert kinds["caption"]["count"] == 60
            assert kinds["colour"]["share"] > 0.9 and kinds["place"]["share"] > 0.9
            assert kinds["digit"]["share"] > 0.4


def test_real_pictures_are_read_right_and_swapped_colours_wrong(judge, coloured, parts):
    _, held_out = parts
    asked = torch.from_numpy(held_out.labels)
    measured = judge.measure(judge.held_out.codes, asked)
    for kinds in measured["read_right"].values():
        assert kinds["colour"]["share"] > 0.9

    names = {combination: number for number, combination in enumerate(coloured.COMBINATIONS)}
    colours = list(coloured.COLOURS)
    swapped = [
        names[digit, colours[colours.index(colour) - 1], place]
        for digit, colour, place in (coloured.COMBINATIONS[label] for label in asked)
    ]
    measured = judge.measure(judge.held_out.codes, torch.tensor(swapped))
    for kinds in measured["read_right"].values():
        assert kinds["colour"]["share"] < 0.1 and kinds["place"]["share"] > 0.9
        assert kinds["caption"]["right"] <= kinds["colour"]["right"]


def test_drawings_nearest_to_a_picture_of_their_caption_are_counted(judge, parts):
    train, _ = parts
    codes = NoTokenizer().encode(train.images[:10])
    labels = torch.from_numpy(train.labels[:10])
    unseen = torch.full((3,), train.unseen[0])

    def counted(asked):
        return judge.measure(codes[: len(asked)], asked)["nearest_shows_the_caption"]

    assert counted(labels) == {"right": 10, "count": 10}
    assert counted(torch.cat([unseen, labels[3:]])) == {"right": 7, "count": 7}
    others = labels.roll(1)
    assert counted(others) == {"right": int((others == labels).sum()), "count": 10}


def test_captions_of_training_and_held_out_ones_are_counted_apart(parts):
    from moe_kernels.programs.shared.reader import read_right

    train, _ = parts
    seen, unseen = np.unique(train.labels), np.array(train.unseen)
    asked = torch.from_numpy(np.concatenate([seen[:30], unseen[:10]]))
    read = torch.from_numpy(np.concatenate([seen[:30], seen[:10]]))
    groups = read_right(read, asked, train, seen)
    assert groups["trained"]["caption"]["right"] == groups["trained"]["caption"]["count"] == 30
    assert groups["held_out"]["caption"]["right"] == 0
    assert groups["held_out"]["caption"]["count"] == 10
    assert groups["held_out"].keys() == {"caption", "digit", "colour", "place"}


def test_the_interval_is_that_of_wilson():
    """The values are those of Brown, Cai and DasGupta's formula, computed by hand."""
    with imported("shared.reader") as reader:
        assert reader.wilson_interval(0, 10) == pytest.approx([0, 0.2775], abs=1e-4)
        assert reader.wilson_interval(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
        figures = reader.share_right(
            torch.tensor([True, True, False, False]), torch.tensor([0, 0, 1, 1])
        )
    assert figures["share"] == figures["standard_error_over_captions"] == 0.5


# --- the program


def test_the_program_draws_held_out_combinations_apart(tmp_path, monkeypatch):
    save_byte_tokenizer(tmp_path / "model")
    make_model("mixtral", vocab_size=256).save_pretrained(tmp_path / "model")
    command = [
        str(tmp_path / "model"), "--data", "coloured-digits", "--image-size", str(SIZE),
        "--images", "500", "--held-out", "40", "--num-codes", "16", "--patch-size", "8",
        "--steps", "1", "--r", "2", "--text-tokens", "32", "--text-block", "32",
        "--samples-per-caption", "1", "--guidance", "1", "--dtype", "float32", "--device", "cpu",
        "--batch", "40", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    with imported("train_text_to_image") as program:
        from moe_kernels.programs.shared import reader

        monkeypatch.setattr(reader, "_STEPS", 5)
        assert program.main(command) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    right = report["samples"]["1"]["read_right"]
    assert {group: kinds["caption"]["count"] for group, kinds in right.items()} == {
        "trained": 40, "held_out": 40,
    }  # fmt: skip
    assert report["reader"]["raw"].keys() == {"trained", "held_out"}
    for name in ("samples", "held-out"):
        picture = tmp_path / "out" / f"{name}-guidance-1.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
