"""Captions to token ids, several pictures in a text, and taking them apart again."""

import pytest
import torch
from support.model_zoo import LARGE, PAD, VOCAB, make_model, token_ids
from support.patched_models import patched_model
from support.text_tokenizer import make_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList

from moe_kernels import add_modality_tokens, patch_model
from moe_kernels.imaging import (
    IGNORE_INDEX,
    CaptionedImages,
    ImageCollator,
    ImageTokensProcessor,
    ImageVocabulary,
    caption_ids,
    generate_image_codes,
    image_prompt,
    image_sequence,
    mixed_sequence,
    padding_id,
    split_images,
)

CODES, TOKENS = 8, 3
VOCABULARY = ImageVocabulary(VOCAB, CODES)
BEGIN, END, FIRST = VOCABULARY.begin_id, VOCABULARY.end_id, VOCABULARY.code_ids.start


# --- captions


@pytest.mark.parametrize(
    ("template", "special", "front"),
    [
        ("$A", {"bos_token": "<s>", "eos_token": "</s>"}, []),
        ("<s> $A", {"bos_token": "<s>", "eos_token": "</s>"}, [1]),
        ("<s> $A </s>", {"bos_token": "<s>", "eos_token": "</s>"}, [1]),
        ("$A </s>", {"eos_token": "</s>"}, []),
    ],
)
def test_a_caption_has_a_begin_of_text_exactly_if_the_tokenizer_adds_it(template, special, front):
    tokenizer = make_tokenizer(template, **special)
    assert caption_ids(tokenizer, "red cat") == [*front, 4, 5]
    assert caption_ids(tokenizer, "") == front
    assert caption_ids(tokenizer, "<s> red") == [1, 4]


def test_padding_is_the_pad_token_or_else_the_end_of_text():
    assert padding_id(make_tokenizer(pad_token="<pad>", eos_token="</s>")) == 0
    assert padding_id(make_tokenizer(eos_token="</s>")) == 2
    with pytest.raises(ValueError, match="neither"):
        padding_id(make_tokenizer())


@pytest.mark.parametrize("bad", VOCABULARY.token_ids[:3])
def test_captions_with_image_tokens_are_refused(bad):
    codes = torch.zeros(2, TOKENS, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"caption 1 contains image tokens: ids \[{bad}\]"):
        CaptionedImages([[5], [6, bad]], codes, VOCABULARY)
    with pytest.raises(ValueError, match="empty_caption contains image tokens"):
        CaptionedImages([[5], [6]], codes, VOCABULARY, empty_caption=[bad])
    for refuses in (
        lambda: image_prompt([6, bad], VOCABULARY),
        lambda: image_sequence([6, bad], codes[0], VOCABULARY),
        lambda: generate_image_codes(None, [[6, bad]], VOCABULARY, TOKENS, pad_token_id=PAD),
    ):
        with pytest.raises(ValueError, match="contains image tokens"):
            refuses()


# --- text and pictures in one sequence


def picture(*codes):
    return torch.tensor(codes)


def same_pieces(actual, expected):
    assert [type(piece) for piece in actual] == [type(piece) for piece in expected]
    for one, other in zip(actual, expected, strict=True):
        assert list(one) == list(other)


PIECES = [[5, 6], picture(3, 1, 4), [7], picture(0, 7, 7), picture(2, 2, 2), [8, 9]]


def test_layout_of_text_and_pictures():
    sample = mixed_sequence(PIECES[:3], VOCABULARY)
    assert sample["input_ids"].tolist() == [5, 6, BEGIN, FIRST + 3, FIRST + 1, FIRST + 4, END, 7]
    ignored = IGNORE_INDEX
    codes = [FIRST + 3, FIRST + 1, FIRST + 4, END]
    assert sample["labels"].tolist() == [ignored, ignored, ignored, *codes, ignored]
    with_text = mixed_sequence(PIECES[:3], VOCABULARY, text_labels=True)
    assert torch.equal(with_text["labels"], sample["input_ids"])
    assert mixed_sequence([], VOCABULARY)["input_ids"].shape == (0,)


