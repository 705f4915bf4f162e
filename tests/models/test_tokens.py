"""Added tokens: rows beside the frozen table, head, loss, tokenizer, inits."""

import copy

import pytest
import torch
from support.model_zoo import FAMILY, VOCAB, make_model, randomise, token_ids, unchanged
from support.patched_models import patched_model
from support.text_tokenizer import make_sized_tokenizer
from torch.nn import functional as F

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model
from moe_kernels.testing import assert_close

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def make_patched(family="mixtral", modalities=("image",), **options):
    return patched_model(family, ModalityLoraConfig(r=4, modalities=modalities), **options)


# --- rows and head


@FAMILY
@TIED
def test_rows_and_head(family, tied):
    """The model has V+n rows, while the frozen table keeps its name, shape and bits."""
    model, patched = make_patched(family, tie_word_embeddings=tied)
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    new = add_modality_tokens(model, "image", 5)
    randomise(patched)
    assert new == range(VOCAB, VOCAB + 5)
    assert patched.modality_token_ids("image") == new
    assert model.get_input_embeddings().weight is table and torch.equal(table, before)
    assert model.config.vocab_size == model.vocab_size == model.model.vocab_size == VOCAB + 5

    rows = model.get_input_embeddings().added_rows["image"]
    ids = token_ids(2, 9, vocab=VOCAB + 5)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(embedded, F.embedding(ids, torch.cat([before, rows])))

    head = model.get_output_embeddings()
    head_rows = head.added_rows["image"]
    assert (head_rows is rows) == tied
    hidden = torch.randn(2, 9, 32)
    expected = hidden @ torch.cat([head.weight, head_rows]).T
    assert_close(head(hidden), expected)
    assert model(ids).logits.shape == (2, 9, VOCAB + 5)

    names = [name for name, _ in patched.named_trainable_parameters() if "added_rows" in name]
    expected = ["model.embed_tokens.added_rows.image"]
    assert names == (expected if tied else [*expected, "lm_head.added_rows.image"])


@FAMILY
@TIED
def test_gradients_of_the_rows(family, tied):
    """Gradients of added rows are those of rows in a plain resized model."""
    model, patched = make_patched(family, num_tokens=5, tie_word_embeddings=tied)
    rows = [p for name, p in patched.named_trainable_parameters() if "added_rows" in name]
    joined = [torch.cat([model.get_input_embeddings().weight, rows[0]])]
    if not tied:
        joined.append(torch.cat([model.get_output_embeddings().weight, rows[1]]))
    ids = token_ids(2, 16, vocab=VOCAB + 5)
    text = torch.zeros_like(ids)
    loss = model(ids, modality_ids=text, labels=ids).loss
    grads = torch.autograd.grad(loss, rows)

    plain = make_model(family, tie_word_embeddings=tied, vocab_size=VOCAB + 5)
    state = {name: t for name, t in model.state_dict().items() if name in plain.state_dict()}
    tables = {"model.embed_tokens.weight": joined[0], "lm_head.weight": joined[-1]}
    plain.load_state_dict(state | tables)
    expected_loss = plain(ids, labels=ids).loss
    tensors = [plain.get_input_embeddings().weight]
    tensors += [] if tied else [plain.get_output_embeddings().weight]
    expected = torch.autograd.grad(expected_loss, tensors)
    torch.testing.assert_close(loss, expected_loss)
    for grad, full in zip(grads, expected, strict=True):
        # Rounding of two layers and a loss.
        assert ((grad - full[VOCAB:]).norm() / full[VOCAB:].norm()) < 3e-5


def test_the_loss_spans_text_and_image_tokens():
    model, _ = make_patched(num_tokens=5)
    ids = token_ids(2, 12, vocab=VOCAB + 5)
    assert (ids >= VOCAB).any()
    out = model(ids, labels=ids)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert out.logits.isfinite().all()


