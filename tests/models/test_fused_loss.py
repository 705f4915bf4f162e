"""The fused loss: that of the logits, without them."""

import pytest
import torch
from support.model_zoo import FAMILY, VOCAB, make_model, token_ids
from support.patched_models import patched_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralForCausalLM, Trainer, TrainingArguments

from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.models.fused_loss import linear_cross_entropy
from moe_kernels.testing import relative_rms

IMAGE = 5
IDS = token_ids(3, 9, vocab=VOCAB + IMAGE)
LABELS = IDS.masked_fill(token_ids(3, 9, seed=1, vocab=4) == 1, -100)
LABELS[0, -3:] = VOCAB + torch.arange(3)
CONFIG = ModalityLoraConfig(r=4, target_modules=("experts", "attention"))


def inputs(dtype=torch.float64, tokens=11, width=6, text=7, added=4, bias=True):
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    labels = torch.randint(text + added, (tokens,), generator=generator)
    labels[1] = -100
    hidden, rows = make(tokens, width).requires_grad_(), make(added, width).requires_grad_()
    return hidden, make(text, width), make(text) if bias else None, rows, labels


def by_logits(hidden, weight, bias, rows, labels):
    logits = torch.cat([F.linear(hidden, weight, bias), F.linear(hidden, rows)], dim=1)
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 33, 10**6])
def test_gradcheck(chunk, bias):
    hidden, weight, bias, rows, labels = inputs(bias=bias)

    def loss(hidden, rows):
        return linear_cross_entropy(hidden, weight, bias, rows, labels, chunk=chunk)

    assert torch.autograd.gradcheck(loss, (hidden, rows))
    torch.testing.assert_close(loss(hidden, rows), by_logits(hidden, weight, bias, rows, labels))


def test_labels_that_all_do_not_count_and_no_rows():
    hidden, weight, _, _, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, None, None, labels.fill_(-100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


def test_tokens_without_a_label_are_not_computed():
    """A caption has no labels, and is often longer than its picture."""
    hidden, weight, bias, rows, labels = inputs()
    with torch.no_grad():
        hidden[labels == -100] = torch.nan
    linear_cross_entropy(hidden, weight, bias, rows, labels).backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[labels == -100].any()
    assert hidden.grad[labels != -100].any(1).all() and rows.grad.isfinite().all()


def test_it_asks_for_gradients_where_they_are_needed_alone():
    hidden, weight, bias, rows, labels = inputs()
    linear_cross_entropy(hidden, weight, bias, rows.detach(), labels).backward()
    expected = torch.autograd.grad(by_logits(hidden, weight, bias, rows, labels), hidden)
    torch.testing.assert_close(hidden.grad, *expected)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, bias, rows, labels).requires_grad


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an op makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor) and each._base is None:
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype):
    """No tensor is larger than a chunk, forward and backward, though the logits would be."""
    hidden, weight, bias, rows, labels = inputs(dtype, tokens=400, width=8, text=900, added=100)
    weight = weight.contiguous()
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, bias, rows, labels, chunk=10_000).backward()
    assert 9000 <= largest.elements <= 10_000 < 400 * 1000
    with Largest() as largest:
        by_logits(hidden, weight, bias, rows, labels).backward()
    assert largest.elements == 400 * 1000


def test_rows_are_summed_in_float32():
    """A sum of many chunks in bfloat16 would stop to grow."""
    hidden, weight, _, rows, labels = inputs(torch.bfloat16, tokens=4000, bias=False)
    rows = rows.detach().float().requires_grad_()
    linear_cross_entropy(hidden, weight, None, rows, labels, chunk=11).backward()
    exact = [each.detach().double() for each in (hidden, weight, rows)]
    exact[2].requires_grad_()
    by_logits(exact[0], exact[1], None, exact[2], labels).backward()
    assert relative_rms(rows.grad, exact[2].grad) < 5e-3


def test_refusals():
    hidden, weight, bias, rows, labels = inputs()
    with pytest.raises(ValueError, match="the head's weight requires grad, and the fused loss"):
        linear_cross_entropy(hidden, weight.requires_grad_(), bias, rows, labels)
    weight.requires_grad_(False)
    for wrong in (11, -1):
        labels[3] = wrong
        with pytest.raises(ValueError, match=r"labels must be below 11, .*or -100: got"):
            linear_cross_entropy(hidden, weight, bias, rows, labels)


# --- in a model


def results(patched, **call):
    parameters = list(patched.trainable_parameters())
    output = patched.model(IDS, labels=LABELS, **call)
    return output, torch.autograd.grad(output.loss, parameters)


def assert_same(patched, tolerance=1e-5, **call):
    """Check loss and gradients against those of the logits."""
    patched.fused_loss = False
    expected, gradients = results(patched, **call)
    assert expected.logits is not None
    patched.fused_loss = True
    found, fused = results(patched, **call)
    assert found.logits is None and "logits" not in found
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    for each, right in zip(fused, gradients, strict=True):
        assert relative_rms(each, right) < tolerance * 10
    return found


