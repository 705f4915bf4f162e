"""Features of several modalities at placeholders in the text."""

import contextlib
import copy

import pytest
import tokenizers
import torch
from support.model_zoo import VOCAB, make_model, randomise, token_ids
from support.registered_ops import same
from support.text_tokenizer import make_sized_tokenizer, make_tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from moe_kernels import (
    ModalityLoraConfig,
    add_modality_tokens,
    modalities,
    moextend,
    patch_model,
)
from moe_kernels.analysis import RoutingRecorder
from moe_kernels.imaging import ImageVocabulary, mixed_sequence
from moe_kernels.modalities import (
    ModalityCollator,
    add_placeholders,
    join_placeholders,
    joining_placeholders,
)
from moe_kernels.moextend import ExpertExtender
from moe_kernels.testing import relative_rms
from moe_kernels.training import AdapterTrainer

IMAGE, AUDIO = 90, 91
PLACES = {"image": IMAGE, "audio": AUDIO}
H = 32


def two_modalities(family="mixtral", **settings):
    """Return a model with random adapters for two modalities, and a projector from width 6."""
    model = make_model(family, **settings)
    patched = patch_model(model, ModalityLoraConfig(r=4, modalities=("image", "audio")))
    projector = ExpertExtender(model).add_projector(6, modality="image")
    randomise(patched)
    return model, projector


def some_features():
    """Return features of two pictures, for the projector, and of two sounds, of the model's."""
    torch.manual_seed(3)
    return {
        "image": [torch.randn(3, 6), torch.randn(1, 6)],
        "audio": [torch.randn(2, H), torch.randn(4, H)],
    }


TEXTS = torch.tensor([[0, 5, IMAGE, 6, AUDIO, 7], [IMAGE, 8, AUDIO, 9, 0, 0]])
MASK = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_layout_by_hand(side):
    model, projector = two_modalities()
    features = some_features()
    joined = join_placeholders(
        model, TEXTS, features, PLACES, attention_mask=MASK, padding_side=side
    )
    table = model.get_input_embeddings().weight
    first, second = projector(torch.cat(features["image"])).split((3, 1))
    sound, noise = features["audio"]
    rows = (
        ([table[5], *first, table[6], *sound, table[7]], [0, 1, 1, 1, 0, 2, 2, 0]),
        ([*second, table[8], *noise, table[9]], [1, 0, 2, 2, 2, 2, 0]),
    )
    labels = ([-100] * 4 + [6, -100, -100, 7], [-100, 8] + [-100] * 4 + [9])
    for row, ((embeddings, modality), expected) in enumerate(zip(rows, labels, strict=True)):
        length = len(embeddings)
        at = slice(8 - length, 8) if side == "left" else slice(0, length)
        assert torch.equal(joined["inputs_embeds"][row, at], torch.stack(embeddings))
        assert joined["modality_ids"][row, at].tolist() == modality
        assert joined["labels"][row, at].tolist() == expected
        assert joined["attention_mask"][row].sum() == length
        assert joined["attention_mask"][row, at].all()
        padding = joined["attention_mask"][row] == 0
        assert (joined["modality_ids"][row, padding] == -1).all()
        assert (joined["labels"][row, padding] == -100).all()


def test_given_labels_are_kept_but_not_on_features():
    model, _ = two_modalities()
    labels = torch.arange(12).view(2, 6)
    joined = join_placeholders(
        model, TEXTS, some_features(), PLACES, attention_mask=MASK, labels=labels
    )
    assert joined["labels"].tolist() == [
        [-100] * 4 + [3, -100, -100, 5],
        [-100, 7] + [-100] * 4 + [9, -100],
    ]


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_say(family, value, side):
    """Logits, loss and every gradient keep their bits, whatever stands in ids and features."""
    model, _ = two_modalities(family)
    features = {name: nn.utils.rnn.pad_sequence(each, True) for name, each in
                some_features().items()}  # fmt: skip
    masks = {"image": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    masks["audio"] = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])

    def results(padding, padding_id):
        model.zero_grad()
        filled = {
            name: each.masked_fill(masks[name][..., None] == 0, padding).requires_grad_()
            for name, each in features.items()
        }
        ids = TEXTS.masked_fill(MASK == 0, padding_id)
        joined = join_placeholders(
            model, ids, filled, PLACES, attention_mask=MASK, feature_masks=masks, padding_side=side
        )
        out = model(**joined)
        out.loss.backward()
        assert all(each.grad.isfinite().all() and each.grad.any() for each in filled.values())
        real = joined["attention_mask"] == 1
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert any(grad.any() for grad in grads)
        return [out.logits[real], out.loss, *(each.grad for each in filled.values()), *grads]

    expected = [each.clone() for each in results(0.0, 0)]
    for padding_id in (IMAGE, AUDIO, 10**6, -100):
        assert same(results(value, padding_id), expected)