@TIED
def test_two_modalities_in_turn(tied):
    model, patched = make_patched(modalities=("image", "sound"), tie_word_embeddings=tied)
    sound = add_modality_tokens(model, "sound", 3)
    image = add_modality_tokens(model, "image", 4)
    assert (sound, image) == (range(VOCAB, VOCAB + 3), range(VOCAB + 3, VOCAB + 7))
    assert patched.modality_token_ids("sound") == sound
    assert patched.modality_token_ids("image") == image
    ids = torch.arange(VOCAB + 7)[None]
    modality_ids = patched.modality_of(ids)
    assert modality_ids[0].tolist() == [0] * VOCAB + [2] * 3 + [1] * 4
    assert model.generation_config.suppress_tokens == list(range(VOCAB, VOCAB + 7))
    randomise(patched)
    with torch.no_grad():
        given = model(ids, modality_ids=modality_ids).logits
        assert torch.equal(model(ids).logits, given)
    rows = model.get_input_embeddings().added_rows
    assert torch.equal(model.get_input_embeddings()(ids)[0, -7:], torch.cat(list(rows.values())))


def test_text_generation_keeps_what_was_suppressed_before():
    model = make_model("mixtral")
    model.generation_config.suppress_tokens = [7]
    patched = patch_model(model)
    add_modality_tokens(model, "image", 2)
    assert model.generation_config.suppress_tokens == [7, VOCAB, VOCAB + 1]
    patched.unpatch()
    assert model.generation_config.suppress_tokens == [7]


def test_dtypes_of_the_rows():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        model, patched = make_patched(dtype=dtype, num_tokens=2)
        row_dtype = torch.float32 if dtype.itemsize == 2 else dtype
        assert {p.dtype for p in patched.trainable_parameters()} == {row_dtype}
        assert model.get_input_embeddings()(torch.tensor([[1, VOCAB]])).dtype == dtype
        assert model(torch.tensor([[1, VOCAB]])).logits.dtype == dtype


def test_a_resized_model_keeps_its_sizes():
    model = make_model("olmoe")
    model.resize_token_embeddings(VOCAB + 16)
    with unchanged(model):
        patched = patch_model(model)
        assert add_modality_tokens(model, "image", 5) == range(VOCAB + 16, VOCAB + 21)
        patched.unpatch()


# --- inits


@pytest.mark.parametrize("init", ["normal", "mean"])
def test_inits(init):
    model, _ = make_patched()
    table = model.get_input_embeddings().weight.detach()
    torch.manual_seed(0)
    add_modality_tokens(model, "image", 2000, init=init)
    rows = model.get_input_embeddings().added_rows["image"].detach()
    spread = {"normal": 1.0, "mean": 0.1}[init]
    error = (rows.mean(0) - table.mean(0)).norm() / table.std(0).norm()
    assert error < 0.2 * spread
    ratio = rows.std(0) / table.std(0)
    assert ratio.mean().item() == pytest.approx(spread, rel=0.05)
    assert rows.unique(dim=0).shape[0] == 2000
    head = model.get_output_embeddings()
    error = head.added_rows["image"].mean(0) - head.weight.mean(0)
    assert error.norm() / head.weight.std(0).norm() < 0.2 * spread


# --- tokenizer


@pytest.mark.parametrize("present", [False, True], ids=["tokens are new", "tokens are there"])
def test_a_tokenizer_gets_the_tokens_of_an_adapter(present, tmp_path):
    """Without names, the ids of an image decode to nothing."""
    config = ModalityLoraConfig(r=2, modalities=("image", "sound"))
    made = patch_model(make_model("mixtral"), config)
    for modality in config.modalities:
        add_modality_tokens(made.model, modality, 2)
    made.save_adapter(tmp_path)
    tokenizer, again = make_sized_tokenizer(VOCAB - 3), make_sized_tokenizer(VOCAB - 3)
    if present:
        add_modality_tokens(
            patch_model(make_model("mixtral"), config).model, "image", 2, tokenizer=again
        )
    patched = made if present else patch_model(make_model("mixtral"), config)
    assert tokenizer.decode([VOCAB, VOCAB + 2]) == ""
    for each in (tokenizer, again, tokenizer):  # one has them already
        patched.load_adapter(tmp_path, each)
        assert each.convert_ids_to_tokens([VOCAB, VOCAB + 2]) == ["<image_0>", "<sound_0>"]
        assert len(each) == VOCAB + 4
    other = make_sized_tokenizer(VOCAB + 1)
    fresh = patch_model(make_model("mixtral"), config)
    with unchanged(fresh.model), pytest.raises(ValueError, match="the tokenizer has ids up to"):
        fresh.load_adapter(tmp_path, other)
    assert len(other) == VOCAB + 1


