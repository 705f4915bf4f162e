"""What patch_model gives every class of experts in transformers."""

import pytest
import torch
import transformers
from packaging.version import Version
from support.families import (
    FAMILIES,
    VERSION,
    VOCAB,
    classes_of_transformers,
    inputs_of,
    make_family,
)
from support.family_checks import try_family
from support.model_zoo import token_ids

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__).release < VERSION,
    reason=f"lists the classes of transformers {'.'.join(map(str, VERSION))}; runs from there on",
)


FAMILY = pytest.mark.parametrize("family", FAMILIES)


def test_every_class_is_listed():
    assert {family.experts for family in FAMILIES.values()} == classes_of_transformers()


@FAMILY
def test_the_tiny_model(family):
    model = make_family(family)
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    kinds = [type(module).__name__ for module in model.modules()]
    assert FAMILIES[family].experts in kinds
    ids = token_ids(2, 12, vocab=VOCAB)
    with torch.no_grad():
        logits = model(**inputs_of(family, model, ids)).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.05


@FAMILY
def test_what_patch_model_gives(family):
    """Whatever is accepted is right, and whatever is refused is refused before any change."""
    assert try_family(family).faults == []