def test_tokens_and_features_of_one_modality_are_mixed():
    """Features that are embeddings of image tokens have the logits of these tokens."""
    model = make_model("mixtral", dtype=torch.float64)
    patched = patch_model(model, ModalityLoraConfig(r=4, modalities=("audio", "image")))
    vocabulary = ImageVocabulary.from_token_ids(
        add_modality_tokens(model, "image", ImageVocabulary.size(4))
    )
    randomise(patched)
    pieces = [[5, 6], torch.tensor([1, 0]), [7], torch.tensor([3, 2]), [8]]
    whole = mixed_sequence(pieces, vocabulary, text_labels=True)["input_ids"][None]
    features = model.get_input_embeddings()(whole[:, 7:11])  # the second picture
    text = torch.cat([whole[:, :7], torch.tensor([[IMAGE]]), whole[:, 11:]], dim=1)
    joined = join_placeholders(model, text, {"image": [features[0]]}, {"image": IMAGE})
    labels = whole.clone()
    labels[:, 7:11] = -100
    assert joined["modality_ids"].tolist() == patched.modality_of(whole).tolist()
    expected, actual = model(whole, labels=labels), model(**joined)
    assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.loss, expected.loss)
    assert (joined["labels"][:, 2:6] == whole[:, 2:6]).all()  # tokens are learnt, features are not


def test_generation_of_a_padded_batch_is_that_of_each_text():
    model, _ = two_modalities()
    features = some_features()

    def written(rows, **parts):
        joined = join_placeholders(
            model, TEXTS[rows], parts, PLACES, attention_mask=MASK[rows], padding_side="left"
        )
        del joined["labels"]
        return model.generate(**joined, max_new_tokens=4, do_sample=False)

    both = written(slice(None), **features)
    for row in (0, 1):
        parts = {name: each[row : row + 1] for name, each in features.items()}
        assert torch.equal(written(slice(row, row + 1), **parts)[0], both[row])


def test_empty_texts_are_joined():
    model, _ = two_modalities()
    joined = join_placeholders(model, torch.zeros(2, 0, dtype=torch.int64), {}, PLACES)
    assert joined["inputs_embeds"].shape == (2, 0, H)


def test_placeholders_side_by_side_at_both_ends_and_alone():
    model, projector = two_modalities()
    ids = torch.tensor([[IMAGE, IMAGE, AUDIO, 5, AUDIO], [IMAGE, AUDIO, 0, 0, 0]])
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    pictures, sounds = torch.randn(6, 6), torch.randn(4, H)
    features = {"image": pictures.split((2, 1, 3)), "audio": sounds.split((1, 2, 1))}
    joined = join_placeholders(model, ids, features, PLACES, attention_mask=mask)
    assert joined["modality_ids"].tolist() == [[1, 1, 1, 2, 0, 2, 2], [1, 1, 1, 2, -1, -1, -1]]
    assert joined["labels"].tolist() == [[-100] * 4 + [5, -100, -100], [-100] * 7]
    embeddings, rows = joined["inputs_embeds"], projector(pictures)
    assert torch.equal(embeddings[:, :3], torch.stack([rows[:3], rows[3:]]))
    assert torch.equal(
        torch.cat([embeddings[0, 3:4], embeddings[0, 5:], embeddings[1, 3:4]]), sounds
    )


