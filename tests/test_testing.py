"""Tests of ``assert_close``: wrong results must exceed its tolerance."""

import pytest
import torch

from moe_kernels import ops, testing


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def case(request):
    inputs = testing.make_moe_inputs(testing.SHAPES["small"], modality="no_padding")
    expected = ops.moe_mlp(*inputs[:5], **inputs.keywords(), backend="reference")
    return inputs.to(request.param), expected, request.param


def run(inputs):
    return ops.moe_mlp(*inputs[:5], **inputs.keywords(), backend="reference")


def test_a_right_result_passes(case):
    inputs, expected, _ = case
    testing.assert_close(run(inputs), expected)


def test_zeros_fail(case):
    _, expected, dtype = case
    with pytest.raises(AssertionError, match="relative RMS"):
        testing.assert_close(torch.zeros_like(expected, dtype=dtype), expected)


def test_a_dropped_token_fails(case):
    inputs, expected, _ = case
    out = run(inputs)
    out[7] = 0
    with pytest.raises(AssertionError, match="relative RMS"):
        testing.assert_close(out, expected)


def test_a_swapped_expert_fails(case):
    inputs, expected, _ = case
    ids = inputs.topk_ids.clone()
    ids[3, 0] = (ids[3, 0] + 1) % testing.SHAPES["small"].E
    with pytest.raises(AssertionError, match="relative RMS"):
        testing.assert_close(run(inputs._replace(topk_ids=ids)), expected)


def test_nan_and_a_wrong_shape_fail():
    expected = torch.ones(3)
    for actual in (torch.tensor([1.0, 1.0, float("nan")]), torch.ones(3, 1)):
        with pytest.raises(AssertionError):
            testing.assert_close(actual, expected)


def test_zeros_expected_ask_for_exact_zeros():
    testing.assert_close(torch.zeros(3), torch.zeros(3))
    with pytest.raises(AssertionError):
        testing.assert_close(torch.full((3,), 1e-30), torch.zeros(3))
