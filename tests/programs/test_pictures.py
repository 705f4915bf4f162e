"""Pictures in a folder: what their files mean, and which are set aside with what reason."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from support.programs import imported

SIZE = 20


@pytest.fixture(scope="module")
def pictures():
    with imported("shared.pictures") as module:
        yield module


@pytest.fixture
def read(pictures, tmp_path):
    """Return a function that saves one picture, lists it and reads the folder."""

    def read(picture, name="one.png", **options):
        picture.save(tmp_path / name, **options)
        (tmp_path / "metadata.csv").write_text(f"file_name,text\n{name},a\n")
        return pictures.folder(tmp_path, SIZE).images[0]

    return read


def filled(shape, value, dtype):
    return Image.fromarray(np.full(shape, value, dtype))


def extent(image):
    """Return the height and width of what is not white."""
    seen = (image < 200).any(-1)
    return [int(seen.any(axis).sum()) for axis in (1, 0)]


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.tiff", "turned.webp"])
@pytest.mark.parametrize(("orientation", "expected"), [(1, [10, 20]), (6, [20, 10]), (8, [20, 10])])
def test_a_picture_is_turned_as_its_exif_data_say(read, name, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read(Image.new("RGB", (40, 20), "red"), name, exif=exif.tobytes())
    assert extent(image) == expected


def test_the_way_it_is_turned(read):
    """Orientation 6: the first row of the file is the right side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.full((SIZE, SIZE, 3), 255, np.uint8)
    pixels[:4] = 0
    image = read(Image.fromarray(pixels), exif=exif.tobytes())
    assert image[:, -4:].max() == 0 and image[:, :-5].min() == 255


@pytest.mark.parametrize(
    ("value", "dtype", "name", "expected"),
    [
        (20_000, np.uint16, "deep.png", 77.8),
        (65_535, np.uint16, "deep.tiff", 255),
        (20_000, ">u2", "big-endian.tiff", 77.8),
        (0.5, np.float32, "float.tiff", 127.5),
        (1.0, np.float32, "float.tiff", 255),
        (100, np.uint8, "grey.png", 100),
        (True, np.bool_, "bits.png", 255),
    ],
)
def test_greys_have_their_range(read, value, dtype, name, expected):
    assert read(filled((SIZE, SIZE), value, dtype), name).mean() == pytest.approx(expected, abs=0.6)


def test_sixteen_bit_greys_of_a_pgm(pictures, tmp_path):
    greys = np.full((SIZE, SIZE), 20_000, ">u2").tobytes()
    (tmp_path / "deep.pgm").write_bytes(b"P5 %d %d 65535\n" % (SIZE, SIZE) + greys)
    (tmp_path / "metadata.csv").write_text("file_name,text\ndeep.pgm,a\n")
    assert pictures.folder(tmp_path, SIZE).images.mean() == pytest.approx(77.8, abs=0.6)


def save_deep_tiff(path, value, tags):
    """Save 16-bit greys with other values of some tags, of which pillow writes none."""
    filled((SIZE, SIZE), value, np.uint16).save(path, tiffinfo={339: 1})
    content = bytearray(path.read_bytes())
    at = int.from_bytes(content[4:8], "little")
    for place in range(at + 2, at + 2 + 12 * int.from_bytes(content[at : at + 2], "little"), 12):
        number = int.from_bytes(content[place : place + 2], "little")
        if number in tags:
            content[place + 8 : place + 10] = tags[number].to_bytes(2, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("tags", "value", "expected"), [({262: 0}, 20_000, 177.2), ({262: 1}, 20_000, 77.8)]
)
def test_zero_may_be_white_in_a_tiff(pictures, tmp_path, tags, value, expected):
    save_deep_tiff(tmp_path / "deep.tiff", value, tags)
    (tmp_path / "metadata.csv").write_text("file_name,text\ndeep.tiff,a\n")
    assert pictures.folder(tmp_path, SIZE).images.mean() == pytest.approx(expected, abs=0.6)


