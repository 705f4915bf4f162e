"""generate() on patched models: cache, batches, padding, sampling, beams and embeddings.

Models are in float64, so that no near-tie flips a token between two call shapes.
"""

import copy

import pytest
import torch
from support.model_zoo import FAMILY, VOCAB, make_model, randomise, token_ids
from support.patched_models import greedy, patched_model
from transformers import GenerationConfig

from moe_kernels import add_modality_tokens, patch_model

NUM_IMAGE_TOKENS = 40
NEW = 8


@pytest.fixture
def model():
    return make_patched("mixtral")


def make_patched(family):
    """Patch a model; its adapters and image tokens are large and many enough to be generated."""
    options = {"num_tokens": NUM_IMAGE_TOKENS, "scale": 0.5, "dtype": torch.float64}
    return patched_model(family, **options)[0]


def generate(model, ids=None, **kwargs):
    """Return the generated tokens: greedy by default, image tokens allowed."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": []} | kwargs
    prompt = 0 if ids is None else ids.shape[1]
    return model.generate(ids, **settings)[:, prompt:]


def prompt(batch=2, length=6, **kwargs):
    ids = token_ids(batch, length, vocab=VOCAB + NUM_IMAGE_TOKENS, **kwargs)
    return {"ids": ids, "attention_mask": torch.ones_like(ids)}


def declared_prompt(*size):
    """Return a prompt, and modality ids (B, S) that call its text an image and its images text."""
    inputs = prompt(*size)
    return inputs, 1 - (inputs["ids"] >= VOCAB).long()


def by_hand(model, ids):
    return greedy(model, ids, NEW)[:, -NEW:]


def by_hand_declared(model, ids):
    """Decode with the opposite modality at the prompt; a new token's follows from its id."""
    length = ids.shape[1]

    def modality_of(ids):
        image = (ids >= VOCAB).long()
        return torch.cat([1 - image[:, :length], image[:, length:]], dim=1)

    return greedy(model, ids, NEW, modality_of)[:, -NEW:]


@FAMILY
def test_cache(family):
    model = make_patched(family)
    inputs = prompt()
    expected = by_hand(model, inputs["ids"])
    assert (expected >= VOCAB).any()
    assert torch.equal(generate(model, **inputs), expected)
    assert torch.equal(generate(model, **inputs, use_cache=False), expected)
    assert torch.equal(generate(model, **inputs, cache_implementation="static"), expected)


@FAMILY
def test_left_padding(family):
    """Prompts of three lengths give the same tokens in a batch as alone."""
    model = make_patched(family)
    lengths = (3, 7, 10)
    inputs = prompt(3, 10)
    mask = (torch.arange(10) >= 10 - torch.tensor(lengths)[:, None]).long()
    ids = inputs["ids"].masked_fill(mask == 0, 0)
    together = generate(model, ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, -length:]
        expected = generate(model, alone, attention_mask=torch.ones_like(alone))
        assert torch.equal(together[row : row + 1], expected)


@FAMILY
def test_from_embeddings(family):
    model = make_patched(family)
    inputs = prompt()
    ids, mask = inputs.values()
    embeds = model.get_input_embeddings()(ids)
    modality_ids = (ids >= VOCAB).long()
    kwargs = {"inputs_embeds": embeds, "attention_mask": mask, "modality_ids": modality_ids}
    assert torch.equal(generate(model, **kwargs), generate(model, **inputs))
    with pytest.raises(ValueError, match="give modality_ids"):
        generate(model, inputs_embeds=embeds, attention_mask=mask)


def test_given_modality_ids_hold_for_the_prompt_only(model):
    """Text tokens may be declared an image; a generated token's modality follows from its id."""
    inputs, declared = declared_prompt()
    ids = inputs["ids"]
    assert not torch.equal(generate(model, **inputs), by_hand_declared(model, ids))
    for use_cache in (True, False):
        actual = generate(model, **inputs, modality_ids=declared, use_cache=use_cache)
        assert torch.equal(actual, by_hand_declared(model, ids))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prompt_of_one_token_with_given_modality(model, use_cache):
    """The prompt's modality ids, though of a new token's shape, do not apply to the new token."""
    inputs, declared = declared_prompt(3, 1)
    actual = generate(model, **inputs, modality_ids=declared, use_cache=use_cache)
    assert torch.equal(actual, by_hand_declared(model, inputs["ids"]))
    assert not torch.equal(actual, generate(model, **inputs))


