"""The patched model as a text model: beams, losses and evaluations over the base vocabulary."""

import contextlib
import copy

import accelerate
import pytest
import torch
from support.model_zoo import FAMILY, VOCAB, make_model, randomise, token_ids, unchanged
from support.patched_models import patched_model
from torch.nn import functional as F
from transformers import GenerationConfig

from moe_kernels import patch_model
from moe_kernels.testing import assert_close

ADDED = 16
IDS = token_ids(2, 10)


def train(patched, seed):
    """Stand in for training: large random adapters and rows, likely beside any text."""
    randomise(patched, scale=2.0, seed=seed)


@FAMILY
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_and_loss_of_the_base_vocabulary(family, tied):
    """The same bits whatever was trained, and those of the unpatched model but for rounding."""
    plain = make_model(family, tie_word_embeddings=tied)(IDS, labels=IDS)
    model, patched = patched_model(family, num_tokens=ADDED, tie_word_embeddings=tied)
    whole = model(IDS).logits
    with patched.text_only():
        found = model(IDS, labels=IDS)
        train(patched, seed=1)
        after = model(IDS, labels=IDS)
    assert found.logits.shape == (2, 10, VOCAB)
    assert torch.equal(found.logits, whole[..., :VOCAB])
    assert torch.equal(found.logits, after.logits) and torch.equal(found.loss, after.loss)
    assert_close(found.logits, plain.logits)
    assert_close(found.loss, plain.loss)
    outside = model(IDS, labels=IDS)
    assert outside.logits.shape[-1] == VOCAB + ADDED and not torch.equal(outside.loss, found.loss)


def test_pictures_may_be_read_within():
    model, patched = patched_model(num_tokens=ADDED)
    pictures = token_ids(2, 10, vocab=VOCAB + ADDED)
    with patched.text_only():
        assert torch.equal(model(pictures).logits, model(pictures).logits[..., :VOCAB])
        expected = model(pictures).logits
    assert torch.equal(model(pictures).logits[..., :VOCAB], expected)
    labels = pictures.masked_fill(pictures >= VOCAB, -100)
    labels[0, 5] = VOCAB + 1
    with patched.text_only(), pytest.raises(ValueError, match=f"labels has id {VOCAB + 1} of an"):
        model(pictures, labels=labels)
    model(pictures, labels=labels)


def test_the_switch_is_for_all_threads_and_stays():
    model, patched = patched_model(num_tokens=ADDED)
    patched.added_tokens_enabled = False
    assert model(IDS).logits.shape[-1] == VOCAB
    copied = copy.deepcopy(model)
    patched.added_tokens_enabled = True
    assert model(IDS).logits.shape[-1] == VOCAB + ADDED
    assert copied(IDS).logits.shape[-1] == VOCAB
    with patched.text_only():
        with patched.text_only():
            pass
        assert not patched.added_tokens_enabled
        with pytest.raises(RuntimeError, match="added_tokens_enabled is for all threads"):
            patched.added_tokens_enabled = True


@pytest.mark.slow
def test_a_compiled_model_sees_it():
    model, patched = patched_model(num_tokens=ADDED)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for context in (contextlib.nullcontext, patched.text_only) * 2:
            with context():
                assert torch.equal(compiled(IDS).logits, model(IDS).logits)


def squared(logits, labels, vocab_size, **kwargs):
    return F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1)).square()


def test_a_loss_of_the_users_own():
    model = make_model("mixtral")
    model.loss_function = squared
    expected = model(IDS, labels=IDS).loss
    patched = patch_model(model)
    with patched.text_only():
        assert_close(model(IDS, labels=IDS).loss, expected)
    patched.unpatch()
    assert model.loss_function is squared


def test_a_loss_that_was_set_later():
    """It takes the vocabulary with added tokens, which the logits then do not have."""
    model, patched = patched_model(num_tokens=ADDED)
    model.loss_function = squared
    model(IDS, labels=IDS)
    with patched.text_only():
        model(IDS)
        with pytest.raises(RuntimeError, match="loss was set to squared after patch_model"):
            model(IDS, labels=IDS)
    patched.unpatch()
    assert model.loss_function is squared


