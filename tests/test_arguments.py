"""Arguments of other types at public entries: taken, or refused in one sentence before any work."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from support.dense_zoo import make_dense
from support.model_zoo import VOCAB, make_model, token_ids
from support.patched_models import patched_model
from support.text_tokenizer import make_tokenizer

from moe_kernels import ModalityLoraConfig, add_modality_tokens, load, ops, patch_model
from moe_kernels.analysis import RoutingRecorder, modality_by_token_id
from moe_kernels.conversion import dense_to_moe, heal, perplexity
from moe_kernels.imaging import (
    CaptionedImages,
    ImageVocabulary,
    PatchTokenizer,
    VQTokenizer,
    generate_image_codes,
    generate_images,
    load_image_tokenizer,
    split_images,
)
from moe_kernels.init import gromov_wasserstein_rows

IDS = token_ids(1, 6)
LISTED = [[0] * 6]
PIXELS = (torch.arange(6 * 8 * 8 * 3).view(6, 8, 8, 3) % 251).to(torch.uint8)
PICTURES = [Image.fromarray(picture.numpy()) for picture in PIXELS]
VOCABULARY = ImageVocabulary(VOCAB, 4)
TWO = np.int64(2)


TOKENIZER = make_tokenizer()
TOKENIZER.pad_token_id = 0


@pytest.fixture(scope="module")
def patched():
    return patched_model("olmoe", num_tokens=6)


@pytest.fixture(scope="module")
def image_tokenizer():
    return PatchTokenizer.fit(PIXELS, num_codes=4)


def observed(model, modality_ids):
    with RoutingRecorder(model) as recorder:
        recorder.observe(modality_ids)
        model(IDS)


def drawn(model, captions=("red",), **options):
    """Draw with a PatchTokenizer, unless the options have another."""
    fitted = options.pop("image_tokenizer", None) or PatchTokenizer.fit(PIXELS, num_codes=4)
    return generate_images(
        model, captions, tokenizer=options.pop("tokenizer", TOKENIZER),
        image_tokenizer=fitted, **options,
    )  # fmt: skip


def of_model(use):
    """Return a situation of a patched model, which ``use`` gets."""
    return lambda patched: use(patched[0])


def of_handle(use):
    """Return a situation of the handle of a patched model, which ``use`` gets."""
    return lambda patched: use(patched[1])


def alone(use):
    """Return a situation without a model."""
    return lambda patched: use()


# situation -> (function of the patched model and its handle, error, what was wanted, what was got)
REFUSED = {
    "modality ids in a list": (
        of_model(lambda model: model(IDS, modality_ids=LISTED)), TypeError,
        "modality_ids must be a tensor (B, S) of integers", "got list",
    ),
    "modality ids in an array": (
        of_model(lambda model: model(IDS, modality_ids=np.zeros((1, 6), int))), TypeError,
        "modality_ids must be a tensor", "got ndarray",
    ),
    "modality ids in a list to generate": (
        of_model(lambda model: model.generate(IDS, modality_ids=LISTED, max_new_tokens=2)),
        TypeError, "modality_ids must be a tensor", "got list",
    ),
    "modality ids in a list to an op": (
        alone(lambda: ops.linear_dispatch([0, 1], 1)), TypeError,
        "modality_ids must be a tensor", "got list",
    ),
    "modality ids in a list to the recorder": (
        of_model(lambda model: observed(model, LISTED)), TypeError,
        "modality_ids must be a tensor (B, S) or (B * S,)", "got list",
    ),
    "token ids in a list": (
        of_model(lambda model: model(IDS.tolist())), TypeError, "input_ids must be a tensor",
        "got list",
    ),
    "one row of token ids": (
        of_model(lambda model: model(IDS[0])), ValueError, "input_ids must be (B, S)", "got (6,)",
    ),
    "ids that are no range": (
        alone(lambda: modality_by_token_id({"image": [1, 2]})), TypeError, "ranges", "[1, 2]",
    ),
    "one name for many": (
        of_model(lambda model: RoutingRecorder(model, modalities="text")), TypeError,
        "must be a list of names", "got the string 'text'",
    ),
    "the handle to the recorder": (
        lambda patched: RoutingRecorder(patched[1]), TypeError, "pass its model",
        "the handle of a patched model",
    ),
    "the handle for its model": (
        lambda patched: add_modality_tokens(patched[1], "image", 2), TypeError, "pass its model",
        "the handle of a patched model",
    ),
    "a dict of settings": (
        alone(lambda: patch_model(make_model("olmoe"), {"r": 4})), TypeError,
        "config must be a ModalityLoraConfig", "got dict",
    ),
    "one token id for several": (
        alone(lambda: ModalityLoraConfig(token_ids={"image": 3})), ValueError,
        "a tuple of ids", "got one number",
    ),
    "a number of tokens that is none": (
        alone(lambda: add_modality_tokens(patched_model("olmoe")[0], "image", 4.0)), TypeError,
        "num_tokens must be an integer", "got 4.0",
    ),
    "features in an array": (
        alone(lambda: gromov_wasserstein_rows(np.ones((4, 2)), torch.ones(4, 2))), TypeError,
        "features must be a tensor (n, d)", "got ndarray",
    ),
    "a number of steps that is none": (
        alone(lambda: VQTokenizer.fit(PIXELS, num_codes=2, steps=1.0)), TypeError,
        "steps must be an integer", "got 1.0",
    ),
    "captions that are no ids": (
        alone(lambda: CaptionedImages(["a cat"], [[0]], VOCABULARY)), TypeError,
        "caption 0 must be token ids, of caption_ids(tokenizer, caption)", "got the string 'a cat'",
    ),
    "codes that are no numbers": (
        alone(lambda: CaptionedImages([[1]], ["code"], VOCABULARY)), TypeError,
        "codes of picture 0 must be a tensor, an array or a list of numbers", "got 'code'",
    ),
    "ids in a list for a vocabulary": (
        alone(lambda: ImageVocabulary.from_token_ids([48, 49, 50])), TypeError,
        "must be the range that add_modality_tokens returned", "got list",
    ),
    "several rows to split": (
        alone(lambda: split_images(IDS, VOCABULARY)), ValueError, "must be one row", "got (1, 6)",
    ),
    "a tokenizer's name": (
        of_model(lambda model: drawn(model, tokenizer="gpt2")), TypeError,
        "tokenizer must be a tokenizer of transformers", "got str",
    ),
    "an image tokenizer's folder": (
        of_model(lambda model: drawn(model, image_tokenizer="folder")), TypeError,
        "load it by load_image_tokenizer(folder)", "got str",
    ),
    "the handle for its base": (
        of_handle(lambda patched: load(patched, "folder")), TypeError,
        "base must be a folder, a hub id or a model that is not patched", "got PatchedModel",
    ),
    "no folder of an adapter": (
        alone(lambda: load("base", None)), TypeError, "adapter must be a folder", "got NoneType",
    ),
    "a rate that is no number": (
        of_handle(lambda patched: patched.parameter_groups("1e-3")), TypeError,
        "lr must be a number", "got '1e-3'",
    ),
    "a reference that is none": (
        of_handle(lambda patched: patched.check_text([IDS], since=IDS)), TypeError,
        "since must be what an earlier check_text returned", "got Tensor",
    ),
    "a temperature that is no number": (
        of_model(lambda model: drawn(model, temperature="1")), TypeError,
        "temperature must be a number", "got '1'",
    ),
    "one tensor for batches": (
        alone(lambda: perplexity(make_dense(), token_ids(2, 6))), ValueError, "(B, S) token ids",
        "got torch.int64 (6,)",
    ),
    "one tensor to heal on": (
        alone(lambda: heal(dense_to_moe(make_dense(), 2, 1), make_dense(), IDS, steps=1)),
        ValueError, "put it into a list", "got one tensor (1, 6)",
    ),
    "batches in lists": (
        alone(lambda: dense_to_moe(make_dense(), 2, 1, "clustered", calibration=[LISTED])),
        TypeError, "each of calibration must be a tensor (B, S) of token ids", "got list",
    ),
    "pictures of two sizes": (
        alone(lambda: PatchTokenizer.fit([PICTURES[0], PICTURES[1].resize((4, 4))])), ValueError,
        "resize and convert them", "got (8, 8, 3) and (4, 4, 3)",
    ),
    "pictures of two modes": (
        alone(lambda: PatchTokenizer.fit([PICTURES[0], PICTURES[1].convert("L")])), ValueError,
        "to one size and mode", "got (8, 8, 3) and (8, 8)",
    ),
    "tensors of two sizes": (
        alone(lambda: PatchTokenizer.fit([torch.zeros(8, 8, 3), torch.zeros(4, 8, 3)])), ValueError,
        "one shape", "got (8, 8, 3) and (4, 8, 3)",
    ),
    "channels first": (
        alone(lambda: VQTokenizer.fit(PIXELS.permute(0, 3, 1, 2))), ValueError,
        "permute it, images.permute(0, 2, 3, 1)", "got (6, 3, 8, 8)",
    ),
    "channels first, in a list": (
        alone(lambda: VQTokenizer.fit([*PIXELS.permute(0, 3, 1, 2).float().div(255)])), ValueError,
        "permute it", "got (6, 3, 8, 8)",
    ),
    "paths of pictures": (
        alone(lambda: PatchTokenizer.fit(["a.png"])), TypeError, "open them, PIL.Image.open(path)",
        "got a list of paths, such as 'a.png'",
    ),
    "a path of pictures": (
        alone(lambda: PatchTokenizer.fit("a.png")), TypeError, "PIL.Image.open(path)",
        "got the path 'a.png'",
    ),
    "an iterator of pictures": (
        alone(lambda: PatchTokenizer.fit(iter(PICTURES))), TypeError, "pass list(images)",
        "got a list_iterator",
    ),
    "a dict of pictures": (
        alone(lambda: PatchTokenizer.fit({"image": PICTURES})), TypeError,
        "a list of arrays or PIL pictures", "got dict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("situation", REFUSED)
def test_another_type_is_refused_in_one_sentence(situation, patched):
    function, error, wanted, got = REFUSED[situation]
    with pytest.raises(error, match=re.escape(got)) as refusal:
        function(patched)
    assert wanted in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_configuration_takes_numbers_of_numpy_and_gives_those_of_python():
    config = ModalityLoraConfig(
        r=TWO, lora_alpha=np.float32(4), rank_pattern={"down_proj": TWO}, layers_to_transform=[TWO]
    )
    plain = ModalityLoraConfig(
        r=2, lora_alpha=4.0, rank_pattern={"down_proj": 2}, layers_to_transform=(2,)
    )
    assert config == plain and repr(config) == repr(plain)


def saved(tokenizer, folder):
    tokenizer.save(folder)
    return load_image_tokenizer(folder)


def test_a_tokenizer_that_was_fitted_with_numbers_of_numpy_can_be_saved(tmp_path):
    """It was fitted for minutes, and then JSON did not know its numbers."""
    sizes = {"num_codes": TWO, "downsample": TWO, "width": np.int64(16), "code_dim": TWO}
    steps = {"steps": np.int64(1), "batch_size": TWO, "progress": False}
    assert saved(VQTokenizer.fit(PIXELS, **sizes, **steps), tmp_path / "vq").downsample == 2
    fitted = PatchTokenizer.fit(PIXELS, num_codes=TWO, patch_size=np.int64(4))
    assert saved(fitted, tmp_path / "patches").patch_size == 4
    made = PatchTokenizer(np.zeros((2, 48)), np.int64(4), np.array([8, 8, 3]))
    assert saved(made, tmp_path / "made").image_shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["list", "tuple", "tensors", "needs grad", "bfloat16", "frozen"])
def test_pictures_come_in_many_kinds(kind, image_tokenizer):
    pixels = PIXELS.float() / 255
    frozen = PIXELS.numpy().copy()
    frozen.flags.writeable = False
    pictures = {
        "list": PICTURES,
        "tuple": tuple(PICTURES),
        "tensors": [*PIXELS],
        "needs grad": [*pixels.clone().requires_grad_()],
        "bfloat16": [*pixels.bfloat16()],
        "frozen": frozen,
    }[kind]
    expected = pixels.bfloat16().float() if kind == "bfloat16" else PIXELS
    assert torch.equal(image_tokenizer.encode(pictures), image_tokenizer.encode(expected))


def test_captions_and_numbers_come_in_many_kinds(patched, image_tokenizer):
    model, options = patched[0], {"image_tokenizer": image_tokenizer}
    expected = drawn(model, ["red", "red"], top_k=1, seed=1, **options)
    numbers = {"top_k": np.int64(1), "seed": np.int64(1), "batch_size": TWO}
    floats = {"temperature": np.float32(1), "top_p": np.float32(1), "guidance_scale": np.float64(1)}
    for captions in (("red", "red"), np.array(["red", "red"]), (each for each in ("red", "red"))):
        found = drawn(model, captions, **numbers, **floats, **options)
        assert [each.tobytes() for each in found] == [each.tobytes() for each in expected]
    codes = generate_image_codes(model, np.array([[1, 2]]), VOCABULARY, TWO, pad_token_id=TWO)
    assert codes.shape == (1, 2)


def test_ids_come_in_many_kinds(patched):
    model = patched[0]
    with torch.no_grad():
        expected = model(IDS, modality_ids=torch.zeros(1, 6, dtype=torch.int64)).logits
        for dtype in (torch.int32, torch.int16, torch.uint8):
            found = model(IDS.int(), modality_ids=torch.zeros(1, 6, dtype=dtype)).logits
            assert torch.equal(found, expected)
    for kind in (list, np.array, torch.tensor):
        assert VOCABULARY.ids_of(kind([0, 1])).tolist() == [VOCAB + 2, VOCAB + 3]
        assert VOCABULARY.codes_of(kind([VOCAB + 2])).tolist() == [0]
    assert ImageVocabulary(np.int64(VOCAB), np.int64(4)) == VOCABULARY
    assert dense_to_moe(make_dense(), TWO, np.int64(1)).config.num_local_experts == 2
