"""Classifier-free guidance: against two separate forwards without a cache, and through generate().

Logits are compared in float64, so that the different call shapes of the cache only cause rounding.
"""

import pytest
import torch
from support.model_zoo import PAD, VOCAB
from support.patched_models import patched_model
from transformers import LogitsProcessor, LogitsProcessorList

from moe_kernels.imaging import (
    ImageGuidanceProcessor,
    ImageTokensProcessor,
    ImageVocabulary,
    generate_image_codes,
    image_prompt,
)
from moe_kernels.testing import assert_close

CODES, TOKENS, SCALE = 8, 4, 2.5
CAPTIONS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
EMPTY = [1, 2]
VOCABULARY = ImageVocabulary(VOCAB, CODES)


def make_painter(family="olmoe"):
    size = ImageVocabulary.size(CODES)
    model, patched = patched_model(family, num_tokens=size, scale=0.5, dtype=torch.float64)
    assert patched.modality_token_ids("image") == VOCABULARY.token_ids
    return model, patched


@pytest.fixture(scope="module")
def painter():
    return make_painter()


def draw(model, captions=CAPTIONS, **options):
    return generate_image_codes(model, captions, VOCABULARY, TOKENS, pad_token_id=PAD, **options)


@torch.no_grad()
def last_logits(model, ids):
    """Return the last logits of one sequence (S,), without a cache, as (V + added,)."""
    return model(torch.as_tensor(ids)[None], use_cache=False).logits[0, -1]


def guided_by_hand(model, row, scores, scale=SCALE):
    """Return the guided scores of one row by the formula.

    row: (S,); scores: (V + added,), the conditional ones
    """
    ids = row.tolist()
    begin = max((at for at, i in enumerate(ids) if i == VOCABULARY.begin_id), default=None)
    if begin is None or VOCABULARY.end_id in ids[begin:] or len(ids) - begin - 1 >= TOKENS:
        return scores
    base = last_logits(model, [*EMPTY, *ids[begin:]])
    return base + scale * (scores - base)


def check_rows(model, processor, ids):
    """Compare the processor with the formula on rows (B, S) and random conditional scores."""
    scores = torch.randn(len(ids), VOCABULARY.token_ids.stop, dtype=torch.float64)
    actual = processor(ids, scores.clone())
    for row, mine, conditional in zip(ids, actual, scores, strict=True):
        assert_close(mine, guided_by_hand(model, row, conditional))
    return actual


def a_picture(*codes):
    return [VOCABULARY.begin_id, *(VOCABULARY.code_ids.start + code for code in codes)]


def processor_for(model, scale=SCALE, **options):
    return ImageGuidanceProcessor(
        model, VOCABULARY, TOKENS, scale, **{"empty_caption": EMPTY} | options
    )


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@pytest.mark.parametrize("empty_caption", [[], EMPTY])
def test_pictures_are_those_of_two_forwards_without_a_cache(family, empty_caption):
    """Greedy generation in a batch with left padding gives the same pictures."""
    model, _ = make_painter(family)
    guidance = {"guidance_scale": SCALE, "empty_caption": empty_caption}
    codes = draw(model, **guidance, top_k=1)
    unguided = draw(model, top_k=1)
    assert not torch.equal(codes, unguided)
    allowed = list(VOCABULARY.code_ids)
    for caption, row in zip(CAPTIONS, codes, strict=True):
        drawn = []
        for code in row.tolist():
            with_caption = last_logits(model, [*image_prompt(caption, VOCABULARY), *drawn])
            without = last_logits(model, [*image_prompt(empty_caption, VOCABULARY), *drawn])
            guided = without + SCALE * (with_caption - without)
            assert guided[allowed].argmax() == code
            drawn.append(VOCABULARY.code_ids.start + code)