def test_text_beside_features_of_a_whole_sequence_has_their_modality():
    """Text is trained as what ``generate`` goes on with, which is the modality of the sequence."""
    model = make_model("mixtral")
    settings = {"modalities": ("image", "audio"), "sequence_modalities": ("image",)}
    patched = patch_model(model, ModalityLoraConfig(**settings))
    randomise(patched)
    features = {"image": [torch.randn(2, H)], "audio": [torch.randn(1, H)] * 2}
    ids = torch.tensor([[5, IMAGE, 6, AUDIO], [5, 6, AUDIO, 7]])
    joined = join_placeholders(model, ids, features, PLACES)
    assert joined["modality_ids"].tolist() == [[1, 1, 1, 1, 2], [0, 0, 2, 0, -1]]
    samples = [
        {"input_ids": row, "features": {name: features[name][:1] for name in names}}
        for row, names in zip(ids, (("image", "audio"), ("audio",)), strict=True)
    ]
    with joining_placeholders(model, PLACES):
        loss = model(**ModalityCollator(PLACES, 0)(samples)).loss
    assert torch.equal(loss, model(**joined).loss)


# --- placeholders of a tokenizer


def test_a_placeholder_is_one_token_of_a_tokenizer_with_merges():
    """A word of its vocabulary that no merges make is no token of a text yet."""
    letters = {letter: i for i, letter in enumerate("<> abdegimou")}
    vocabulary = letters | {"<image>": len(letters)}
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces)
    model = make_model("mixtral")
    patch_model(model, ModalityLoraConfig(modalities=("image", "audio")))
    places = add_placeholders(model, tokenizer)
    assert places == {"image": len(letters), "audio": len(letters) + 1}
    ids = tokenizer("a<image><audio>b").input_ids
    assert ids == [letters["a"], *places.values(), letters["b"]]
    assert add_placeholders(model, tokenizer) == places


def test_what_gets_no_placeholders():
    model = make_model("mixtral")
    patch_model(model)
    for other in (None, model):
        with pytest.raises(TypeError, match="must be a tokenizer of transformers"):
            add_placeholders(model, other)
    with pytest.raises(TypeError, match="got the string 'image'"):
        add_placeholders(model, make_sized_tokenizer(VOCAB), "image")


def test_tokens_after_placeholders_are_refused_with_the_order():
    model, tokenizer = make_model("mixtral"), make_sized_tokenizer(VOCAB)
    patch_model(model)
    add_placeholders(model, tokenizer)
    with pytest.raises(ValueError, match="Placeholders .* after these tokens"):
        add_modality_tokens(model, "image", 3, tokenizer=tokenizer)


def test_placeholders_follow_the_added_tokens():
    model, tokenizer = make_model("mixtral"), make_sized_tokenizer(VOCAB)
    patch_model(model, ModalityLoraConfig(modalities=("image", "audio")))
    add_modality_tokens(model, "image", 3, tokenizer=tokenizer)
    assert add_placeholders(model, tokenizer) == {"image": VOCAB + 3, "audio": VOCAB + 4}
    assert add_placeholders(model, tokenizer, ["audio"]) == {"audio": VOCAB + 4}
    assert tokenizer("w1 <image><audio> w2").input_ids == [1, VOCAB + 3, VOCAB + 4, 2]


def test_a_placeholder_with_the_id_of_an_added_token_is_refused():
    model, tokenizer = make_model("mixtral"), make_sized_tokenizer(VOCAB)
    patch_model(model)
    add_modality_tokens(model, "image", 3)  # the tokenizer does not know them
    size = len(tokenizer)
    with pytest.raises(ValueError, match=r"has id 48, which is a token that was added .*48\.\.50"):
        add_placeholders(model, tokenizer)
    assert len(tokenizer) == size


# --- training


def samples():
    """Return samples: with both modalities, with one, with text alone."""
    features = some_features()
    return [
        {"input_ids": TEXTS[0, 1:], "features": features},
        {"input_ids": [8, IMAGE, 9], "features": {"image": features["image"][1:]}},
        {"input_ids": [8, 9], "labels": [-100, 9]},
    ]