def test_given_modality_ids_with_a_cache_of_ones_own(model):
    """generate() continues from a cache of the first tokens of the prompt."""
    inputs, declared = declared_prompt()
    ids = inputs["ids"]
    with torch.no_grad():
        cache = model(ids[:, :4], modality_ids=declared[:, :4], use_cache=True).past_key_values
    actual = generate(model, **inputs, modality_ids=declared, past_key_values=cache)
    assert torch.equal(actual, by_hand_declared(model, ids))


@pytest.mark.parametrize(
    "option", [{"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_given_modality_ids_in_pieces(model, option):
    inputs, declared = declared_prompt(1, 12)
    actual = generate(model, **inputs, modality_ids=declared, **option)
    assert torch.equal(actual, by_hand_declared(model, inputs["ids"]))


def test_sampling_is_reproducible(model):
    inputs = prompt(4)
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(generate(model, **inputs, do_sample=True, temperature=1.0, top_k=0))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_beams(model):
    """Scoring a beam with one forward gives the score that beam search gave it."""
    inputs = prompt()
    out = model.generate(
        inputs["ids"], attention_mask=inputs["attention_mask"], max_new_tokens=NEW, num_beams=3,
        do_sample=False, suppress_tokens=[], return_dict_in_generate=True, output_scores=True,
        length_penalty=0.0,
    )  # fmt: skip
    with torch.no_grad():
        log_probs = model(out.sequences).logits.float().log_softmax(-1)
    chosen = log_probs[:, 5:-1].gather(-1, out.sequences[:, 6:, None]).sum((1, 2))
    assert torch.allclose(chosen, out.sequences_scores.float(), rtol=1e-4)
    greedy = torch.cat([inputs["ids"], generate(model, **inputs)], dim=1)
    with torch.no_grad():
        log_probs = model(greedy).logits.float().log_softmax(-1)
    assert (chosen >= log_probs[:, 5:-1].gather(-1, greedy[:, 6:, None]).sum((1, 2)) - 1e-4).all()


def test_guidance_through_the_unconditional_branch(model):
    """transformers' guidance runs a second prompt, which must have its own modality."""
    inputs = prompt()
    negative = prompt(seed=7)
    kwargs = {"guidance_scale": 1.5, "negative_prompt_ids": negative["ids"]}
    kwargs["negative_prompt_attention_mask"] = negative["attention_mask"]
    actual = generate(model, **inputs, **kwargs)
    ids, other = inputs["ids"], negative["ids"]
    for _ in range(NEW):
        with torch.no_grad():
            scores, base = (model(x).logits[:, -1].log_softmax(-1) for x in (ids, other))
        new = (1.5 * (scores - base) + base).argmax(-1, keepdim=True)
        ids, other = torch.cat([ids, new], 1), torch.cat([other, new], 1)
    assert torch.equal(actual, ids[:, -NEW:])


@FAMILY
def test_text_generation_makes_no_image_tokens(family):
    model = make_patched(family)
    inputs = prompt()
    ids, mask = inputs.values()
    assert (generate(model, **inputs) >= VOCAB).any()
    text = {"attention_mask": mask, "max_new_tokens": 16}
    torch.manual_seed(0)
    for kwargs in (
        {"do_sample": False},
        {"do_sample": True},
        {"do_sample": False, "num_beams": 2},
    ):
        assert (model.generate(ids, **text, **kwargs)[:, 6:] < VOCAB).all()
    own = GenerationConfig(max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert (model.generate(ids, attention_mask=mask, generation_config=own)[:, 6:] < VOCAB).all()


def test_image_tokens_allowed_in_a_configuration_of_ones_own(model):
    inputs = prompt()
    own = copy.deepcopy(model.generation_config)
    own.update(max_new_tokens=NEW, do_sample=False, suppress_tokens=[])
    out = model.generate(
        inputs["ids"], attention_mask=inputs["attention_mask"], generation_config=own
    )
    assert torch.equal(out[:, 6:], generate(model, **inputs))


def test_text_generation_is_the_base(family="olmoe"):
    model = make_model(family, dtype=torch.float64)
    ids = token_ids(2, 6)
    text = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False}
    expected = model.generate(ids, **text)
    patched = patch_model(model)
    add_modality_tokens(model, "image", NUM_IMAGE_TOKENS)
    randomise(patched)
    assert torch.equal(model.generate(ids, **text), expected)
    patched.unpatch()
    assert torch.equal(model.generate(ids, **text), expected)