def test_several_pictures_that_start_at_different_steps(painter):
    """A row's branch restarts at each begin-of-image; rows without a picture are untouched."""
    model, _ = painter
    end = VOCABULARY.end_id
    rows = torch.tensor([
        [5, *a_picture(3, 1, 4, 1), end, 6, *a_picture(2, 7)],
        [5, 6, *a_picture(0, 5, 5, 2), end, *a_picture(6, 6)],
        [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    ])  # fmt: skip
    processor = processor_for(model)
    torch.manual_seed(0)
    for length in range(1, rows.shape[1] + 1):
        check_rows(model, processor, rows[:, :length])


def test_a_step_of_several_tokens_and_rows_that_change_places(painter):
    model, _ = painter
    rows = torch.tensor([[5, *a_picture(3, 1, 4)], [*a_picture(2, 0, 6, 1)], [5, 6, 7, 8, 9]])
    processor = processor_for(model)
    torch.manual_seed(1)
    check_rows(model, processor, rows[:, :2])
    check_rows(model, processor, rows[:, :4])
    check_rows(model, processor, rows[[1, 0, 0]])
    # The next batch is that of another call of generate.
    check_rows(model, processor, rows[:2, :3])


class GuidanceWithoutCache(LogitsProcessor):
    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, scores):
        return torch.stack([
            guided_by_hand(self.model, row, score.double()).float()
            for row, score in zip(input_ids, scores, strict=True)
        ])  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 0},
        {"do_sample": True, "top_k": 3, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_in_a_generate_call_of_ones_own(painter, options):
    model, _ = painter
    ids = torch.tensor([image_prompt(caption, VOCABULARY) for caption in ([5, 6], [7, 8])])
    drawn = []
    for guidance in (processor_for(model), GuidanceWithoutCache(model)):
        torch.manual_seed(0)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS + 3, suppress_tokens=[],
            logits_processor=LogitsProcessorList(
                [guidance, ImageTokensProcessor(VOCABULARY, TOKENS)]
            ),
            **options,
        )  # fmt: skip
        drawn.append(output)
    assert torch.equal(*drawn)
    assert (drawn[0][:, 3 + TOKENS] == VOCABULARY.end_id).all()


def count_forwards(model):
    calls = []
    handle = model.model.register_forward_hook(lambda *_: calls.append(1))
    return calls, handle


def test_one_is_the_conditional_picture_without_a_second_forward(painter):
    model, _ = painter
    options = {"seed": 3, "batch_size": 2}
    calls, handle = count_forwards(model)
    plain = draw(model, **options)
    once = len(calls)
    one = draw(model, guidance_scale=1, empty_caption=EMPTY, **options)
    assert len(calls) == 2 * once
    guided = draw(model, guidance_scale=4, empty_caption=EMPTY, **options)
    assert len(calls) == 4 * once
    handle.remove()
    assert torch.equal(plain, one)
    assert not torch.equal(plain, guided)

    scores = torch.randn(1, VOCABULARY.token_ids.stop)
    ids = torch.tensor([[5, VOCABULARY.begin_id]])
    assert torch.equal(processor_for(model, scale=1)(ids, scores), scores)


def test_zero_is_the_picture_without_a_caption(painter):
    model, _ = painter
    unconditional = draw(model, [EMPTY], top_k=1)
    zero = draw(model, guidance_scale=0, empty_caption=EMPTY, top_k=1)
    assert torch.equal(zero, unconditional.expand(3, -1))


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_what_is_forbidden_stays_so(painter, scale):
    model, _ = painter
    scores = torch.randn(1, VOCABULARY.token_ids.stop)
    scores[0, 7] = float("-inf")
    guided = processor_for(model, scale)(torch.tensor([[5, VOCABULARY.begin_id]]), scores)
    assert guided[0].isneginf().nonzero().flatten().tolist() == [7]
    assert not guided.isnan().any()


def test_adapters_act_in_the_unconditional_branch(painter):
    model, patched = painter
    ids = torch.tensor([[5, *a_picture(3, 1)]])
    scores = torch.randn(1, VOCABULARY.token_ids.stop, dtype=torch.float64)
    guided = processor_for(model)(ids, scores)
    with patched.adapters_disabled():
        without = processor_for(model)(ids, scores)
    assert (guided - without).abs().max() > 1e-2
    base = (SCALE * scores - guided) / (SCALE - 1)
    modality_ids = torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        given = model(torch.tensor([[*EMPTY, *a_picture(3, 1)]]), modality_ids=modality_ids)
    assert_close(base[0], given.logits[0, -1])


def test_text_is_untouched(painter):
    """Text keeps its bits in a batch with a picture, and after a picture."""
    model, _ = painter
    text = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [5, *a_picture(3, 1, 4, 1), VOCABULARY.end_id]])
    scores = torch.randn(2, VOCABULARY.token_ids.stop)
    assert torch.equal(processor_for(model)(text, scores), scores)
    beside = torch.tensor([[5, 6, 7], [5, *a_picture(3)]])
    guided = processor_for(model)(beside, scores)
    assert torch.equal(guided[0], scores[0]) and not torch.equal(guided[1], scores[1])


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_refuses_a_scale(painter, scale):
    model, _ = painter
    with pytest.raises(ValueError, match="guidance_scale"):
        processor_for(model, scale)
    with pytest.raises(ValueError, match="guidance_scale"):
        generate_image_codes(model, [[5]], VOCABULARY, 4, pad_token_id=PAD, guidance_scale=scale)


def test_refuses_image_tokens_in_the_empty_caption(painter):
    model, _ = painter
    with pytest.raises(ValueError, match="image tokens"):
        processor_for(model, empty_caption=[5, VOCABULARY.end_id])
    with pytest.raises(ValueError, match="tokens_per_image"):
        ImageGuidanceProcessor(model, VOCABULARY, 0, 2.0)