def first_sample():
    one = {name: each[:1] for name, each in some_features().items()}
    return {"input_ids": TEXTS[0, 1:], "features": one}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_collated_batch_is_joined_in_the_forward(side):
    model, _ = two_modalities()
    features = some_features()
    rows = [first_sample(), {"input_ids": [IMAGE, 8, AUDIO, 9], "features": {
        name: each[1:] for name, each in features.items()}}]  # fmt: skip
    batch = ModalityCollator(PLACES, 0, side)(rows)
    joined = join_placeholders(
        model, TEXTS, features, PLACES, attention_mask=MASK, padding_side=side
    )
    assert torch.equal(batch["labels"], joined["labels"])
    assert batch["input_ids"].shape == joined["labels"].shape
    expected = model(**joined)
    with joining_placeholders(model, PLACES):
        actual = model(**batch)
        twin = copy.deepcopy(model)
        text = model(TEXTS[:, 3:4])
    assert torch.equal(actual.loss, expected.loss) and torch.equal(actual.logits, expected.logits)
    assert torch.equal(twin(**batch).loss, expected.loss)
    assert torch.equal(model(TEXTS[:, 3:4]).logits, text.logits)


def test_features_outside_of_the_context_are_refused_until_unpatched():
    """A model whose table has a row for the placeholder would learn from that, without a word."""
    model, tokenizer = make_model("mixtral"), make_sized_tokenizer(VOCAB - 4)
    patched = patch_model(model)
    places = add_placeholders(model, tokenizer)
    assert places == add_placeholders(model, tokenizer) == {"image": VOCAB - 4}
    sample = {"input_ids": [5, places["image"]], "features": {"image": [torch.randn(2, H)]}}
    batch = ModalityCollator(places, 0)([sample])
    for _ in range(2):
        with pytest.raises(TypeError, match="within joining_placeholders"):
            model(**batch)
        with joining_placeholders(model, places):
            model(**batch)
    twin = copy.deepcopy(model)
    patched.unpatch()
    assert not model._forward_pre_hooks
    with pytest.raises(TypeError, match="within joining_placeholders"):
        twin(**batch)
    twin._modality_patch.unpatch()
    assert not twin._forward_pre_hooks


def test_a_context_that_another_thread_ends_during_a_forward():
    """torch calls its hook all the same, without keywords; that of this thread joins."""
    model, _ = two_modalities()
    batch = ModalityCollator(PLACES, 0)([first_sample()])
    hooks = len(model._forward_pre_hooks)
    with joining_placeholders(model, PLACES), contextlib.ExitStack() as other:
        expected = model(**batch).logits
        other.enter_context(joining_placeholders(model, PLACES))
        ending = model.register_forward_pre_hook(lambda *_: other.close(), prepend=True)
        assert torch.equal(model(**batch).logits, expected)
        ending.remove()
    assert len(model._forward_pre_hooks) == hooks


def test_a_model_that_is_unpatched_within_says_so():
    model, _ = two_modalities()
    batch = ModalityCollator(PLACES, 0)([first_sample()])
    with joining_placeholders(model, PLACES):
        model._modality_patch.unpatch()
        with pytest.raises(ValueError, match="is not patched"):
            model(**batch)
        model(TEXTS[:, 3:4])


def test_a_whole_graph_is_compiled_within():
    torch.compiler.reset()
    model, _ = two_modalities()
    batch = ModalityCollator(PLACES, 0)([first_sample()])
    with joining_placeholders(model, PLACES):
        expected = model(**batch)
        actual = torch.compile(model, backend="eager", fullgraph=True)(**batch)
    assert relative_rms(actual.logits, expected.logits) < 1e-6
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


def test_the_old_place_of_a_name_is_the_same():
    assert moextend.join_features_and_text is modalities.join_features_and_text


def test_a_projector_takes_part_in_a_step_without_its_features():
    """DDP would wait for the gradient of a projector that a rank's batch does not use."""
    model, projector = two_modalities()
    batch = ModalityCollator(PLACES, 0)([{"input_ids": [8, 9]}])
    assert batch["features"] == {}
    with joining_placeholders(model, PLACES):
        model(**batch).loss.backward()
    for parameter in projector.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("trainer", [Trainer, AdapterTrainer])
