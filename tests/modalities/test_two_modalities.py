"""Two added modalities in every part that takes one: each keeps to its own rows."""

import pytest
import torch
from support.model_zoo import VOCAB, make_model, randomise, token_ids
from torch.utils.data import ConcatDataset
from transformers import LogitsProcessorList, TrainingArguments

from moe_kernels import ModalityLoraConfig, add_modality_tokens, initialise_lora, patch_model
from moe_kernels.analysis import RoutingRecorder, expert_redundancy, plot_specialisation
from moe_kernels.imaging import (
    CaptionedImages,
    ImageCollator,
    ImageTokensProcessor,
    ImageVocabulary,
    generate_image_codes,
    mixed_sequence,
    split_images,
)
from moe_kernels.models.added_experts import added_experts
from moe_kernels.moextend import ExpertExtender
from moe_kernels.training import AdapterTrainer

CODES = {"image": 6, "audio": 4}


def model_with_tokens(target_modules=("experts", "attention"), **settings):
    """Return a handle with tokens for pictures and for sounds, and a vocabulary of each."""
    model = make_model("mixtral", **settings)
    patched = patch_model(
        model, ModalityLoraConfig(r=4, modalities=tuple(CODES), target_modules=target_modules)
    )
    vocabularies = {
        name: ImageVocabulary.from_token_ids(
            add_modality_tokens(model, name, ImageVocabulary.size(codes))
        )
        for name, codes in CODES.items()
    }
    return patched, vocabularies


def data_of(vocabularies, length=3):
    """Return a dataset of captioned codes by modality."""
    return {
        name: CaptionedImages(
            [[5, 6], [7]], torch.arange(2 * length).view(2, length) % CODES[name], vocabulary
        )
        for name, vocabulary in vocabularies.items()
    }


def batch_of(vocabularies):
    return ImageCollator(0)(list(ConcatDataset(data_of(vocabularies).values())))


def test_one_collator_takes_sequences_of_both():
    """A batch of both has a gradient for the adapters, and rows, of both."""
    patched, vocabularies = model_with_tokens()
    randomise(patched)
    patched.model(**batch_of(vocabularies)).loss.backward()
    for name, parameter in patched.named_trainable_parameters():
        if "lora" in name:
            assert all(of_one.any() for of_one in parameter.grad), name
        else:
            assert parameter.grad.any(), name


def test_one_modality_alone_leaves_the_other_without_gradient():
    patched, vocabularies = model_with_tokens()
    randomise(patched)
    batch = ImageCollator(0)(list(data_of(vocabularies)["audio"]))
    patched.model(**batch).loss.backward()
    for name, parameter in patched.named_trainable_parameters():
        if "lora" in name:
            assert not parameter.grad[0].any() and parameter.grad[1].any(), name


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_training_one_keeps_the_other_unless_weights_decay(decay):
    """The pairs of both are one tensor, which weight decay shrinks as a whole."""
    patched, vocabularies = model_with_tokens()
    randomise(patched)
    batch = ImageCollator(0)(list(data_of(vocabularies)["audio"]))
    pairs = {n: p for n, p in patched.named_trainable_parameters() if "lora" in n}
    before = {name: pair.detach().clone() for name, pair in pairs.items()}
    optimizer = torch.optim.AdamW(pairs.values(), lr=1e-2, weight_decay=decay)
    for _ in range(2):
        patched.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, pair in pairs.items():
        assert torch.equal(pair[0], before[name][0]) == (decay == 0), name
        assert not torch.equal(pair[1], before[name][1])


def test_both_in_one_sequence():
    """Pieces of two vocabularies are joined, and each vocabulary finds its own again."""
    patched, vocabularies = model_with_tokens()
    image, audio = vocabularies["image"], vocabularies["audio"]
    codes = torch.tensor([0, 5, 2]), torch.tensor([3, 1])
    parts = [
        mixed_sequence([[5], codes[0]], image),
        mixed_sequence([[6, 7], codes[1]], audio),
    ]
    sample = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    modality_ids = patched.modality_of(sample["input_ids"]).tolist()
    assert modality_ids == [0, *[1] * 5, 0, 0, *[2] * 4]
    text, picture, rest = split_images(sample["input_ids"], image)
    assert text == [5] and torch.equal(picture, codes[0])
    text, sound = split_images(torch.tensor(rest), audio)
    assert text == [6, 7] and torch.equal(sound, codes[1])
    assert (sample["labels"] >= VOCAB).sum() == 4 + 3


def test_generation_of_each():
    patched, vocabularies = model_with_tokens()
    randomise(patched, scale=1.0)
    for name, vocabulary in vocabularies.items():
        found = generate_image_codes(
            patched.model, [[5], [6, 7]], vocabulary, 4, pad_token_id=0, seed=0
        )
        assert found.shape == (2, 4) and int(found.max()) < CODES[name]


