"""Pictures from caption strings: the prompt equals that of training, and bad input is refused."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.model_zoo import VOCAB, make_model, randomise
from support.text_tokenizer import WORDS, make_tokenizer

from moe_kernels import add_modality_tokens, patch_model, progress
from moe_kernels.imaging import (
    CaptionedImages,
    ImageVocabulary,
    PatchTokenizer,
    caption_ids,
    generate_image_codes,
    generate_images,
    to_pil,
)

CODES, TOKENS = 8, 6
CAPTIONS = ["red cat", "dog", "a red dog", "red cat"]
MARKED = {"template": "<s> $A", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def painter():
    """Return a model and its tokenizer, both with image tokens, and an image tokenizer."""
    model = make_model("olmoe")
    patched = patch_model(model)
    tokenizer = make_tokenizer(pad_token="<pad>", **MARKED)
    add_modality_tokens(model, "image", ImageVocabulary.size(CODES), tokenizer=tokenizer)
    randomise(patched, scale=0.5)
    torch.manual_seed(0)
    return model, tokenizer, PatchTokenizer(torch.rand(CODES, 12), 2, (4, 6, 3))


def draw(painter, captions=CAPTIONS, **options):
    model, tokenizer, image_tokenizer = painter
    defaults = {"tokenizer": tokenizer, "image_tokenizer": image_tokenizer, "seed": 0}
    return generate_images(model, captions, **defaults | options)


def same_pictures(first, second):
    return (np.stack(first) == np.stack(second)).all()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_one_picture_a_caption(painter, scale):
    model, tokenizer, image_tokenizer = painter
    pictures = draw(painter, guidance_scale=scale, batch_size=3, temperature=0.7)
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (6, 4))] * 4
    codes = generate_image_codes(
        model, [caption_ids(tokenizer, caption) for caption in CAPTIONS],
        ImageVocabulary(VOCAB, CODES), TOKENS, pad_token_id=0, guidance_scale=scale,
        empty_caption=caption_ids(tokenizer, ""), batch_size=3, temperature=0.7, seed=0,
    )  # fmt: skip
    assert same_pictures(pictures, to_pil(image_tokenizer.decode(codes)))
    assert not same_pictures(pictures, draw(painter, guidance_scale=scale, seed=1))
    assert draw(painter, []) == []


def test_every_drawing_at_once_is_the_drawing_alone(painter):
    """Seeds and the model's settings for text are those of all threads."""
    model, settings, state = painter[0], painter[0].generation_config, torch.get_rng_state()
    seeds = list(range(4)) * 3
    alone = [draw(painter, seed=seed, guidance_scale=1 + seed % 2) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(draw, painter, seed=s, guidance_scale=1 + s % 2) for s in seeds]
        together = [call.result() for call in calls]
    assert all(same_pictures(*pair) for pair in zip(alone, together, strict=True))
    assert model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), state)