def test_a_trainer_trains_projectors_and_adapters(trainer, tmp_path):
    model, projector = two_modalities()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, per_device_train_batch_size=2, max_steps=4,
        learning_rate=0.1, save_strategy="no", report_to=[], use_cpu=True,
    )  # fmt: skip
    rows = [first_sample(), *samples()[1:]]
    with joining_placeholders(model, PLACES):
        trained = trainer(
            model if trainer is Trainer else model._modality_patch, arguments, train_dataset=rows,
            eval_dataset=rows, data_collator=ModalityCollator(PLACES, 0),
        )  # fmt: skip
        trained.train()
        assert trained.evaluate()["eval_loss"] > 0
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == changed
    assert len(list(projector.parameters())) == sum("projector" in name for name in changed)


def test_the_trainer_counts_the_labels_that_are_learnt(tmp_path):
    """The mean of the loss is over the tokens that have one after joining."""
    batch = ModalityCollator(PLACES, 0)([first_sample(), *samples()[1:]])
    model, _ = two_modalities()
    with joining_placeholders(model, PLACES):
        count = int((batch["labels"] != -100).sum())
        mean = model(**batch).loss
        total = model(**batch, num_items_in_batch=torch.tensor(1)).loss
    assert total.item() == pytest.approx(count * mean.item(), rel=1e-5)


def test_collated_batches_in_the_other_parts():
    """Scores, counts of routing, disturbance, a fused loss and checkpointing see what is joined."""
    model, _ = two_modalities()
    patched, batch = model._modality_patch, ModalityCollator(PLACES, 0)([first_sample()])
    extender = ExpertExtender(model)
    with joining_placeholders(model, PLACES):
        with torch.no_grad(), RoutingRecorder(model) as recorder:
            model(**batch)
        assert recorder.statistics().rows[0].tolist() == [3, 3, 2]
        scores = extender.score_layers([batch], 1, modality="audio", progress=False)
        assert scores.before.sum(1).tolist() == [2 * 2] * 2  # top 2
        extender.extend("all", modality="audio", scores=scores, freeze_earlier=False)
        assert extender.disturbance([batch])["audio"] is not None
        expected = model.train()(**batch).loss
        patched.fused_loss = True
        assert model(**batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)
        patched.fused_loss = False
        gradients = torch.autograd.grad(expected, list(patched.trainable_parameters()))
        model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
    for parameter, gradient in zip(patched.trainable_parameters(), gradients, strict=True):
        assert relative_rms(parameter.grad, gradient) < 1e-5


# --- chat templates

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %} {{ message['content'] }} </s>{% endgeneration %}"
    "{% else %}{% for part in message['content'] %}"
    "{{ ' ' + (part['text'] if part['type'] == 'text' else '<' + part['type'] + '>') }}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def test_a_chat_with_placeholders():
    model, tokenizer = make_model("mixtral"), make_tokenizer(pad_token="<pad>")
    patch_model(model, ModalityLoraConfig(modalities=("image", "audio")))
    places = add_placeholders(model, tokenizer)
    tokenizer.chat_template = TEMPLATE
    user = [{"type": "image"}, {"type": "text", "text": "a dog"}, {"type": "audio"}]
    chat = [{"role": "user", "content": user}, {"role": "assistant", "content": "red cat"}]
    sample = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    answer = zip(sample["input_ids"], sample.pop("assistant_masks"), strict=True)
    sample["labels"] = [token_id if mask else -100 for token_id, mask in answer]
    sample["features"] = {"image": [torch.randn(2, H)], "audio": [torch.randn(3, H)]}
    batch = ModalityCollator(places, 0)([sample])
    image, audio = places["image"], places["audio"]
    assert batch["input_ids"].tolist() == [[image, image, 3, 6, *[audio] * 3, 4, 5, 2]]
    assert batch["labels"].tolist() == [[-100] * 7 + [4, 5, 2]]
    with joining_placeholders(model, places):
        model(**batch).loss.backward()