@FAMILY
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model(family, tied):
    model, patched = patched_model(
        family, CONFIG, num_tokens=IMAGE, scale=0.1, tie_word_embeddings=tied
    )
    model.train()
    assert_same(patched)
    assert_same(patched, num_items_in_batch=torch.tensor(50))
    assert_same(patched, shift_labels=LABELS.roll(-1, 1))
    assert assert_same(patched, output_router_logits=True).aux_loss > 0
    model.eval()
    assert model(IDS, labels=LABELS).logits.shape[-1] == VOCAB + IMAGE
    patched.unpatch()
    assert "forward" not in model.lm_head.__dict__


def test_a_model_without_added_tokens_and_in_bfloat16():
    model, patched = patched_model("mixtral", CONFIG, dtype=torch.bfloat16, scale=0.1)
    model.train()
    text = IDS % VOCAB
    call = {"labels": text, "modality_ids": torch.ones_like(IDS)}
    expected = model(text, **call).loss.item()
    patched.fused_loss = True
    assert model(text, **call).loss.item() == pytest.approx(expected, rel=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(text, **call).loss.item() == pytest.approx(expected, rel=1e-2)


def test_checkpointing_and_autocast():
    model, patched = patched_model("mixtral", CONFIG, num_tokens=IMAGE, scale=0.1)
    model.train().gradient_checkpointing_enable()
    assert_same(patched, use_cache=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(patched, tolerance=5e-3, use_cache=False)


def test_text_only():
    model, patched = patched_model("mixtral", CONFIG, num_tokens=IMAGE)
    model.train()
    text = IDS % VOCAB
    with patched.text_only():
        expected = model(text, labels=text).loss
        patched.fused_loss = True
        torch.testing.assert_close(model(text, labels=text).loss, expected)
        with pytest.raises(ValueError, match="added tokens have no logit"):
            model(IDS, labels=IDS.clamp(min=VOCAB))


def test_the_trainer(tmp_path):
    """Set once, and the Trainer trains with it: gradient accumulation, padding, all labels."""

    def train(fused):
        _, patched = patched_model("mixtral", CONFIG, num_tokens=IMAGE, scale=0.1)
        patched.fused_loss = fused
        rows = [
            {"input_ids": i.tolist(), "labels": j.tolist()}
            for i, j in zip(IDS, LABELS, strict=True)
        ]
        args = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True,
            gradient_accumulation_steps=3, learning_rate=1e-2, save_strategy="no", optim="sgd",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(patched.model, args, train_dataset=rows)
        return trainer.train().training_loss, dict(patched.named_trainable_parameters())

    (loss, ends), (expected, right) = train(True), train(False)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, end in ends.items():
        torch.testing.assert_close(end, right[name], atol=1e-5, rtol=1e-5, msg=name)


def test_engines_whose_hooks_give_another_tensor():
    """DeepSpeed's hooks before backward do."""
    model, patched = patched_model("mixtral", CONFIG, num_tokens=IMAGE)
    model.train().lm_head.register_forward_hook(lambda module, args, output: output.clone())
    assert_same(patched)
    assert_same(patched)


class ChangesLogits(MixtralForCausalLM):
    def forward(self, input_ids, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = self.lm_head(hidden).tanh()
        return self.loss_function(logits=logits, labels=labels, vocab_size=VOCAB)


def test_what_cannot_be_fused():
    model, patched = patched_model("mixtral", CONFIG, num_tokens=IMAGE)
    patched.fused_loss = True
    model.train()
    with pytest.raises(ValueError, match=r"hidden states of all labels.*leave out logits_to_keep"):
        model(IDS, labels=IDS, logits_to_keep=2)
    with pytest.raises(RuntimeError, match="a tuple cannot show: return_dict=True"):
        model(IDS, labels=IDS, return_dict=False)
    model.loss_function = nn.functional.cross_entropy
    with pytest.raises(RuntimeError, match="was set to cross_entropy after patch_model"):
        model(IDS, labels=IDS)


def test_a_loss_or_a_class_of_ones_own():
    model = make_model("mixtral")
    model.loss_function = nn.functional.cross_entropy
    patch_model(model).fused_loss = True
    with pytest.raises(
        RuntimeError, match="ForCausalLMLoss, and the model's loss is cross_entropy"
    ):
        model.train()(IDS % VOCAB, labels=IDS % VOCAB)
    model = make_model("mixtral")
    model.__class__ = ChangesLogits
    patch_model(model).fused_loss = True
    with pytest.raises(RuntimeError, match="changes the logits that its head gives, which fused"):
        model.train()(IDS % VOCAB, labels=IDS % VOCAB)