# --- generate()

WAYS = {
    "beams": {"num_beams": 4},
    "sampled beams": {"num_beams": 4, "do_sample": True},
    "sampling": {"do_sample": True, "temperature": 3.0, "top_p": 0.9},
    "guidance": {"guidance_scale": 1.5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"num_beams": 3, "cache_implementation": "static"},
    "length penalty": {"num_beams": 4, "length_penalty": -1.0, "num_return_sequences": 2},
    "renormalised": {"num_beams": 2, "renormalize_logits": True, "repetition_penalty": 1.3},
}


def generated(model, **settings):
    """Return the tokens that were generated, and their scores."""
    torch.manual_seed(0)
    ids = IDS[:1] if "prompt_lookup_num_tokens" in settings else IDS
    settings = {"max_new_tokens": 8, "do_sample": False, "output_scores": True} | settings
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **settings
    )
    return found.sequences, torch.stack(found.scores)


@pytest.mark.parametrize("way", WAYS)
def test_training_moves_no_generated_text(way):
    model, patched = patched_model("olmoe", num_tokens=ADDED, dtype=torch.float64)
    before = generated(model, **WAYS[way])
    train(patched, seed=1)
    after = generated(model, **WAYS[way])
    for found, expected in zip(after, before, strict=True):
        assert torch.equal(found, expected)
    assert before[0].max() < VOCAB


@pytest.mark.parametrize("way", ["beams", "sampled beams", "sampling"])
def test_text_is_generated_as_by_the_unpatched_model(way):
    plain = make_model("olmoe", dtype=torch.float64)
    expected, scores = generated(plain, **WAYS[way])
    model, patched = patched_model("olmoe", num_tokens=ADDED, dtype=torch.float64)
    train(patched, seed=1)
    sequences, found = generated(model, **WAYS[way])
    if "do_sample" not in WAYS[way]:  # V + n columns take other random numbers
        assert torch.equal(sequences, expected)
    assert_close(found[0, :, :VOCAB].softmax(-1), scores[0].softmax(-1))
    assert (found[..., VOCAB:] == -torch.inf).all()


def test_the_arguments_decide_whether_added_tokens_are_masked():
    model, _ = patched_model(num_tokens=ADDED)
    allowed = GenerationConfig(suppress_tokens=[], max_new_tokens=1, do_sample=False)
    some = list(range(VOCAB, VOCAB + ADDED - 1))
    own = GenerationConfig(max_new_tokens=1, do_sample=False)  # None: the model's setting
    text = GenerationConfig(suppress_tokens=[3], max_new_tokens=1, do_sample=False)

    def first_logits(**settings):
        found = model.generate(
            IDS, max_new_tokens=1, return_dict_in_generate=True, output_logits=True, **settings
        )
        return found.logits[0]

    lowest = torch.finfo(torch.float32).min
    whole = model(IDS).logits[:, -1]
    for settings in (
        {},
        {"generation_config": own},
        {"generation_config": text},
        {"suppress_tokens": [3]},
        {"suppress_tokens": torch.tensor([3])},
    ):
        assert (first_logits(**settings)[:, VOCAB:] == lowest).all()
    for settings in (
        {"suppress_tokens": []},
        {"suppress_tokens": None},
        {"suppress_tokens": some},
        {"generation_config": allowed},
    ):
        assert_close(first_logits(**settings), whole)


def test_a_new_configuration_of_the_model_allows_no_added_token():
    model, _ = patched_model(num_tokens=ADDED)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=20)
    assert model.generate(IDS).max() < VOCAB
    model.generation_config.suppress_tokens = []
    assert model.generate(IDS).max() >= VOCAB


def test_added_tokens_are_masked_within_text_only_whatever_the_arguments_say():
    model, patched = patched_model(num_tokens=ADDED)
    with patched.text_only():
        found = model.generate(IDS, max_new_tokens=20, do_sample=False, suppress_tokens=[])
    assert found.max() < VOCAB
    assert model.generate(IDS, max_new_tokens=20, suppress_tokens=[]).max() >= VOCAB