# --- refusals


def refused_join(change, match):
    model, _ = two_modalities()
    arguments = {
        "input_ids": TEXTS, "features": some_features(), "placeholders": PLACES,
        "attention_mask": MASK,
    }  # fmt: skip
    change(arguments)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises((TypeError, ValueError), match=match):
        join_placeholders(model, **arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a["features"]["image"].pop(), r"2 placeholders of 'image' \(id 90, in rows "
         r"\[0, 1\]\) and there are features of 1"),
        (lambda a: a["features"]["audio"].append(torch.randn(1, H)), "2 placeholders of 'audio'.* "
         "features of 3"),
        (lambda a: a["features"].pop("audio"), "2 placeholders of 'audio'.* features of 0"),
        (lambda a: a["features"].update(video=[]), "features of 'video', which has no placeholder"),
        (lambda a: a.update(placeholders={"video": 5}), "not for 'video'"),
        (lambda a: a.update(placeholders={"image": 5, "audio": 5}), "distinct ids"),
        (lambda a: a.update(placeholders={"image": "<image>"}), "must be integers"),
        (lambda a: a.update(placeholders=[5]), "must map modalities to token ids"),
        (lambda a: a["features"].update(image=[torch.randn(3, 6), torch.randn(1, 5)]),
         r"one d for all; item 1 is \(1, 5\), item 0 is \(3, 6\)"),
        (lambda a: a["features"].update(image=[torch.randn(3, 6), torch.randn(6)]), r"\(n, d\)"),
        (lambda a: a["features"].update(image=[torch.randn(3, 6), torch.randn(0, 6)]), "at least"),
        (lambda a: a["features"].update(image=torch.randn(2, 6)), "put it into a list"),
        (lambda a: a["features"].update(image=[torch.ones(2, 6).long()] * 2), "must be floats"),
        (lambda a: a["features"].update(image=[torch.randn(2, H)] * 2), "width 6 of its projector, "
         "which is applied here; they have 32"),
        (lambda a: a["features"].update(audio=[torch.randn(2, 9)] * 2), "width 32 of the model, as "
         "it has no projector; they have 9: .*add_projector"),
        (lambda a: a.update(feature_masks={"image": torch.ones(2, 3)}), "have a mask, and are "
         "not padded"),
        (lambda a: (a["features"].pop("audio"), a.update(feature_masks={"audio": MASK}),
                    a.update(input_ids=TEXTS.clamp(max=IMAGE), attention_mask=None)),
         "there is a mask of 'audio', but no features"),
        (lambda a: a.update(feature_masks={"video": torch.ones(2, 3)}), "'video'"),
        (lambda a: (a["features"].update(image=torch.randn(2, 3, 6)),
                    a.update(feature_masks={"image": torch.ones(2, 4)})), 
         r"the mask of features of 'image' must be \(2, 3\)"),
        (lambda a: a.update(attention_mask=torch.ones(2, 5)), r"must be \(B, S\)"),
        (lambda a: a.update(padding_side="both"), "padding_side"),
        (lambda a: a.update(input_ids=TEXTS.float()), "must be integers, got torch.float32"),
        (lambda a: a.update(input_ids=torch.where(TEXTS == 7, 300, TEXTS)),
         r"ids \[300\], and the model has rows for 0\.\.47"),
        (lambda a: (a["features"].pop("audio"), a.update(placeholders={"image": IMAGE})),
         r"ids \[91\].* no placeholders of this call"),
        (lambda a: a.update(input_ids=TEXTS.tolist()), "input_ids must be a tensor"),
        (lambda a: a.update(features=[torch.randn(1, 6)]), "features must map modalities"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined(change, match):
    refused_join(change, match)


def test_a_plain_model_is_refused():
    with pytest.raises(ValueError, match="not patched"):
        join_placeholders(make_model("mixtral"), TEXTS, some_features(), PLACES)


@pytest.mark.parametrize(
    ("sample", "match"),
    [
        ({"input_ids": [IMAGE, IMAGE], "features": {"image": [torch.ones(1, 6)]}}, "sample 1 has 2 "
         r"placeholders of 'image' \(id 90\) and features of 1$"),
        ({"input_ids": [5], "features": {"image": [torch.ones(1, 6)]}}, "0 placeholders"),
        ({"input_ids": [IMAGE]}, "no 'features'.*remove_unused_columns=False"),
        ({"input_ids": [5], "features": {"video": []}}, "sample 1 has features of 'video'"),
        ({"input_ids": [IMAGE], "features": {"image": [torch.ones(1, 7)]}}, "one d for all"),
        ({"input_ids": [5], "labels": [5, 6]}, r"of sample 1 must be \(S,\)"),
        ({"input_ids": [5.5]}, "sample 1 must be integers"),
        ({"input_ids": [IMAGE], "features": [torch.ones(1, 6)]}, "sample 1 must map .* got list"),
        ({"input_ids": [IMAGE], "features": torch.ones(2, 6)}, "sample 1 must map .* got Tensor"),
    ],
)  # fmt: skip
def test_samples_that_cannot_be_collated(sample, match):
    with pytest.raises((TypeError, ValueError), match=match):
        ModalityCollator(PLACES, 0)([first_sample(), sample])


@pytest.mark.parametrize("padding", [None, "<pad>", 0.5])
def test_a_padding_that_is_no_id_is_refused_at_once(padding):
    with pytest.raises(TypeError, match="pad_token_id must be an integer"):
        ModalityCollator(PLACES, padding)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image": torch.randn(2, 6)}, "1 places for features of 'image' and 2 features"),
        ({"audio": torch.randn(1, H)}, "1 places for features of 'image' and 0 features"),
        ({"image": torch.randn(1, 7)}, "width 6 of its projector"),
        ({"video": torch.randn(1, 6)}, "features of 'video'"),
    ],
)
def test_a_batch_that_another_collator_made_is_refused(change, match):
    model, _ = two_modalities()
    with joining_placeholders(model, PLACES), pytest.raises(ValueError, match=match):
        model(input_ids=TEXTS[:1, 1:], features=change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"features": [torch.randn(1, 6)]}, r"features must map modalities to \(rows, d\)"),
        ({"features": torch.randn(1, 6)}, r"features must map modalities to \(rows, d\)"),
        ({"features": {"image": [torch.randn(1, 6)]}}, "join_placeholders takes lists"),
        ({"input_ids": torch.tensor([[5, IMAGE, 6, 300, 7]])}, r"ids \[300\], and the model has"),
        ({"features": {"image": torch.randn(1, 1, 6)}}, "join_placeholders takes lists"),
        ({"labels": TEXTS[:1, 2:]}, r"as large as input_ids, \(1, 5\)"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, r"as large as input_ids, \(1, 5\)"),
    ],
)
def test_a_batch_of_other_shapes_is_refused(change, match):
    model, _ = two_modalities()
    batch = {"input_ids": TEXTS[:1, 1:], "features": {"image": torch.randn(1, 6)}}
    with (
        joining_placeholders(model, PLACES),
        pytest.raises((TypeError, ValueError), match=match),
    ):
        model(**batch | change)


@pytest.mark.parametrize("ids", [{}, {"input_ids": TEXTS, "modality_ids": TEXTS}])
def test_features_beside_modality_ids_or_without_ids_are_refused(ids):
    model, _ = two_modalities()
    with (
        joining_placeholders(model, PLACES),
        pytest.raises(TypeError, match="features need input_ids by keyword"),
    ):
        model(**ids, features={})


def test_features_beside_the_name_of_an_adapter_are_refused():
    """Added rows are looked up when features are joined, by the adapter of the context."""
    model, _ = two_modalities()
    with (
        joining_placeholders(model, PLACES),
        pytest.raises(TypeError, match="joined before the forward knows its adapter"),
    ):
        model(input_ids=TEXTS, features={}, adapter="default")


def test_text_alone_keeps_its_bits_after_training():
    model, _ = two_modalities(hidden_size=128)
    text = token_ids(2, 40)
    before = model(text).logits
    randomise(model._modality_patch, scale=3.0)
    assert torch.equal(model(text).logits, before)
