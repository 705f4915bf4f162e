"""Fitting of down_proj by least squares: what it solves, what it leaves alone, refusals."""

import copy

import pytest
import torch
from support.dense_zoo import make_dense, same_state, token_ids

from moe_kernels.conversion import dense_to_moe, refit
from moe_kernels.conversion.whole import gated_activations, whole_experts

pytestmark = pytest.mark.filterwarnings("ignore:experts of 6 neurons")


def batches(count=8, dtype_seed=0):
    return [token_ids(4, 16, seed=dtype_seed + index) for index in range(count)]


def hidden_states(model, ids):
    return model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_every_layer_comes_nearer_to_the_dense_one(family):
    dense = make_dense(family)
    moe = dense_to_moe(dense, 4, 2, calibration=batches())
    before, source = copy.deepcopy(moe), copy.deepcopy(dense)
    shares = refit(moe, dense, batches(), progress=False)
    assert len(shares) == len(moe.model.layers) and all(0 < share < 1 for share in shares)
    assert same_state(dense, source)
    changed = {n for n, p in moe.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed == {n for n, _ in moe.named_parameters() if n.endswith("experts.down_proj")}
    fresh = token_ids(4, 16, seed=99)
    target, found, old = (hidden_states(m, fresh)[-1] for m in (dense, moe, before))
    assert (found - target).norm() < (old - target).norm()


@torch.no_grad()
def test_the_first_layer_is_the_least_squares_solution():
    """Against torch.linalg.lstsq on the activations and errors of a layer computed here."""
    dense = make_dense("llama")
    moe = dense_to_moe(dense, 4, 2, calibration=batches())
    ids = torch.cat(batches(count=16))
    seen = []
    hook = moe.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, a: seen.extend(a))
    # The last of hidden_states is normalised, so the state behind layer 0 is taken by index.
    error = (hidden_states(dense, ids)[1] - hidden_states(moe, ids)[1]).flatten(0, 1)
    hook.remove()
    experts = moe.model.layers[0].mlp.experts
    act = gated_activations(experts, *seen)
    ridge = 0.01 * (act.T @ act).diagonal().mean()
    rows = torch.cat([act, ridge.sqrt() * torch.eye(act.shape[1], dtype=act.dtype)])
    right = torch.cat([error, error.new_zeros(act.shape[1], error.shape[1])])
    change = torch.linalg.lstsq(rows, right).solution
    expected = experts.down_proj + change.view(4, -1, error.shape[1]).transpose(1, 2)
    refit(moe, dense, [ids], progress=False)
    torch.testing.assert_close(experts.down_proj.detach(), expected)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("shared_expert", [0, 16])
@torch.no_grad()
def test_whole_experts_are_the_experts(top_k, shared_expert):
    moe = dense_to_moe(
        make_dense("llama"), 4, top_k, calibration=batches(), shared_expert=shared_expert
    )
    expected = moe(input_ids=batches()[0]).logits
    name = moe.config._experts_implementation
    with whole_experts(moe):
        assert (moe.config._experts_implementation != name) == (top_k >= 2)
        torch.testing.assert_close(moe(input_ids=batches()[0]).logits, expected)
    assert moe.config._experts_implementation == name
    assert torch.equal(moe(input_ids=batches()[0]).logits, expected)


def test_refusals_change_nothing():
    dense = make_dense("llama", dtype=torch.bfloat16)
    moe = dense_to_moe(dense, 4, 2, calibration=batches())
    before = copy.deepcopy(moe)
    with pytest.raises(ValueError, match="batches is empty"):
        refit(moe, dense, [])
    with pytest.raises(ValueError, match="too coarse to solve"):
        refit(moe, dense, batches())
    assert same_state(moe, before)