@pytest.mark.parametrize("pieces", [PIECES, PIECES[1:], PIECES[:5], [[5]], []])
def test_split_is_the_inverse_of_the_layout(pieces):
    ids = mixed_sequence(pieces, VOCABULARY)["input_ids"]
    same_pieces(split_images(ids, VOCABULARY), pieces)
    same_pieces(split_images(ids.tolist(), VOCABULARY), pieces)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, FIRST], "outside a picture, at position 1"),
        ([END], "outside a picture, at position 0"),
        ([BEGIN, FIRST, BEGIN], "inside a picture, at position 2"),
        ([BEGIN, FIRST, 5], "text token 5 inside a picture, at position 2"),
        ([5, BEGIN, FIRST, FIRST], "2 codes"),
    ],
)
def test_split_refuses(ids, message):
    with pytest.raises(ValueError, match=message):
        split_images(ids, VOCABULARY)


def test_split_can_leave_out_an_unfinished_picture():
    ids = [5, BEGIN, FIRST, END, 6, BEGIN, FIRST]
    same_pieces(split_images(ids, VOCABULARY, drop_unfinished=True), [[5], picture(0), [6]])


def test_a_caption_may_be_a_tensor():
    from_list = image_sequence([5, 6], picture(3, 1, 4), VOCABULARY)
    from_tensor = image_sequence(torch.tensor([5, 6]), picture(3, 1, 4), VOCABULARY)
    for name, tensor in from_list.items():
        assert torch.equal(from_tensor[name], tensor)


def test_mixed_samples_are_collated():
    samples = [mixed_sequence(PIECES, VOCABULARY), mixed_sequence(PIECES[:1], VOCABULARY)]
    batch = ImageCollator(PAD)(samples)
    assert batch["input_ids"].shape == batch["labels"].shape
    assert batch["attention_mask"].sum(1).tolist() == [len(s["input_ids"]) for s in samples]


def test_refuses_image_tokens_in_a_text_and_codes_outside():
    with pytest.raises(ValueError, match="image tokens"):
        mixed_sequence([[5, FIRST]], VOCABULARY)
    with pytest.raises(ValueError, match=r"0\.\.7"):
        mixed_sequence([picture(CODES)], VOCABULARY)
    with pytest.raises(TypeError, match="list of token ids or a tensor"):
        mixed_sequence([picture(1).numpy()], VOCABULARY)


# --- generating several pictures in a text


def allowed(processor, *ids):
    scores = torch.randn(1, VOCABULARY.token_ids.stop)
    return processor(torch.tensor([ids]), scores)[0].isfinite().nonzero().flatten().tolist()


def test_processor_lets_pictures_begin_until_there_are_enough():
    processor = ImageTokensProcessor(VOCABULARY, TOKENS, max_images=2)
    text, codes = list(range(VOCAB)), list(VOCABULARY.code_ids)
    whole = (BEGIN, FIRST, FIRST + 1, FIRST, END)
    assert allowed(processor, 5) == [*text, BEGIN]
    assert allowed(processor, 5, *whole[:3]) == codes
    assert allowed(processor, 5, *whole[:4]) == [END]
    assert allowed(processor, 5, *whole) == [*text, BEGIN]
    assert allowed(processor, 5, *whole, 6, *whole[:2]) == codes
    assert allowed(processor, 5, *whole, *whole) == text
    # A picture of the prompt may end early; one with too many codes gets its end token now.
    assert allowed(processor, *whole[:2], END, 5) == [*text, BEGIN]
    assert allowed(processor, BEGIN, *[FIRST] * (TOKENS + 1)) == [END]
    with pytest.raises(ValueError, match="max_images"):
        ImageTokensProcessor(VOCABULARY, TOKENS, max_images=-1)


