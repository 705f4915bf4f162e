"""Outcome of patch_model on every class of experts in transformers."""

from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from support.families import FAMILIES, VERSION, classes_of_transformers
from support.family_checks import try_family
from support.family_page import row

from moe_kernels import ops

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__).release < VERSION,
    reason=f"lists the classes of transformers {'.'.join(map(str, VERSION))}; runs from there on",
)
OTHER_LAYOUTS = ("deepseek_v3", "gpt_oss", "mixtral")  # of attention, of experts and of a router
PAGE = Path(__file__).parents[2] / "docs/families.md"


def test_every_class_is_listed():
    assert {family.experts for family in FAMILIES.values()} == classes_of_transformers()


def one_of_each_outcome():
    """Yield all families; those are slow whose row on the page another has but for the names."""
    seen, lines = set(), PAGE.read_text().splitlines()
    for name, family in FAMILIES.items():
        start = f"| `{family.experts}` | `{family.model}` |"
        rows = {line.removeprefix(start) for line in lines if line.startswith(start)}
        slow = rows and rows <= seen and name not in OTHER_LAYOUTS
        seen |= rows
        yield pytest.param(name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("family", list(one_of_each_outcome()))
def test_what_patch_model_gives(family):
    """Whatever is accepted is right, and whatever is refused is refused before any change.

    Run ``python tools/write_supported_models.py`` to write the page anew.
    """
    outcome = try_family(family)
    assert outcome.faults == []
    assert row(family, outcome) in PAGE.read_text().splitlines()


def _on_every_row(modality_ids, lora):
    return modality_ids.clamp(min=1), lora


def _twice(modality_ids, lora):
    return modality_ids, lora and lora._replace(scaling=2 * lora.scaling)


def _with_twice_the_gradient(modality_ids, lora):
    return modality_ids, lora and lora._replace(lora_B=2 * lora.lora_B - lora.lora_B.detach())


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (_on_every_row, "logits of text changed"),
        (_twice, "wrong logits with adapters"),
        (_with_twice_the_gradient, "a wrong gradient of an adapter"),
    ],
)
def test_a_wrong_kernel_is_found(monkeypatch, wrong, fault):
    right = ops.moe_mlp

    def moe_mlp(*args, modality_ids=None, down_lora=None, **kwargs):
        if modality_ids is not None:  # else patching tries an activation
            modality_ids, down_lora = wrong(modality_ids, down_lora)
        return right(*args, modality_ids=modality_ids, down_lora=down_lora, **kwargs)

    monkeypatch.setattr(ops, "moe_mlp", moe_mlp)
    assert fault in try_family.__wrapped__("mixtral").faults
