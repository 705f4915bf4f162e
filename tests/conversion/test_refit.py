"""Fitting of down_proj by least squares: what it solves, what it leaves alone, refusals.

Also the experts as one product, on which the fit and the healing stand.
"""

import copy
import math

import pytest
import torch
from support.dense_zoo import EVERY_CASE, make_dense, same_state, token_ids

from moe_kernels.conversion import dense_to_moe, refit
from moe_kernels.conversion.whole import gated_activations, whole_experts

pytestmark = pytest.mark.filterwarnings("ignore:experts of 6 neurons")


def batches(count=8, dtype_seed=0):
    return [token_ids(4, 16, seed=dtype_seed + index) for index in range(count)]


def hidden_states(model, ids):
    return model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states


def convert(dense, top_k=2, **settings):
    return dense_to_moe(dense, 4, top_k, calibration=batches(), **settings)


@EVERY_CASE
@torch.no_grad()
def test_every_layer_comes_nearer_to_the_dense_one(family, shared):
    """Batches have different shapes, and are longer than the sliding windows of 4 tokens."""
    dense = make_dense(family)
    moe = convert(dense, shared_expert=shared)
    before, source = copy.deepcopy(moe), copy.deepcopy(dense)
    shapes = ((1, 5), (3, 24), (8, 16), (2, 40), (6, 12), (4, 30), (9, 11))
    various = [token_ids(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    shares = refit(moe, dense, various, progress=False)
    assert len(shares) == len(moe.model.layers) and all(0 < share < 1 for share in shares)
    assert same_state(dense, source)
    changed = {n for n, p in moe.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed == {n for n, _ in moe.named_parameters() if n.endswith("experts.down_proj")}
    fresh = token_ids(4, 16, seed=99)
    target, found, old = (hidden_states(m, fresh)[-1] for m in (dense, moe, before))
    assert (found - target).norm() < (old - target).norm()


@pytest.mark.parametrize("family", ["llama", "qwen2 sliding"])
@pytest.mark.parametrize("kinds", [("sdpa", "eager"), ("eager", "sdpa"), ("eager", "eager")])
def test_implementations_of_attention_do_not_matter(family, kinds):
    """Masks differ: sdpa needs none, and eager without one would attend to the future."""
    dense = make_dense(family)
    moe, expected = convert(dense), convert(dense)
    shares = refit(expected, dense, batches(), progress=False)
    dense.set_attn_implementation(kinds[0])
    moe.set_attn_implementation(kinds[1])
    assert refit(moe, dense, batches(), progress=False) == pytest.approx(shares)
    for name, parameter in moe.named_parameters():
        # Eager attention takes its softmax in float32.
        torch.testing.assert_close(parameter, expected.get_parameter(name), atol=1e-5, rtol=1e-4)


def test_the_share_is_that_of_the_hidden_states():
    dense = make_dense("llama")
    moe = convert(dense)
    ids = batches()

    def error():
        with torch.no_grad():
            pairs = [[hidden_states(m, each)[1] for m in (dense, moe)] for each in ids]
        return sum(float((one - other).square().sum()) for one, other in pairs)

    before = error()
    share, _ = refit(moe, dense, ids, progress=False)
    assert share == pytest.approx(error() / before)


def test_nothing_changes_where_all_experts_are_chosen(monkeypatch):
    dense = make_dense("llama")
    moe = convert(dense, top_k=4)
    before = copy.deepcopy(moe)
    monkeypatch.setattr(torch.linalg, "solve", None)  # nothing is solved
    assert refit(moe, dense, batches(), progress=False) == [1.0, 1.0]
    assert same_state(moe, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("damaged", "match"),
    [
        (lambda moe, dense: moe.mlp.experts.gate_up_proj, "activations' products of layer 1"),
        (lambda moe, dense: dense.mlp.down_proj.weight, "the error of layer 1"),
    ],
)
def test_values_that_are_not_finite_are_refused(value, damaged, match):
    dense = make_dense("llama")
    moe = convert(dense)
    with torch.no_grad():
        damaged(moe.model.layers[1], dense.model.layers[1]).view(-1)[0] = value
    before = {name: parameter.clone() for name, parameter in moe.named_parameters()}
    with pytest.raises(
        FloatingPointError, match=f"{match} .* is not finite; no weight has changed"
    ):
        refit(moe, dense, batches(), progress=False)
    for name, parameter in moe.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def second_solve(monkeypatch, do):
    """Replace the solution of the second layer by what ``do`` makes of it."""
    original, calls = torch.linalg.solve, []

    def solve(*args):
        calls.append(None)
        return original(*args) if len(calls) == 1 else do(original(*args))

    monkeypatch.setattr(torch.linalg, "solve", solve)


def test_a_solution_that_is_not_finite_is_refused(monkeypatch):
    """1e40 is finite in float64, in which it is solved, and not in the weights' float32."""
    dense = make_dense("llama", dtype=torch.float32)
    moe = convert(dense)
    before = copy.deepcopy(moe)
    second_solve(monkeypatch, lambda solution: solution + 1e40)
    with pytest.raises(FloatingPointError, match="the solution of layer 1 .* is not finite"):
        refit(moe, dense, batches(), progress=False)
    assert same_state(moe, before)


def test_an_interrupt_puts_all_weights_back(monkeypatch):
    """The first layer is fitted by then."""
    dense = make_dense("llama")
    moe = convert(dense).train()
    before = copy.deepcopy(moe)

    def interrupt(solution):
        assert not same_state(moe, before)
        raise KeyboardInterrupt

    second_solve(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        refit(moe, dense, batches(), progress=False)
    assert same_state(moe, before) and moe.training
    assert not any(module._forward_pre_hooks for m in (moe, dense) for module in m.modules())


@torch.no_grad()
def test_the_first_layer_is_the_least_squares_solution():
    """Against torch.linalg.lstsq on the activations and errors of a layer computed here."""
    dense = make_dense("llama")
    moe = convert(dense)
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
    moe = convert(make_dense("llama"), top_k, shared_expert=shared_expert)
    expected = moe(input_ids=batches()[0]).logits
    name = moe.config._experts_implementation
    with whole_experts(moe):
        assert (moe.config._experts_implementation != name) == (top_k >= 2)
        torch.testing.assert_close(moe(input_ids=batches()[0]).logits, expected)
    assert moe.config._experts_implementation == name
    assert torch.equal(moe(input_ids=batches()[0]).logits, expected)


@EVERY_CASE
def test_gradients_through_whole_experts_are_those_of_eager(family, shared):
    """In float64, into router, experts and, where there is one, the shared expert and its gate."""
    moe = convert(make_dense(family), top_k=3, shared_expert=shared)
    moe.set_experts_implementation("eager")
    weight = torch.randn(moe.config.vocab_size, dtype=torch.float64)

    def gradients():
        moe.zero_grad()
        (moe(input_ids=batches()[0]).logits.log_softmax(-1) @ weight).sum().backward()
        return {name: p.grad.clone() for name, p in moe.named_parameters() if p.numel()}

    expected = gradients()
    with whole_experts(moe):
        found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any() or (not shared and "shared_expert_gate" in name), name
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("name", ["eager", "batched_mm"])
def test_an_interrupt_puts_the_implementation_of_experts_back(name):
    moe = convert(make_dense("llama"))
    moe.set_experts_implementation(name)
    with pytest.raises(KeyboardInterrupt), whole_experts(moe):
        assert moe.config._experts_implementation not in ("eager", "batched_mm")
        raise KeyboardInterrupt
    assert moe.get_experts_implementation()[""] == name
    configs = [module.config for module in moe.modules() if hasattr(module, "config")]
    assert {config._experts_implementation for config in configs} == {name}


def test_no_file_names_whole_experts(tmp_path):
    """Saved within, the model loads in a process that knows nothing of them."""
    moe = convert(make_dense("llama"))
    with whole_experts(moe):
        name = moe.config._experts_implementation
        moe.save_pretrained(tmp_path)
    files = [file for file in tmp_path.iterdir() if file.suffix == ".json"]
    assert files and not any(name in file.read_text() for file in files)
    loaded = type(moe).from_pretrained(tmp_path)
    assert loaded.config._experts_implementation != name


def test_refusals_change_nothing():
    dense = make_dense("llama", dtype=torch.bfloat16)
    moe = convert(dense)
    before = copy.deepcopy(moe)
    with pytest.raises(ValueError, match="batches is empty"):
        refit(moe, dense, [])
    with pytest.raises(ValueError, match="too coarse to solve"):
        refit(moe, dense, batches())
    assert same_state(moe, before)