def test_the_tokenizer_keeps_step():
    model, _ = make_patched(modalities=("image", "sound"))
    tokenizer = make_sized_tokenizer(VOCAB)
    image = add_modality_tokens(model, "image", 4, tokenizer=tokenizer)
    sound = add_modality_tokens(model, "sound", 2, tokenizer=tokenizer)
    assert len(tokenizer) == VOCAB + 6 == model.config.vocab_size
    assert tokenizer("w3<image_0><image_3> w4<sound_1>").input_ids == [
        3, image[0], image[3], 4, sound[1],
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(list(sound)) == ["<sound_0>", "<sound_1>"]
    decoded = tokenizer.decode([3, image[0], 4], skip_special_tokens=True)
    assert decoded == "w3 w4"


def test_fillers_for_rows_without_a_token():
    """Tables are often longer than the vocabulary, so fillers take the ids between."""
    model, _ = make_patched()
    tokenizer = make_sized_tokenizer(VOCAB - 5)
    image = add_modality_tokens(model, "image", 4, tokenizer=tokenizer)
    assert tokenizer.convert_tokens_to_ids("<image_0>") == image[0] == VOCAB
    assert len(tokenizer) == VOCAB + 4
    assert tokenizer.convert_ids_to_tokens(VOCAB - 1) == f"<unused_{VOCAB - 1}>"


def with_names(size, names):
    tokenizer = make_sized_tokenizer(size)
    tokenizer.add_tokens(names)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "match"),
    [
        (make_sized_tokenizer(VOCAB + 1), "resize the model's embeddings before patching"),
        (
            make_sized_tokenizer(VOCAB, ids=[*range(1, VOCAB - 5), VOCAB + 2]),
            "resize the model's embeddings",
        ),
        (make_sized_tokenizer(VOCAB, ids=[*range(1, VOCAB - 5), VOCAB - 2]), "fall into the gaps"),
        (with_names(VOCAB - 5, ["<image_1>"]), "names already: .*<image_1>"),
    ],
    ids=["too large", "an id above the table", "gaps", "clash"],
)
def test_a_tokenizer_that_cannot_keep_step(tokenizer, match):
    model, _ = make_patched()
    vocabulary = copy.deepcopy(tokenizer.get_vocab())
    with unchanged(model), pytest.raises(ValueError, match=match):
        add_modality_tokens(model, "image", 4, tokenizer=tokenizer)
    assert tokenizer.get_vocab() == vocabulary
    add_modality_tokens(model, "image", 4)


# --- bad input


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        (("sound", 4), {}, r"patched for \('image',\), not for 'sound'"),
        (("image", 0), {}, "at least 1, got 0"),
        (("image", 4), {"init": "zeros"}, "unknown init 'zeros'; the inits are normal, mean"),
        (("image", 4), {"init": "gromov_wasserstein"}, "'gromov_wasserstein' needs features"),
    ],
)
def test_bad_arguments(args, kwargs, match):
    model, _ = make_patched()
    tokenizer = make_sized_tokenizer(VOCAB)
    with unchanged(model), pytest.raises(ValueError, match=match):
        add_modality_tokens(model, *args, tokenizer=tokenizer, **kwargs)
    assert len(tokenizer) == VOCAB


def test_tokens_of_a_modality_are_added_once():
    model, _ = make_patched()
    add_modality_tokens(model, "image", 4)
    with (
        unchanged(model),
        pytest.raises(ValueError, match="has tokens of modality 'image' already"),
    ):
        add_modality_tokens(model, "image", 4)


def test_a_model_that_is_not_patched():
    with pytest.raises(ValueError, match="is not patched: call patch_model"):
        add_modality_tokens(make_model("mixtral"), "image", 4)
