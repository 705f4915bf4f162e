"""Eval mode for a while: every module gets back the mode that it had."""

import pytest
from torch import nn

from moe_kernels.modes import evaluating


@pytest.fixture
def model():
    """Return a model in training whose first layer is frozen in eval mode."""
    model = nn.Sequential(nn.Sequential(nn.Dropout()), nn.Linear(2, 2))
    model[0].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_modules_keep_modes_of_their_own(model):
    before = modes(model)
    assert before == [True, False, False, True]
    with evaluating(model):
        assert modes(model) == [False] * 4
    assert modes(model) == before


def test_modes_return_after_a_failure(model):
    before = modes(model)
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        raise KeyboardInterrupt
    assert modes(model) == before


def test_a_part_of_another_model_may_be_named_too(model):
    before = modes(model)
    with evaluating(model[1], model):
        assert modes(model) == [False] * 4
    assert modes(model) == before
