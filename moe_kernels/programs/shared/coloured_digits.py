"""MNIST digits in colours at places of a canvas, with a tenth of the combinations held out."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
from PIL import Image

from moe_kernels.programs.shared.pictures import DIGITS, CaptionedPictures, digits

# As RGB: far from each other, and dark enough to be read on white.
COLOURS = {
    "red": (220, 20, 30), "orange": (250, 140, 0), "green": (20, 150, 40), "cyan": (0, 190, 205),
    "blue": (30, 60, 220), "purple": (125, 30, 150), "pink": (250, 110, 190),
    "black": (20, 20, 20),
}  # fmt: skip
# The upper left corner of a digit's box, in quarters of the canvas: (row, column).
PLACES = {
    "at the top left": (0, 0), "at the top right": (0, 2), "at the bottom left": (2, 0),
    "at the bottom right": (2, 2), "in the centre": (1, 1),
}  # fmt: skip
COMBINATIONS = tuple(product(DIGITS, COLOURS, PLACES))
SMALLEST = 16  # pixels of a canvas on which a digit can still be read
COUNT = 20_000  # pictures, where no number is asked for
_HANDWRITING_HELD_OUT = 0.2  # share of the pictures of MNIST that no training picture shows


def coloured_digits(
    size: int, count: int, held_out: int, seed: int
) -> tuple[CaptionedPictures, CaptionedPictures]:
    """Return pictures for training and held-out ones, such as "a green seven at the top left".

    No combination of :func:`held_out_combinations` is in training, and half of the held-out
    pictures show these. No picture of MNIST is on both sides. A reader learns from other pictures,
    of training's handwriting in all combinations: one that has never seen some of them would take
    them for others.

    Args:
        size: pixels of a canvas' side; the digit's box has half of it
        count: pictures for training, each another picture of MNIST or another combination
        held_out: held-out pictures

    Raises:
        ValueError: there are not so many different pictures.
    """
    if count < 1:
        raise ValueError(f"--images leaves no picture to train on, of {held_out:,} held-out ones")
    random = np.random.default_rng(seed)
    unseen = held_out_combinations(seed)
    seen = np.setdiff1d(np.arange(len(COMBINATIONS)), unseen)
    source = digits()
    learnt, rest = source.split(round(_HANDWRITING_HELD_OUT * len(source)), seed)
    inks = {id(part): _inks(part.images, size // 2) for part in (learnt, rest)}

    def make(handwriting: CaptionedPictures, *wanted: tuple[np.ndarray, int]) -> CaptionedPictures:
        chosen = [_choose(handwriting, *each, random) for each in wanted]
        pairs = random.permutation(np.concatenate(chosen))
        images = paint(inks[id(handwriting)], pairs, size)
        return _captioned(images, pairs[:, 1], unseen)

    train = make(learnt, (seen, count))
    tested = make(rest, (unseen, held_out // 2), (seen, held_out - held_out // 2))
    to_read = make(learnt, (np.arange(len(COMBINATIONS)), count))
    return dataclasses.replace(train, to_read=to_read), tested


def held_out_combinations(seed: int) -> np.ndarray:
    """Return (40,) numbers of combinations that are held out, in ascending order.

    Each digit has 4 of them, each colour 5 and each place 8. Of the combinations with the same
    digit and colour, or the same digit and place, at most one is held out; of those with the same
    colour and place, exactly one. So every pair stays in training.
    """
    random = np.random.default_rng(seed)
    # Which digit, colour and place stands for each row, column and letter of a Latin square.
    digit, colour, place = map(random.permutation, (len(DIGITS), len(COLOURS), len(PLACES)))
    cells = [
        (digit[row], colour[column], place[(row // 2 + column // 2) % len(PLACES)])
        for row, column in product(range(len(DIGITS)), range(len(COLOURS)))
        if (row + column) % 2 == 0
    ]
    shape = (len(DIGITS), len(COLOURS), len(PLACES))
    return np.sort(np.ravel_multi_index(np.transpose(cells), shape))


def caption(combination: tuple[str, str, str]) -> str:
    digit, colour, place = combination
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {digit} {place}"


def _choose(
    handwriting: CaptionedPictures, combinations: np.ndarray, count: int,
    random: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Return (count, 2) pairs of a picture of MNIST and a combination, none of them twice.

    Each combination has the same number of them, or one more than others.
    """
    shares = np.full(len(combinations), count // len(combinations))
    shares[random.permutation(len(shares))[: count % len(combinations)]] += 1
    of_digit = [np.flatnonzero(handwriting.labels == digit) for digit in range(len(DIGITS))]
    most = min(map(len, of_digit))
    if shares.max() > most:
        raise ValueError(
            f"{count:,} coloured digits of {len(combinations)} combinations cannot be made: there "
            f"are {most} pictures of MNIST for each, so {most * len(combinations):,} at most"
        )
    each = len(COLOURS) * len(PLACES)
    pairs = [
        (picture, combination)
        for combination, share in zip(combinations, shares, strict=True)
        for picture in random.choice(of_digit[combination // each], share, replace=False)
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _inks(images: np.ndarray, side: int) -> np.ndarray:
    """Return (N, side, side) float32 in 0..1: digits cut out, scaled and put into a box's middle.

    Their longer side has the box but for a margin of a sixteenth on both sides.
    """
    boxes = np.zeros((len(images), side, side), np.float32)
    longest = side - 2 * max(1, side // 16)
    for box, image in zip(boxes, images, strict=True):
        digit = Image.fromarray(image)
        digit = digit.crop(digit.getbbox())
        scale = longest / max(digit.size)
        width, height = (max(1, round(length * scale)) for length in digit.size)
        left, top = (side - width) // 2, (side - height) // 2
        scaled = np.asarray(digit.resize((width, height), Image.Resampling.BICUBIC))
        box[top : top + height, left : left + width] = scaled / np.float32(255)
    return boxes


def paint(inks: np.ndarray, pairs: np.ndarray, size: int) -> np.ndarray:
    """Return (N, size, size, 3) uint8: white canvases with the digits of ``pairs``.

    Args:
        inks: (M, side, side) in 0..1
        pairs: (N, 2), numbers of an ink and of a combination
    """
    canvases = np.full((len(pairs), size, size, 3), 255, np.uint8)
    side = inks.shape[1]
    for canvas, (number, combination) in zip(canvases, pairs, strict=True):
        _, colour, place = COMBINATIONS[combination]
        top, left = (quarters * (size - side) // 2 for quarters in PLACES[place])
        ink = inks[number][..., None]
        blended = 255 + ink * (np.array(COLOURS[colour], np.float32) - 255)
        canvas[top : top + side, left : left + side] = blended.round()
    return canvases


def _captioned(images: np.ndarray, labels: np.ndarray, unseen: np.ndarray) -> CaptionedPictures:
    columns = zip(*COMBINATIONS, strict=True)
    return CaptionedPictures(
        images, tuple(map(caption, COMBINATIONS)), labels,
        attributes=dict(zip(("digit", "colour", "place"), columns, strict=True)),
        unseen=tuple(unseen.tolist()),
    )  # fmt: skip