def test_the_prompt_is_that_of_training(painter, monkeypatch):
    model, tokenizer, image_tokenizer = painter
    ids = [caption_ids(tokenizer, caption) for caption in CAPTIONS]
    codes = torch.zeros(4, TOKENS, dtype=torch.int64)
    trained = CaptionedImages(ids, codes, ImageVocabulary(VOCAB, CODES))
    prompts, original = [], type(model).generate

    def generate(*args, input_ids, attention_mask, **kwargs):
        prompts.extend(
            row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)
        )
        return original(model, *args, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(model, "generate", generate)
    draw(painter)
    for prompt, sample in zip(prompts, trained, strict=True):
        assert prompt == sample["input_ids"][: len(prompt)].tolist()
        assert prompt[0] == WORDS.index("<s>") and prompt[-1] == VOCAB


def test_without_a_pad_token_the_end_of_text_fills_up(painter):
    assert same_pictures(draw(painter), draw(painter, tokenizer=make_tokenizer(**MARKED)))


def test_settings_for_text_have_no_say(painter):
    model = copy.deepcopy(painter[0])
    model.generation_config.update(
        repetition_penalty=5.0, top_k=1, min_p=0.9, num_beams=3, eos_token_id=VOCAB + 2,
        num_return_sequences=2,
    )  # fmt: skip
    settings = model.generation_config.to_dict()
    assert same_pictures(draw(painter), draw((model, *painter[1:])))
    assert model.generation_config.to_dict() == settings


def test_a_model_in_training_with_a_balance_loss_draws(painter):
    model = copy.deepcopy(painter[0])
    model.config.output_router_logits = True
    drawn = draw((model, *painter[1:]), guidance_scale=2.0)
    assert same_pictures(drawn, draw(painter, guidance_scale=2.0))
    assert model.config.output_router_logits is True


@pytest.mark.parametrize("option", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_sampling_options_that_leave_the_likeliest(painter, option):
    assert same_pictures(draw(painter, **option, seed=1), draw(painter, **option, seed=2))
    assert not same_pictures(draw(painter, seed=1), draw(painter, seed=2))


def test_a_model_that_is_not_patched_needs_the_vocabulary(painter):
    model = make_model("olmoe", vocab_size=VOCAB + ImageVocabulary.size(CODES))
    plain = (model, make_tokenizer(pad_token="<pad>"), painter[2])
    pictures = draw(plain, vocabulary=ImageVocabulary(VOCAB, CODES))
    assert len(pictures) == 4
    with pytest.raises(ValueError, match="not patched"):
        draw(plain)
    patch_model(model)
    with pytest.raises(ValueError, match='no tokens of modality "image"'):
        draw(plain)


def test_a_model_of_peft_draws_too(painter, recwarn):
    """A model with PEFT's LoRA, which is the baseline, can generate pictures too."""
    peft = pytest.importorskip("peft")
    model = make_model("olmoe", vocab_size=VOCAB + ImageVocabulary.size(CODES))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings, expected = model.generation_config, []
    for wrap in (lambda: model, lambda: peft.get_peft_model(model, config)):
        drawn = draw(
            (wrap(), *painter[1:]), vocabulary=ImageVocabulary(VOCAB, CODES), guidance_scale=2.0
        )
        expected.append(drawn)
    assert same_pictures(*expected)  # LoRA's B starts at zero
    assert model.generation_config is settings
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]


def test_any_object_with_the_four_members_serves(painter):
    class Grey:
        num_codes, tokens_per_image = CODES, 3

        def decode(self, codes):
            return (codes.float() / CODES)[:, None, :]

    pictures = draw(painter, image_tokenizer=Grey())
    assert [(picture.mode, picture.size) for picture in pictures] == [("L", (3, 1))] * 4


def test_progress(painter, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    draw(painter, progress=True)
    assert "drawing" in capsys.readouterr().err
    draw(painter)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": ["dog", "a <image_3>"]}, "contains image tokens"),
        ({"empty_caption": "<image_0>"}, "contains image tokens"),
        ({"vocabulary": ImageVocabulary(VOCAB, 4)}, "4 codes, but the image tokenizer has 8"),
        ({"tokenizer": make_tokenizer()}, "neither a pad token"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1e-300}, "temperature"),
        ({"guidance_scale": 1e30}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"batch_size": 2.5}, "batch_size must be an integer"),
        ({"seed": -1}, "seed must be an integer of at least 0; got -1"),
        ({"seed": 2**64}, "seed must be an integer"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"captions": ["dog", "\ud800"]}, "valid Unicode"),
        ({"captions": ["red cat " * 3000]}, "positions, more than the model's .*: shorten"),
        ({"top_p": 0.0}, "top_p"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_refuses(painter, change, message):
    with pytest.raises(ValueError, match=message):
        draw(painter, **{"guidance_scale": 2.0} | change)


def test_positions_may_be_filled_to_the_last(painter, monkeypatch):
    """The last code is drawn but never read."""
    model, tokenizer, _ = painter
    caption = "red cat " * 5
    needed = len(caption_ids(tokenizer, caption)) + 1 + TOKENS - 1
    monkeypatch.setattr(model.config, "max_position_embeddings", needed)
    reached = []
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: reached.append(int([*args, *kwargs.values()][1].max())),
        with_kwargs=True,
    )
    draw(painter, [caption])
    hook.remove()
    assert max(reached) == needed - 1  # counted from 0
    draw(painter, ["red"], guidance_scale=2.0, empty_caption=caption)
    monkeypatch.setattr(model.config, "max_position_embeddings", needed - 1)
    draw(painter, ["red"], empty_caption=caption)
    message = f"a picture take {needed} positions, more than the model's {needed - 1}: shorten"
    with pytest.raises(ValueError, match=message):
        draw(painter, [caption])
    with pytest.raises(ValueError, match=message):
        draw(painter, ["red"], guidance_scale=2.0, empty_caption=caption)


def test_refuses_one_string(painter):
    with pytest.raises(TypeError, match="list of strings"):
        draw(painter, "red cat")
    with pytest.raises(TypeError, match="a caption must be a string; got 7"):
        draw(painter, ["red cat", 7])


def test_refuses_scores_that_are_not_numbers(painter):
    model = copy.deepcopy(painter[0])
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the model's scores are NaN"):
        draw((model, *painter[1:]))


def test_refuses_a_model_without_weights(painter):
    with torch.device("meta"):
        model = make_model("olmoe")
        patched = patch_model(model)
        add_modality_tokens(model, "image", ImageVocabulary.size(CODES))
    with pytest.raises(ValueError, match="on the meta device, where it has no weights"):
        draw((patched.model, *painter[1:]))


def test_a_failure_leaves_the_model_as_it_was(painter, monkeypatch):
    model = painter[0]
    settings = model.generation_config

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    model.train()
    model.model.layers[0].eval()  # such as a part that is frozen
    modes = [module.training for module in model.modules()]
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            draw(painter)
        assert [module.training for module in model.modules()] == modes
        assert model.generation_config is settings
    finally:
        model.eval()
