"""Tiny models whose experts PEFT has adapted, with random adapters, and comparisons of two."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from support.model_zoo import make_model, token_ids

from moe_kernels import accelerate_peft
from moe_kernels.testing import relative_rms

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
IDS = token_ids(3, 9)


def lora_config(**settings):
    defaults = {"r": 3, "lora_alpha": 4.5, "target_modules": []}
    return LoraConfig(**defaults | {"target_parameters": list(EXPERTS)} | settings)


def fill_adapters(model, seed=3):
    """Fill PEFT's adapters with noise and return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def make_peft(family="mixtral", *, second=None, dtype=torch.float64, model=None, **settings):
    """Return PEFT's model with random adapters.

    Args:
        family: of the base.
        second: settings of an adapter "other" beside "default", or None.
        dtype: of the base.
        model: settings of the base.
        **settings: of the LoraConfig.
    """
    peft = get_peft_model(make_model(family, dtype=dtype, **model or {}), lora_config(**settings))
    if second is not None:
        peft.add_adapter("other", lora_config(**second))
    return fill_adapters(peft)


def make_pair(*args, **settings):
    """Return two equal models of PEFT, the second of them accelerated."""
    theirs = make_peft(*args, **settings)
    ours = copy.deepcopy(theirs)
    accelerate_peft(ours)
    return theirs, ours


def experts_of(model, layer=0):
    """Return the outermost wrapper of a layer's experts."""
    return model.get_base_model().model.layers[layer].mlp.experts


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, tolerance):
    """Compare the gradients of two models, none of which may be zero."""
    expected, actual = gradients(theirs), gradients(ours)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.norm() > 0, name
        assert relative_rms(actual[name], grad) < tolerance, name


def assert_same_model(ours, theirs, tolerance=1e-9, ids=IDS):
    """Compare logits and the gradients of all that trains."""
    for model in (ours, theirs):
        model.zero_grad()
    expected, actual = theirs(ids, labels=ids), ours(ids, labels=ids)
    assert relative_rms(actual.logits, expected.logits) < tolerance
    assert actual.loss.requires_grad == expected.loss.requires_grad
    if expected.loss.requires_grad:
        expected.loss.backward()
        actual.loss.backward()
        assert_same_gradients(ours, theirs, tolerance)


def run_experts(model, upstream=None, *, rows=40, dtype=torch.float64, **settings):
    """Return output and gradients of the first experts module, with its routed inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 32, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    scores = torch.rand(rows, 4, generator=generator, dtype=torch.float64)
    weights, index = scores.topk(2)
    weights = weights.to(dtype).requires_grad_()
    wrapper = experts_of(model)
    parameters = {n: p for n, p in wrapper.named_parameters() if p.requires_grad}
    out = wrapper(x, index, weights, **settings)
    if upstream is None:
        upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    inputs = {"x": x, "weights": weights} | parameters
    grads = torch.autograd.grad(out, list(inputs.values()), upstream.to(out.dtype))
    return {"out": out.detach()} | dict(zip(inputs, grads, strict=True))


def assert_same_results(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.norm() > 0, name
        assert relative_rms(actual[name], tensor) < tolerance, name
