"""Transforms of functorch and tracing of a patched model: right gradients, or an error."""

import warnings

import pytest
import torch
from support.model_zoo import FAMILY, VOCAB, token_ids
from support.patched_models import patched_model
from torch.func import functional_call, grad, jvp, linearize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from moe_kernels import ModalityLoraConfig
from moe_kernels.testing import assert_close

TARGETS = ("experts", "attention", "router")
IDS = token_ids(3, 6, vocab=VOCAB + 5)


def adapted(family, given=False):
    """Return a model, its loss as a function of parameters and one row of ids, its parameters."""
    config = ModalityLoraConfig(r=2, target_modules=TARGETS)
    model, patched = patched_model(family, config, num_tokens=5, dtype=torch.float64)

    def loss(parameters, ids):
        ids = ids.reshape(-1, ids.shape[-1])
        keywords = {"modality_ids": (ids >= VOCAB).long()} if given else {}
        keywords |= {"input_ids": ids, "labels": ids, "use_cache": False}
        return functional_call(model, parameters, kwargs=keywords).loss

    return model, loss, dict(patched.named_trainable_parameters())


@FAMILY
@pytest.mark.parametrize("given", [False, True])
def test_gradients_of_single_samples(family, given):
    """vmap(grad) gives each sample's gradients, those of backward."""
    _, loss, parameters = adapted(family, given)
    names, values = zip(*parameters.items(), strict=True)
    expected = [torch.autograd.grad(loss(parameters, ids), values) for ids in IDS]
    detached = {name: value.detach() for name, value in parameters.items()}
    found = vmap(grad(loss), in_dims=(None, 0))(detached, IDS)
    for name, each in zip(names, zip(*expected, strict=True), strict=True):
        assert_close(found[name], torch.stack(each))


def test_forward_mode_is_refused():
    _, loss, parameters = adapted("mixtral")
    detached = {name: value.detach() for name, value in parameters.items()}
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        jvp(lambda values: loss(values, IDS), (detached,), (detached,))


# Where these are not given, transformers itself reads values, which no graph of make_fx can.
GIVEN = {
    "position_ids": torch.arange(6).expand(3, 6),
    "attention_mask": torch.ones(3, 1, 6, 6, dtype=torch.bool).tril(),
    "use_cache": False,
}


@pytest.mark.parametrize("given", [False, True])
def test_a_graph_of_make_fx_serves_other_tokens(given):
    model, _, _ = adapted("mixtral")

    def logits(ids):
        keywords = {"modality_ids": (ids >= VOCAB).long()} if given else {}
        return model(input_ids=ids, **GIVEN, **keywords).logits

    others = token_ids(3, 6, seed=1, vocab=VOCAB + 5)
    assert torch.equal(make_fx(logits)(IDS)(others), logits(others))


def test_linearize_is_refused():
    model, _, parameters = adapted("mixtral")
    detached = {name: value.detach() for name, value in parameters.items()}
    inputs = {"input_ids": IDS, "modality_ids": (IDS >= VOCAB).long(), **GIVEN}
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        linearize(lambda values: functional_call(model, values, kwargs=inputs).logits, detached)


def test_a_trace_serves_other_tokens():
    model, _, _ = adapted("mixtral")
    inputs = {"input_ids": IDS, "use_cache": torch.tensor(False)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; sizes become constants
        traced = torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False)
    others = token_ids(3, 6, seed=1, vocab=VOCAB + 5)
    expected = model(input_ids=others, use_cache=False).logits
    assert torch.equal(traced(**inputs | {"input_ids": others})["logits"], expected)