class Favour(LogitsProcessor):
    """Gives begin-of-image the highest score."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, BEGIN] = scores.amax(1)
        return scores


@pytest.fixture(scope="module")
def painter():
    return patched_model("olmoe", num_tokens=ImageVocabulary.size(CODES), scale=0.5)[0]


def test_every_picture_in_a_generated_text_has_the_right_number_of_codes(painter):
    prompts = [{"input_ids": torch.tensor(ids)} for ids in ([5, 6, 7], [8], [9, BEGIN])] * 3
    batch = ImageCollator(PAD)(prompts)
    constraint = ImageTokensProcessor(VOCABULARY, TOKENS, max_images=3)
    torch.manual_seed(0)
    output = painter.generate(
        **batch, do_sample=True, top_k=0, max_new_tokens=40, suppress_tokens=[],
        logits_processor=LogitsProcessorList([Favour(), constraint]),
    )  # fmt: skip
    counts = []
    for row in output:
        pieces = split_images(row, VOCABULARY, drop_unfinished=True)
        pictures = [piece for piece in pieces if isinstance(piece, torch.Tensor)]
        assert all(len(codes) == TOKENS for codes in pictures)
        counts.append(len(pictures))
        assert isinstance(pieces[-1], list) and len(pieces) > len(pictures)
    assert max(counts) == 3 and min(counts) >= 1


def test_text_keeps_its_bits_when_pictures_in_a_text_are_learnt():
    """Text keeps its bits, alone and before a picture, at a size that would show a change."""
    model = make_model("mixtral", intermediate_size=128, **LARGE)
    patched = patch_model(model)
    add_modality_tokens(model, "image", ImageVocabulary.size(CODES))
    generator = torch.Generator().manual_seed(4)

    def some(size, high):
        return torch.randint(1, high, (size,), generator=generator)

    samples = [
        mixed_sequence(
            [some(40, VOCAB).tolist(), some(9, CODES), some(5, VOCAB).tolist(), some(9, CODES)],
            VOCABULARY,
        )
        for _ in range(3)
    ]
    batch = ImageCollator(PAD)(samples)
    text = token_ids(3, batch["input_ids"].shape[1])

    def text_logits():
        with torch.no_grad():
            alone = model(input_ids=text).logits[..., :VOCAB]
            mixed = model(input_ids=batch["input_ids"]).logits[..., :VOCAB]
        return alone, mixed[:, :40], mixed[:, 40:]

    before = text_logits()
    optimizer = torch.optim.SGD(patched.trainable_parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    after = text_logits()
    assert losses[-1] < losses[0]
    assert before[0].std() > 0.1
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[2], after[2])


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint32]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_do_not_overflow_the_dtype_of_codes(dtype):
    vocabulary = ImageVocabulary(first_id=50304, num_codes=256)
    ids = vocabulary.ids_of(torch.tensor([0, 1, 200, 255]).to(dtype))
    assert ids.dtype == torch.int64 and ids.tolist() == [50306, 50307, 50506, 50561]
    if dtype in (torch.int64, torch.int32, torch.uint16, torch.uint32):
        codes = vocabulary.codes_of(ids.to(dtype))
        assert codes.dtype == torch.int64 and codes.tolist() == [0, 1, 200, 255]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_codes_that_are_not_integers_are_refused(dtype):
    with pytest.raises(TypeError, match=f"codes must be integers; got {dtype}"):
        ImageVocabulary(first_id=8, num_codes=4).ids_of(torch.ones(2).to(dtype))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([5.7], TypeError, "caption 1 must hold integer token ids; got torch.float32"),
        ([True], TypeError, "got torch.bool"),
        ([-1], ValueError, "one row of token ids of at least 0"),
        ([[5]], ValueError, "one row of token ids"),
    ],
    ids=str,
)
def test_captions_that_are_no_token_ids_are_refused(ids, error, message):
    vocabulary = ImageVocabulary(first_id=8, num_codes=4)
    with pytest.raises(error, match=message):
        CaptionedImages([[5], ids], torch.zeros(2, 3, dtype=torch.int64), vocabulary)
    with pytest.raises(error, match=message.replace("caption 1", "the caption")):
        image_prompt(ids, vocabulary)