def test_twelve_bit_greys_of_a_tiff(pictures, tmp_path):
    """Two values are in three bytes."""
    save_deep_tiff(tmp_path / "deep.tiff", 0, {258: 12, 279: SIZE * SIZE * 3 // 2})
    packed = bytes([0x80, 0x08, 0x00]) * (SIZE * SIZE // 2)  # 2048 each
    content = (tmp_path / "deep.tiff").read_bytes()
    (tmp_path / "deep.tiff").write_bytes(content[: -2 * SIZE * SIZE] + packed)
    (tmp_path / "metadata.csv").write_text("file_name,text\ndeep.tiff,a\n")
    assert pictures.folder(tmp_path, SIZE).images.mean() == pytest.approx(127.5, abs=0.6)


@pytest.mark.parametrize("shape", [(4, 4), (2, 1), (1, 7)])
def test_a_small_picture_is_scaled(read, shape):
    image = read(filled((*shape, 3), 0, np.uint8))
    assert extent(image) == [round(SIZE * side / max(shape)) for side in shape]


def test_a_very_flat_picture_keeps_a_line(read):
    assert extent(read(filled((1, 400, 3), 0, np.uint8))) == [1, SIZE]


def palette_with_a_clear_entry():
    picture = Image.new("P", (SIZE, SIZE), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.info["transparency"] = 1
    return picture


@pytest.mark.parametrize(
    ("picture", "name", "expected"),
    [
        (Image.new("RGBA", (9, 9), (255, 0, 0, 0)), "clear.png", (255, 255, 255)),
        (Image.new("RGBA", (9, 9), (255, 0, 0, 128)), "half.png", (255, 127, 127)),
        (Image.new("LA", (9, 9), (0, 128)), "half.png", (127, 127, 127)),
        (Image.new("L", (9, 9), 40), "grey.png", (40, 40, 40)),
        (palette_with_a_clear_entry(), "palette.png", (255, 255, 255)),
        (Image.new("P", (9, 9), 0), "palette.gif", (0, 0, 0)),
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "print.jpg", (255, 0, 0)),
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "print.tiff", (255, 0, 0)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_modes_have_a_meaning(read, picture, name, expected):
    assert np.abs(read(picture, name).astype(int) - expected).max() <= 3


@pytest.mark.parametrize("name", ["film.gif", "film.png", "film.webp"])
def test_the_first_frame_of_an_animation_is_taken(read, name):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    image = read(frames[0], name, save_all=True, append_images=frames[1:], duration=100)
    assert np.abs(image.astype(int) - (255, 0, 0)).max() <= 5


# --- metadata


@pytest.fixture
def two(tmp_path):
    for name, colour in (("one.png", "red"), ("two.png", "blue")):
        Image.new("RGB", (9, 9), colour).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_byte_order_mark_is_no_part_of_a_name(pictures, two, encoding, ending):
    text = ending.join(["file_name,text", "one.png,café", 'two.png,"red, round"', ""])
    (two / "metadata.csv").write_bytes(text.encode(encoding))
    assert pictures.folder(two, SIZE).names == ("café", "red, round")
    (two / "metadata.csv").unlink()
    rows = [{"file_name": "one.png", "text": "café"}, {"file_name": "two.png", "text": "red"}]
    text = ending.join(json.dumps(row, ensure_ascii=False) for row in rows)
    (two / "metadata.jsonl").write_bytes(text.encode(encoding))
    assert pictures.folder(two, SIZE).names == ("café", "red")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,caption\none.png,a\n", "text; it has file_name, caption"),
        ("metadata.csv", "file_name;text\none.png;a\n", "file_name;text, with semicolons: sep"),
        ("metadata.csv", "file_name\ttext\none.png\ta\n", "with tabs: separate the columns by c"),
        ("metadata.csv", "file_name, text\none.png, a\n", "in small letters, without spaces"),
        ("metadata.csv", "File_name,Text\none.png,a\n", "it has File_name, Text: write these n"),
        ("metadata.csv", "file_name,text\n", "it has no rows"),
        ("metadata.csv", "", "it has no rows"),
        ("metadata.csv", b"file_name,text\none.png,caf\xe9\n", "is not in UTF-8"),
        ("metadata.csv", "file_name,text\none.png,a\n".encode("utf-16"), "is not in UTF-8"),
        ("metadata.csv", 'file_name,text\none.png,"' + "a" * 200_000 + '"\n', "line 2: field"),
        ("metadata.csv", 'file_name,text\n\none.png,"a\ntwo.png,a\n', "starts in line 3: unexp"),
        ("metadata.csv", 'file_name,text\none.png,"a" b\n', "starts in line 2: ',' expected"),
        ("metadata.csv", 'file_name,text\none.png,"a\ntwo.png,b"\n', "lines 2 to 3 are one row"),
        ("metadata.csv", 'file_name,text\r\none.png,"a\r\ntwo.png,b"\r\n', "in line 2, or use"),
        ("metadata.csv", "file_name,text,text\none.png,a,b\n", "2 times: keep one of them"),
        ("metadata.jsonl", '{"file_name":"one.png","text":"a","text":"b"}', "names text 2 times"),
        ("metadata.jsonl", '\n{"file_name":"a","text":"a","file_name":"b"}', "line 2 names file_n"),
        ("metadata.jsonl", '{"file_name": "one.png", "te', "line 1 is not JSON"),
        ("metadata.jsonl", "\n" + "[" * 100_000, "line 2 is not JSON"),
        ("metadata.jsonl", '["one.png", "a"]', "line 1 is not a JSON object"),
        ("metadata.csv", "file_name,text\none.png\n", "metadata.csv line 2, one.png: .* no capt"),
    ],
    ids=range(21),
)  # fmt: skip
def test_says_what_is_wrong_with_a_listing(pictures, two, name, text, message):
    (two / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        pictures.folder(two, SIZE)
    assert str(two) in str(error.value)


def test_columns_without_a_meaning_may_have_any_names(pictures, two):
    """Spreadsheets leave empty columns at the end."""
    (two / "metadata.csv").write_text("file_name,text,,\none.png,a,,\n\ntwo.png,b\n")
    found = pictures.folder(two, SIZE)
    assert found.names == ("a", "b") and not found.set_aside


def test_captions_in_json_may_have_line_breaks(pictures, two):
    rows = [
        {"file_name": name, "text": "a\nb", "more": {"x": 1}} for name in ("one.png", "two.png")
    ]
    (two / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert pictures.folder(two, SIZE).names == ("a\nb",)


def test_two_listings_are_refused(pictures, two):
    (two / "metadata.csv").write_text("file_name,text\none.png,a\n")
    (two / "metadata.jsonl").write_text('{"file_name": "one.png", "text": "b"}\n')
    with pytest.raises(ValueError, match="both metadata.csv and metadata.jsonl: keep one of them"):
        pictures.folder(two, SIZE)


CAPTIONS = [
    ({}, "the row has no caption"),
    ({"text": ""}, "the row has no caption"),
    ({"text": " \t"}, "the row has no caption"),
    ({"text": None}, "the row has no caption"),
    ({"text": 7}, "its caption is not text: 7"),
    ({"text": ["a"]}, "its caption is not text: ['a']"),
    ({"text": "\ud800"}, "its caption is not text: 'utf-8' codec"),
    ({"text": "word " * 20_000}, "100,000 characters, more than 2,000"),
]


@pytest.mark.parametrize(("row", "reason"), CAPTIONS, ids=range(len(CAPTIONS)))
def test_a_row_without_a_caption_is_set_aside(pictures, two, row, reason):
    rows = [{"file_name": "one.png", "text": "a"}, {"file_name": "two.png"} | row]
    (two / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = pictures.folder(two, SIZE)
    assert found.names == ("a",) and len(found) == 1
    ((name, said),) = found.set_aside
    assert name == "metadata.jsonl line 2, two.png" and reason in said


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("two.png", "no caption"),
        ("two.png,red, round", "more fields than the header"),
        (",a", "names no file"),
        ("missing.png,a", "no such file"),
        ("folder,a", "no such file"),
        ("pipe.png,a", "no such file"),
        ("../outside.png,a", "outside of"),
        ("/etc/passwd,a", "outside of"),
        ("more/../../outside.png,a", "outside of"),
        ("x" * 5000 + ",a", "cannot be opened"),
        ("nul\0.png,a", "cannot be opened"),
        ("nul\0/one.png,a", "cannot be opened"),
        ("drawing.eps,a", "damaged, or none of BMP"),
        ("eps.png,a", "damaged, or none of BMP"),
        ("text.png,a", "damaged, or none of BMP"),
        ("cut.png,a", "cannot be read (OSError"),
        ("cut.jpg,a", "cannot be read (OSError"),
        ("bomb.png,a", "cannot be read (DecompressionBomb"),
        ("large.png,a", "cannot be read (DecompressionBomb"),
        ("nan.tiff,a", "its values are nan..nan; expected float greys, 0..1"),
        ("float.tiff,a", "its values are 0..255; expected float greys, 0..1"),
        ("dark.tiff,a", "its values are 200..200, in 32 bits or signed, so it is unknown"),
        ("negative.tiff,a", "its values are -1..-1, in 32 bits or signed"),
        ("signed.tiff,a", "its values are 200..200, in 32 bits or signed"),
        ("lab.tiff,a", "mode LAB"),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_what_cannot_be_used_is_set_aside(pictures, two, line, reason, tmp_path_factory):
    outside = two.parent / "outside.png"
    Image.new("RGB", (9, 9)).save(outside)
    (two / "folder").mkdir()
    os.mkfifo(two / "pipe.png")
    (two / "more").symlink_to(two.parent)
    Image.new("RGB", (9, 9)).save(two / "drawing.eps")
    (two / "eps.png").write_bytes((two / "drawing.eps").read_bytes())
    (two / "text.png").write_text("no picture")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8))
    for name in ("cut.png", "cut.jpg"):
        noise.save(two / name)
        (two / name).write_bytes((two / name).read_bytes()[:3000])
    for name, side in (("bomb.png", 60_000), ("large.png", 10_000)):
        Image.new("1", (9, 9)).save(two / name)
        content = bytearray((two / name).read_bytes())
        content[16:24] = side.to_bytes(4, "big") * 2
        content[29:33] = crc(content[12:29])
        (two / name).write_bytes(content)
    floats = np.linspace(0, 255, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    Image.fromarray(floats).save(two / "float.tiff")
    filled((9, 9), np.nan, np.float32).save(two / "nan.tiff")
    filled((9, 9), -1, np.int32).save(two / "negative.tiff")
    filled((9, 9), 200, np.int32).save(two / "dark.tiff")
    save_deep_tiff(two / "signed.tiff", 200, {339: 2})
    Image.new("LAB", (9, 9)).save(two / "lab.tiff")
    (two / "metadata.csv").write_text(f"file_name,text\none.png,a\n{line}\n")
    found = pictures.folder(two, SIZE)
    assert len(found) == 1
    name, said = found.set_aside[0]
    assert name.startswith("metadata.csv line 3, ") and reason in said


def crc(chunk):
    import zlib

    return zlib.crc32(chunk).to_bytes(4, "big")


def test_pictures_that_are_not_listed_are_named(pictures, two):
    (two / "more").mkdir()
    Image.new("RGB", (9, 9)).save(two / "more" / "three.JPG", format="JPEG")
    (two / "notes.txt").write_text("no picture")
    (two / "metadata.csv").write_text("file_name,text\n./one.png,a\n")
    assert pictures.folder(two, SIZE).set_aside == (
        ("more/three.JPG", "metadata.csv does not list it"),
        ("two.png", "metadata.csv does not list it"),
    )


@pytest.mark.parametrize("name", ["b.jfif", "c.avif", "d.tga", "e.PSD", "f.jp2"])
def test_pictures_of_any_format_are_named(pictures, two, name):
    (two / name).write_bytes(b"x")
    (two / "metadata.csv").write_text("file_name,text\none.png,a\ntwo.png,a\n")
    assert pictures.folder(two, SIZE).set_aside == ((name, "metadata.csv does not list it"),)


def test_a_listed_picture_is_known_whatever_its_path(pictures, two):
    alias = two.with_name(f"{two.name}-alias")
    alias.symlink_to(two)
    (two / "metadata.csv").write_text(f"file_name,text\n{two}/one.png,a\n{alias}/two.png,b\n")
    for folder in (two, alias):
        found = pictures.folder(folder, SIZE)
        assert len(found) == 2 and not found.set_aside


def test_links_in_a_folder_are_followed(pictures, two):
    """A snapshot of the Hugging Face cache is a folder of links to files elsewhere."""
    snapshot = two / "snapshot"
    snapshot.mkdir()
    (snapshot / "red.png").symlink_to(two / "one.png")
    (snapshot / "more").symlink_to(two)
    (snapshot / "metadata.csv").write_text("file_name,text\nred.png,a\nmore/two.png,b\n")
    found = pictures.folder(snapshot, SIZE)
    assert len(found) == 2 and not found.set_aside


def test_a_folder_without_a_usable_picture_is_refused(pictures, two):
    (two / "metadata.csv").write_text("file_name,text\nmissing.png,a\nthree.png,b\n")
    with pytest.raises(ValueError, match="of 2 rows none can be used: .*missing.png: there is no"):
        pictures.folder(two, SIZE)
    with pytest.raises(ValueError, match="there is no folder"):
        pictures.folder(two / "nowhere", SIZE)


def test_what_is_set_aside_stays_known_in_a_split(pictures, two):
    (two / "metadata.csv").write_text("file_name,text\none.png,a\ntwo.png,a\nthree.png,b\n")
    parts = pictures.folder(two, SIZE).split(1, seed=0)
    assert [len(part) for part in parts] == [1, 1]
    assert all(len(part.set_aside) == 1 for part in parts)


# --- held-out pictures


def shades(pictures, rows):
    """Return pictures of one grey each: (grey, caption) by row."""
    images = np.array([np.full((2, 2, 3), grey, np.uint8) for grey, _ in rows])
    return pictures.CaptionedPictures.from_captions(images, [caption for _, caption in rows])


@pytest.mark.parametrize("captions", ["a", "ab"])
def test_no_held_out_picture_is_trained_on(pictures, captions):
    """Each picture has two rows, with one caption or two, and every third has a third row."""
    rows = [(grey, caption) for caption in captions * (2 // len(captions)) for grey in range(30)]
    found = shades(pictures, rows + rows[:30:3])
    train, held_out = found.split(8, seed=0)
    greys = [set(part.images[:, 0, 0, 0].tolist()) for part in (train, held_out)]
    assert not greys[0] & greys[1] and [len(each) for each in greys] == [22, 8]
    assert len(train) + len(held_out) == len(found) == 70
    assert train.listed_again + held_out.listed_again == found.listed_again == 30
    for part in (train, held_out):
        expected = {(grey, name) for grey, name in rows if grey in part.images[:, 0, 0, 0]}
        names = [part.names[label] for label in part.labels]
        assert set(zip(part.images[:, 0, 0, 0].tolist(), names, strict=True)) == expected


def test_one_picture_cannot_be_split(pictures):
    with pytest.raises(ValueError, match="2 of 1 pictures, which are listed 40 times, cannot be"):
        shades(pictures, [(7, "a")] * 40).split(2, seed=0)


def test_different_pictures_are_split_by_caption(pictures):
    found = shades(pictures, [(grey, "abc"[grey % 3]) for grey in range(30)])
    train, held_out = found.split(9, seed=0)
    assert np.bincount(held_out.labels).tolist() == [3, 3, 3] and found.listed_again == 0
    assert len(train) == 21


# --- held-out captions


def names_of(part):
    return {part.names[label] for label in part.labels}


def test_all_pictures_of_a_held_out_caption_are_apart(pictures):
    found = shades(pictures, [(grey, "abcde"[grey % 5]) for grey in range(30)])
    rest, apart = found.hold_out_names(["b"], 2, seed=0)
    assert names_of(apart) == {found.names[label] for label in rest.unseen} >= {"b"}
    assert len(names_of(apart)) == 3 and not names_of(apart) & names_of(rest)
    assert len(rest) + len(apart) == 30 and rest.names == apart.names == found.names
    again, _ = found.hold_out_names(["b"], 2, seed=0)
    assert again.unseen == rest.unseen
    others = {found.hold_out_names([], 2, seed)[0].unseen for seed in range(5)}
    assert len(others) > 1, "the seed draws none"


def test_a_picture_with_a_held_out_caption_is_not_trained_on_under_another(pictures):
    found = shades(pictures, [(1, "a"), (1, "b"), (2, "b"), (3, "c")])
    rest, apart = found.hold_out_names(["a"], 0, seed=0)
    assert rest.images[:, 0, 0, 0].tolist() == [2, 3]
    assert apart.images[:, 0, 0, 0].tolist() == [1, 1] and names_of(apart) == {"a", "b"}


@pytest.mark.parametrize(
    ("names", "count", "message"),
    [
        (["green haert"], 0, "no picture has the caption 'green haert'.*: green heart"),
        ([], 2, "2 of 2 captions cannot be held out"),
        (["green heart"], 1, "1 of 1 captions cannot be held out"),
    ],
)
def test_captions_that_cannot_be_held_out(pictures, names, count, message):
    found = shades(pictures, [(1, "green heart"), (2, "car")])
    with pytest.raises(ValueError, match=message):
        found.hold_out_names(names, count, seed=0)


def test_joined_pictures_keep_their_captions(pictures):
    found = shades(pictures, [(grey, "abcde"[grey % 5]) for grey in range(30)])
    rest, apart = found.hold_out_names(["b"], 0, seed=0)
    joined = rest.join(apart, seed=1)
    assert sorted(joined.images[:, 0, 0, 0]) == list(range(30))
    for image, label in zip(joined.images, joined.labels, strict=True):
        assert joined.names[label] == "abcde"[image[0, 0, 0] % 5]
