"""Adapters made of others: what they compute is the sum, the average or a part of it."""

import pytest
import torch
from support.model_zoo import VOCAB, make_model, randomise, token_ids
from support.saved_adapters import ADAPTER

from moe_kernels import ModalityLoraConfig, add_modality_tokens, combine_adapters, load, patch_model
from moe_kernels.moextend import ExpertExtender
from moe_kernels.testing import relative_rms

IDS = token_ids(2, 9, vocab=VOCAB + 3)


def save(folder, seed, rows=0, family="mixtral", dtype=torch.float32, **settings):
    """Save an adapter of random pairs, and rows that all adapters of a seed of rows share."""
    model = make_model(family, dtype=dtype)
    patched = patch_model(model, ModalityLoraConfig(**{"r": 2, "lora_alpha": 3.0} | settings))
    add_modality_tokens(model, "image", 3)
    randomise(patched, seed=rows)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in patched.named_trainable_parameters():
        if "lora" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    patched.save_adapter(folder)
    return folder


def updates(folder):
    """Return the update of each projection, (M, ..., out, in) in float64."""
    patched = load(make_model("mixtral"), folder)
    found = {}
    for projection in patched.projections:
        pair = projection.lora.weights()
        product = pair.lora_B.double() @ pair.lora_A.double()
        found[projection.name] = product * pair.scaling.double().view(-1, *[1] * (product.ndim - 1))
    return found


def rows_of(folder):
    patched = load(make_model("mixtral"), folder)
    return patched.model.lm_head.added_rows["image"].detach()


def test_a_concatenation_is_the_weighted_sum_exactly(tmp_path):
    first = save(tmp_path / "a", 1)
    second = save(tmp_path / "b", 2, rows=5, r=5, lora_alpha=1.5)
    combine_adapters({first: 0.7, second: -0.4}, tmp_path / "c")
    ours, theirs = updates(first), updates(second)
    for name, found in updates(tmp_path / "c").items():
        assert relative_rms(found, 0.7 * ours[name] - 0.4 * theirs[name]) < 1e-6, name
    expected = (0.7 * rows_of(first) - 0.4 * rows_of(second)) / 0.3
    assert relative_rms(rows_of(tmp_path / "c"), expected) < 1e-6
    assert ModalityLoraConfig.from_adapter(tmp_path / "c").r == 7


def test_one_adapter_alone_is_scaled(tmp_path):
    first = save(tmp_path / "a", 1)
    combine_adapters({str(first): 0.25}, tmp_path / "c")
    ours = updates(first)
    for name, found in updates(tmp_path / "c").items():
        assert relative_rms(found, 0.25 * ours[name]) < 1e-6
    assert torch.equal(rows_of(tmp_path / "c"), rows_of(first))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_an_average_is_that_of_the_parameters(t, tmp_path):
    first, second = save(tmp_path / "a", 1), save(tmp_path / "b", 2, rows=5)
    combine_adapters({first: 1 - t, second: t}, tmp_path / "c", method="average")
    handles = [load(make_model("mixtral"), each) for each in (first, second, tmp_path / "c")]
    named = [dict(each.named_trainable_parameters()) for each in handles]
    for name, found in named[2].items():
        expected = (1 - t) * named[0][name] + t * named[1][name]
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7), name
    if t in (0.0, 1.0):
        ends = [handle.model(IDS).logits for handle in handles]
        assert torch.equal(ends[2], ends[int(t)])


def with_experts(folder):
    model = make_model("mixtral")
    patched = patch_model(model, ModalityLoraConfig(r=2))
    ExpertExtender(model).extend([0], 1, init=0)
    patched.save_adapter(folder)
    return folder


@pytest.mark.parametrize(
    ("other", "weights", "method", "message"),
    [
        ({}, (0.5, 0.6), "average", "must add up to 1"),
        ({}, (0.5, -0.5), "concatenate", "add up to 0, and added rows are averaged"),
        ({}, (float("nan"), 1.0), "concatenate", "must be finite"),
        ({}, (1.0, 1.0), "merge", '"concatenate" or "average"'),
        ({"r": 3}, (0.5, 0.5), "average", "have another configuration"),
        ({"target_modules": ("experts",)}, (1.0, 1.0), "concatenate", "another configuration"),
        ({"rank_pattern": {"q_proj": 3}}, (1.0, 1.0), "concatenate", "has rank_pattern"),
        ({"lora_alpha": 0.0}, (1.0, 1.0), "concatenate", "lora_alpha 0"),
        ({"dtype": torch.float16}, (1.0, 1.0), "concatenate", "have another base"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    other, weights, method, message, tmp_path
):
    folders = save(tmp_path / "a", 1), save(tmp_path / "b", 2, **other)
    with pytest.raises(ValueError, match=message):
        combine_adapters(dict(zip(folders, weights, strict=True)), tmp_path / "c", method=method)
    assert not (tmp_path / "c").exists()


def test_adapters_with_added_experts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has extensions, which cannot be combined"):
        combine_adapters({with_experts(tmp_path / "a"): 1.0}, tmp_path / "c")


def test_a_difference_of_adapters_without_rows(tmp_path):
    for seed, name in enumerate("ab"):
        patched = patch_model(make_model("mixtral"), ModalityLoraConfig(r=2))
        randomise(patched, seed=seed)
        patched.save_adapter(tmp_path / name)
    combine_adapters({tmp_path / "a": 1.0, tmp_path / "b": -1.0}, tmp_path / "c")
    first, second, found = (updates(tmp_path / name) for name in "abc")
    for name, update in found.items():
        assert relative_rms(update, first[name] - second[name]) < 1e-6, name


@pytest.mark.parametrize("frozen", ["a", "ab"])
def test_what_is_frozen_in_all_of_them_is_frozen(frozen, tmp_path):
    for name in "ab":
        patched = patch_model(make_model("mixtral"), ModalityLoraConfig(r=2))
        trained = len(list(patched.trainable_parameters()))
        if name in frozen:
            next(patched.trainable_parameters()).requires_grad_(False)
        patched.save_adapter(tmp_path / name)
    combine_adapters({tmp_path / "a": 0.5, tmp_path / "b": 0.5}, tmp_path / "c")
    found = load(make_model("mixtral"), tmp_path / "c")
    assert len(list(found.trainable_parameters())) == trained - (frozen == "ab")


def test_no_adapter(tmp_path):
    with pytest.raises(ValueError, match="no adapters are given"):
        combine_adapters({}, tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        combine_adapters({tmp_path: 1.0}, tmp_path / "c")
    assert not (tmp_path / ADAPTER[0]).exists()


def test_merging_into_the_base_is_refused_with_the_reason():
    patched = patch_model(make_model("mixtral"))
    with pytest.raises(NotImplementedError, match="merged weights would change text too"):
        patched.merge_and_unload()