def test_two_processors_keep_each_kind_whole():
    """With a processor each, a text with pictures and sounds has no code outside of its own."""
    patched, vocabularies = model_with_tokens()
    randomise(patched, scale=1.0)
    processors = LogitsProcessorList(
        ImageTokensProcessor(each, 2, max_images=3) for each in vocabularies.values()
    )
    torch.manual_seed(0)
    found = patched.model.generate(
        token_ids(4, 3), attention_mask=torch.ones(4, 3), do_sample=True, max_new_tokens=40,
        suppress_tokens=[], logits_processor=processors,
    )  # fmt: skip
    kinds = {"image": 0, "audio": 0}
    for row in found:
        texts = [row.tolist()]
        for name, vocabulary in vocabularies.items():
            pieces = [p for t in texts for p in split_images(t, vocabulary, drop_unfinished=True)]
            texts = [piece for piece in pieces if isinstance(piece, list)]
            codes = [piece for piece in pieces if isinstance(piece, torch.Tensor)]
            assert all(len(each) == 2 for each in codes)
            kinds[name] += len(codes)
        assert all(max(text) < VOCAB for text in texts)
    assert all(kinds.values())


def test_scores_and_experts_of_each():
    """Scores count the tokens of their modality; each modality chooses its own experts."""
    patched, vocabularies = model_with_tokens(target_modules=())
    extender, batch = ExpertExtender(patched.model), batch_of(vocabularies)
    scores = {
        name: extender.score_layers([batch], 2, modality=name, progress=False) for name in CODES
    }
    rows = patched.modality_of(batch["input_ids"])
    for number, (name, found) in enumerate(scores.items(), 1):
        assert found.modality == name
        assert found.before.sum(1).tolist() == [2 * int((rows == number).sum())] * 2  # top 2
    with pytest.raises(ValueError, match="choose one by modality="):
        extender.score_layers([batch], 2)
    with pytest.raises(ValueError, match="the scores are of modality 'image'"):
        extender.extend("top-half", modality="audio", scores=scores["image"])
    for name in CODES:
        extender.extend([0], modality=name, scores=scores[name], freeze_earlier=False)
    first, second = added_experts(patched.model.model.layers[0])
    randomise(patched)
    only_images = ImageCollator(0)(list(data_of(vocabularies)["image"]))
    patched.model(**only_images).loss.backward()
    assert first.router_columns.grad.any() and not second.router_columns.grad.any()


def test_routing_of_each_is_counted_drawn_and_compared(tmp_path):
    patched, vocabularies = model_with_tokens()
    randomise(patched)
    batch = batch_of(vocabularies)
    del batch["labels"]
    with torch.no_grad(), RoutingRecorder(patched.model) as recorder:
        patched.model(**batch)
    found = recorder.statistics()
    assert found.modalities == ("text", "image", "audio")
    assert found.rows[0].tolist() == [6, 10, 10]
    assert set(found.summary()) == {
        *(f"{name}_largest_load" for name in found.modalities),
        *(f"{name}_divergence" for name in CODES),
    }
    plot_specialisation(found, tmp_path / "a.png", modalities=("image", "audio"))
    for name in CODES:
        similar = expert_redundancy(patched.model, [batch], modality=name)
        assert similar.modality == name


def test_starts_of_each():
    """A start from data gives one modality its pairs and leaves those of the other."""
    patched, vocabularies = model_with_tokens()
    before = {name: p.clone() for name, p in patched.named_trainable_parameters()}
    batch = batch_of(vocabularies)
    initialise_lora(patched.model, [batch], modality="audio")
    changed = [n for n, p in patched.named_trainable_parameters() if not torch.equal(p, before[n])]
    assert changed
    for name, parameter in patched.named_trainable_parameters():
        if name in changed:
            assert torch.equal(parameter[0], before[name][0]), name


def test_a_trainer_logs_the_routing_of_both(tmp_path):
    patched, vocabularies = model_with_tokens()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = AdapterTrainer(
        patched, arguments, log_routing=True, data_collator=ImageCollator(0),
        train_dataset=ConcatDataset(data_of(vocabularies).values()),
    )  # fmt: skip
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert {"routing/image_divergence", "routing/audio_divergence"} <= logged


def test_both_come_back_from_a_file(tmp_path):
    patched, vocabularies = model_with_tokens()
    randomise(patched)
    batch = batch_of(vocabularies)
    expected = patched.model(**batch).logits
    patched.save_adapter(tmp_path)
    fresh = patch_model(make_model("mixtral"), ModalityLoraConfig.from_adapter(tmp_path))
    fresh.load_adapter(tmp_path)
    assert torch.equal(fresh.model(**batch).logits, expected)
    assert fresh.added_tokens == patched.added_tokens