def test_generate_is_that_of_the_class_after_unpatch():
    model, patched = patched_model(num_tokens=ADDED)
    patched.unpatch()
    assert "generate" not in model.__dict__ and "_loss_function" not in model.__dict__


# --- the check that users make


def padded_batches():
    ids = token_ids(2, 12, seed=3)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # padding on the left
    return [IDS, {"input_ids": ids, "attention_mask": mask, "labels": ids}]


@FAMILY
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_check_text_compares_with_what_unpatching_gives(family, tied):
    model, patched = patched_model(family, num_tokens=ADDED, tie_word_embeddings=tied)
    train(patched, seed=1)
    model.train().model.layers[0].eval()
    (batch, other), weights = padded_batches(), [p.data_ptr() for p in model.parameters()]
    with unchanged(model):
        before = patched.check_text([batch, other])
        train(patched, seed=2)
        found = patched.check_text([batch, other], since=before)
        train(patched, seed=1)
    assert [p.data_ptr() for p in model.parameters()] == weights
    assert not model.model.layers[0].training and model.model.layers[1].training
    assert (found.changed_by_adapters, found.changed_since, found.tokens) == (0, 0, 2 * 10 + 19)
    assert before.changed_since is None and "tokens changed since" not in repr(before)
    assert "tokens changed since the reference  0 of 39" in repr(found)

    def logits():
        with torch.no_grad():
            padded = model(other["input_ids"], attention_mask=other["attention_mask"]).logits
            both = [model(batch).logits.flatten(0, 1), padded[other["attention_mask"].bool()]]
            return torch.cat(both)[:, :VOCAB]

    model.eval()
    ours = logits()
    patched.unpatch()
    plain = logits()
    assert found.changed_by_patching == int((ours != plain).any(-1).sum())
    assert found.same_next_token == float((ours.argmax(-1) == plain.argmax(-1)).float().mean())
    assert found.largest_difference == float((ours - plain).abs().max())
    expected = (ours - plain).double().norm() / plain.double().norm()
    assert found.relative_rms == pytest.approx(float(expected), rel=1e-6)


def test_check_text_finds_text_that_changed():
    model, patched = patched_model(num_tokens=ADDED)
    before = patched.check_text(IDS)

    def leak(module, inputs, output):
        return output + 1e-3 if patched.adapters_enabled else output

    hook = model.get_output_embeddings().register_forward_hook(leak)
    assert patched.check_text(IDS).changed_by_adapters == 20
    hook.remove()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] += 1  # one logit of each token
    found = patched.check_text(IDS, since=before)
    assert (found.changed_by_adapters, found.changed_since) == (0, 20)


def test_check_text_says_what_it_cannot_compare():
    model, patched = patched_model(num_tokens=ADDED)
    before = patched.check_text(IDS)
    for batches, message in (
        ([], "check_text got no batch"),
        (IDS[0], r"needs input_ids, a tensor \(B, S\)"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, r"needs input_ids, a tensor \(B, S\)"),
        (IDS + VOCAB, "batch 0 has tokens of image: check_text compares text alone"),
        ([{"input_ids": IDS, "modality_ids": torch.ones_like(IDS)}], "has tokens of image"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=message):
            patched.check_text(batches)
    for other in (IDS.flip(0), IDS[:1]):
        with pytest.raises(ValueError, match="the reference was made of other batches"):
            patched.check_text(other, since=before)
    with patched.adapters_disabled(), pytest.raises(ValueError, match="they are off here"):
        patched.check_text(IDS)
    model._original_forward = model.forward
    with pytest.raises(ValueError, match="unwrap_model.model, keep_fp32_wrapper=False. first"):
        patched.check_text(IDS)
    del model._original_forward
    model.train().get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        patched.check_text(IDS)
    assert model.training
    accelerate.cpu_offload(model)
    with pytest.raises(ValueError, match="sharded or offloaded: load the adapter into a whole"):
        patched.check_text(IDS)
