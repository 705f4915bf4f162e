"""Forwards that are bound over a patched model's, or skip its head: right, or refused by name."""

import functools
import types

import pytest
import torch
from support.model_zoo import VOCAB, make_model, token_ids
from support.patched_models import patched_model
from torch.nn import functional as F
from transformers import MixtralForCausalLM

from moe_kernels import add_modality_tokens, patch_model
from moe_kernels.models.handle import get_patched
from moe_kernels.models.tokens import JoinedHead

IMAGE = 4
IDS = token_ids(2, 7, vocab=VOCAB + IMAGE)
GIVEN = pytest.mark.parametrize("given", [False, True], ids=["by token id", "given ids"])


def ids_for(model, given):
    return {"modality_ids": get_patched(model).modality_of(IDS)} if given else {}


class ReadsTheWeight(MixtralForCausalLM):
    """A class whose fused loss never calls the head, as Liger makes of transformers' own."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = F.linear(hidden, self.lm_head.weight)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten() % VOCAB)
        return types.SimpleNamespace(loss=loss)


def test_a_class_that_leaves_out_the_head():
    model = make_model("mixtral")
    model.__class__ = ReadsTheWeight
    patch_model(model)
    text = IDS % VOCAB
    assert model(text, labels=text).loss.isfinite()  # right, while there are no added rows
    add_modality_tokens(model, "image", IMAGE)
    message = r"ReadsTheWeight|forward did not call the model's head.*Switch it off before patch"
    with pytest.raises(RuntimeError, match=message):
        model(IDS, labels=IDS)


def bind(model, make):
    model.forward = types.MethodType(make(model.forward), model)


def fused(own):
    """Make a fused head that nobody knows."""

    def forward(self, input_ids, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        return F.linear(hidden, self.lm_head.weight)

    return forward


def hidden_wrapper(own):
    return lambda self, *args, **kwargs: own(*args, **kwargs)


def open_wrapper(own):
    @functools.wraps(own)
    def forward(self, *args, **kwargs):
        return own(*args, **kwargs)

    return forward


@GIVEN
def test_an_unknown_forward_over_ours(given):
    model, _ = patched_model("mixtral", num_tokens=IMAGE)
    bind(model, fused)
    message = "test_forwards.forward replaced model.forward after patch_model.*switch it off"
    with pytest.raises(RuntimeError, match=message):
        model(IDS, labels=IDS, **ids_for(model, given))


@GIVEN
@pytest.mark.parametrize("wrapper", [hidden_wrapper, open_wrapper])
def test_a_forward_that_calls_ours(wrapper, given):
    model, _ = patched_model("mixtral", num_tokens=IMAGE)
    expected = model(IDS).logits
    bind(model, wrapper)
    assert torch.equal(model(IDS, **ids_for(model, given)).logits, expected)


def test_the_inner_model_takes_given_ids():
    model, _ = patched_model("mixtral", num_tokens=IMAGE)
    expected = model(IDS, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(model.model(IDS, **ids_for(model, True)).last_hidden_state, expected)
    with pytest.raises(RuntimeError, match="got no modality_ids.*call that, not the inner model"):
        model.model(IDS)


def test_a_replaced_forward_of_the_head():
    """TRL's cast of the head to float32 replaces it."""
    model, _ = patched_model("mixtral", num_tokens=IMAGE)
    head = model.lm_head
    head.forward = lambda hidden: F.linear(hidden.float(), head.weight)
    with pytest.raises(RuntimeError, match="did not call the model's head"):
        model(IDS)


# --- the head of TRL, stood in for by a function that says to be of its module

FUSED_HEAD = """
def add_fused_lm_head(model, asks=True):
    original_forward = model.forward

    def fused(self, input_ids, labels, **kwargs):
        if labels is None:
            return original_forward(input_ids)
        hidden = self.base_model(input_ids, **kwargs).last_hidden_state
        head = self.get_output_embeddings() if asks else self.lm_head
        logits = linear(hidden, head.weight, head.bias)
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model.forward = MethodType(fused, model)
"""


def add_fused_lm_head(model, **options):
    names = {
        "__name__": "trl.trainer.utils", "linear": F.linear, "cross_entropy": F.cross_entropy,
        "MethodType": types.MethodType,
    }  # fmt: skip
    exec(FUSED_HEAD, names)
    names["add_fused_lm_head"](model, **options)


@GIVEN
@pytest.mark.parametrize("tied", [False, True])
def test_a_fused_head_sees_added_rows(tied, given):
    model, patched = patched_model("mixtral", num_tokens=IMAGE, tie_word_embeddings=tied)
    expected = model(IDS, labels=IDS).loss
    parameters = list(patched.trainable_parameters())
    gradients = torch.autograd.grad(expected, parameters)
    add_fused_lm_head(model)
    loss = model(IDS, labels=IDS, **ids_for(model, given))
    torch.testing.assert_close(loss, expected)
    for found, right in zip(torch.autograd.grad(loss, parameters), gradients, strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)
    assert type(model.get_output_embeddings()) is torch.nn.Linear  # for all others
    with pytest.raises(RuntimeError, match=r"fused cannot run within text_only\(\)"):  # noqa: SIM117
        with patched.text_only():
            model(IDS, labels=IDS)


def test_the_joined_head():
    model, _ = patched_model("mixtral", num_tokens=IMAGE)
    joined = JoinedHead(model.lm_head)
    assert torch.equal(joined.weight[:VOCAB], model.lm_head.weight)
    assert torch.equal(joined.weight[VOCAB:], model.lm_head.added_rows["image"])
    assert joined.bias is None and joined.in_features == 32
    model.lm_head.bias = torch.nn.Parameter(torch.arange(float(VOCAB)))
    assert joined.bias.tolist() == [*range(VOCAB), *[0] * IMAGE]
    model.lm_head.weight.ds_status = "AVAILABLE"  # as ZeRO-3 marks what it has gathered
    with pytest.raises(RuntimeError, match="a fused head cannot read the weight of lm_head"):
        _ = joined.weight


def test_a_fused_head_that_takes_the_head_elsewhere():
    model, _ = patched_model("mixtral", num_tokens=IMAGE)
    add_fused_lm_head(model, asks=False)
    with pytest.raises(IndexError, match="too many indices"):
        model(IDS, labels=IDS[0, 0])  # fails after the inner model, and leaves nothing behind
    assert not get_patched(model).switches.awaits_head
    text = IDS % VOCAB
    message = r"utils.fused did not take the head from get_output_embeddings\(\)"
    with pytest.raises(RuntimeError, match=message):
        model(text, labels=text)


def test_a_known_head_over_an_unknown_forward():
    model, _ = patched_model("mixtral", num_tokens=IMAGE)
    bind(model, fused)
    add_fused_lm_head(model)
    with pytest.raises(RuntimeError, match="fused replaced model.forward after patch_model"):
        model(IDS, labels=IDS)
